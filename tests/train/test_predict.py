"""Predictions of a run: rows in order, texts, scores, and that they depend on nothing they should
not: the number of ranks, batches' company, and training on them not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from llmray import hub
from llmray.arguments.loading import load
from llmray.data import prepared
from llmray.data.conversation import Message
from llmray.errors import ArgumentsError
from llmray.run import Context, RunResult, run
from llmray.serve.answering import Answerer
from llmray.train.observers import read_log
from llmray.train.parallel import World
from llmray.train.predict import plan
from llmray.train.similarity import similarity

ROWS = [
    {"instruction": f"Say {i} " + "so " * (7 * i % 11), "output": f"word {i % 5} " * (i % 5 + 1)}
    for i in range(22)
]
RUN: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "do_predict": True,
    "predict_with_generate": True,
    "do_sample": False,
    "max_new_tokens": 6,
    "template": "chatml",
    "dataset": "rows",
    "val_size": 7,
    "finetuning_type": "lora",
    "lora_rank": 2,
    "lora_dropout": 0.1,
    "learning_rate": 0.03,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "fp32": True,
    "report_to": "none",
}


@dataclass
class Site:
    root: Path

    def arguments(self, name: str, **keys: Any):
        places = {"model_name_or_path": str(self.root), "dataset_dir": str(self.root)}
        merged = {**RUN, **places, "output_dir": str(self.root / name), **keys}
        return load({k: v for k, v in merged.items() if v is not ...}, environ={})

    def run(self, name: str, stop=lambda: None, **keys: Any) -> RunResult:
        arguments = self.arguments(name, **keys)
        model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
        ref = prepared.ensure(arguments, model_dir, root=self.root / "prepared")
        world = World.single(torch.device("cpu"))
        context = Context(world, str(self.root / name), ref, model_dir, stop)
        return run(arguments, context)

    def json(self, *parts: str) -> Any:
        return json.loads(self.root.joinpath(*parts).read_text())

    def predictions(self, name: str) -> list[dict[str, str]]:
        text = (self.root / name / "generated_predictions.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    root = tmp_path_factory.mktemp("predict")
    make_tokenizer(root)
    make_model(root, amplify=4.0)
    texts = [{"text": f"Some text of number {i}."} for i in range(12)]
    info: Any = {name: {"file_name": f"{name}.json"} for name in ("rows", "texts")}
    info["texts"]["columns"] = {"prompt": "text"}
    info |= {name: {"file_name": f"{name}.json"} for name in ("few", "fewer")}
    sets = {"rows": ROWS, "texts": texts, "few": ROWS[:3], "fewer": ROWS[:2]}
    for name, rows in {**sets, "dataset_info": info}.items():
        (root / f"{name}.json").write_text(json.dumps(rows))
    return Site(root)


@pytest.fixture(scope="module")
def predicted(site: Site) -> Site:
    site.run("whole", do_eval=True)
    return site


def test_rows_come_in_the_order_of_the_data_with_their_texts(predicted: Site) -> None:
    rows = predicted.predictions("whole")
    assert len(rows) == 7
    asked = [row["prompt"].split("user\n")[1].split("<|im_end|>")[0] for row in rows]
    places = [[row["instruction"] for row in ROWS].index(text) for text in asked]
    assert places == sorted(places)
    assert [row["label"] for row in rows] == [ROWS[at]["output"] for at in places]
    for row in rows:
        assert row["prompt"].startswith("<|im_start|>user\n")
        assert row["prompt"].endswith("<|im_start|>assistant\n")


def test_responses_are_those_that_chat_gives(predicted: Site) -> None:
    arguments = predicted.arguments("x", adapter_name_or_path=str(predicted.root / "whole"))
    answerer = Answerer.load(arguments)
    for row in predicted.predictions("whole"):
        question = row["prompt"].split("user\n")[1].split("<|im_end|>")[0]
        prompt = answerer.prompt_ids([Message("user", question)])
        [ids] = answerer.generate([prompt])
        assert answerer.text(ids, plain=False) == row["predict"]


def test_results_hold_the_scores_of_what_was_written(predicted: Site) -> None:
    rows = predicted.predictions("whole")
    scores = similarity([row["predict"] for row in rows], [row["label"] for row in rows])
    results = predicted.json("whole", "predict_results.json")
    assert {f"predict_{name}": value for name, value in scores.items()}.items() <= results.items()
    assert set(results) - {f"predict_{name}" for name in scores} == {
        "predict_runtime",
        "predict_samples_per_second",
    }
    everything = predicted.json("whole", "all_results.json")
    assert results.items() <= everything.items()
    assert "train_loss" in everything
    evaluated = predicted.json("whole", "eval_results.json")  # the same rows, the same model
    assert {f"eval_{name}": value for name, value in scores.items()}.items() <= evaluated.items()
    assert "eval_loss" in evaluated


def test_evaluations_that_generate_leave_training_as_it_is(site: Site) -> None:
    """With dropout and draws of responses: both take random numbers."""
    keys = {"eval_strategy": "steps", "eval_steps": 2, "do_predict": False}
    site.run("plain", **keys, predict_with_generate=False)
    site.run("judged", **keys, do_sample=True, temperature=2.0)
    weights = [load_file(site.root / name / "adapter_model.safetensors") for name in _BOTH]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])
    logs = [read_log(site.root / name / "trainer_log.jsonl") for name in _BOTH]
    evaluated = [record for record in logs[1] if "eval_loss" in record]
    assert [record["current_steps"] for record in evaluated] == [2, 4]
    assert all("eval_rouge-l" in record and "eval_bleu-4" in record for record in evaluated)
    assert not any("eval_rouge-l" in record for record in logs[0])
    losses = [[record["eval_loss"] for record in log if "eval_loss" in record] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)  # one turn: the same tokens


_BOTH = ("plain", "judged")


def test_draws_do_not_depend_on_what_was_drawn_before(site: Site) -> None:
    keys = {"do_sample": True, "temperature": 2.0, "top_p": 1.0, "top_k": 0}
    site.run("drawn", **keys)
    site.run("drawn-after-evaluation", **keys, do_eval=True)
    assert site.predictions("drawn") == site.predictions("drawn-after-evaluation")
    site.run("other-seed", **keys, seed=3, data_seed=42)
    assert site.predictions("drawn") != site.predictions("other-seed")


def test_prediction_alone_is_that_after_training(predicted: Site) -> None:
    """From the adapter that the run left, in the same folder and in another."""
    before = (predicted.root / "whole" / "generated_predictions.jsonl").read_bytes()
    alone = {"do_train": False, "adapter_name_or_path": str(predicted.root / "whole")}
    predicted.run("alone", **alone)
    written = (predicted.root / "alone" / "generated_predictions.jsonl").read_bytes()
    assert written == before
    assert set(os.listdir(predicted.root / "alone")) == {
        "generated_predictions.jsonl",
        "predict_results.json",
        "all_results.json",
    }
    trained = predicted.json("whole", "all_results.json")
    predicted.run("whole", **alone)
    assert (predicted.root / "whole" / "generated_predictions.jsonl").read_bytes() == before
    assert set(predicted.json("whole", "all_results.json")) == set(trained)


def test_sets_that_are_evaluated_one_by_one_are_predicted_so(site: Site) -> None:
    keys = {"val_size": 0.0, "eval_dataset": "few,fewer", "eval_on_each_dataset": True}
    site.run("each", **keys, do_train=False, do_eval=True)
    results = site.json("each", "predict_results.json")
    assert {"predict_few_rouge-l", "predict_fewer_rouge-l"} <= set(results)
    assert {"eval_few_rouge-l", "eval_few_loss"} <= set(site.json("each", "eval_results.json"))
    assert [row["label"] for row in site.predictions("each")] == [
        row["output"] for row in [*ROWS[:3], *ROWS[:2]]
    ]


def test_the_best_evaluation_may_be_that_of_the_responses(site: Site) -> None:
    keys = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rouge-l"}
    site.run("best", **keys, **best, do_predict=False)
    log = read_log(site.root / "best" / "trainer_log.jsonl")
    scores = [record["eval_rouge-l"] for record in log if "eval_rouge-l" in record]
    assert site.json("best", "eval_results.json")["eval_rouge-l"] == max(scores)
    with pytest.raises(ArgumentsError, match="eval_rouge-l"):
        site.arguments("x", **keys, metric_for_best_model="rouge-x")
    with pytest.raises(ArgumentsError, match="rouge-l is never logged"):
        site.arguments("x", **keys, **best, predict_with_generate=False, do_predict=False)


def test_stage_pt_predicts_by_its_loss(site: Site) -> None:
    keys = {"stage": "pt", "dataset": "texts", "template": ..., "predict_with_generate": False}
    site.run("pt", **keys, val_size=0.25, do_eval=True)
    results = site.json("pt", "predict_results.json")
    assert results["predict_loss"] == site.json("pt", "eval_results.json")["eval_loss"]
    assert not (site.root / "pt" / "generated_predictions.jsonl").exists()


def test_a_stop_between_batches_leaves_nothing_half_written(site: Site) -> None:
    """One step and its border ask once each; the third question is at the second batch."""
    asked: list[int] = []

    def stop() -> str | None:
        asked.append(len(asked))
        return "SIGTERM" if len(asked) > 2 else None

    result = site.run("stopped", stop, max_steps=1)
    assert result.stopped == "SIGTERM"
    names = set(os.listdir(site.root / "stopped"))
    assert "train_results.json" in names
    assert not names & {"predict_results.json", "generated_predictions.jsonl"}


def test_rows_of_like_length_are_answered_together() -> None:
    class Table:
        lengths = np.array([5, 9, 7, 9])
        target_counts = np.array([1, 2, 1, 3])  # prompts of 4, 7, 6, 6

    batches = plan(Table(), 3)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in batches] == [[1, 2, 3], [0]]


def test_two_ranks_predict_what_one_does(site: Site) -> None:
    """Weights that differ in their last bits: batches are the same, and draws too."""
    keys = {"do_sample": True, "temperature": 1.0, "max_steps": 2, "lora_dropout": 0.0}
    arguments = site.arguments("ranks", **keys)
    path = site.root / "ranks.yaml"
    arguments.save(path)
    environ = {**os.environ, "LLMRAY_CACHE": str(site.root / "cache"), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for name, words in (("one", []), ("two", launcher)):
        command = [sys.executable, *words, "-m", "llmray", "train", str(path)]
        size = 2 if name == "one" else 1
        command += [f"output_dir={site.root / name}", f"per_device_train_batch_size={size}"]
        subprocess.run(command, check=True, env=environ, timeout=800)
    assert site.predictions("one") == site.predictions("two")
    assert len(site.predictions("one")) == 7
    results = [site.json(name, "predict_results.json") for name in ("one", "two")]
    assert results[0]["predict_bleu-4"] == results[1]["predict_bleu-4"]
