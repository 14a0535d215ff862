"""Micro-batches of a plan of steps, collated here or ahead of time by threads.

Which rows form a step is decided in the calling thread; threads only collate, so nothing depends on
their number. Rows are memory-mapped: threads share them without a copy.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llmray.batch import Batch
from llmray.data.batches import Batches
from llmray.data.collate import collate, split
from llmray.data.prepared import PackedTable, Sample, Table
from llmray.train.parallel import World


@dataclass(frozen=True)
class Rows:
    """Rows of a table, or its bins, as batches in the layout that the model takes.

    `reference` holds what the reference says of each row, (num_rows, 2) float64, where that is
    known: of its two answers, or of its answer and the mismatched one.
    """

    table: Table
    flat: bool
    pad_id: int
    reference: np.ndarray | None = None

    @property
    def splits(self) -> bool:
        """Whether a micro-batch may become several: bins for a model that pads their rows."""
        return not self.flat and isinstance(self.table, PackedTable)

    def batch(self, indices: np.ndarray) -> Batch:
        """One micro-batch of these rows; no rows give one token without a target."""
        return self._made(self._numbers(indices), self._samples(indices))

    def batches(self, indices: np.ndarray) -> list[Batch]:
        """One micro-batch of these rows; several, none larger than the bins, where it `splits`."""
        if not self.splits or not len(indices):
            return [self.batch(indices)]
        numbers, samples = self._numbers(indices), self._samples(indices)
        lengths = [len(sample.input_ids) for sample in samples]
        max_cells = int(self.table.lengths[indices].max()) * len(indices)
        groups = split(lengths, max_cells)
        return [self._made(numbers[group], [samples[i] for i in group]) for group in groups]

    def empty(self) -> Batch:
        """One token without a target."""
        return self._made(np.zeros(0, np.int64), [])

    def _made(self, numbers: np.ndarray, samples: list[Sample]) -> Batch:
        """One micro-batch of rows with these numbers, with what is known of the reference."""
        made = replace(self._collate(samples), rows=tuple(numbers.tolist()))
        if self.reference is None:
            return made
        values = torch.from_numpy(self.reference[numbers])  # (R, 2)
        if made.mismatched is None:
            return replace(made, reference=values.reshape(-1))
        mismatched = replace(made.mismatched, reference=values[:, 1])
        return replace(made, reference=values[:, 0], mismatched=mismatched)

    def _numbers(self, indices: np.ndarray) -> np.ndarray:
        """The rows of the table, or of these bins of it."""
        if not isinstance(self.table, PackedTable):
            return indices
        return np.array([row for i in indices for row in self.table.numbers(int(i))], np.int64)

    def _samples(self, indices: np.ndarray) -> list[Sample]:
        return [sample for i in indices for sample in self.table.samples(int(i))]

    def _collate(self, samples: list[Sample]) -> Batch:
        return collate(samples, flat=self.flat, pad_id=self.pad_id)


@dataclass(frozen=True)
class Ahead:
    """How reading runs ahead: by how many threads, for how many micro-batches each; pinned or not.

    Without threads micro-batches are collated when they are asked for.
    """

    num_threads: int = 0
    each: int = 2
    pins: bool = False


@dataclass(frozen=True)
class Work:
    """What the rows of a step amount to on this rank, padding not counted."""

    tokens: int = 0
    targets: int = 0
    squares: int = 0  # sum of squared lengths: pairs of tokens that attention compares, twice

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens, self.targets + other.targets, self.squares + other.squares
        )


class Reader:
    """The micro-batches of each step of this rank; closed at its end.

    Args:
        rows: of the table that `batches` plans.
        batches: the plan; its position moves with `step`, not with what is read ahead.
        ahead: how far reading runs ahead.
        last_step: steps from this one on are not read ahead.
        world: this rank among all, where rows of bins may be padded; None: alone.
    """

    def __init__(
        self,
        rows: Rows,
        batches: Batches,
        ahead: Ahead,
        last_step: int | None = None,
        world: World | None = None,
    ) -> None:
        self.rows = rows
        self.batches = batches
        self._world = world
        self._ahead = ahead
        self._last_step = last_step
        self._pool = ThreadPoolExecutor(ahead.num_threads, "read") if ahead.num_threads else None
        self._waiting: dict[int, list[Future[list[Batch]]]] = {}

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.rows.table.num_rows

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of step number `step`, counted from 0 over all epochs."""
        if self._pool is None:
            made = [self._collate(indices) for indices in self._plan(step)]
        else:
            for number in [n for n in self._waiting if n < step]:
                del self._waiting[number]
            self._fill(step, self._pool)
            made = [future.result() for future in self._waiting.pop(step)]
        self.batches.pass_by(*divmod(step, self.batches.steps_per_epoch))
        return self._as_many([batch for parts in made for batch in parts])

    def work(self, step: int) -> Work:
        """What the rows of that step amount to."""
        indices = np.concatenate(self._plan(step))
        lengths = self.rows.table.lengths[indices].astype(np.int64)
        targets = int(self.rows.table.target_counts[indices].sum())
        return Work(int(lengths.sum()), targets, int((lengths**2).sum()))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _as_many(self, micro_batches: list[Batch]) -> list[Batch]:
        """As many on every rank: where rows of bins are padded, their number differs."""
        if not self.rows.splits or self._world is None:
            return micro_batches
        [most] = self._world.max([len(micro_batches)])
        return micro_batches + [self.rows.empty()] * (int(most) - len(micro_batches))

    def _plan(self, step: int) -> list[np.ndarray]:
        return self.batches.micro_batches(*divmod(step, self.batches.steps_per_epoch))

    def _fill(self, step: int, pool: ThreadPoolExecutor) -> None:
        """Hand steps to the threads, at least `step`, until enough micro-batches wait."""
        wanted = self._ahead.num_threads * self._ahead.each
        number = step
        while number == step or (self._num_waiting() < wanted and not self._is_last(number)):
            if number not in self._waiting:
                plan = self._plan(number)
                self._waiting[number] = [pool.submit(self._collate, rows) for rows in plan]
            number += 1

    def _num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _is_last(self, number: int) -> bool:
        return self._last_step is not None and number >= self._last_step

    def _collate(self, indices: np.ndarray) -> list[Batch]:
        batches = self.rows.batches(indices)
        return [batch.map(Tensor.pin_memory) for batch in batches] if self._ahead.pins else batches
