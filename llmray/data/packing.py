"""Packing: rows of a table in bins of bounded size, over the whole data set; a plan, no tokens.

A bin is what one row of a batch holds. Its rows stay samples of their own, which never see each
other: what is packed is where they are computed, not what.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmray import store
from llmray.data.mismatched import JudgedTable
from llmray.data.shards import Sample, SampleTable

FILES = ("packing-rows.npy", "packing-bounds.npy")


@dataclass(frozen=True)
class Packing:
    """Which rows share a bin: bin i holds `rows[bounds[i] : bounds[i + 1]]`.

    Bins come in the order of their first rows, rows of a bin rise.
    """

    rows: np.ndarray  # (num_rows,) int32
    bounds: np.ndarray  # (num_bins + 1,) int64
    capacity: int

    @property
    def num_bins(self) -> int:
        """How many bins there are."""
        return len(self.bounds) - 1

    @property
    def num_alone(self) -> int:
        """How many bins hold one row, to which no other was left that fits."""
        return int(np.count_nonzero(np.diff(self.bounds) == 1))

    def efficiency(self, lengths: np.ndarray) -> float:
        """The share of the bins' room that tokens fill."""
        return float(lengths.sum(dtype=np.int64)) / max(1, self.num_bins * self.capacity)


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """Rows in as few bins as best fit finds, the longest rows first.

    Rows of equal length are placed together and bins with equal room are one class, so that the
    time follows from how many lengths there are, not how many rows. Best fit decreasing, D. S.
    Johnson 1973.

    Args:
        lengths: tokens of each row, (num_rows,) int32.
        capacity: tokens of a bin.

    Raises:
        ValueError: a row is longer than a bin.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row has {lengths.max()} tokens, a bin {capacity}")
    longest_first = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bins = _Bins(capacity)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bins.place(size, count)
    of_row = np.empty(len(lengths), np.int64)
    of_row[longest_first] = bins.placed
    return _in_order(of_row, bins.num_bins, capacity)


class _Bins:
    """Bins under packing, by the room that they have left.

    Attributes:
        placed: the bin of each row, in the order in which rows were placed.
        num_bins: bins that were opened.
    """

    def __init__(self, capacity: int) -> None:
        self.placed: list[int] = []
        self.num_bins = 0
        self._capacity = capacity
        self._with_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []  # the keys of `_with_room`, rising

    def place(self, size: int, count: int) -> None:
        """Place `count` rows of `size` tokens, each into the fullest bin that has room for it.

        A bin that took one is then the fullest with room for the next, if it has any: so the bins
        of a class are filled one after the other, each with as many rows as it takes.
        """
        rooms = self._rooms
        first = at = bisect_left(rooms, size)
        filled: list[tuple[int, list[int]]] = []
        while count and at < len(rooms):
            room = rooms[at]
            bins = self._with_room[room]
            count = self._fill(bins, room, size, count, filled)
            if not bins:
                del self._with_room[room]
                at += 1
        del rooms[first:at]
        if count:
            last = self.num_bins - 1
            self.num_bins += -(-count // (self._capacity // size))
            opened = list(range(self.num_bins - 1, last, -1))  # bins are taken from the end
            self._fill(opened, self._capacity, size, count, filled)
        for room, bins in filled:
            if room not in self._with_room:
                insort(rooms, room)
            self._with_room.setdefault(room, []).extend(bins)

    def _fill(
        self,
        bins: list[int],
        room: int,
        size: int,
        count: int,
        filled: list[tuple[int, list[int]]],
    ) -> int:
        """Move bins of one class to `filled` while rows are left; returns how many are left."""
        each = room // size
        num_full = min(len(bins), count // each)
        if num_full:
            full = bins[-num_full:]
            del bins[-num_full:]
            self.placed += full * each
            filled.append((room - each * size, full))
            count -= num_full * each
        if count and bins:  # fewer rows are left than the next bin takes
            last = bins.pop()
            self.placed += [last] * count
            filled.append((room - count * size, [last]))
            count = 0
        return count


def _in_order(of_row: np.ndarray, num_bins: int, capacity: int) -> Packing:
    """The packing in which row i is in the bin `of_row[i]`, its bins by their first rows."""
    sizes = np.bincount(of_row, minlength=num_bins)
    grouped = np.argsort(of_row, kind="stable")
    first_rows = grouped[np.cumsum(sizes) - sizes]
    by_first = np.argsort(first_rows)
    number = np.empty(num_bins, np.int64)
    number[by_first] = np.arange(num_bins)
    rows = np.argsort(number[of_row], kind="stable").astype(np.int32)
    bounds = np.concatenate([[0], np.cumsum(sizes[by_first])]).astype(np.int64)
    return Packing(rows, bounds, capacity)


def write(folder: Path, packing: Packing) -> None:
    """Write the plan beside the shards.

    Raises:
        StoreError: it cannot be written.
    """
    for name, array in zip(FILES, (packing.rows, packing.bounds), strict=True):
        with store.replacing(folder / name) as unfinished, open(unfinished, "wb") as file:
            np.save(file, array)


def read(folder: str, capacity: int) -> Packing:
    """The plan that lies beside shards, memory-mapped."""
    rows, bounds = (np.load(store.join(folder, name), mmap_mode="r") for name in FILES)
    return Packing(rows, bounds, capacity)


def build(folder: Path, lengths: np.ndarray, capacity: int) -> dict[str, Any]:
    """Pack rows and write the plan beside their shards; returns what came of it, in JSON types.

    Raises:
        StoreError: it cannot be written.
    """
    started = time.perf_counter()
    made = pack(lengths, capacity)
    write(folder, made)
    return {
        "bin_len": capacity,
        "bins": made.num_bins,
        "alone": made.num_alone,
        "efficiency": made.efficiency(lengths),
        "seconds": time.perf_counter() - started,
    }


def described(built: Mapping[str, Any]) -> str:
    """What `build` came to, for a line of the log."""
    return (
        f"{built['bins']} bins of {built['bin_len']} tokens, {built['efficiency']:.1%} full, in "
        f"{built['seconds']:.1f} s; {built['alone']} rows are alone in theirs, since no other was "
        "left that fits"
    )


class PackedTable:
    """The rows of a table, in bins: what is dealt and counted is a bin.

    Attributes:
        table: the rows.
        packing: which rows share a bin.
        lengths: tokens of each bin, (num_bins,) int32.
        target_counts: targets of each bin, (num_bins,) int32.
    """

    def __init__(self, table: SampleTable | JudgedTable, packing: Packing) -> None:
        self.packing = packing
        self.table = table
        self.lengths = self._sums(table.lengths)
        self.target_counts = self._sums(table.target_counts)

    def __len__(self) -> int:
        return self.packing.num_bins

    @property
    def num_rows(self) -> int:
        """Rows in all bins."""
        return len(self.packing.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self.table.num_tokens

    def samples(self, index: int) -> list[Sample]:
        """The rows of a bin."""
        return [self.table[row] for row in self.numbers(index)]

    def numbers(self, index: int) -> list[int]:
        """Which rows of the table a bin holds."""
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} of {len(self)}")
        first, last = self.packing.bounds[index : index + 2]
        found: list[int] = self.packing.rows[first:last].tolist()
        return found

    def _sums(self, counts: np.ndarray) -> np.ndarray:
        starts = self.packing.bounds[:-1]
        return np.add.reduceat(counts[self.packing.rows], starts).astype(np.int32)
