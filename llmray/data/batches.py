"""Which rows form each step, and which rank computes them in which micro-batch.

The rows of step k of an epoch follow from the seed, the epoch, k and the global batch alone; how
many ranks and micro-batches share them changes only who computes what.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from llmray.errors import CheckpointError, DataError

Order = Literal["random", "sequential", "group_by_length"]


class Batches:
    """The plan of steps of a table; a Resumable whose position is an epoch and a step of it.

    Attributes:
        steps_per_epoch: steps that see every row once; the last one may be smaller, or left out.
        global_batch: rows of a full step, over all ranks and micro-batches.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        per_device: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        order: Order,
        drop_last: bool = False,
    ) -> None:
        """Plan steps.

        Args:
            lengths: tokens of each row, (num_rows,) int32.
            per_device: most rows of a micro-batch.
            accumulation: micro-batches of a full step on each rank.
            world_size: ranks.
            rank: this one.
            seed: of the order of rows; epoch e is drawn with seed + e.
            order: random, that of the table, or random with rows of like length near each other.
            drop_last: leave out the last step of an epoch when it is not full.

        Raises:
            DataError: no step is left.
        """
        self._lengths = lengths
        self._per_device, self._accumulation = per_device, accumulation
        self._world_size, self._rank = world_size, rank
        self._seed, self._kind = seed, order
        self.global_batch = per_device * accumulation * world_size
        full = len(lengths) // self.global_batch
        self.steps_per_epoch = full if drop_last else -(-len(lengths) // self.global_batch)
        if drop_last and not full:
            raise DataError(
                f"dataloader_drop_last=true leaves no step: there are {len(lengths)} rows, and a "
                f"step has {self.global_batch}. Lower per_device_train_batch_size or "
                "gradient_accumulation_steps, or remove dataloader_drop_last."
            )
        self._epoch, self._step = 0, 0  # of the next step
        self._order: tuple[int, np.ndarray] | None = None

    def step(self, epoch: int, k: int) -> list[np.ndarray]:
        """The rows of this rank's micro-batches in step k of an epoch; moves the position past it.

        Every rank has as many micro-batches as the others; those of a last step may be empty.
        """
        made = self.micro_batches(epoch, k)
        self.pass_by(epoch, k)
        return made

    def micro_batches(self, epoch: int, k: int) -> list[np.ndarray]:
        """What `step` gives; leaves the position where it is."""
        rows = self.rows(epoch, k)
        dealt = share(self._lengths[rows], self._per_device, self._world_size, self._rank)
        return [rows[places] for places in dealt]

    def rows(self, epoch: int, k: int) -> np.ndarray:
        """The rows of step k of an epoch, over all ranks and micro-batches."""
        if not 0 <= k < self.steps_per_epoch:
            raise IndexError(f"step {k} of {self.steps_per_epoch}")
        part = slice(k * self.global_batch, (k + 1) * self.global_batch)
        if self._kind == "sequential":
            return np.arange(len(self._lengths))[part]
        if self._order is None or self._order[0] != epoch:
            import torch

            generator = torch.Generator().manual_seed(self._seed + epoch)
            order = torch.randperm(len(self._lengths), generator=generator).numpy()
            if self._kind == "group_by_length":
                order = by_length(order, self._lengths, self.global_batch)
            self._order = (epoch, order)
        return self._order[1][part]

    def pass_by(self, epoch: int, k: int) -> None:
        """Move the position past step k of an epoch."""
        self._epoch, self._step = divmod(epoch * self.steps_per_epoch + k + 1, self.steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order of rows follows from."""
        return {
            "epoch": self._epoch,
            "step": self._step,
            "seed": self._seed,
            "global_batch": self.global_batch,
            "num_rows": len(self._lengths),
            "steps_per_epoch": self.steps_per_epoch,
            "order": self._kind,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position.

        Raises:
            CheckpointError: rows came in another order there, so the position says nothing here.
        """
        names = {
            "seed": "seed (or data_seed)",
            "num_rows": "number of rows",
            "order": "order of rows (train_sampling_strategy, disable_shuffling)",
        }
        check_order(state, self.state_dict(), names)
        check_step(state, self._per_device, self._accumulation, self._world_size)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"The checkpoint's epochs have {state['steps_per_epoch']} steps, here they have "
                f"{self.steps_per_epoch}. A resume needs the checkpoint's dataloader_drop_last: "
                "use it, or start anew with overwrite_output_dir: true."
            )
        self._epoch, self._step = state["epoch"], state["step"]


def by_length(order: np.ndarray, lengths: np.ndarray, global_batch: int) -> np.ndarray:
    """A random order with rows of like length near each other, as transformers groups them.

    The order is cut into stretches of up to 50 steps, at least four of them where rows suffice;
    each is sorted from long to short. The longest row of all comes first, so that memory that does
    not suffice shows at once.

    Args:
        order: a permutation, (num_rows,).
        lengths: tokens of each row, (num_rows,).
        global_batch: rows of a step.
    """
    stretch = global_batch * max(1, min(len(order) // (global_batch * 4), 50))
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    parts = [part[np.argsort(-lengths[part].astype(np.int64), kind="stable")] for part in parts]
    longest = max(range(len(parts)), key=lambda i: int(lengths[parts[i][0]]))
    parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    return np.concatenate(parts)


def check_order(
    state: Mapping[str, Any], ours: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Fail if a position was taken in another order of rows.

    Args:
        state: of the checkpoint.
        ours: of this run.
        names: entries of both that decide the order, and what users call them.

    Raises:
        CheckpointError: one differs.
    """
    for name, said in names.items():
        if state[name] != ours[name]:
            raise CheckpointError(
                f"The checkpoint's {said} is {state[name]}, here it is {ours[name]}: rows come "
                "in another order. Use the checkpoint's, or start anew with "
                "overwrite_output_dir: true."
            )


def check_step(
    state: Mapping[str, Any], per_device: int, accumulation: int, world_size: int
) -> None:
    """Fail if a step of the checkpoint has another number of rows.

    Raises:
        CheckpointError: it has.
    """
    theirs, ours = state["global_batch"], per_device * accumulation * world_size
    if theirs != ours:
        raise CheckpointError(
            f"The checkpoint's step has {theirs} rows, here it has {ours} = "
            f"per_device_train_batch_size {per_device} x gradient_accumulation_steps "
            f"{accumulation} x {world_size} workers. A resume needs a product of {theirs}: change "
            "one of the three, or start anew with overwrite_output_dir: true."
        )


def share(lengths: np.ndarray, per_device: int, world_size: int, rank: int) -> list[np.ndarray]:
    """Which rows of a step are in each micro-batch of a rank; tokens are balanced.

    Every rank has as many micro-batches as the others; those of a last step may be empty.

    Args:
        lengths: tokens of each row of the step, (num_rows,).
        per_device: most rows of a micro-batch.
        world_size: ranks.
        rank: this one.
    """
    count = -(-len(lengths) // (per_device * world_size))
    mine = _deal(lengths, np.arange(len(lengths)), world_size, count * per_device)[rank]
    return _deal(lengths, mine, count, per_device)


def _deal(lengths: np.ndarray, rows: np.ndarray, num_bins: int, capacity: int) -> list[np.ndarray]:
    """Rows in bins of at most `capacity`, tokens balanced; each bin keeps the rows' order."""
    if num_bins == 1:
        return [rows]
    return [rows[places] for places in deal(lengths[rows].tolist(), num_bins, capacity)]


def deal(sizes: Sequence[int], num_bins: int, capacity: int) -> list[list[int]]:
    """Indices of `sizes` in bins whose sums are near each other: the largest first.

    Each goes to the bin of the smallest sum that has fewer than `capacity`; bins come in the order
    of their number, indices in a bin rise. Longest-processing-time rule, Graham 1969.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    open_bins = [(0, number) for number in range(num_bins)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, number = open_bins[0]
        bins[number].append(index)
        if len(bins[number]) == capacity:
            heapq.heappop(open_bins)
        else:
            heapq.heapreplace(open_bins, (total + sizes[index], number))
    return [sorted(chosen) for chosen in bins]
