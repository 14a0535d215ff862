"""Verdicts: what one of Ray Tune's schedulers says of each evaluation of a trial.

The schedulers are Ray Tune's own objects; `Verdicts` is the side of Tune's controller that they
speak to. It starts nothing and stops nothing: the sweep does as it is told.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

Verdict = Literal["go on", "stop", "pause"]

SCHEDULERS: dict[str, type[TrialScheduler]] = {
    "asha": AsyncHyperBandScheduler,
    "hyperband": HyperBandScheduler,
    "median": MedianStoppingRule,
}


@dataclass(eq=False)
class Candidate:
    """A trial as far as a scheduler looks at it; equal to itself alone."""

    trial_id: str
    status: str = Trial.PENDING
    is_saving: bool = False
    last: dict[str, Any] | None = None  # what was reported last
    stopped_after: int | None = None  # the step whose report it was told to stop after

    def __str__(self) -> str:
        return self.trial_id


@dataclass(frozen=True)
class Report:
    """One evaluation: after which update, in which epoch, after how many seconds, how good."""

    step: int
    epoch: float
    seconds: float
    value: float


class Verdicts:
    """What becomes of the trials of a sweep, evaluation by evaluation.

    Args:
        kind: a row of `SCHEDULERS`, or `none`.
        settings: of the scheduler, by Ray Tune's names.
        metric: a key of trainer_log.jsonl.
        mode: `min` or `max`.
        seed: of what a scheduler draws.
    """

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, Any],
        *,
        metric: str,
        mode: str,
        seed: int,
    ) -> None:
        self.metric = metric
        self._trials: dict[str, Candidate] = {}
        self._put_out: list[str] = []
        self._scheduler: TrialScheduler | None = None
        if kind == "none":
            return
        np.random.seed(seed)  # ASHA deals trials to its brackets by numpy's global generator
        chosen = _as_taken(kind, settings)
        self._scheduler = SCHEDULERS[kind](metric=metric, mode=mode, **chosen)

    def add(self, name: str) -> None:
        """A trial that waits for its turn."""
        self._trials[name] = Candidate(name)
        if self._scheduler is not None:
            self._scheduler.on_trial_add(self, self._trials[name])

    def next(self, startable: Collection[str]) -> str | None:
        """The trial whose turn it is among those that can start; None where all shall wait."""
        if isinstance(self._scheduler, HyperBandScheduler):
            chosen = self._scheduler.choose_trial_to_run(self)
            return chosen.trial_id if chosen and chosen.trial_id in startable else None
        waiting = [name for name in self._trials if name in startable]
        # those that were put aside gave way to the others
        return min(waiting, key=lambda n: self._trials[n].status == Trial.PAUSED, default=None)

    def started(self, name: str) -> None:
        """The trial runs, for the first time or again."""
        self._trials[name].status = Trial.RUNNING

    def waits(self, name: str) -> bool:
        """The trial runs no more and is not over; whether it was put aside, to be compared."""
        trial = self._trials[name]
        if trial.status == Trial.RUNNING:
            trial.status = Trial.PENDING
        return trial.status == Trial.PAUSED

    def replay(self, past: Iterable[tuple[str, Report]]) -> None:
        """Take in what trials reported before a restart, in its order."""
        for name, report in past:
            if not self.is_stopped(name):
                self.started(name)
                self.judge(name, report)

    def judge(self, name: str, report: Report) -> Verdict:
        """What the trial shall do after an evaluation."""
        trial = self._trials[name]
        result = {
            "current_steps": report.step,
            "epoch": report.epoch,
            "time_total_s": report.seconds,
            self.metric: report.value,
        }
        if self._scheduler is None or not math.isfinite(report.value):
            return "go on"
        if trial.stopped_after is not None:  # the scheduler knows it no more
            return "stop" if report.step >= trial.stopped_after else "go on"
        trial.last = result
        said = self._scheduler.on_trial_result(self, trial, result)
        if said == TrialScheduler.STOP:
            trial.stopped_after = report.step
            return "stop"
        if said == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
            return "pause"
        return "go on"

    def ended(self, name: str, *, failed: bool = False) -> None:
        """The trial is over: at its last step, stopped, or failed."""
        trial = self._trials[name]
        if trial.status in (Trial.TERMINATED, Trial.ERROR):
            return
        trial.status = Trial.ERROR if failed else Trial.TERMINATED
        if self._scheduler is None:
            return
        if failed:
            self._scheduler.on_trial_error(self, trial)
        elif trial.last is not None:
            self._scheduler.on_trial_complete(self, trial, trial.last)
        else:
            self._scheduler.on_trial_remove(self, trial)

    def is_alive(self, name: str) -> bool:
        """Whether the trial may go on."""
        return self._trials[name].status not in (Trial.TERMINATED, Trial.ERROR)

    def is_stopped(self, name: str) -> bool:
        """Whether the trial was told to stop, also while it was put aside."""
        return self._trials[name].stopped_after is not None

    def put_out(self) -> list[str]:
        """The paused trials that were told to stop since the last call."""
        names, self._put_out = self._put_out, []
        return names

    # what schedulers call on Tune's controller

    def get_live_trials(self) -> list[Candidate]:
        """The trials that are not over."""
        over = (Trial.TERMINATED, Trial.ERROR)
        return [trial for trial in self._trials.values() if trial.status not in over]

    def stop_trial(self, trial: Candidate) -> None:
        """A trial that is paused shall not go on."""
        if trial.status in (Trial.TERMINATED, Trial.ERROR):
            return
        trial.status = Trial.TERMINATED
        trial.stopped_after = trial.last["current_steps"] if trial.last else 0
        self._put_out.append(trial.trial_id)
        assert self._scheduler is not None
        self._scheduler.on_trial_remove(self, trial)


def _as_taken(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as Ray Tune's class takes them."""
    found = dict(settings)
    if kind == "median" and not found.get("min_time_slice"):
        # 0 would put a trial aside at every evaluation while others wait for their first
        found["min_time_slice"] = math.inf
    return found
