"""A real SIGKILL in stages dpo and kto: the run that goes on ends with the undisturbed weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from preference_rows import write_preferences
from safetensors.torch import load_file

from llmray.train.observers import read_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def keys(tmp_path: Path, tiny_llama_dir: Path) -> dict[str, Any]:
    write_preferences(tmp_path, 30, 2)
    return {
        "do_train": True,
        "model_name_or_path": str(tiny_llama_dir),
        "dataset_dir": str(tmp_path),
        "template": "chatml",
        "cutoff_len": 64,
        "learning_rate": 0.01,
        "max_steps": 60,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 5,
        "fp32": True,
        "report_to": "none",
    }


def start(keys: dict[str, Any], folder: Path, name: str) -> subprocess.Popen[bytes]:
    file = folder / f"{name}.json"
    file.write_text(json.dumps({**keys, "output_dir": str(folder / name)}))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "LLMRAY_CACHE": str(folder / "cache")}
    return subprocess.Popen([sys.executable, "-m", "llmray", "train", str(file)], env=environ)


@pytest.mark.parametrize(
    "more",
    [
        {"stage": "dpo", "dataset": "pairs", "precompute_ref_logps": False},
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "kto_pair", "pref_bco_weight": 0.5},
        {"stage": "kto", "dataset": "judged", "precompute_ref_logps": False},
    ],
    ids=["dpo", "dpo with statistics", "kto"],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    keys: dict[str, Any], tmp_path: Path, more: dict[str, Any]
) -> None:
    assert start({**keys, **more}, tmp_path, "whole").wait(800) == 0
    process = start({**keys, **more}, tmp_path, "killed")
    end = time.monotonic() + 600
    while not list((tmp_path / "killed").glob("checkpoint-*")):
        assert time.monotonic() < end, "no checkpoint came in time"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(300)
    before = max(int(p.name.split("-")[1]) for p in (tmp_path / "killed").glob("checkpoint-*"))
    assert 0 < before < 60
    assert start({**keys, **more}, tmp_path, "killed").wait(800) == 0
    log = read_log(tmp_path / "killed" / "trainer_log.jsonl")
    assert log[-1]["current_steps"] == 60
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "killed")]
    ours, theirs = map(load_file, files)
    assert all((tensor == theirs[name]).all() for name, tensor in ours.items())
