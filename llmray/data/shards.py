"""Shards: Arrow files of token lists, written from numpy buffers, and read by memory-mapping.

A shard's file holds one record batch. A `SampleTable` is rows over the shards of a table: the
lists themselves, or blocks of a fixed length laid over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from llmray import store
from llmray.data.features import RowFeatures


@dataclass(frozen=True)
class Sample:
    """One row: its tokens, and which of them are targets; the first never is.

    `instead` has places, and the tokens that are learned there instead of those that stand there.
    `starts` is where the answers begin, one after the other behind the prompt that they share: of
    a pair two; None where the row is one sequence. `is_wanted` judges the one answer of a row, and
    `mismatched` is its prompt with the answer of another row. `said` is the conversation of a
    prompt, as `spoken` writes it.
    """

    input_ids: np.ndarray  # (T,) int32
    target_mask: np.ndarray  # (T,) bool
    instead: np.ndarray | None = None  # (k, 2) int32
    starts: np.ndarray | None = None  # (num_answers,) int32
    is_wanted: bool | None = None
    mismatched: Sample | None = None
    said: str | None = None

    def target_ids(self) -> np.ndarray:
        """The tokens that are learned, in their order."""
        if self.instead is None or not len(self.instead):
            return self.input_ids[self.target_mask]
        learned = self.input_ids.copy()
        learned[self.instead[:, 0]] = self.instead[:, 1]
        return learned[self.target_mask]


class Table(Protocol):
    """Rows of prepared data, or bins of them, which count as one each.

    Attributes:
        lengths: tokens of each, (num,) int32.
        target_counts: targets of each, (num,) int32.
    """

    lengths: np.ndarray
    target_counts: np.ndarray

    def __len__(self) -> int:
        """How many there are to be dealt."""
        ...

    @property
    def num_rows(self) -> int:
        """How many rows they hold together."""
        ...

    def samples(self, index: int) -> list[Sample]:
        """The rows of one."""
        ...


def write(path: Path, rows: Sequence[RowFeatures], numbers: Sequence[int] | None = None) -> None:
    """Write rows as a shard; the same rows give the same bytes.

    Args:
        path: the file.
        rows: what is written.
        numbers: of each row among those that the shard was built from; None: it was all of them.

    Raises:
        StoreError: the file cannot be written.
    """
    batch = _batch(rows, range(len(rows)) if numbers is None else numbers)
    # whoever notes that the shard is finished seals its files before
    with (
        store.replacing(path, syncs=False) as unfinished,
        pa.OSFile(str(unfinished), "wb") as sink,
    ):
        _write(batch, sink)


def to_bytes(rows: Sequence[RowFeatures]) -> bytes:
    """Rows as the content of a shard's file."""
    sink = pa.BufferOutputStream()
    _write(_batch(rows, range(len(rows))), sink)
    return bytes(sink.getvalue())


def _write(batch: Any, sink: Any) -> None:
    with ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _batch(rows: Sequence[RowFeatures], numbers: Sequence[int]) -> Any:
    columns = {
        "input_ids": _lists([row.input_ids for row in rows]),
        "targets": _lists([np.array(row.targets, np.int32) for row in rows]),
        "instead": _lists([np.array(row.instead, np.int32) for row in rows]),
        "num_targets": pa.array(np.array([row.num_targets for row in rows], np.int32)),
        "number": pa.array(np.array(numbers, np.int32)),
    }
    if any(row.starts for row in rows):
        columns["starts"] = _lists([np.array(row.starts, np.int32) for row in rows])
    if any(row.is_wanted is not None for row in rows):
        columns["is_wanted"] = pa.array(np.array([bool(row.is_wanted) for row in rows], np.int32))
    if any(row.said is not None for row in rows):
        columns["said"] = pa.array([row.said or "" for row in rows], pa.large_string())
    return pa.record_batch(columns)


def row_numbers(path: Path) -> np.ndarray:
    """The numbers that the rows of a shard were written with, (num_rows,) int32."""
    with pa.memory_map(str(path)) as source:
        return _view(ipc.open_file(source).get_batch(0).column("number"))


def _lists(arrays: Sequence[np.ndarray]) -> Any:
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate([*arrays, np.empty(0, np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


class _Shard:
    """The columns of a shard's file, as views of its memory-mapped bytes, or of its content."""

    def __init__(self, path: str | bytes) -> None:
        with pa.BufferReader(path) if isinstance(path, bytes) else pa.memory_map(path) as source:
            batch = ipc.open_file(source).get_batch(0)
        self.ids, self.offsets = _views(batch.column("input_ids"))
        self.runs, self.run_offsets = _views(batch.column("targets"))
        self.instead, self.instead_offsets = _views(batch.column("instead"))
        self.num_targets = _view(batch.column("num_targets"))
        names = (
            batch.schema.names
        )  # rows of one sequence have no starts, unjudged ones no judgement
        self.starts = _views(batch.column("starts")) if "starts" in names else None
        self.is_wanted = _view(batch.column("is_wanted")) if "is_wanted" in names else None
        self.said = batch.column("said") if "said" in names else None


def _views(column: Any) -> tuple[np.ndarray, np.ndarray]:
    return _view(column.values), _view(column.offsets)


def _view(column: Any) -> np.ndarray:
    """The values of an int32 column; its own `to_numpy` would load pandas."""
    if not len(column):
        return np.empty(0, np.int32)
    return np.frombuffer(column.buffers()[1], np.int32, len(column), 4 * column.offset)


class SampleTable:
    """Rows over the memory-mapped shards of a table.

    Attributes:
        lengths: tokens of each row, (num_rows,) int32.
        target_counts: targets of each row, (num_rows,) int32.
        order: as given.
    """

    def __init__(
        self,
        paths: Sequence[str | bytes],
        block_len: int | None = None,
        order: np.ndarray | None = None,
    ) -> None:
        """Open shards.

        Args:
            paths: files of the shards in order, or their contents.
            block_len: lay the tokens of all rows into blocks of this length, the last one
                shorter, all of it learned; None: a row is what it was when the shard was written.
            order: rows of the shards in the order of the table, which may leave some out and have
                others several times, (num_rows,) int64; None: all as they stand.
        """
        self._shards = [_Shard(path) for path in paths]
        self.order = order
        rows = [len(shard.num_targets) for shard in self._shards]
        self._row_starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        none = [np.empty(0, np.int32)]
        lengths = np.concatenate([np.diff(s.offsets) for s in self._shards] or none)
        targets = np.concatenate([s.num_targets for s in self._shards] or none)
        self._blocks: _Blocks | None = None
        if block_len is not None:
            self._blocks = _Blocks(lengths, order, block_len)
            self.lengths = np.diff(self._blocks.bounds).astype(np.int32)
            self.target_counts = self.lengths - 1
            return
        self.lengths = lengths if order is None else lengths[order]
        self.target_counts = targets if order is None else targets[order]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._blocks is None:
            return self._row(index if self.order is None else int(self.order[index]))
        parts = [self._tokens(*part) for part in self._blocks.parts(index)]
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        mask = np.ones(len(ids), np.bool_)
        mask[0] = False
        return Sample(ids, mask)

    @property
    def num_rows(self) -> int:
        """Rows, as many as `len`; a table in bins has more rows than bins."""
        return len(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_wanted(self) -> int:
        """Rows whose answer is wanted."""
        counts = [
            np.empty(0, np.int32) if s.is_wanted is None else s.is_wanted for s in self._shards
        ]
        wanted = np.concatenate(counts or [np.empty(0, np.int32)])
        return int(np.sum(wanted if self.order is None else wanted[self.order]))

    def _find(self, row: int) -> tuple[_Shard, int]:
        """The shard of a row, and its number there."""
        number = int(np.searchsorted(self._row_starts, row, "right")) - 1
        return self._shards[number], row - int(self._row_starts[number])

    def _tokens(self, row: int, start: int, stop: int) -> np.ndarray:
        shard, row = self._find(row)
        first = int(shard.offsets[row])
        return shard.ids[first + start : first + stop]

    def samples(self, index: int) -> list[Sample]:
        """The samples of a row: itself; a bin of a table in bins has several."""
        return [self[index]]

    def _row(self, index: int) -> Sample:
        shard, row = self._find(index)
        ids = shard.ids[shard.offsets[row] : shard.offsets[row + 1]]
        mask = np.zeros(len(ids), np.bool_)
        runs = shard.runs[shard.run_offsets[row] : shard.run_offsets[row + 1]]
        for start, stop in runs.reshape(-1, 2).tolist():
            mask[start:stop] = True
        instead = shard.instead[shard.instead_offsets[row] : shard.instead_offsets[row + 1]]
        starts = None
        if shard.starts is not None:
            values, offsets = shard.starts
            starts = values[offsets[row] : offsets[row + 1]]
        return Sample(
            ids,
            mask,
            instead.reshape(-1, 2) if len(instead) else None,
            starts,
            None if shard.is_wanted is None else bool(shard.is_wanted[row]),
            said=None if shard.said is None else shard.said[row].as_py(),
        )


class _Blocks:
    """Blocks of a fixed length over the tokens of rows in their order."""

    def __init__(self, lengths: np.ndarray, order: np.ndarray | None, block_len: int) -> None:
        self._order = order
        laid = lengths if order is None else lengths[order]
        self._starts = np.concatenate([[0], np.cumsum(laid, dtype=np.int64)])  # of rows, in tokens
        total = int(self._starts[-1])
        self.bounds = np.append(np.arange(0, total, block_len, dtype=np.int64), total)

    def parts(self, index: int) -> Iterator[tuple[int, int, int]]:
        """The rows of a block, each with the tokens of it that are in the block."""
        at, stop = int(self.bounds[index]), int(self.bounds[index + 1])
        place = int(np.searchsorted(self._starts, at, "right")) - 1
        while at < stop:
            first, end = int(self._starts[place]), min(int(self._starts[place + 1]), stop)
            if at < end:
                row = place if self._order is None else int(self._order[place])
                yield row, at - first, end - first
            at, place = max(at, end), place + 1
