"""What follows from evaluations: which is the best, and when to end since none is better.

Both see every evaluation of the run in its order, on all ranks alike, and are in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmray.train.schedules import Schedule


class Best:
    """The best evaluation so far, and the best of those whose weights were saved; Resumable.

    Args:
        metric: the name of the metric that decides.
        greater_is_better: its direction.
    """

    def __init__(self, metric: str, *, greater_is_better: bool) -> None:
        self.metric = metric
        self.greater_is_better = greater_is_better
        self.value: float | None = None
        self.step: int | None = None
        self.saved_step: int | None = None
        self.saved_metrics: dict[str, float] = {}

    def see(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take note of an evaluation after update `step`; returns whether it is the best so far."""
        value = metrics[self.metric]
        if not self.is_better(value, self.value):
            return False
        self.value, self.step = value, step
        return True

    def saved(self, step: int, metrics: Mapping[str, float]) -> None:
        """The weights of the evaluation after update `step` are being saved."""
        best = self.saved_metrics.get(self.metric)
        if self.is_better(metrics[self.metric], best):
            self.saved_step, self.saved_metrics = step, dict(metrics)

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether `value` is better; a number always is than none, and NaN never."""
        if math.isnan(value):
            return False
        if than is None:
            return True
        return value > than if self.greater_is_better else value < than

    def state_dict(self) -> dict[str, Any]:
        """Values and steps."""
        return {
            "metric": self.metric,
            "value": self.value,
            "step": self.step,
            "saved_step": self.saved_step,
            "saved_metrics": dict(self.saved_metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; another metric than it was begins anew."""
        if state["metric"] != self.metric:
            return
        self.value, self.step = state["value"], state["step"]
        self.saved_step, self.saved_metrics = state["saved_step"], dict(state["saved_metrics"])


class EarlyStopping:
    """Ends the run after `patience` evaluations in a row that are not better; Resumable.

    Better means: than the best of all before, by more than `threshold`. An evaluation that is
    better by less is the best from then on, and counts as not better, as in transformers.
    """

    def __init__(self, best: Best, patience: int, threshold: float) -> None:
        self.best = best
        self.patience = patience
        self.threshold = threshold
        self.num_worse = 0

    def see(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation, before `best` does."""
        value, before = metrics[self.best.metric], self.best.value
        is_better = self.best.is_better(value, before)
        if is_better and (before is None or abs(value - before) > self.threshold):
            self.num_worse = 0
        else:
            self.num_worse += 1

    def reason(self) -> str | None:
        """Why the run ends now, None where it goes on."""
        if self.num_worse < self.patience:
            return None
        by = f" by more than {self.threshold}" if self.threshold else ""
        best = "no number" if self.best.value is None else f"{self.best.value:.6g}"
        return (
            f"{self.best.metric} did not get better{by} in {self.num_worse} evaluations; the best "
            f"is {best} after step {self.best.step}"
        )

    def state_dict(self) -> dict[str, Any]:
        """How many evaluations in a row were not better."""
        return {"num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from there."""
        self.num_worse = state["num_worse"]


class Judge:
    """All that looks at evaluations within training; Resumable.

    Args:
        best: None where nothing in the run asks which evaluation is the best.
        early: None where the run does not stop early.
        schedule: of the learning rate, which may follow the metric of `best`; the engine keeps it.
    """

    def __init__(
        self,
        best: Best | None = None,
        early: EarlyStopping | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.best = best
        self.early = early
        self._schedule = schedule

    def see(self, step: int, metrics: Mapping[str, float]) -> bool:
        """An evaluation after update `step`; returns whether it is the best so far."""
        if self.best is None:
            return False
        if self.early is not None:
            self.early.see(metrics)
        if self._schedule is not None:
            self._schedule.observe(
                metrics[self.best.metric], greater_is_better=self.best.greater_is_better
            )
        return self.best.see(step, metrics)

    def saved(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was just evaluated is being saved."""
        if self.best is not None:
            self.best.saved(step, metrics)

    def reason(self) -> str | None:
        """Why the run ends early, or None."""
        return None if self.early is None else self.early.reason()

    @property
    def saved_step(self) -> int | None:
        """The step of the checkpoint that must not be removed, where there is one."""
        return None if self.best is None else self.best.saved_step

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {
            "best": None if self.best is None else self.best.state_dict(),
            "early": None if self.early is None else self.early.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, where the checkpoint knew them."""
        if self.best is not None and state["best"] is not None:
            self.best.load_state_dict(state["best"])
        if self.early is not None and state["early"] is not None:
            self.early.load_state_dict(state["early"])
