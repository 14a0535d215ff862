"""Two ranks under torchrun give the losses, norms and weights of one process; a token is added."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from llmray.train.observers import read_log

RUN = {
    "stage": "sft",
    "do_train": True,
    "template": "chatml",
    "dataset": "rows",
    "finetuning_type": "lora",
    "lora_rank": 4,
    "add_tokens": "word",
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "val_size": 0.2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "no",
    "fp32": True,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """19 rows of different lengths: the last step of an epoch is not full."""
    root = tmp_path_factory.mktemp("ranks")
    rows = [
        {"instruction": f"Say {i}.", "output": " ".join(["word"] * (i % 9 + 1))} for i in range(24)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    places = {"model_name_or_path": str(tiny_llama_dir), "dataset_dir": str(root)}
    (root / "run.json").write_text(json.dumps({**RUN, **places}))
    return root / "run.json"


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which rows are whole blocks of 4-bit weights."""
    directory = tmp_path_factory.mktemp("wide")
    make_tokenizer(directory)
    return make_model(directory, hidden_size=64)


def train(run_file: Path, name: str, launcher: list[str], *words: str) -> Path:
    output = run_file.parent / name
    environ = {**os.environ, "LLMRAY_CACHE": str(run_file.parent / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "llmray", "train", str(run_file), f"output_dir={output}", *words]
    subprocess.run(command, check=True, env=environ, timeout=800)
    return output


def test_two_ranks_equal_one(run_file: Path) -> None:
    """The same global batch of 4 rows: 2 x 2 on one rank, 2 x 1 on two."""
    compare(run_file, "ordinary")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_two_ranks_equal_one_beside_low_bits(run_file: Path, wide_model: Path, bits: int) -> None:
    words = (f"quantization_bit={bits}", f"model_name_or_path={wide_model}", "add_tokens=")
    compare(run_file, f"{bits}-", *words)


def compare(run_file: Path, name: str, *words: str) -> None:
    one = train(run_file, f"{name}one", [sys.executable], *words)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ("gradient_accumulation_steps=1", *words)
    two = train(run_file, f"{name}two", [*launcher, "--standalone"], *words)
    trains = json.loads((one / "trainable_parameters.json").read_text())
    shapes = [parameter["shape"] for parameter in trains["parameters"].values()]
    assert trains["trainable"] == sum(math.prod(shape) for shape in shapes) > 0
    logs = [read_log(path / "trainer_log.jsonl") for path in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 6
    for alone, together in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in alone:
                assert together[key] == pytest.approx(alone[key], abs=1e-5)
    weights = [load_file(path / "adapter_model.safetensors") for path in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=0)
