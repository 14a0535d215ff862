"""The loop with fake steps: cadence, what records hold, stopping, and resuming in the middle."""

import math

import pytest
import torch

from llmray.errors import TrainingError
from llmray.train.loop import Cadence, Loop, Progress, StepResult, fit
from llmray.train.observers import Observer
from llmray.train.parallel import World


class Recorder(Observer):
    def __init__(self):
        self.records, self.saves = [], []

    def on_log(self, record):
        self.records.append(record)

    def on_save(self, step, path):
        self.saves.append(step)


def result(loss):
    return StepResult(torch.tensor(float(loss)), torch.tensor(1.0), 0.1, 10, {})


def loop(cadence, *, loss=lambda step: step, stop=lambda: None, evaluate=None, progress=None):
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
