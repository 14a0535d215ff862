"""Every environment variable that llmray declares, shown to work: two values, and what differs.

`SEEN` holds one row for each of `environment.VARIABLES`; None leaves the variable unset.
"""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_tokenizer

from llmray import cli, hub, launch, reinforcement
from llmray import run as runs
from llmray.arguments import environment, paths
from llmray.arguments.loading import load
from llmray.arguments.model import ModelArguments
from llmray.errors import LlmrayError
from llmray.model.load import load_config
from llmray.model_code import optional_imports
from llmray.rl import rewards
from llmray.train import parallel, trackers
from llmray.train.loop import Progress
from llmray.train.parallel import World

RUN = {"model_name_or_path": "m", "dataset": "a", "output_dir": "o", "do_train": True}


class Look:
    """What a row may use: a folder, what was printed, and patches that end with the look."""

    def __init__(self, root: Path, printed: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch):
        self.root, self.printed, self.patch = root, printed, patch

    def said(self, *words: str) -> str:
        """What the command line says of these words, on both streams."""
        self.printed.readouterr()
        log = logging.getLogger("llmray")
        self.patch.setattr(log, "handlers", [])  # made anew, on the stream of this test
        level, propagates = log.level, log.propagate
        try:
            cli.main(words)
        finally:
            log.setLevel(level)
            log.propagate = propagates
        return "".join(self.printed.readouterr())


def outcome(action: Callable[[], object]) -> object:
    """What an action returns, or what it refuses."""
    try:
        return action()
    except LlmrayError as error:
        return str(error)


def recorded(look: Look) -> object:
    core = SimpleNamespace(
        arguments=load(RUN),
        context=SimpleNamespace(world=SimpleNamespace(device=torch.device("cpu"))),
    )
    return sorted(runs._figures(core)(Progress()))  # type: ignore[arg-type]


def enabled(look: Look) -> object:
    return load(RUN).ray_enabled


def start_of_paths(look: Look) -> object:
    return paths.base_directory(os.environ, True, look.root)


def cache(look: Look) -> object:
    return environment.prepared_directory(os.environ), environment.cache_directory(os.environ)


def of_a_defect(look: Look) -> object:
    def defect(words: list[str]) -> int:
        raise KeyError("missing")

    command = cli.COMMANDS["check"]._replace(run=defect)
    look.patch.setitem(cli.COMMANDS, "check", command)
    return "Traceback" in look.said("check")


def given_to_workers(look: Look) -> object:
    from llmray.orchestration import cluster

    look.patch.setenv("MY_FLAG", "1")
    return "MY_FLAG" in cluster.split_environment(os.environ)[0]


def unknown_key(look: Look) -> object:
    return outcome(lambda: load(RUN | {"nothing_like_it": 1}).flat() != {})


def colours(look: Look) -> object:
    """The marks of a shown row on a terminal."""
    from llmray import render

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    found = SimpleNamespace(left_out=(), rows=["row"])
    look.patch.setattr(render.hub, "resolve", lambda *words, **named: look.root)
    look.patch.setattr(render, "preview", lambda *words, **named: found)
    look.patch.setattr(render, "_lines", lambda *words: [str(words[-1])])
    target = Terminal()
    render.render(load(RUN), render.Options(), target=target)
    return target.getvalue()


def of_other_versions(look: Look) -> object:
    from llmray.orchestration import cluster
    from llmray.orchestration.plan import Node

    node = Node("1", "10.0.0.1", {})
    look.patch.setattr(cluster, "on_nodes", lambda *_, **__: {"1": {"torch": "0.1"}})
    return outcome(lambda: cluster.check_versions([node]))


def of_a_remark(look: Look) -> object:
    words = [f"{key}={value}" for key, value in RUN.items()]
    return "goes before" in look.said("check", *words, "warmup_steps=2", "warmup_ratio=0.1")


def torchrun(look: Look) -> object:
    """The flags that torchrun gets on a machine with two GPUs, of two machines."""
    look.patch.setattr(launch, "_visible_gpus", lambda: 2)
    for name, value in {"NNODES": "2", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29400"}.items():
        if name not in os.environ:
            look.patch.setenv(name, value)
    return outcome(lambda: launch._flags(launch.plan(False, os.environ) or launch.Ranks(0)))


def one_process(look: Look) -> object:
    look.patch.setattr(launch, "_visible_gpus", lambda: 1)
    return launch.plan(False, os.environ)


def allocator(look: Look) -> object:
    look.patch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        launch._prepare_environment(launch.Ranks(1))
        return os.environ.get("PYTORCH_CUDA_ALLOC_CONF")


def mode_of_npu(look: Look) -> object:
    """The mode that a torch which knows an NPU is set to."""
    modes: list[bool] = []
    npu = SimpleNamespace(
        is_available=lambda: True, set_compile_mode=lambda jit_compile: modes.append(jit_compile)
    )
    look.patch.setattr(torch, "npu", npu, raising=False)
    parallel.set_npu_mode(os.environ)
    return modes


def token_of_rewards(look: Look) -> object:
    """The token that a reward server is sent."""
    asked: list[object] = []
    look.patch.setattr(rewards, "RewardApi", lambda address, options: asked.append(options.token))
    keys = {"stage": "ppo", "reward_model": "http://127.0.0.1:1", "reward_model_type": "api"}
    context = SimpleNamespace(
        world=World.single(torch.device("cpu")), rewards=None, model_dir=look.root
    )
    core = SimpleNamespace(arguments=load(RUN | keys), context=context)
    reinforcement.weighted_rewards(core).close()  # type: ignore[arg-type]
    return asked


CODE = """
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
    def fast(self):
        import no_such_package_of_kernels
"""


def model_with_code(look: Look) -> object:
    """Whether a model's code loads that names a package which is not installed."""
    folder = look.root / "own"
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(CODE)
    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}'
    )
    arguments = ModelArguments(trust_remote_code=True)
    return outcome(lambda: load_config(folder, arguments).model_type)


def from_hub(look: Look) -> object:
    look.patch.setattr("huggingface_hub.snapshot_download", lambda *words, **named: str(look.root))
    make_tokenizer(look.root)
    (look.root / "config.json").write_text("{}")
    (look.root / "w.safetensors").write_text("")
    return outcome(lambda: hub.resolve("somebody/model", ModelArguments()))


def chosen_trackers(look: Look) -> object:
    look.patch.setenv("WANDB_API_KEY", "k")
    return trackers.choose(load(RUN | {"report_to": "wandb"}).tracking, os.environ).names


def project_in_wandb(look: Look) -> object:
    """The project that wandb is asked for, which then fails: no run is made here."""
    asked: list[object] = []

    def init(**named: object) -> None:
        asked.append(named["project"])
        raise ConnectionError("not in this test")

    look.patch.setattr("wandb.init", init)
    look.patch.setenv("WANDB_MODE", "offline")
    observer = trackers.Trackers(load(RUN | {"report_to": "wandb"}), look.root, os.environ)
    observer.on_start(0, 1)
    observer.on_end({})
    return asked


def served(look: Look) -> object:
    """Where the reward server listens, and the token that it asks for."""
    from llmray.serve import reward_server

    found: list[object] = []
    look.patch.setattr(reward_server, "serve", lambda run, made: found.append(made) or 0)
    look.said("reward-server", "model_name_or_path=m")
    [options] = found
    return options


SEEN: dict[str, tuple[str | None, str | None, Callable[[Look], object]]] = {
    "RECORD_VRAM": (None, "1", recorded),
    "USE_RAY": ("0", "1", enabled),
    "LLMRAY_HOME": ("/one", "/two", start_of_paths),
    "LLMRAY_CACHE": ("/one", "/two", cache),
    "LLMRAY_DRIVER_CACHE": ("/one", "/two", cache),
    "LLMRAY_DEBUG": (None, "1", of_a_defect),
    "LLMRAY_PASS_ENV": (None, "MY_FLAG", given_to_workers),
    "ALLOW_EXTRA_ARGS": (None, "1", unknown_key),
    "NO_COLOR": (None, "1", colours),
    "DISABLE_VERSION_CHECK": (None, "1", of_other_versions),
    "LLAMAFACTORY_VERBOSITY": ("WARN", "ERROR", of_a_remark),
    "FORCE_TORCHRUN": (None, "1", one_process),
    "NPROC_PER_NODE": ("2", "3", torchrun),
    "NNODES": ("2", "3", torchrun),
    "NODE_RANK": ("0", "1", torchrun),
    "MASTER_ADDR": ("10.0.0.1", "10.0.0.2", torchrun),
    "MASTER_PORT": ("29500", "29501", torchrun),
    "WANDB_DISABLED": (None, "true", chosen_trackers),
    "WANDB_PROJECT": (None, "ours", project_in_wandb),
    "OPTIM_TORCH": (None, "0", allocator),
    "NPU_JIT_COMPILE": (None, "1", mode_of_npu),
    "FORCE_CHECK_IMPORTS": (None, "1", model_with_code),
    "USE_MODELSCOPE_HUB": (None, "1", from_hub),
    "USE_OPENMIND_HUB": (None, "1", from_hub),
    "API_HOST": (None, "127.0.0.9", served),
    "API_PORT": (None, "8001", served),
    "REWARD_API_KEY": (None, "a token", token_of_rewards),
    "API_KEY": (None, "a token", served),
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*environment.VARIABLES, "WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))


@pytest.mark.parametrize("name", SEEN)
def test_variable_is_seen(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, see = SEEN[name]
    seen = []
    for value in (first, second):
        with monkeypatch.context() as patch:
            if value is not None:
                patch.setenv(name, value)
            seen.append(see(Look(tmp_path, capsys, patch)))
    assert seen[0] != seen[1]


def test_every_variable_has_a_row() -> None:
    assert set(SEEN) == set(environment.VARIABLES)


def test_without_an_npu_its_variables_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(parallel.log, "warning", lambda text, *words: said.append(text % words))
    parallel.set_npu_mode({})
    assert said == []
    parallel.set_npu_mode({"NPU_JIT_COMPILE": "1", "ASCEND_RT_VISIBLE_DEVICES": "0"})
    [line] = said
    assert line.startswith("NPU_JIT_COMPILE, ASCEND_RT_VISIBLE_DEVICES: there is no NPU here")


def test_a_run_says_what_is_for_npus_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`run` is what every worker calls; it fails here after it has looked."""

    seen: list[object] = []
    monkeypatch.setattr(runs, "set_npu_mode", seen.append)
    with pytest.raises(AttributeError):
        runs.run(load(RUN), None)  # type: ignore[arg-type]
    assert seen == [os.environ]


def test_missing_packages_of_model_code_are_named_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Look(tmp_path, capsys, monkeypatch)
    assert model_with_code(look) == "own"
    monkeypatch.setenv("FORCE_CHECK_IMPORTS", "1")
    assert "no_such_package_of_kernels" in str(model_with_code(look))


def test_threads_that_load_at_the_same_time_leave_the_check_as_it_was(tmp_path: Path) -> None:
    from transformers import dynamic_module_utils as loader

    code = tmp_path / "own.py"
    code.write_text(CODE)
    first, second = optional_imports(), optional_imports()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(first.__enter__).result()
        second.__enter__()
        thread.submit(first.__exit__, None, None, None).result()
    second.__exit__(None, None, None)
    with pytest.raises(ImportError, match="no_such_package_of_kernels"):
        loader.check_imports(str(code))


def test_allocator_of_the_user_stays() -> None:
    assert environment.allocator({}) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert environment.allocator({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}) == {}


@pytest.mark.parametrize(("switch", "seen"), [("1", True), ("0", False)])
def test_workers_of_ray_with_gpus_get_the_allocator(
    switch: str, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmray.orchestration import train_job
    from llmray.orchestration.plan import Inventory, Node, place

    monkeypatch.setenv("OPTIM_TORCH", switch)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(train_job, "_Trainer", lambda loop, **given: given)
    arguments = load(RUN | {"ray_num_workers": 1})
    resources = {"CPU": 8.0, "GPU": 1.0}
    inventory = Inventory((Node("1", "10.0.0.1", resources),), resources)
    driver = train_job._Driver(arguments, "/runs/one", train_job.DriverSignals(), None, False)
    placement = place(arguments.cluster, inventory)
    given = driver._trainer(placement, None, {"A": "1"})
    variables = given["run_config"].worker_runtime_env["env_vars"]
    assert variables["A"] == "1"
    assert ("PYTORCH_CUDA_ALLOC_CONF" in variables) == seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_hidden_gpus_are_not_used() -> None:
    code = "from llmray.train.parallel import default_device; print(default_device(0).type)"
    seen = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | hidden,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hidden in ({}, {"CUDA_VISIBLE_DEVICES": ""})
    ]
    assert seen == ["cuda", "cpu"]
