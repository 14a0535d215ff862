"""The loop with fake steps: cadence, what records hold, stopping, and resuming in the middle."""

import math

import pytest
import torch

from llmray.arguments.training import TrainingArguments
from llmray.errors import TrainingError
from llmray.train.loop import Cadence, Loop, Progress, StepResult, fit
from llmray.train.loop import cadence as cadence_of
from llmray.train.observers import Observer
from llmray.train.parallel import World
from llmray.train.stopping import Best, EarlyStopping, Judge


class Recorder(Observer):
    def __init__(self):
        self.records, self.saves = [], []

    def on_log(self, record):
        self.records.append(record)

    def on_save(self, step, path):
        self.saves.append(step)


def result(loss):
    return StepResult(torch.tensor(float(loss)), torch.tensor(1.0), 0.1, 10, {})


def loop(
    cadence, *, loss=lambda step: step, stop=lambda: None, evaluate=None, progress=None, judge=None
):
    recorder = Recorder()
    calls = []

    def do_step(step):
        calls.append(step)
        return result(loss(step))

    built = Loop(
        cadence=cadence,
        world=World.single(torch.device("cpu")),
        progress=progress or Progress(),
        do_step=do_step,
        evaluate=evaluate,
        save=lambda step: f"checkpoint-{step}",
        stop=stop,
        judge=judge or Judge(),
        observers=(recorder,),
    )
    return built, recorder, calls


def test_logs_mean_of_the_steps_since_the_last_log():
    """Losses 0..6, logged every 3: means 1, 4, and the last step alone 6."""
    built, recorder, calls = loop(Cadence(7, 7, logging_steps=3))
    fit(built)
    assert calls == list(range(7))
    assert [(r["current_steps"], r["loss"]) for r in recorder.records] == [(3, 1), (6, 4), (7, 6)]


@pytest.mark.parametrize(
    ("save_steps", "expected"), [(2, [2, 4, 5]), (5, [5]), (10, [5]), (None, [])]
)
def test_saves_at_multiples_and_at_the_end(save_steps, expected):
    built, recorder, _ = loop(Cadence(5, 5, logging_steps=1, save_steps=save_steps))
    fit(built)
    assert recorder.saves == expected


def test_evaluation_joins_the_logged_record_and_stands_alone_elsewhere():
    cadence = Cadence(6, 6, logging_steps=4, eval_steps=2)
    built, recorder, _ = loop(cadence, evaluate=lambda: {"eval_loss": 0.5})
    outcome = fit(built)
    rows = {r["current_steps"]: ("loss" in r, "eval_loss" in r) for r in recorder.records}
    assert rows == {2: (False, True), 4: (True, True), 6: (True, True)}
    assert outcome.metrics == {"eval_loss": 0.5}


def test_stop_saves_at_the_border_and_says_why():
    reasons = iter([None, None, "SIGTERM"])
    built, recorder, calls = loop(Cadence(9, 9, logging_steps=1), stop=lambda: next(reasons))
    assert fit(built).stopped == "SIGTERM"
    assert calls == [0, 1, 2]
    assert recorder.saves == [3]


def test_resume_in_the_middle_of_a_log_window_gives_the_same_means():
    whole, expected, _ = loop(Cadence(8, 8, logging_steps=4))
    fit(whole)
    first, _, _ = loop(Cadence(8, 8, logging_steps=4, save_steps=6))
    saved = {}

    def save(step):
        saved[step] = first.progress.state_dict()
        return "path"

    first.save = save
    first.stop = lambda: "SIGTERM" if first.progress.step == 6 else None
    fit(first)
    progress = Progress()
    progress.load_state_dict(saved[6])
    second, after, calls = loop(Cadence(8, 8, logging_steps=4), progress=progress)
    fit(second)
    assert calls == [6, 7]
    assert after.records[-1]["loss"] == expected.records[-1]["loss"] == 5.5


def test_loss_that_is_not_finite_ends_the_run_with_a_remedy():
    built, _, _ = loop(Cadence(3, 3, logging_steps=1), loss=lambda step: math.nan)
    with pytest.raises(TrainingError, match=r"loss=nan at step 1.*learning_rate"):
        fit(built)


def test_progress_counts_tokens_of_all_steps():
    built, recorder, _ = loop(Cadence(5, 5, logging_steps=2))
    fit(built)
    assert built.progress.num_tokens == 50
    assert all(record["tokens_per_second"] > 0 for record in recorder.records)


def judged(losses, patience=2, threshold=0.0):
    """An evaluation function that gives these losses one after the other, and its judge."""
    values = iter(losses)
    best = Best("eval_loss", greater_is_better=False)
    return (lambda: {"eval_loss": next(values)}), Judge(
        best, EarlyStopping(best, patience, threshold)
    )


def test_stops_early_saves_and_says_why():
    """Evaluated at 2, 4, 6, 8: the best is that at 4, two that are worse follow."""
    evaluate, judge = judged([3.0, 1.0, 2.0, 1.5, 0.1])
    cadence = Cadence(20, 20, logging_steps=5, eval_steps=2, save_steps=4)
    built, recorder, calls = loop(cadence, evaluate=evaluate, judge=judge)
    outcome = fit(built)
    assert len(calls) == 8
    assert outcome.stopped is None
    assert "eval_loss did not get better in 2 evaluations" in outcome.finished
    assert "after step 4" in outcome.finished
    assert outcome.metrics == {"eval_loss": 1.5}
    assert recorder.saves == [4, 8]
    assert judge.saved_step == 4


def test_an_early_stop_saves_where_nothing_else_would():
    evaluate, judge = judged([1.0, 2.0, 2.0])
    cadence = Cadence(20, 20, logging_steps=5, eval_steps=2, save_steps=20)
    built, recorder, _ = loop(cadence, evaluate=evaluate, judge=judge)
    fit(built)
    assert recorder.saves == [6]
    evaluate, judge = judged([1.0, 2.0, 2.0])
    built, recorder, _ = loop(
        Cadence(20, 20, logging_steps=5, eval_steps=2), evaluate=evaluate, judge=judge
    )
    fit(built)
    assert recorder.saves == []


def test_a_run_that_had_stopped_early_makes_no_further_step():
    evaluate, judge = judged([1.0, 2.0, 2.0])
    built, _, _ = loop(Cadence(9, 9, None, eval_steps=1), evaluate=evaluate, judge=judge)
    fit(built)
    again = judged([])[1]
    again.load_state_dict(judge.state_dict())
    built, _, calls = loop(
        Cadence(9, 9, None, eval_steps=1), judge=again, progress=Progress(step=3)
    )
    assert fit(built).finished is not None
    assert calls == []


def test_saves_only_the_best():
    evaluate, judge = judged([3.0, 4.0, 2.0, 2.0, 1.0], patience=9)
    cadence = Cadence(5, 5, logging_steps=5, eval_steps=1, saves_best=True)
    built, recorder, _ = loop(cadence, evaluate=evaluate, judge=judge)
    fit(built)
    assert recorder.saves == [1, 3, 5]


def test_evaluation_on_start_is_logged_and_counts_for_nothing():
    evaluate, judge = judged([0.0, 3.0, 2.0], patience=1)
    cadence = Cadence(4, 4, logging_steps=4, eval_steps=2, evaluates_first=True)
    built, recorder, calls = loop(cadence, evaluate=evaluate, judge=judge)
    fit(built)
    assert [r["current_steps"] for r in recorder.records] == [0, 2, 4]
    assert recorder.records[0]["eval_loss"] == 0.0
    assert len(calls) == 4
    assert judge.best.value == 2.0


def test_the_delay_leaves_out_early_evaluations():
    cadence = Cadence(9, 9, logging_steps=9, eval_steps=2, eval_delay=5)
    built, recorder, _ = loop(cadence, evaluate=lambda: {"eval_loss": 0.5})
    fit(built)
    assert [r["current_steps"] for r in recorder.records] == [6, 8, 9]


def test_nothing_is_logged_where_nothing_is_asked_for():
    built, recorder, _ = loop(Cadence(5, 5, logging_steps=None, save_steps=2))
    fit(built)
    assert recorder.records == []
    assert built.progress.loss_sum == 10
    built, _, _ = loop(Cadence(3, 3, None, save_steps=2), loss=lambda step: math.inf)
    with pytest.raises(TrainingError, match="loss=inf at step 2"):
        fit(built)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"logging_strategy": "no"}, {"logging_steps": None}),
        ({"logging_strategy": "epoch"}, {"logging_steps": 7}),
        ({"save_strategy": "best"}, {"save_steps": None, "saves_best": True}),
        ({"eval_strategy": "epoch", "eval_delay": 1.5}, {"eval_steps": 7, "eval_delay": 11}),
        ({"eval_strategy": "steps", "eval_delay": 4}, {"eval_steps": 500, "eval_delay": 4}),
        ({"eval_on_start": True}, {"evaluates_first": True}),
    ],
)
def test_cadence_of_keys(keys, expected):
    made = cadence_of(TrainingArguments(**keys), 7)
    assert {name: getattr(made, name) for name in expected} == expected
