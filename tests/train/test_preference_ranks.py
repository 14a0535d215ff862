"""Two ranks give the losses, metrics and weights of one, in each loss of preference and in rm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_on_ranks import train, train_together
from preference_rows import write_preferences
from ranks import on_ranks
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from llmray.train.observers import read_log
from llmray.train.parallel import World

FULL = {"finetuning_type": "full", "learning_rate": 0.001}
ROWS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": FULL,
    "ipo": {"precompute_ref_logps": True, "pref_ftx": 0.2},
    "orpo": {},
    "simpo": {},
    "kto_pair": {"pref_bco_weight": 0.5, "ld_alpha": 0.5},
    "qlora": {"pref_loss": "sigmoid", "quantization_bit": 4},
    "kto": {"stage": "kto", "dataset": "judged", "pref_ftx": 0.1, "pref_beta": 0.5},
    "rm": {"stage": "rm"},
}


COMPARED = ("loss", "kl", "grad_norm", "accuracy", "margin", "reward_chosen", "reward_rejected")


def runs(root: Path, ranks: int) -> list[dict[str, Any]]:
    """The same global batch of 6 rows, of which the last step of an epoch has 5."""
    base = {
        "stage": "dpo",
        "do_train": True,
        "model_name_or_path": str(root / "model"),
        "template": "chatml",
        "dataset": "pairs",
        "dataset_dir": str(root),
        "cutoff_len": 64,
        "lora_rank": 4,
        "learning_rate": 0.01,
        "adam_epsilon": 1e-5,  # a gradient that is all rounding makes no step
        "max_steps": 3,
        "per_device_train_batch_size": 3 if ranks == 2 else 2,
        "gradient_accumulation_steps": 1 if ranks == 2 else 3,
        "logging_steps": 1,
        "val_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "fp32": True,
        "report_to": "none",
    }
    found = []
    for name, keys in ROWS.items():
        row = {**base, "output_dir": str(root / f"{name}-{ranks}")}
        if keys.get("stage", "dpo") == "dpo":
            row["pref_loss"] = name
        if keys.get("stage") != "rm":
            row["precompute_ref_logps"] = False
        found.append({**row, **keys})
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair of processes trains all rows; this one trains each alone meanwhile."""
    root = tmp_path_factory.mktemp("ranks")
    write_preferences(root, 14, 4)
    make_tokenizer(root / "model")
    make_model(root / "model", hidden_size=64)  # 4-bit rows are whole blocks
    with on_ranks(train_together, (root / "prepared-together", runs(root, 2))):
        for keys in runs(root, 1):
            train(keys, root / "prepared", World.single(torch.device("cpu")))
    return root


def learned(output: Path) -> dict[str, torch.Tensor]:
    """The weights of all files, a value head's too."""
    return {k: v for path in output.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_equal_one(root: Path, name: str) -> None:
    logs = [read_log(root / f"{name}-{ranks}" / "trainer_log.jsonl") for ranks in (1, 2)]
    assert len(logs[0]) == len(logs[1]) == 3
    for alone, together in zip(*logs, strict=True):
        shared = [k for k in alone if k in COMPARED or "/" in k or "eval_" in k]
        for key in shared:
            if not key.endswith(("runtime", "per_second")):
                # the loss of ipo is 25, its sums follow
                assert together[key] == pytest.approx(alone[key], abs=2e-5, rel=2e-5), key
    assert any("eval_loss" in record for record in logs[0])
    weights = [learned(root / f"{name}-{ranks}") for ranks in (1, 2)]
    assert len(weights[0]) > 2
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, atol=2e-5, rtol=0)
