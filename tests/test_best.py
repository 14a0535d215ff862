"""Whole runs that compare evaluations: stopping early, ending with the best, evaluating alone."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmray import cli, local
from llmray.arguments import environment
from llmray.arguments.loading import load
from llmray.train.observers import read_log

RUN = {
    "stage": "sft",
    "do_train": True,
    "template": "chatml",
    "dataset": "rows",
    "eval_dataset": "other",
    "finetuning_type": "lora",
    "lora_dropout": 0.1,
    "learning_rate": 0.05,
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "report_to": "none",
    "fp32": True,
}


@pytest.fixture
def keys(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    sets = {
        "rows": [{"instruction": f"Say {i}.", "output": "word " * (i % 9 + 1)} for i in range(20)],
        "other": [{"instruction": f"Ask {i}?", "output": "no answer"} for i in range(5)],
        "third": [{"instruction": f"What is {i}?", "output": "word " * 5} for i in range(3)],
    }
    for name, rows in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    places = {"model_name_or_path": str(tiny_llama_dir), "dataset_dir": str(tmp_path)}
    return {**RUN, **places, "output_dir": str(tmp_path / "out")}


def train(keys: dict[str, Any], **more: Any) -> Path:
    merged = {key: value for key, value in {**keys, **more}.items() if value is not ...}
    assert local.train(load(merged, environ={})) == 0
    return Path(merged["output_dir"])


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = adapter(one), adapter(two)
    return all(torch.equal(first[name], second[name]) for name in first)


def losses(output: Path, key: str = "eval_loss") -> dict[int, float]:
    log = read_log(output / "trainer_log.jsonl")
    return {record["current_steps"]: record[key] for record in log if key in record}


def results(output: Path) -> dict[str, float]:
    return json.loads((output / "eval_results.json").read_text())


def test_ends_with_the_best_which_rotation_spared(keys, caplog) -> None:
    """At this rate the set of other answers gets worse after a while, so the best is not last."""
    with caplog.at_level(logging.INFO, "llmray"):
        output = train(keys, load_best_model_at_end=True, save_total_limit=2)
    found = losses(output)
    best = min(found, key=lambda step: found[step])
    assert best < 12, found
    kept = {int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")}
    assert kept == {best, 12}
    assert same(output, output / f"checkpoint-{best}")
    assert not same(output, output / "checkpoint-12")
    assert results(output)["eval_loss"] == found[best]
    assert f"ending with the weights after step {best}, the best: eval_loss" in caplog.text


def test_stops_early_and_a_resume_stops_at_the_same_step(keys, tmp_path) -> None:
    stops = {"early_stopping_steps": 2, "max_steps": 40}
    whole = train(keys, **stops)
    [last] = [max(losses(whole))]
    assert last < 40
    part = {**stops, "output_dir": str(tmp_path / "part"), "lr_scheduler_type": "constant"}
    full = train(keys, **{**part, "output_dir": str(tmp_path / "full")})
    end = max(losses(full))
    train(keys, **{**part, "max_steps": end - 2})
    resumed = train(keys, **part)
    assert losses(resumed) == losses(full)
    assert same(resumed, full)


def test_a_run_that_stopped_early_ends_again_without_a_step(keys) -> None:
    stops = {"early_stopping_steps": 1, "early_stopping_threshold": 100.0, "max_steps": 40}
    first = losses(train(keys, **stops))
    assert max(first) == 4
    assert losses(train(keys, **stops)) == first


def test_a_plateau_lowers_the_rate_and_a_resume_is_bitwise(keys, tmp_path) -> None:
    plateau = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.5},
    }
    whole = train(keys, **plateau)
    rates = losses(whole, "lr")
    assert rates[2] == 0.05
    assert rates[12] == pytest.approx(0.05 / 2**4)
    part = {**plateau, "output_dir": str(tmp_path / "part")}
    train(keys, **part, max_steps=6)
    assert same(train(keys, **part), whole)


def test_only_the_best_is_saved(keys) -> None:
    output = train(keys, save_strategy="best")
    found = losses(output)
    best = [s for s in found if found[s] == min(v for step, v in found.items() if step <= s)]
    assert [f"checkpoint-{step}" for step in best] == sorted(
        (path.name for path in output.glob("checkpoint-*")), key=lambda name: int(name[11:])
    )
    assert len(best) < len(found)


def test_accuracy_is_that_of_the_logits(keys, tmp_path) -> None:
    """The share of targets that are the argmax, counted through transformers' own forward."""
    from transformers import AutoModelForCausalLM

    from llmray.data import prepared

    output = train(keys, max_steps=..., do_train=False, do_eval=True, compute_accuracy=True)
    found = results(output)
    arguments = load({**keys, "do_train": False, "do_eval": True}, environ={})
    ref = prepared.ensure(
        arguments, keys["model_name_or_path"], root=environment.prepared_directory(os.environ)
    )
    model = AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"], dtype=torch.float32)
    right = total = 0
    for row in prepared.open(ref).eval["eval"]:
        ids = torch.from_numpy(row.input_ids.astype("int64"))
        guess = model(ids[None]).logits[0].argmax(-1)
        mask = torch.from_numpy(row.target_mask)[1:]
        right += int((guess[:-1] == ids[1:])[mask].sum())
        total += int(mask.sum())
    assert total > 10
    assert found["eval_accuracy"] == pytest.approx(right / total)


def test_each_set_has_its_loss_and_together_they_are_the_whole(keys, tmp_path) -> None:
    alone = {"do_train": False, "do_eval": True, "dataset": ...}
    sets = {"eval_dataset": "other,third", "compute_accuracy": True}
    parts = results(train(keys, **alone, **sets, eval_on_each_dataset=True))
    whole = results(train(keys, **alone, **sets, output_dir=str(tmp_path / "whole")))
    single = results(
        train(keys, **alone, eval_dataset="third", output_dir=str(tmp_path / "single"))
    )
    assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    assert parts["eval_accuracy"] == pytest.approx(whole["eval_accuracy"])
    assert parts["eval_third_loss"] == pytest.approx(single["eval_loss"], abs=1e-6)
    assert parts["eval_other_loss"] != parts["eval_third_loss"]


def test_evaluating_alone_needs_no_rows_to_train_on_and_leaves_a_training_as_it_is(keys) -> None:
    output = train(keys, max_steps=4)
    log, trained = (output / "trainer_log.jsonl").read_text(), adapter(output)
    last = results(output)["eval_loss"]
    alone = {"do_train": False, "do_eval": True, "dataset": ..., "overwrite_output_dir": True}
    train(keys, **alone, adapter_name_or_path=str(output))
    assert results(output)["eval_loss"] == pytest.approx(last, abs=1e-5)
    whole = json.loads((output / "all_results.json").read_text())
    assert whole["train_loss"] > 0
    assert whole["eval_loss"] == results(output)["eval_loss"]
    assert (output / "trainer_log.jsonl").read_text() == log
    assert (output / "checkpoint-4").is_dir()
    assert all(torch.equal(adapter(output)[name], trained[name]) for name in trained)
    base = results(train(keys, **{**alone, "output_dir": f"{output}-base"}))
    assert base["eval_loss"] != pytest.approx(last, abs=1e-3)


def test_rows_that_val_size_sets_aside_are_the_same_without_training(keys, tmp_path) -> None:
    split = {"eval_dataset": ..., "val_size": 0.25, "learning_rate": 0.0, "max_steps": 1}
    trained = results(train(keys, **split, do_eval=True))
    alone = {"do_train": False, "do_eval": True, "output_dir": str(tmp_path / "alone")}
    found = results(train(keys, **{**split, **alone}))
    assert found["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-6)


def test_nothing_to_do_is_said(keys, tmp_path, capsys) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**keys, "do_train": False}))
    try:
        assert cli.main(["train", str(path)]) == 2
        assert "there is nothing to do" in capsys.readouterr().err
    finally:
        cli.log.handlers.clear()
        cli.log.propagate = True
