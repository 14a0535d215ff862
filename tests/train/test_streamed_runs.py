"""Whole runs on a stream: beside prepared data, over ranks, killed and resumed."""

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
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 5,
    "streaming": True,
    "buffer_size": 16,
    "report_to": "none",
    "fp32": True,
}


@pytest.fixture
def keys(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """42 rows: 11 steps an epoch, the last of two rows."""
    rows = [{"instruction": f"Say {i}.", "output": "word " * (i % 9 + 1)} for i in range(42)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    places = {"model_name_or_path": str(tiny_llama_dir), "dataset_dir": str(tmp_path)}
    return {**RUN, **places, "output_dir": str(tmp_path / "out")}


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_log(output / "trainer_log.jsonl")]


def weights(output: Path) -> dict[str, bytes]:
    found = load_file(output / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def test_in_the_order_of_the_files_a_stream_equals_prepared_data(keys, tmp_path) -> None:
    """Two epochs and a half, evaluated on the way; nothing is prepared for the stream."""
    common = {**keys, "disable_shuffling": True, "max_steps": 27}
    common |= {"eval_dataset": "rows", "eval_strategy": "steps", "eval_steps": 10}
    assert local.train(load(common, environ={})) == 0
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    whole = {**common, "streaming": False, "output_dir": str(tmp_path / "prepared")}
    assert local.train(load(whole, environ={})) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "prepared")
    assert weights(tmp_path / "out") == weights(tmp_path / "prepared")
    results = [
        json.loads((tmp_path / name / "eval_results.json").read_text())["eval_loss"]
        for name in ("out", "prepared")
    ]
    assert results[0] == results[1]


def test_a_killed_run_goes_on_with_the_same_rows(keys, tmp_path) -> None:
    """SIGKILL after a checkpoint, in the middle of an epoch as it comes; beside a whole run."""
    whole = {**keys, "output_dir": str(tmp_path / "whole")}
    assert local.train(load(whole, environ={})) == 0
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**keys, "save_steps": 3}))
    process = subprocess.Popen([sys.executable, "-m", "llmray", "train", str(path)])
    end = time.monotonic() + 600
    while not list((tmp_path / "out").glob("checkpoint-*")):
        assert time.monotonic() < end, "no checkpoint in time"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(300)
    steps = [int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*")]
    assert 0 < max(steps) < 40
    assert local.train(load(keys, environ={})) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_two_ranks_equal_one(keys, tmp_path) -> None:
    """A global batch of 4 rows, 2 on each rank; a file is cut into as many pieces as it has."""
    common = {**keys, "lora_dropout": 0.0, "max_steps": 14, "val_size": 4, "save_strategy": "no"}
    common |= {"eval_strategy": "steps", "eval_steps": 7}
    assert local.train(load({**common, "output_dir": str(tmp_path / "one")}, environ={})) == 0
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**common, "per_device_train_batch_size": 2}))
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run(
        [sys.executable, *words, "-m", "llmray", "train", str(path)],
        check=True,
        timeout=800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_other_files_are_another_run(keys, tmp_path) -> None:
    assert local.train(load({**keys, "max_steps": 5}, environ={})) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(CheckpointError, match=r"another run: data"):
        local.train(load(keys, environ={}))


def test_bad_rows_of_a_stream_are_in_the_run_directory_once(keys, tmp_path) -> None:
    """Over a resume in the second epoch, and two epochs and a half."""
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([*rows[:20], {"output": "x"}, *rows[20:]]))
    common = {**keys, "bad_rows": "quarantine"}
    common |= {"mix_strategy": "interleave_over", "max_samples": 40}
    assert local.train(load({**common, "max_steps": 13}, environ={})) == 0
    [first] = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(first)["row"] == 21
    assert local.train(load({**common, "max_steps": 27}, environ={})) == 0
    assert (tmp_path / "out" / "bad_rows.jsonl").read_text() == first + "\n"


def test_responses_to_rows_of_a_stream_are_judged(keys, tmp_path) -> None:
    """The file of predictions is that of a run on prepared data, of the same model."""
    common = {
        **keys,
        "max_steps": 2,
        "learning_rate": 0,
        "save_strategy": "no",
        "eval_dataset": "rows",
        "max_samples": 5,
        "do_predict": True,
        "predict_with_generate": True,
        "max_new_tokens": 4,
    }
    texts = []
    for name, streams in (("out", True), ("prepared", False)):
        given = {**common, "streaming": streams, "output_dir": str(tmp_path / name)}
        assert local.train(load(given, environ={})) == 0
        texts.append((tmp_path / name / "generated_predictions.jsonl").read_text())
    assert texts[0] == texts[1]
    assert texts[0].count("\n") == 5
