"""How long the trials of a sweep are or may become: what a scheduler's settings are to cover."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from llmray.arguments import names
from llmray.arguments.run import RunArguments
from llmray.arguments.space import Distribution, Space, Values
from llmray.arguments.tune import Sweep
from llmray.errors import DataError
from llmray.sweep.scheduling import Length, length_by_rows
from llmray.sweep.trials import runs_with

# how many updates a run has, and when it is evaluated
DECIDE = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "ppo_buffer_size",
    "ray_num_workers",
    "dataloader_drop_last",
    "eval_strategy",
    "eval_steps",
    "logging_steps",
)
MOST = 1000  # combinations of ends that are looked at


def lengths_of(runs: Iterable[tuple[RunArguments, int | None]]) -> list[Length]:
    """The lengths of runs with so many rows to train on each, as far as they are known."""
    found: list[Length] = []
    for run, rows in runs:
        with suppress(DataError):  # of too few rows, which the run says itself
            length = length_by_rows(run, rows)
            found += [] if length is None else [length]
    return found


def lengths_at_ends(base: RunArguments, sweep: Sweep, rows: int | None) -> list[Length]:
    """The lengths that a searcher may choose: every end with every other of what decides them.

    Args:
        base: the run file.
        sweep: its section.
        rows: to train on; None where they are not known.
    """
    known = {key for key in sweep.space.keys if names.ALIASES.get(key, key) in DECIDE}
    while more := {n for d in sweep.space.dimensions if d.key in known for n in d.when} - known:
        known |= more
    space = sweep.space.restricted(known)
    at_ends = Space(
        tuple(replace(d, distribution=_listed(d.distribution)) for d in space.dimensions),
        space.variants,
    )
    points = islice(at_ends.grid(), MOST)
    chosen = [at_ends.assemble(partial(_value_at, point)) for point in points]
    return lengths_of((run, rows) for run in runs_with(base, chosen))


def _value_at(point: Values, key: str, _: Distribution) -> Any:
    return point[key]


def _listed(found: Distribution) -> Distribution:
    return Distribution("grid", found.ends())
