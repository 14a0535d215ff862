"""Stage ppo as a user runs it, without Ray: a tiny model with rewards that can be verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ppo_rows import told
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from llmray import local
from llmray.arguments.loading import load

RUN: dict[str, Any] = {
    "stage": "ppo",
    "do_train": True,
    "template": "chatml",
    "dataset": "rows",
    "cutoff_len": 64,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "learning_rate": 0.02,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "fp32": True,
    "report_to": "none",
    "reward_model": "letter_rewards:share_of_e",
    "max_new_tokens": 6,
    "top_p": 1.0,
    "top_k": 0,
    "temperature": 1.0,
}
GRPO = {"advantage_estimator": "grpo", "ppo_num_samples": 3}
ESTIMATORS = {"gae": {}, "grpo": GRPO}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model`, and a set of prompts."""
    root = tmp_path_factory.mktemp("ppo")
    make_tokenizer(root / "model")
    make_model(root / "model")
    rows = [{"instruction": f"Say {i}.", "output": "word " * (i % 4 + 1)} for i in range(24)]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return root


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRAY_CACHE", str(folder / "cache"))


def keys_of(folder: Path, output: Path, **keys: Any) -> dict[str, Any]:
    places = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder)}
    return {**RUN, **places, "output_dir": str(output), **keys}


def train(folder: Path, output: Path, **keys: Any) -> Path:
    merged = {k: v for k, v in keys_of(folder, output, **keys).items() if v is not ...}
    assert local.train(load(merged, environ={})) == 0
    return output


def weights(output: Path) -> dict[str, bytes]:
    """All that a run learned, to the bit."""
    files = sorted(output.glob("*.safetensors"))
    assert files
    return {
        f"{file.name}: {name}": tensor.float().numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_goes_on_bitwise_from_a_checkpoint(
    estimator: str, folder: Path, tmp_path: Path
) -> None:
    """The weight of the divergence, moments of scores, optimizer, random numbers and prompts."""
    keys = {**ESTIMATORS[estimator], "lora_dropout": 0.1}
    keys |= {"ppo_score_norm": True} if estimator == "gae" else {}
    whole = train(folder, tmp_path / "whole", **keys)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint-4")
    before = weights(whole)
    train(folder, again, **keys, resume_from_checkpoint=True)
    assert weights(again) == before
    assert told(again) == told(whole)
    assert [record["current_steps"] for record in told(whole) if "beta" in record] == [1, 2, 3, 4]
    values = (whole / "value_head.safetensors").exists()
    assert values == (estimator == "gae")
