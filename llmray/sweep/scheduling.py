"""What a scheduler's settings are in a run of known length; where rungs stand, and what they cost.

Ray Tune's own defaults suit no run: its ASHA ends every trial at 100, and compares the first at 1,
before anything was evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np

from llmray.arguments.run import RunArguments
from llmray.arguments.tune import Scheduler
from llmray.data.batches import Batches

log = getLogger("llmray")


@dataclass(frozen=True)
class Length:
    """How long a run is, in optimizer updates; `eval_steps` lie between two evaluations."""

    total_steps: int
    steps_per_epoch: int
    eval_steps: int


def settings(scheduler: Scheduler, *lengths: Length) -> dict[str, Any]:
    """The settings by Ray Tune's names, with `max_t` and `grace_period` where none are given.

    Args:
        scheduler: of the sweep.
        lengths: of its trials, in which time_attr counts: the longest ends it, and the first to be
            evaluated begins it. Seconds are not known, so that a scheduler that counts them starts
            at 1 and has no end.
    """
    found = dict(scheduler.settings)
    if scheduler.kind == "none":
        return found
    unit = found["time_attr"]
    first: float = {
        "current_steps": min(length.eval_steps for length in lengths),
        "epoch": min(length.eval_steps / length.steps_per_epoch for length in lengths),
    }.get(unit, 1.0)
    end: float = {
        "current_steps": max(length.total_steps for length in lengths),
        "epoch": max(length.total_steps / length.steps_per_epoch for length in lengths),
    }.get(unit, float(10**9))
    if scheduler.kind in ("asha", "median"):
        # where a trial ends before it was evaluated, its first evaluation is its end
        found.setdefault("grace_period", min(first, found.get("max_t", first)))
    if scheduler.kind == "asha":
        found.setdefault("max_t", max(end, found["grace_period"]))
    elif scheduler.kind == "hyperband":
        found.setdefault("max_t", max(1, round(end)))
        # Ray Tune's borders are rounded, the last one too: the best would miss their last steps,
        # and none that was compared would be trained to its end
        found.setdefault("stop_last_trials", found["max_t"] < round(end))
        if found["max_t"] < found["reduction_factor"]:  # known by now alone
            log.warning(
                "hyperband compares no trials: with max_t=%d, of %s, it has no border before the "
                "end. Write a reduction_factor of at most that, or another time_attr.",
                found["max_t"],
                unit,
            )
    return found


def length_of(arguments: RunArguments, steps_per_epoch: int) -> Length:
    """The length of a run whose evaluations follow from its keys.

    Args:
        arguments: of the run.
        steps_per_epoch: updates in a pass over its rows.
    """
    from llmray.train.loop import cadence

    found = cadence(arguments.training, steps_per_epoch)
    return Length(found.total_steps, steps_per_epoch, found.eval_steps or found.total_steps)


def length_by_rows(arguments: RunArguments, rows: int | None) -> Length | None:
    """The length of a run before it starts.

    Args:
        arguments: of the run.
        rows: to train on, packed ones as such; None where they are not known, of a stream too.

    Returns: None where the length follows from rows that are not known.
    """
    steps = arguments.training.max_steps
    if rows is not None:
        return length_of(arguments, _steps_per_epoch(arguments, rows))
    return length_of(arguments, steps) if steps > 0 else None


def _steps_per_epoch(run: RunArguments, rows: int) -> int:
    options = run.training
    # a step of ppo is a rollout batch
    rollouts = run.rlhf.ppo_buffer_size if run.finetuning.stage == "ppo" else 1
    batches = Batches(
        np.ones(rows, dtype=np.int32),
        options.per_device_train_batch_size,
        options.gradient_accumulation_steps * rollouts,
        run.cluster.num_workers,
        0,
        seed=0,
        order="sequential",
        drop_last=options.dataloader_drop_last,
    )
    return batches.steps_per_epoch


def rungs(found: dict[str, Any]) -> list[float]:
    """Where asynchronous halving compares trials, from the first to the last below `max_t`.

    Args:
        found: of scheduler asha, as `settings` gives them.
    """
    at, stands = float(found["grace_period"]), []
    while at < found["max_t"]:
        stands.append(at)
        at *= found["reduction_factor"]
    return stands


def expected_steps(scheduler: Scheduler, lengths: Sequence[Length]) -> float:
    """The updates of trials so long together that a scheduler leaves, as it is meant to.

    Of halving: all trials reach the first rung, one of `reduction_factor` the next, and so on. What
    the others leave depends on the trials; all steps are counted.
    """
    whole = float(sum(length.total_steps for length in lengths))
    if scheduler.kind != "asha" or scheduler.settings["time_attr"] == "time_total_s":
        return whole
    found = settings(scheduler, *lengths)
    by_epoch = found["time_attr"] == "epoch"
    steps, before, left = 0.0, 0.0, 1.0
    for stand in [*rungs(found), float(found["max_t"])]:
        for length in lengths:
            per_unit = length.steps_per_epoch if by_epoch else 1
            first, last = (min(at * per_unit, length.total_steps) for at in (before, stand))
            steps += left * (last - first)
        before, left = stand, left / found["reduction_factor"]
    return steps
