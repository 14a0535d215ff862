"""Learning-rate schedules: the factor of the highest rate at each step. Rows of a table.

A schedule either follows from the step alone, or (`reduce_lr_on_plateau`) from the evaluations so
far; both are called with the number of the update, and are Resumable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from llmray.arguments.group import Group
from llmray.arguments.optimizer import OptimizerArguments
from llmray.arguments.settings import (
    CosineSettings,
    InverseSqrtSettings,
    MinLrSettings,
    PlateauSettings,
    PolynomialSettings,
    RestartSettings,
    StableSettings,
    StepSettings,
    WarmMinLrSettings,
    schedule_settings,
)


@dataclass(frozen=True)
class Horizon:
    """How long a schedule runs, in optimizer updates, and below which rate its factors lie."""

    total_steps: int
    warmup_steps: int
    highest: float  # learning_rate, > 0 wherever a row divides by it


class Schedule(Protocol):
    """What the engine asks before each update; Resumable."""

    def __call__(self, step: int) -> float:
        """The factor of the learning rate for the update after `step` earlier ones."""

    def observe(self, metric: float, *, greater_is_better: bool) -> None:
        """Take note of an evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """What the factors follow from beside the step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


class ByStep:
    """A schedule that follows from the step alone."""

    def __init__(self, factor: Callable[[int], float]) -> None:
        self._factor = factor

    def __call__(self, step: int) -> float:
        """The factor at a step."""
        return self._factor(step)

    def observe(self, metric: float, *, greater_is_better: bool) -> None:
        """Evaluations change nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the engine knows the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to load."""


class Plateau:
    """Reduced by a factor after evaluations that are not better, as torch's ReduceLROnPlateau.

    Args:
        settings: as given.
        highest: the learning rate before any reduction, > 0.
    """

    def __init__(self, settings: PlateauSettings, highest: float) -> None:
        self._settings = settings
        self._highest = highest
        self.rate = highest
        self.best: float | None = None
        self.num_bad = 0
        self.cooldown = 0

    def __call__(self, step: int) -> float:
        """The present factor, whatever the step."""
        return self.rate / self._highest if self._highest else 1.0

    def observe(self, metric: float, *, greater_is_better: bool) -> None:
        """Count an evaluation; after too many that are not better the rate falls."""
        settings = self._settings
        if self._is_better(metric, greater_is_better):
            self.best, self.num_bad = metric, 0
        else:
            self.num_bad += 1
        if self.cooldown > 0:
            self.cooldown, self.num_bad = self.cooldown - 1, 0
        if self.num_bad > settings.patience:
            reduced = max(self.rate * settings.factor, settings.min_lr)
            if self.rate - reduced > settings.eps:
                self.rate = reduced
            self.cooldown, self.num_bad = settings.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """The rate, and the counts of evaluations."""
        return {
            "rate": self.rate,
            "best": self.best,
            "num_bad": self.num_bad,
            "cooldown": self.cooldown,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put all back."""
        self.rate, self.best = state["rate"], state["best"]
        self.num_bad, self.cooldown = state["num_bad"], state["cooldown"]

    def _is_better(self, metric: float, greater_is_better: bool) -> bool:
        settings = self._settings
        if math.isnan(metric):
            return False
        if self.best is None:
            return True
        upwards = settings.mode == "max" if settings.mode else greater_is_better
        sign = 1 if upwards else -1
        if settings.threshold_mode == "rel":
            return sign * metric > sign * self.best * (1 + sign * settings.threshold)
        return sign * metric > sign * self.best + settings.threshold


def _linear_warmup(step: int, horizon: Horizon, settings: Any) -> float:
    return step / max(1, horizon.warmup_steps)


def _progress(step: float, horizon: Horizon) -> float:
    return (step - horizon.warmup_steps) / max(1, horizon.total_steps - horizon.warmup_steps)


def _wave(progress: float, num_cycles: float = 0.5) -> float:
    """From 1 to 0 along half a cosine; on, for more cycles."""
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress))


def _linear(step: int, horizon: Horizon, settings: Any) -> float:
    return max(0.0, 1.0 - _progress(step, horizon))


def _cosine(step: int, horizon: Horizon, settings: CosineSettings) -> float:
    return max(0.0, _wave(_progress(step, horizon), settings.num_cycles))


def _restarts(step: int, horizon: Horizon, settings: RestartSettings) -> float:
    progress = _progress(step, horizon)
    return 0.0 if progress >= 1.0 else _wave(settings.num_cycles * progress % 1.0)


def _polynomial(step: int, horizon: Horizon, settings: PolynomialSettings) -> float:
    end = settings.lr_end / horizon.highest
    remaining = max(0.0, 1.0 - _progress(step, horizon))
    return end + (1.0 - end) * remaining**settings.power


def _inverse_sqrt(step: int, horizon: Horizon, settings: InverseSqrtSettings) -> float:
    scale = settings.timescale or horizon.warmup_steps or 10_000
    return math.sqrt(scale / (step - horizon.warmup_steps + scale))


def _floor(horizon: Horizon, settings: MinLrSettings) -> float:
    if settings.min_lr is not None:
        return settings.min_lr / horizon.highest
    return settings.min_lr_rate or 0.0


def _above(floor: float, factor: float) -> float:
    return max(0.0, floor + (1.0 - floor) * factor)


def _min_lr(step: int, horizon: Horizon, settings: MinLrSettings) -> float:
    wave = _wave(_progress(step, horizon), settings.num_cycles)
    return _above(_floor(horizon, settings), wave)


def _warm_min_lr(step: int, horizon: Horizon, settings: WarmMinLrSettings) -> float:
    wave = _wave(_progress(step + 1, horizon), settings.num_cycles)
    return _above(_floor(horizon, settings), wave)


def _warm_min_lr_warmup(step: int, horizon: Horizon, settings: WarmMinLrSettings) -> float:
    if settings.warmup_lr_rate is None:
        return (step + 1) / horizon.warmup_steps
    return _above(settings.warmup_lr_rate, step / max(1, horizon.warmup_steps - 1))


RISING: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 1.0 - _wave(progress),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(1.0 - progress),
}
FALLING: dict[str, Callable[[float, float], float]] = {
    "linear": lambda progress, num_cycles: 1.0 - progress,
    "cosine": _wave,
    "1-sqrt": lambda progress, num_cycles: 1.0 - math.sqrt(progress),
}


def stable_and_decay(horizon: Horizon, settings: StableSettings) -> tuple[int, int]:
    """Steps at the full rate and steps of the decay; a third and two thirds where neither is given.

    Where one is given the other is what it leaves.
    """
    left = max(0, horizon.total_steps - horizon.warmup_steps)
    stable, decay = settings.num_stable_steps, settings.num_decay_steps
    if stable is None:
        stable = left // 3 if decay is None else max(0, left - decay)
    return stable, max(0, left - stable) if decay is None else decay


def _stable(step: int, horizon: Horizon, settings: StableSettings) -> float:
    stable, decay = stable_and_decay(horizon, settings)
    into_decay = step - horizon.warmup_steps - stable
    if into_decay < 0:
        return 1.0
    if into_decay >= decay:
        return settings.min_lr_ratio
    factor = FALLING[settings.decay_type](into_decay / decay, settings.num_cycles)
    return _above(settings.min_lr_ratio, factor)


def _stable_warmup(step: int, horizon: Horizon, settings: StableSettings) -> float:
    return _above(settings.min_lr_ratio, RISING[settings.warmup_type](step / horizon.warmup_steps))


def _step(step: int, horizon: Horizon, settings: StepSettings) -> float:
    return settings.gamma ** ((step - horizon.warmup_steps) // settings.step_size)


@dataclass(frozen=True)
class Course:
    """A schedule by step: its factor after the warm-up, and in it."""

    after: Callable[[int, Horizon, Any], float]
    warmup: Callable[[int, Horizon, Any], float] | None = _linear_warmup


SCHEDULES: dict[str, Course] = {
    "constant": Course(lambda step, horizon, settings: 1.0, warmup=None),
    "constant_with_warmup": Course(lambda step, horizon, settings: 1.0),
    "linear": Course(_linear),
    "cosine": Course(_cosine),
    "cosine_with_restarts": Course(_restarts),
    "polynomial": Course(_polynomial),
    "inverse_sqrt": Course(_inverse_sqrt),
    "cosine_with_min_lr": Course(_min_lr),
    "cosine_warmup_with_min_lr": Course(_warm_min_lr, _warm_min_lr_warmup),
    "warmup_stable_decay": Course(_stable, _stable_warmup),
    "step": Course(_step),
}


def warmup_steps(arguments: OptimizerArguments, total_steps: int) -> int:
    """The length of the warm-up in updates; a ratio is rounded up, and whole steps win over it."""
    steps = arguments.warmup_steps or 0
    if steps >= 1:
        return int(steps)
    ratio = steps or arguments.warmup_ratio or 0.0
    return math.ceil(total_steps * ratio)


def schedule(arguments: OptimizerArguments, total_steps: int) -> Schedule:
    """The run's schedule over `total_steps` updates."""
    settings = schedule_settings(arguments)
    if isinstance(settings, PlateauSettings):
        return Plateau(settings, arguments.learning_rate)
    return ByStep(
        _by_step(SCHEDULES[arguments.lr_scheduler_type], arguments, total_steps, settings)
    )


def _by_step(
    course: Course, arguments: OptimizerArguments, total_steps: int, settings: Group
) -> Callable[[int], float]:
    length = warmup_steps(arguments, total_steps) if course.warmup else 0
    horizon = Horizon(total_steps, length, arguments.learning_rate)

    def factor(step: int) -> float:
        if course.warmup is not None and step < length:
            return course.warmup(step, horizon, settings)
        return course.after(step, horizon, settings)

    return factor
