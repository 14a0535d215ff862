import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmray.arguments.loading import load

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CHAIN = [ROOT / "configs" / "chain" / f"{stage}.yaml" for stage in ("sft", "rm", "dpo")]
REWARD = [ROOT / "configs" / "reward" / f"{stage}.yaml" for stage in ("sft", "rm", "ppo")]


def of_folder(path: Path) -> str:
    return "-".join(path.relative_to(ROOT / "configs").with_suffix("").parts)


@pytest.mark.parametrize("path", [*CONFIGS, *CHAIN, *REWARD], ids=of_folder)
def test_every_config_loads(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    flat = load(path, environ={}).flat()
    assert written.keys() <= flat.keys()


@pytest.mark.parametrize("path", [*CONFIGS, *REWARD], ids=of_folder)
def test_every_config_names_data_that_is_here(path: Path) -> None:
    data = load(path, environ={}).data
    info = json.loads((ROOT / data.dataset_dir / "dataset_info.json").read_text())
    for name in (*data.dataset, *data.eval_dataset):
        assert (ROOT / data.dataset_dir / info[name]["file_name"]).is_file()


def test_in_a_chain_one_begins_with_the_output_of_another() -> None:
    """On sets of LLaMA-Factory's folder of data; reward model and policy hold out the same rows."""
    assert sorted(CHAIN) == sorted((ROOT / "configs" / "chain").glob("*.yaml"))
    sft, rm, dpo = [load(path, environ={}) for path in CHAIN]
    assert [run.finetuning.stage for run in (sft, rm, dpo)] == ["sft", "rm", "dpo"]
    for run in (sft, rm, dpo):
        assert run.model.model_name_or_path == sft.model.model_name_or_path
        assert f"dataset_dir=LLaMA-Factory/{run.data.dataset_dir}" in CHAIN[0].read_text()
    assert rm.model.adapter_name_or_path == (str(sft.training.output_dir),)
    assert dpo.model.adapter_name_or_path == (str(sft.training.output_dir),)
    assert rm.data == dpo.data
    assert rm.data.val_size > 0
    assert len({str(run.training.output_dir) for run in (sft, rm, dpo)}) == 3


def test_a_policy_and_its_reward_model_begin_with_the_outputs_of_others() -> None:
    assert sorted(REWARD) == sorted((ROOT / "configs" / "reward").glob("*.yaml"))
    sft, rm, ppo = [load(path, environ={}) for path in REWARD]
    assert [run.finetuning.stage for run in (sft, rm, ppo)] == ["sft", "rm", "ppo"]
    assert len({run.model.model_name_or_path for run in (sft, rm, ppo)}) == 1
    assert ppo.model.adapter_name_or_path == (str(sft.training.output_dir),)
    assert ppo.rlhf.reward_models == (str(rm.training.output_dir),)
    assert len({str(run.training.output_dir) for run in (sft, rm, ppo)}) == 3
    answers = json.loads((ROOT / "data" / "demo_judged.json").read_text())
    assert sum(row["output"].endswith("— Raylo") for row in answers) == len(answers) / 2


def asks_for_gpus(path: Path) -> bool:
    arguments = load(path, environ={})
    return arguments.ray_enabled and "GPU" in arguments.cluster.resources


def test_there_is_a_config_for_each_way_to_run() -> None:
    runs = {path.stem: load(path, environ={}) for path in CONFIGS}
    ways = {(run.finetuning.stage, run.finetuning.finetuning_type) for run in runs.values()}
    assert ("rm", "lora") in ways
    assert {("pt", "lora"), ("sft", "lora"), ("sft", "full"), ("sft", "freeze")} <= ways
    assert {("dpo", "lora"), ("kto", "lora"), ("ppo", "lora")} <= ways
    evaluates = runs["evaluate_lora"].training
    assert (evaluates.do_train, evaluates.do_eval) == (False, True)
    assert runs["sft_lora_ray_cpu"].cluster.resources == {"CPU": 1}
    assert runs["ppo_lora_ray"].rlhf.reward_num_actors == 2
    on_gpus = runs["sft_lora_ray_gpu"].cluster
    assert (on_gpus.num_workers, on_gpus.resources) == (4, {"GPU": 1})
    searched = {path: set(run.tune.tune["search"]) for path, run in runs.items() if run.tune.tune}
    assert searched == {"tune_sft": {"lora_rank", "learning_rate"}, "tune_dpo": {"pref_beta"}}
    assert [path.stem for path in CONFIGS if asks_for_gpus(path)] == ["sft_lora_ray_gpu"]


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's model, fetched as the demo does, and a cache for its converted form."""
    demo = runpy.run_path(str(ROOT / "demo" / "run.py"))
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        demo["fetch_model"]()
    finally:
        os.chdir(before)
    [gguf] = (ROOT / demo["PACKAGES"]).glob("*/*.gguf")
    return gguf.parent, tmp_path_factory.mktemp("cache")


def run_shortly(path: Path, model: Path, cache: Path, folder: Path, **more: object) -> Path:
    """The output of a config: two updates or few rows, all short; the rest as the file says."""
    arguments = load(path, environ={})
    words: dict[str, object] = {
        "model_name_or_path": model,
        "dataset_dir": ROOT / "data",
        "output_dir": folder / "out",
        "cutoff_len": 64,
        "max_samples": 40,
    }
    command = "train"
    if arguments.training.do_train:
        words |= {"max_steps": 2, "per_device_train_batch_size": 1, "save_strategy": "no"}
        words |= {"gradient_accumulation_steps": 1}
    elif arguments.export.export_dir is not None:
        command = "export"
        words["export_dir"] = folder / "out"
    else:
        words |= {"max_samples": 4}
    if arguments.training.predict_with_generate:
        words |= {"max_new_tokens": 8}
    if arguments.model.adapter_name_or_path and "adapter_name_or_path" not in more:
        trained = run_shortly(ROOT / "configs" / "sft_lora.yaml", model, cache, folder / "before")
        words["adapter_name_or_path"] = trained
    if arguments.rlhf.reward_model == "saves/rm-lora":
        trained = run_shortly(ROOT / "configs" / "rm_lora.yaml", model, cache, folder / "before")
        words["reward_model"] = trained
    if arguments.tune.tune:
        command = "tune"  # with a place for checkpoints that the files leave out
    elif arguments.ray_enabled:
        words["ray_storage_path"] = folder / "ray"
    folder.mkdir(exist_ok=True)
    environ = {**os.environ, "LLMRAY_CACHE": str(cache), "RAY_AUTH_MODE": "disabled"}
    environ["PYTHONPATH"] = str(ROOT)
    environ.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "llmray", command, str(path)]
        + [f"{key}={value}" for key, value in (words | more).items() if value is not ...],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder / "out"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if not asks_for_gpus(path)], ids=lambda path: path.stem
)
def test_config_runs_on_the_real_model(
    path: Path, real_model: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = load(path, environ={})
    options = arguments.training
    output = run_shortly(path, *real_model, tmp_path)
    if arguments.export.export_dir is not None:
        assert {"model.safetensors", "Modelfile", "README.md"} <= {p.name for p in output.iterdir()}
    if arguments.tune.tune:
        assert {"results.csv", "best.yaml", "tune.png"} <= {p.name for p in output.iterdir()}
        load(output / "best.yaml", environ={})
    elif options.do_train:
        results = json.loads((output / "train_results.json").read_text())
        assert abs(results["train_loss"]) < 12
        assert results["train_loss"] > 0 or arguments.finetuning.stage == "ppo"
        assert list(output.glob("*.safetensors"))
        assert (output / "training_loss.png").is_file()
    if not arguments.tune.tune and (options.do_eval or options.eval_strategy != "no"):
        evaluated = json.loads((output / "eval_results.json").read_text())
        if arguments.finetuning.stage == "ppo":
            assert abs(evaluated["eval_score"]) < 100
        else:
            assert 0 < evaluated["eval_loss"] < 12
    if options.predict_with_generate:
        assert (output / "generated_predictions.jsonl").read_text()


def test_configs_say_in_their_first_line_what_they_are() -> None:
    assert CONFIGS
    assert all(path.read_text().startswith("# ") for path in (*CONFIGS, *CHAIN))


def test_demonstration_data_is_what_its_script_writes() -> None:
    namespace: dict = {"__name__": "make_demo"}
    exec((ROOT / "data" / "make_demo.py").read_text(), namespace)
    written = json.loads((ROOT / "data" / "demo_persona.json").read_text())
    assert written == namespace["persona_rows"]()
    assert all(row["output"].endswith("\n— Raylo") for row in written)
    assert json.loads((ROOT / "data" / "dataset_info.json").read_text()) == namespace["INFO"]


# one for each way to tune; of the files alone that are there
TUNED = [path for path in CONFIGS if path.stem.startswith("sft_") and "ray" not in path.stem]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", TUNED, ids=lambda path: path.stem)
def test_ten_steps_exported_give_the_logits_of_what_was_trained(
    path: Path, real_model: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmray import hub
    from llmray.arguments.model import ModelArguments

    model, cache = real_model
    finetuning = load(path, environ={}).finetuning
    is_adapter = finetuning.finetuning_type == "lora"
    keys = {"max_steps": 10, "learning_rate": 1e-3 if is_adapter else 1e-4, "fp32": True}
    trained = run_shortly(path, model, cache, tmp_path / "train", **keys)
    places = {"adapter_name_or_path": trained} if is_adapter else {"model_name_or_path": trained}
    exported = run_shortly(
        ROOT / "configs" / "export_lora.yaml",
        model,
        cache,
        tmp_path / "export",
        **{"adapter_name_or_path": "", **places},
    )

    @torch.no_grad()
    def logits(network: torch.nn.Module) -> torch.Tensor:
        ids = torch.arange(500, 532)[None]
        found: torch.Tensor = network.eval()(ids).logits
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMRAY_CACHE", str(cache))
        base_dir = hub.resolve(model, ModelArguments())
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    before = logits(base)
    if is_adapter:  # also of low-bit weights: it goes onto the ordinary ones
        after = logits(PeftModel.from_pretrained(base, trained))
    else:
        after = logits(AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32))
    again = logits(AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32))
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(again, after, atol=2e-3, rtol=1e-3)
