"""Runs without Ray, stopped and killed from outside; what the user finds, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmray import local
from llmray.arguments.loading import load
from llmray.errors import CheckpointError
from llmray.train.observers import read_log

RUN = {
    "stage": "sft",
    "do_train": True,
    "template": "chatml",
    "dataset": "rows",
    "finetuning_type": "lora",
    "lora_dropout": 0.1,
    "learning_rate": 0.01,
    "max_steps": 4000,
    "per_device_train_batch_size": 2,
    "logging_steps": 20,
    "save_steps": 40,
    "save_total_limit": 2,
    "report_to": "none",
    "fp32": True,
}


@pytest.fixture
def keys(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    rows = [{"instruction": f"Say {i}.", "output": "word " * (i % 9 + 1)} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    places = {"model_name_or_path": str(tiny_llama_dir), "dataset_dir": str(tmp_path)}
    return {**RUN, **places, "output_dir": str(tmp_path / "out")}


def start(keys: dict[str, object], directory: Path) -> subprocess.Popen[bytes]:
    path = directory / "run.json"
    path.write_text(json.dumps(keys))
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "llmray", "train", str(path)], env=environ)


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def weights(directory: Path) -> dict[str, bytes]:
    found = load_file(directory / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_interrupted_run_goes_on_bitwise(number, code, keys, tmp_path) -> None:
    """A signal after a checkpoint; then the same file to 20 steps beyond, beside a whole run."""
    output = tmp_path / "out"
    process = start(keys, tmp_path)
    wait_for(lambda: list(output.glob("checkpoint-*")))
    process.send_signal(number)
    assert process.wait(600) == code
    steps = [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")]
    if number != signal.SIGKILL:
        log = read_log(output / "trainer_log.jsonl")
        assert max(steps) >= log[-1]["current_steps"], "the stop saved where it stood"
    total = max(steps) + 20
    assert local.train(load({**keys, "max_steps": total, "lr_scheduler_type": "constant"})) == 0
    del process
    log = read_log(output / "trainer_log.jsonl")
    logged = [record["current_steps"] for record in log]
    assert logged == sorted(set(logged)), "no step is logged twice"


def test_resumed_run_equals_the_undisturbed_one(keys, tmp_path) -> None:
    whole = {**keys, "max_steps": 60, "output_dir": str(tmp_path / "whole")}
    assert local.train(load(whole)) == 0
    process = start({**keys, "max_steps": 60, "save_steps": 5}, tmp_path)
    output = tmp_path / "out"
    wait_for(lambda: list(output.glob("checkpoint-*")))
    process.send_signal(signal.SIGKILL)
    process.wait(600)
    assert local.train(load({**keys, "max_steps": 60})) == 0
    assert weights(output) == weights(tmp_path / "whole")


def test_nothing_left_to_do_is_said(keys) -> None:
    assert local.train(load({**keys, "max_steps": 4})) == 0
    with pytest.raises(CheckpointError, match=r"0 steps remain.*overwrite_output_dir: true"):
        local.train(load({**keys, "max_steps": 4}))


def test_a_checkpoint_of_another_run_is_refused_with_the_line_to_write(keys) -> None:
    assert local.train(load({**keys, "max_steps": 4})) == 0
    with pytest.raises(CheckpointError, match=r"another run.*data.*`overwrite_output_dir: true`"):
        local.train(load({**keys, "max_steps": 8, "max_samples": 5}))


def test_overwriting_moves_the_earlier_run_aside(keys, tmp_path) -> None:
    assert local.train(load({**keys, "max_steps": 4})) == 0
    assert local.train(load({**keys, "max_steps": 3, "overwrite_output_dir": True})) == 0
    output = tmp_path / "out"
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (output / ".replaced" / "checkpoint-4").is_dir()


def test_resolved_choices_are_written_and_load_back_equal(keys, tmp_path) -> None:
    assert local.train(load({**keys, "max_steps": 1})) == 0
    written = load(tmp_path / "out" / "run_arguments.yaml")
    assert written.model.disable_gradient_checkpointing is True
    assert written.cluster.use_ray is False
    assert (written.training.bf16, written.training.fp32) == (False, True)
    written.save(tmp_path / "again.yaml")
    assert load(tmp_path / "again.yaml") == written
