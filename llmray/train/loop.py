"""The one loop: cadence of steps, logs, evaluations, saves, stopping. Nothing else loops.

What a step does, how an evaluation and a save are made, are functions that it is given; it knows no
stage, no model and no Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch import Tensor

from llmray.arguments.training import TrainingArguments
from llmray.errors import TrainingError
from llmray.train.observers import Observer, Record
from llmray.train.parallel import World
from llmray.train.reading import Work
from llmray.train.stopping import Judge


@dataclass(frozen=True)
class StepResult:
    """What one optimizer update reports; tensors stay on the device until they are logged."""

    loss: Tensor  # scalar, this rank's share of the step's mean loss
    grad_norm: Tensor  # scalar, before clipping
    learning_rate: float
    num_tokens: int  # real tokens of this rank
    metrics: dict[str, Tensor]  # as `loss`
    work: Work = field(default_factory=Work)  # of this rank
    num_positions: int = 0  # tokens of this rank, padding counted
    data_seconds: float = 0.0  # waited for the rows
    other_rates: dict[str, float] = field(default_factory=dict)  # of parameters with their own


@dataclass(frozen=True)
class Cadence:
    """When things happen, in optimizer updates; an interval of None never happens."""

    total_steps: int
    steps_per_epoch: int
    logging_steps: int | None
    logs_first_step: bool = False
    save_steps: int | None = None
    saves_best: bool = False
    eval_steps: int | None = None
    eval_delay: int = 0
    evaluates_first: bool = False

    def is_due(self, interval: int | None, step: int) -> bool:
        """Whether something with `interval` happens after update number `step` (from 1)."""
        return interval is not None and (step % interval == 0 or step == self.total_steps)

    def logs(self, step: int) -> bool:
        """Whether update number `step` is logged; the last one is where any are."""
        return self.is_due(self.logging_steps, step) or (self.logs_first_step and step == 1)

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after update number `step`."""
        return step >= self.eval_delay and self.is_due(self.eval_steps, step)


def cadence(arguments: TrainingArguments, steps_per_epoch: int) -> Cadence:
    """The cadence that the arguments ask for.

    `max_steps` wins over `num_train_epochs`; an interval below 1 is a share of all steps.
    """
    total = arguments.max_steps
    if total <= 0:
        total = math.ceil(arguments.num_train_epochs * steps_per_epoch)

    def interval(strategy: str, steps: float | None) -> int | None:
        if strategy in ("no", "best"):
            return None
        if strategy == "epoch":
            return steps_per_epoch
        value = arguments.logging_steps if steps is None else steps
        return max(1, math.ceil(value * total) if value < 1 else int(value))

    delay = arguments.eval_delay * (steps_per_epoch if arguments.eval_strategy == "epoch" else 1)
    return Cadence(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        logging_steps=interval(arguments.logging_strategy, arguments.logging_steps),
        logs_first_step=arguments.logging_first_step,
        save_steps=interval(arguments.save_strategy, arguments.save_steps),
        saves_best=arguments.save_strategy == "best",
        eval_steps=interval(arguments.eval_strategy, arguments.eval_steps),
        eval_delay=math.ceil(delay),
        evaluates_first=arguments.eval_on_start,
    )


@dataclass
class Progress:
    """How far the run has come, over all attempts; Resumable.

    `loss_sum`, `metric_sums` and `loss_steps` cover the updates since the last log; `total_loss`
    those before it.
    """

    step: int = 0
    num_tokens: int = 0  # of all ranks, as the next three
    num_positions: int = 0
    num_targets: int = 0
    num_squares: int = 0
    seconds: float = 0.0  # in updates, evaluations and saves excluded
    data_seconds: float = 0.0  # of these, waiting for rows
    evaluation_seconds: float = 0.0
    saving_seconds: float = 0.0
    total_loss: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    metric_sums: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return {**vars(self), "metric_sums": dict(self.metric_sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put all fields back."""
        vars(self).update(state)


@dataclass
class Loop:
    """What `fit` runs: the functions, who watches, and where the run stands."""

    cadence: Cadence
    world: World
    progress: Progress
    do_step: Callable[[int], StepResult]  # number of the update, from 0
    evaluate: Callable[[], dict[str, float]] | None
    save: Callable[[int], str]  # a collective; returns where
    stop: Callable[[], str | None]
    judge: Judge = field(default_factory=Judge)
    observers: Sequence[Observer] = ()
    report: Callable[[dict[str, float], str | None], None] | None = None
    figures: Callable[[Progress], dict[str, float]] | None = None  # further ones of a log line
    described: Callable[[Mapping[str, float]], dict[str, float]] = (
        dict  # metrics as they are logged
    )


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    `stopped` is why it was interrupted, `finished` why it had nothing more to do before its last
    step; both None at the last step. `metrics` are those of an evaluation there.
    """

    stopped: str | None
    metrics: dict[str, float]
    finished: str | None = None


def fit(loop: Loop) -> Outcome:
    """Run updates until the last step or until a stop is asked for; all ranks together.

    Raises:
        TrainingError: if the loss is not finite.
    """
    window = _Window(loop)
    stopped: str | None = None
    metrics: dict[str, float] = {}
    cadence, progress = loop.cadence, loop.progress
    if cadence.evaluates_first and progress.step == 0 and loop.evaluate is not None:
        _emit(loop, _evaluated(loop, window))
    while progress.step < cadence.total_steps and not (stopped or loop.judge.reason()):
        window.add(loop.do_step(progress.step))
        step = progress.step
        stopped = _agreed_stop(loop)
        record: Record = window.flush() if cadence.logs(step) else {}
        metrics = _evaluated(loop, window) if cadence.evaluates(step) else {}
        is_best = bool(metrics) and loop.judge.see(step, metrics)
        if record or metrics:
            _emit(loop, record | metrics)
        saves = stopped or (is_best and cadence.saves_best) or _saves(loop, step)
        path = _save(loop, window, metrics) if saves else None
        if loop.report is not None and (path is not None or metrics):
            loop.report({"step": step, **record, **metrics}, path)
        window.skip()
    if progress.step == cadence.total_steps:
        return Outcome(None, metrics)
    return Outcome(stopped, metrics, None if stopped else loop.judge.reason())


def _evaluated(loop: Loop, window: _Window) -> dict[str, float]:
    """The metrics of an evaluation now; none where there are no rows for it."""
    if loop.evaluate is None:
        return {}
    window.settle()
    metrics = loop.evaluate()
    loop.progress.evaluation_seconds += window.lap()
    return metrics


def _saves(loop: Loop, step: int) -> bool:
    """Whether a checkpoint is due: by its interval, and where the run ends early."""
    interval = loop.cadence.save_steps
    ends = interval is not None and loop.judge.reason() is not None
    return ends or loop.cadence.is_due(interval, step)


class _Window:
    """The updates since the last log: sums on the device, read by the host only when logged."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.results: list[StepResult] = []
        self.tokens_before = loop.progress.num_tokens
        self.seconds_before = loop.progress.seconds
        self.clock = time.perf_counter()
        self.last: StepResult | None = None

    def add(self, result: StepResult) -> None:
        self.results.append(result)
        self.loop.progress.step += 1

    def lap(self) -> float:
        """Seconds since the last update was added to the sums; they count no further."""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before

    def skip(self) -> None:
        """Count nothing of the time since the last update was added to the sums."""
        if not self.results:
            self.lap()

    def settle(self) -> None:
        """Add this window's updates, of all ranks, to the progress; a collective call."""
        if not self.results:
            return
        progress, results = self.loop.progress, self.results
        names = list(results[0].metrics)
        local = [float(sum(result.loss.item() for result in results))]
        local += [float(sum(r.metrics[name].item() for r in results)) for name in names]
        counts = [(r.num_tokens, r.num_positions, r.work.targets, r.work.squares) for r in results]
        local += [float(sum(column)) for column in zip(*counts, strict=True)]
        loss, *metrics, tokens, positions, targets, squares = self.loop.world.sum(local)
        self._check_finite(loss)
        progress.seconds += self.lap()
        progress.data_seconds += sum(result.data_seconds for result in results)
        progress.num_tokens += int(tokens)
        progress.num_positions += int(positions)
        progress.num_targets += int(targets)
        progress.num_squares += int(squares)
        progress.loss_sum += loss
        progress.loss_steps += len(results)
        for name, value in zip(names, metrics, strict=True):
            progress.metric_sums[name] = progress.metric_sums.get(name, 0.0) + value
        self.last = results[-1]
        self.results = []

    def flush(self) -> Record:
        """The record of all updates since the last log."""
        self.settle()
        progress = self.loop.progress
        seconds = progress.seconds - self.seconds_before
        tokens = progress.num_tokens - self.tokens_before
        steps = max(1, progress.loss_steps)
        assert self.last is not None, "a log follows at least one update"
        record: Record = {
            "loss": progress.loss_sum / steps,
            "grad_norm": self.last.grad_norm.item(),
            "lr": self.last.learning_rate,
            **{f"lr_{name}": rate for name, rate in self.last.other_rates.items()},
            "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        }
        means = {name: value / steps for name, value in progress.metric_sums.items()}
        record |= self.loop.described(means)
        if self.loop.figures is not None:
            record |= self.loop.figures(progress)
        progress.total_loss += progress.loss_sum
        progress.loss_sum, progress.loss_steps = 0.0, 0
        progress.metric_sums = {}
        self.tokens_before, self.seconds_before = progress.num_tokens, progress.seconds
        return record

    def _check_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        raise TrainingError(
            f"loss={loss} at step {self.loop.progress.step}: training has diverged. Finite "
            "numbers are required. Lower learning_rate, set max_grad_norm: 1.0, or train in "
            "bf16 or fp32 instead of fp16; the last checkpoint is untouched."
        )


def _agreed_stop(loop: Loop) -> str | None:
    """The reason for which rank 0 wants to stop, known to all ranks at the same border."""
    reason = loop.stop() if loop.world.is_main else None
    if loop.world.sum([1.0 if reason else 0.0])[0] == 0:
        return None
    return loop.world.broadcast(reason)


def _save(loop: Loop, window: _Window, metrics: dict[str, float]) -> str:
    window.settle()
    if metrics:
        loop.judge.saved(loop.progress.step, metrics)
    path = loop.save(loop.progress.step)
    loop.progress.saving_seconds += window.lap()
    for observer in loop.observers:
        observer.on_save(loop.progress.step, path)
    return path


def _emit(loop: Loop, record: Record) -> None:
    progress, total = loop.progress, loop.cadence.total_steps
    left = (total - progress.step) * progress.seconds / max(1, progress.step)
    whole: Record = {
        "current_steps": progress.step,
        "total_steps": total,
        **record,
        "epoch": round(progress.step / loop.cadence.steps_per_epoch, 6),
        "percentage": round(100 * progress.step / total, 2),
        "elapsed_time": str(timedelta(seconds=round(progress.seconds))),
        "remaining_time": str(timedelta(seconds=round(left))),
    }
    for observer in loop.observers:
        observer.on_log(whole)
