"""Which rows form each step, and which rank computes them in which micro-batch.

The rows of step k of an epoch follow from the seed, the epoch, k and the global batch alone; how
many ranks and micro-batches share them changes only who computes what.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmray.errors import CheckpointError


class Batches:
    """The plan of steps of a table; a Resumable whose position is an epoch and a step of it.

    Attributes:
        steps_per_epoch: steps that see every row once; the last one may be smaller.
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
        shuffle: bool,
    ) -> None:
        """Plan steps.

        Args:
            lengths: tokens of each row, (num_rows,) int32.
            per_device: most rows of a micro-batch.
            accumulation: micro-batches of a full step on each rank.
            world_size: ranks.
            rank: this one.
            seed: of the order of rows; epoch e is drawn with seed + e.
            shuffle: whether rows are drawn in random order; else in that of the table.
        """
        self._lengths = lengths
        self._per_device, self._accumulation = per_device, accumulation
        self._world_size, self._rank = world_size, rank
        self._seed, self._shuffle = seed, shuffle
        self.global_batch = per_device * accumulation * world_size
        self.steps_per_epoch = -(-len(lengths) // self.global_batch)
        self._epoch, self._step = 0, 0  # of the next step
        self._order: tuple[int, np.ndarray] | None = None

    def step(self, epoch: int, k: int) -> list[np.ndarray]:
        """The rows of this rank's micro-batches in step k of an epoch.

        Every rank has as many micro-batches as the others; those of a last step may be empty.
        """
        if not 0 <= k < self.steps_per_epoch:
            raise IndexError(f"step {k} of {self.steps_per_epoch}")
        rows = self._rows(epoch, k)
        self._epoch, self._step = divmod(epoch * self.steps_per_epoch + k + 1, self.steps_per_epoch)
        count = -(-len(rows) // (self._per_device * self._world_size))
        mine = self._deal(rows, self._world_size, count * self._per_device)[self._rank]
        return self._deal(mine, count, self._per_device)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order of rows follows from."""
        return {
            "epoch": self._epoch,
            "step": self._step,
            "seed": self._seed,
            "global_batch": self.global_batch,
            "num_rows": len(self._lengths),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position.

        Raises:
            CheckpointError: rows came in another order there, so the position says nothing here.
        """
        ours = self.state_dict()
        names = {"seed": "seed (or data_seed)", "num_rows": "number of rows"}
        for name, said in names.items():
            if state[name] != ours[name]:
                raise CheckpointError(
                    f"The checkpoint's {said} is {state[name]}, here it is {ours[name]}: rows come "
                    "in another order. Use the checkpoint's, or start anew with "
                    "overwrite_output_dir: true."
                )
        if state["global_batch"] != self.global_batch:
            raise CheckpointError(
                f"The checkpoint's step has {state['global_batch']} rows, here it has "
                f"{self.global_batch} = per_device_train_batch_size {self._per_device} x "
                f"gradient_accumulation_steps {self._accumulation} x {self._world_size} workers. A "
                f"resume needs a product of {state['global_batch']}: change one of the three, or "
                "start anew with overwrite_output_dir: true."
            )
        self._epoch, self._step = state["epoch"], state["step"]

    def _rows(self, epoch: int, k: int) -> np.ndarray:
        part = slice(k * self.global_batch, (k + 1) * self.global_batch)
        if not self._shuffle:
            return np.arange(len(self._lengths))[part]
        if self._order is None or self._order[0] != epoch:
            import torch

            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = (epoch, torch.randperm(len(self._lengths), generator=generator).numpy())
        return self._order[1][part]

    def _deal(self, rows: np.ndarray, num_bins: int, capacity: int) -> list[np.ndarray]:
        """Rows in bins of at most `capacity`, tokens balanced; each bin keeps the rows' order."""
        if num_bins == 1:
            return [rows]
        return [rows[places] for places in deal(self._lengths[rows].tolist(), num_bins, capacity)]


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
