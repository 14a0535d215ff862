"""Whole runs of stage rm: each tuning method, resumed, evaluated, predicted, on two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from llmray import local, scoring
from llmray.arguments.loading import load
from llmray.errors import LlmrayError, RewardError, TrainingError
from llmray.model.value_head import ValueHead
from llmray.train import ranking
from llmray.train.observers import read_log
from llmray.train.ranking import Pair
from llmray.train.score import Scorer

RUN = {
    "stage": "rm",
    "do_train": True,
    "template": "chatml",
    "dataset": "pairs",
    "finetuning_type": "lora",
    "lora_rank": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "fp32": True,
    "use_cpu": True,
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"finetuning_type": "full", "learning_rate": 0.003},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "qlora": {"quantization_bit": 4},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Polite answers are to be preferred; the model's head is not its embedding."""
    root = tmp_path_factory.mktemp("rm")
    make_tokenizer(root / "model")
    make_model(root / "model", amplify=2.0, hidden_size=64, tie_word_embeddings=False)
    pairs = [
        {
            "instruction": f"What is {i}?",
            "chosen": "A helpful assistant. " + "well " * (i % 3),
            "rejected": "no " * (i % 4 + 1),
        }
        for i in range(40)
    ]
    (root / "pairs.json").write_text(json.dumps(pairs))
    (root / "plain.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 4))
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True},
        "plain": {"file_name": "plain.json"},
    }
    (root / "dataset_info.json").write_text(json.dumps(info))
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRAY_CACHE", str(root / "cache"))


def keys(root: Path, name: str, **more: Any) -> dict[str, Any]:
    places = {"model_name_or_path": str(root / "model"), "dataset_dir": str(root)}
    return {**RUN, **places, "output_dir": str(root / name), **more}


def train(root: Path, name: str, **more: Any) -> Path:
    shutil.rmtree(root / name, ignore_errors=True)
    assert local.train(load(keys(root, name, **more), environ={})) == 0
    return root / name


def log(output: Path, key: str) -> list[float]:
    return [record[key] for record in read_log(output / "trainer_log.jsonl") if key in record]


def results(output: Path, name: str = "eval_results") -> dict[str, float]:
    found = json.loads((output / f"{name}.json").read_text())
    return {
        key: value for key, value in found.items() if "_second" not in key and "time" not in key
    }


def weights(output: Path) -> dict[str, Any]:
    return {k: v for path in output.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("method", METHODS)
def test_margins_rise_and_scores_are_those_of_the_loop(method: str, root: Path, capsys) -> None:
    """Rewards of prediction, `llmray score` and `Scorer` agree; with LoRA the head has its file."""
    settings = {"val_size": 8, "do_predict": True, **METHODS[method]}
    output = train(root, method, max_steps=8, **settings)
    margins, accuracies = log(output, "margin"), log(output, "accuracy")
    assert margins[-1] > margins[0] + 0.5
    assert accuracies[-1] == 1
    assert log(output, "loss")[-1] < 0.8 * log(output, "loss")[0]

    head = load_file(output / "value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "v_head.summary.weight": (1, 64),
        "v_head.summary.bias": (1,),
    }
    told = json.loads((output / "trainable_parameters.json").read_text())["parameters"]
    assert told["value_head.summary.weight"] == {"shape": [1, 64], "dtype": "float32"}
    assert "value_head.summary.bias" not in told, "no pair says what it should be"
    assert head["v_head.summary.bias"].item() == 0
    lines = (output / "generated_predictions.jsonl").read_text().splitlines()
    predicted = [json.loads(line) for line in lines]
    found = results(output, "predict_results")
    assert len(predicted) == 8
    assert found["predict_accuracy"] == 1
    gaps = [row["chosen"] - row["rejected"] for row in predicted]
    assert found["predict_margin"] == pytest.approx(np.mean(gaps), abs=1e-5)
    assert (output / "calibration.png").read_bytes().startswith(b"\x89PNG")

    place = "model_name_or_path" if method in ("full", "freeze") else "adapter_name_or_path"
    bits = {key: value for key, value in METHODS[method].items() if key == "quantization_bit"}
    arguments = load(keys(root, "scores", **{place: str(output)}, **bits), environ={})
    scorer = Scorer.load(arguments)
    scoring.score(arguments, scoring.Options())
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(scored) == 40
    for row in predicted:
        distances = [
            max(abs(row[name] - other[name]) for name in ("chosen", "rejected")) for other in scored
        ]
        assert min(distances) < 1e-4
    assert scorer.forward.is_flat


def test_a_resume_is_bitwise(root: Path) -> None:
    common = {"save_strategy": "steps", "save_steps": 3, "lora_dropout": 0.1}
    whole = train(root, "whole", **common)
    parted = train(root, "parted", **common, max_steps=3)
    assert (parted / "checkpoint-3" / "value_head.safetensors").is_file()
    assert local.train(load(keys(root, "parted", **common), environ={})) == 0
    assert log(parted, "loss")[-3:] == log(whole, "loss")[-3:]
    ours, theirs = weights(parted), weights(whole)
    assert "v_head.summary.weight" in ours
    assert {name: tensor.numpy().tobytes() for name, tensor in ours.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in theirs.items()
    }


def test_evaluation_alone_and_training_on_use_the_head_that_was_trained(root: Path) -> None:
    output = train(root, "first", val_size=8, do_eval=True)
    again = {"adapter_name_or_path": str(output), "val_size": 8}
    alone = train(root, "alone", **again, do_train=False, do_eval=True, plot_loss=True)
    assert results(alone) == pytest.approx(
        {k: v for k, v in results(output).items() if k != "epoch"}, abs=1e-5
    )
    assert set(results(alone)) >= {"eval_accuracy", "eval_margin", "eval_reward_chosen"}
    assert (alone / "calibration.png").is_file()
    on = train(root, "on", **again, max_steps=1)
    assert log(on, "loss")[0] < 0.5 * log(output, "loss")[0]


def test_the_best_of_a_run_is_known_by_its_accuracy(root: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "margin", "val_size": 8}
    output = train(root, "best", **saves, **best)
    assert results(output)["eval_margin"] == max(log(output, "eval_margin"))


@pytest.mark.slow
def test_two_ranks_equal_one(root: Path) -> None:
    """The same global batch of 8 pairs; one rank scores 5 evaluation pairs, the other 4."""
    one = train(root, "one", val_size=9, do_predict=True, save_strategy="no")
    settings = keys(root, "two", val_size=9, do_predict=True, gradient_accumulation_steps=1)
    (root / "two.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "llmray", "train", str(root / "two.json")]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=800)
    for key in ("loss", "margin", "accuracy", "grad_norm"):
        assert log(root / "two", key) == pytest.approx(log(one, key), abs=1e-4)
    assert results(root / "two", "predict_results") == pytest.approx(
        results(one, "predict_results"), abs=1e-4
    )
    pairs = [
        [json.loads(line) for line in (path / "generated_predictions.jsonl").open()]
        for path in (one, root / "two")
    ]
    for alone, together in zip(*pairs, strict=True):
        assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_rewards(root: Path) -> None:
    """SIGKILL from outside after a checkpoint; the second attempt begins there."""
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 60, "save_total_limit": 2}
    whole = train(root, "undisturbed", **common)
    (root / "killed.json").write_text(json.dumps(keys(root, "killed", **common)))
    command = [sys.executable, "-m", "llmray", "train", str(root / "killed.json")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 600
    while not list((root / "killed").glob("checkpoint-*")):
        assert time.monotonic() < end, "no checkpoint in time"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(300) == -signal.SIGKILL
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    step = re.search(r"resuming from \S+: step (\d+) of 60", done.stderr)
    assert step is not None, done.stderr
    assert 0 < int(step[1]) < 60
    ours, theirs = weights(root / "killed"), weights(whole)
    assert {name: tensor.numpy().tobytes() for name, tensor in ours.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in theirs.items()
    }


def test_data_of_another_stage_is_refused(root: Path) -> None:
    with pytest.raises(LlmrayError, match="no pairs of responses"):
        train(root, "plain", dataset="plain")
    with pytest.raises(LlmrayError, match="pairs of responses, from which this stage does not"):
        train(root, "sft", stage="sft")


def test_evaluation_without_a_head_says_where_one_comes_from(root: Path) -> None:
    with pytest.raises(LlmrayError, match=r"has no value_head\.safetensors.*stage: rm"):
        train(root, "none", do_train=False, do_eval=True, val_size=8)


def test_a_reward_of_training_that_is_no_number_is_named_by_its_row(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come in their order, one at a time; the head breaks before the sixth forward pass."""
    settings: dict[str, Any] = {"disable_shuffling": True, "gradient_accumulation_steps": 1}
    settings["per_device_train_batch_size"] = 1
    real, seen = ValueHead.forward, []

    def forward(self: ValueHead, hidden: Any) -> Any:
        seen.append(0)
        return real(self, hidden) * (float("nan") if len(seen) == 6 else 1)

    monkeypatch.setattr(ValueHead, "forward", forward)
    with pytest.raises(TrainingError, match="reward of an answer is nan: row 5 of the table"):
        train(root, "nan-in-training", **settings)


def test_a_reward_that_is_no_number_is_named_by_its_row(root: Path, monkeypatch) -> None:
    """Rows 0 to 7, one at a time; the third is wrong."""
    output = train(root, "nan", max_steps=1)
    settings = {"adapter_name_or_path": str(output), "do_train": False, "do_predict": True}
    real = ranking.Engine.logprobs
    seen: list[int] = []

    def logprobs(self, batch, **more):
        found = real(self, batch, **more)
        seen.append(len(seen))
        return ranking.replace(found, scores=found.scores * float("nan")) if wrong() else found

    def wrong() -> bool:
        return len(seen) == 8 + 3

    monkeypatch.setattr(ranking.Engine, "logprobs", logprobs)
    monkeypatch.setattr(ranking, "replace", __import__("dataclasses").replace, raising=False)
    with pytest.raises(RewardError, match=r"rewards of row 2 \(counted from 0\) of eval are"):
        train(root, "nan-2", **settings, val_size=8, per_device_eval_batch_size=1)


# ---- calibration ---------------------------------------------------------------------------------


def test_bins_by_hand() -> None:
    """Margins 0, ln 3 and ln 9, all as preferred but the last: sigmoid is 1/2, 3/4, 9/10.

    One bin of three: predicted (0.5 + 0.75 + 0.9) / 3, observed (0.5 + 1 + 0) / 3.
    """
    [found] = ranking.bins([0.0, np.log(3), -np.log(9)])
    assert found.predicted == pytest.approx(2.15 / 3)
    assert found.observed == pytest.approx(0.5)
    assert found.count == 3
    assert ranking.calibration_error([found]) == pytest.approx(2.15 / 3 - 0.5)
    assert ranking.bins([]) == []


def test_a_model_that_is_right_lies_on_the_line() -> None:
    """4000 margins whose signs are drawn by their own probabilities; one twice as sure is off."""
    draw = np.random.default_rng(0)
    size = np.abs(draw.normal(0, 2, 4000))
    sign = np.where(draw.random(4000) < 1 / (1 + np.exp(-size)), 1, -1)
    right = ranking.bins(size * sign)
    assert len(right) == 10
    assert sum(one.count for one in right) == 4000
    assert ranking.calibration_error(right) < 0.02
    assert ranking.calibration_error(ranking.bins(2 * size * sign)) > 0.05


def test_the_picture_has_its_points(tmp_path: Path, monkeypatch) -> None:
    seen = []
    save = ranking.plots.save
    monkeypatch.setattr(
        ranking.plots, "save", lambda figure, path: (seen.append(figure), save(figure, path))
    )
    ranking.draw([Pair(float(i % 7), 2.0) for i in range(100)], tmp_path / "c.png")
    [axes] = seen[0].axes
    line = next(line for line in axes.lines if line.get_label() == "this model")
    assert len(line.get_xdata()) == 5
    assert "100 pairs, in bins of 20" in axes.get_title()
    assert (tmp_path / "c.png").stat().st_size > 5000
