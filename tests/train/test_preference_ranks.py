"""Two ranks give the losses, metrics and weights of one, in every loss of preference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_on_ranks import train
from preference_rows import write_preferences
from safetensors.torch import load_file

from llmray.train.observers import read_log
from llmray.train.parallel import World

ROWS: dict[str, dict[str, Any]] = {
    **{loss: {"pref_loss": loss} for loss in ("sigmoid", "hinge", "ipo", "orpo", "simpo")},
    "kto_pair": {"pref_loss": "kto_pair", "pref_bco_weight": 0.5, "ld_alpha": 0.5},
    "asked once": {"precompute_ref_logps": True, "pref_ftx": 0.2},
    "full": {"finetuning_type": "full", "learning_rate": 0.001},
    "kto": {"stage": "kto", "dataset": "judged", "pref_ftx": 0.1, "pref_beta": 0.5},
}


def runs(root: Path, model: Path, ranks: int) -> list[dict[str, Any]]:
    """The same global batch of 6 rows, of which the last step of an epoch has 5."""
    base = {
        "stage": "dpo",
        "do_train": True,
        "model_name_or_path": str(model),
        "template": "chatml",
        "dataset": "pairs",
        "dataset_dir": str(root),
        "cutoff_len": 64,
        "lora_rank": 4,
        "learning_rate": 0.01,
        "max_steps": 3,
        "per_device_train_batch_size": 3 if ranks == 2 else 2,
        "gradient_accumulation_steps": 1 if ranks == 2 else 3,
        "logging_steps": 1,
        "val_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "precompute_ref_logps": False,
        "fp32": True,
        "report_to": "none",
    }
    return [
        {**base, **keys, "output_dir": str(root / f"{name}-{ranks}")} for name, keys in ROWS.items()
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    write_preferences(root, 14, 4)
    for keys in runs(root, tiny_llama_dir, 1):
        train(keys, root / "prepared", World.single(torch.device("cpu")))
    (root / "runs.json").write_text(json.dumps(runs(root, tiny_llama_dir, 2)))
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    script = Path(__file__).parents[1] / "preference_on_ranks.py"
    command = [*launcher, "--standalone", str(script), str(root / "runs.json")]
    subprocess.run(command, check=True, env=environ, timeout=280)
    return root


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_equal_one(root: Path, name: str) -> None:
    logs = [read_log(root / f"{name}-{ranks}" / "trainer_log.jsonl") for ranks in (1, 2)]
    assert len(logs[0]) == len(logs[1]) == 3
    for alone, together in zip(*logs, strict=True):
        shared = [k for k in alone if k in ("loss", "kl", "grad_norm") or "/" in k or "eval_" in k]
        for key in shared:
            if not key.endswith(("runtime", "per_second")):
                # the loss of ipo is 25, its sums follow
                assert together[key] == pytest.approx(alone[key], abs=2e-5, rel=2e-5), key
    assert any("eval_loss" in record for record in logs[0])
    file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
    weights = [load_file(root / f"{name}-{ranks}" / file) for ranks in (1, 2)]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, atol=2e-5, rtol=0)
