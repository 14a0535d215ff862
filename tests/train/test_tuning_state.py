"""Each way to tune: resumed it is bitwise equal, two ranks equal one, a kill changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from layouts import make_rows
from safetensors.torch import load_file
from tuning_rows import MIDWAY, ROWS, STEPS, engine, keys_of, train, weights, write_adapters

from llmray import local
from llmray.arguments.loading import load
from llmray.model import pissa
from llmray.train.losses import LanguageModeling
from llmray.train.observers import read_log
from llmray.train.parallel import World
from llmray.train.state_files import read_state, write_state

TESTS = Path(__file__).parents[1]
CPU = World.single(torch.device("cpu"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


CASES = [(row, "llama") for row in ROWS] + [
    (row, arch)
    for row in ("full", "freeze-first", "dora", "pissa")
    for arch in ("qwen3", "gemma3_text", "qwen3_moe")
]


@pytest.mark.parametrize(("row", "arch"), CASES)
def test_a_resumed_engine_is_bitwise_equal(
    row: str, arch: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through files, as a checkpoint; frozen weights too, and without a second decomposition."""
    whole = engine(row, adapters, CPU, arch)
    before = weights(whole)
    train(whole, 0, MIDWAY)
    write_state(tmp_path / "state", "engine", whole.state_dict())
    train(whole, MIDWAY, STEPS)
    monkeypatch.setattr(pissa, "principal", None)  # a call would fail
    resumed = engine(row, adapters, CPU, arch)
    resumed.load_state_dict(read_state(tmp_path / "state", "engine"))
    train(resumed, MIDWAY, STEPS)
    ends = weights(resumed)
    assert ends.keys() == before.keys()
    for name, tensor in weights(whole).items():
        assert torch.equal(ends[name], tensor), name
    changed = {name for name in before if not torch.equal(before[name], ends[name])}
    trains = set(whole.state_dict()["trainable"])
    starts = row.startswith("pissa")  # the base keeps a residual from then on
    assert changed > trains if starts else changed == trains


def test_rates_of_lora_plus_follow_the_schedule(adapters: Path) -> None:
    """Linear over four steps: 1, 3/4; B at 8 times the rate, embeddings at 1e-6."""
    of = engine("lora-plus", adapters, CPU)
    before = weights(of)
    for factor in (1.0, 0.75):
        of.forward_backward([make_rows((9, 5)).flat], LanguageModeling())
        done = of.optim_step()
        assert done.learning_rate == pytest.approx(0.01 * factor)
        rates = {"lora_B": 0.08 * factor, "embedding": 1e-6 * factor}
        assert done.other_rates == pytest.approx(rates)
    moved = {name: (p - before[name]).abs().max() for name, p in weights(of).items()}
    [down, up] = (f"layers.0.self_attn.q_proj.lora_{side}.default.weight" for side in "AB")
    sizes = {end: size for end in (down, up) for n, size in moved.items() if n.endswith(end)}
    assert sizes[up] > 4 * sizes[down] > 0
    embedding = [size for name, size in moved.items() if ".lora_embedding_B." in name]
    assert 0 < embedding[0] < 1e-5


def test_two_ranks_equal_one_in_every_row(adapters: Path, tmp_path: Path) -> None:
    """One pair of processes trains all rows."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    places = f"{TESTS}{os.pathsep}{TESTS.parent}"
    subprocess.run(
        [*words, str(TESTS / "tuning_rows.py"), str(adapters), str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places},
        timeout=800,
    )
    for row in ROWS:
        one = engine(row, adapters, CPU)
        train(one, 0, STEPS)
        ranks = [load_file(tmp_path / f"{row}-{rank}.safetensors") for rank in (0, 1)]
        for name, tensor in weights(one).items():
            assert torch.equal(ranks[0][name], ranks[1][name]), (row, name)
            torch.testing.assert_close(ranks[0][name], tensor, atol=2e-5, rtol=1e-4)


# ---- whole runs, killed ---------------------------------------------------------------------

RUN = {
    "stage": "sft",
    "do_train": True,
    "template": "chatml",
    "dataset": "rows",
    "learning_rate": 0.01,
    "max_steps": 40,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 4,
    "save_total_limit": 2,
    "fp32": True,
    "report_to": "none",
    "lora_dropout": 0.1,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, adapters: Path) -> Path:
    from tiny import make_model, make_tokenizer

    root = tmp_path_factory.mktemp("killed")
    rows = [{"instruction": f"Say {i}.", "output": " ".join(["word"] * (i % 9))} for i in range(24)]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    for arch in ("llama", "qwen3_moe"):
        make_tokenizer(root / arch)
        make_model(root / arch, arch, amplify=2.0)
    make_tokenizer(root / "wide")
    make_model(root / "wide", amplify=2.0, hidden_size=64)
    return root


def test_the_evaluation_before_the_first_update_sees_the_model_that_it_changes(
    site: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PiSSA beside low bits: not the plain low-bit model that was loaded."""
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    keys = {**RUN, **keys_of("pissa-4-bit", adapters), "model_name_or_path": str(site / "wide")}
    keys |= {"dataset_dir": str(site), "max_steps": 1, "learning_rate": 1e-12, "lora_dropout": 0.0}
    keys |= {"val_size": 4, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    losses = {}
    for starts in (True, False):
        own = {"pissa_init": starts, "output_dir": str(tmp_path / str(starts))}
        assert local.train(load({**keys, **own}, environ={})) == 0
        log = read_log(tmp_path / str(starts) / "trainer_log.jsonl")
        losses[starts] = [record["eval_loss"] for record in log if "eval_loss" in record]
    for before, after in losses.values():
        assert before == pytest.approx(after, abs=1e-6)
    assert abs(losses[True][0] - losses[False][0]) > 1e-5


def start(site: Path, adapters: Path, row: str, name: str) -> tuple[Path, subprocess.Popen[str]]:
    keys = {**RUN, **keys_of(row, adapters), "output_dir": str(site / name)}
    if row == "experts":
        keys["lora_dropout"] = 0.0
    keys |= {"model_name_or_path": str(site / ROWS[row].get("model", "llama"))}
    file = site / f"{name}.json"
    file.write_text(json.dumps({**keys, "dataset_dir": str(site)}))
    environ = {**os.environ, "LLMRAY_CACHE": str(site / "cache"), "PYTHONPATH": str(TESTS.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmray", "train", str(file)],
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return site / name, process


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=800)
    assert process.returncode == 0, text
    return text


def killed_after(output: Path, process: subprocess.Popen[str], step: int) -> None:
    """End the process by SIGKILL as soon as its log shows `step`."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        log = output / "trainer_log.jsonl"
        if log.is_file() and len(read_log(log)) >= step:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=300)
            return
        time.sleep(0.002)
    raise AssertionError("the step never came")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_killed_run_ends_with_the_same_weights(row: str, site: Path, adapters: Path) -> None:
    undisturbed, process = start(site, adapters, row, f"{row}-whole")
    finish(process)
    output, process = start(site, adapters, row, f"{row}-killed")
    killed_after(output, process, 10)
    _, process = start(site, adapters, row, f"{row}-killed")
    assert "resuming from" in finish(process)
    names = [path.name for path in undisturbed.glob("*.safetensors")]
    assert names
    for name in names:
        one, two = load_file(undisturbed / name), load_file(output / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
