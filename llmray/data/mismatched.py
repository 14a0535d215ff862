"""Judged rows with the answer of another row: from them stage kto estimates how far it has come.

The answer is that of the row before, in the order of the table, and the last one's for the first:
a rotation over the whole table, which follows from nothing but the table. Of a stream the first row
waits for the last one: `Rotation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np

from llmray.data.shards import Sample, SampleTable, Table
from llmray.errors import DataError


class RowTable(Table, Protocol):
    """A table whose rows count as one each."""

    def __getitem__(self, index: int) -> Sample:
        """A row."""
        ...


class JudgedTable:
    """The rows of a table, each with `mismatched`.

    An answer that does not fit behind the other prompt loses its end.

    Attributes:
        lengths: tokens of each row, without the mismatched answer, (num_rows,) int32.
        target_counts: targets of each row, (num_rows,) int32.
    """

    def __init__(self, table: RowTable, cutoff_len: int, name: str) -> None:
        """Wrap a table.

        Args:
            table: of judged rows.
            cutoff_len: tokens of a row at most.
            name: of the table, for an error.

        Raises:
            DataError: it has one row, to which there is no other answer.
        """
        if len(table) < 2:
            raise too_few(f"{len(table)} row in table {name}")
        self._table, self._cutoff_len = table, cutoff_len
        self.target_counts = table.target_counts
        self.lengths = table.lengths

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        own, other = self._table[index], self._table[index - 1 if index else len(self) - 1]
        return with_answer_of(other, own, self._cutoff_len)

    @property
    def num_rows(self) -> int:
        """Rows, as many as `len`."""
        return len(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without mismatched answers."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_wanted(self) -> int:
        """Rows whose answer is wanted."""
        if isinstance(self._table, SampleTable):
            return self._table.num_wanted
        return sum(bool(self._table[index].is_wanted) for index in range(len(self)))

    def samples(self, index: int) -> list[Sample]:
        """The sample of a row."""
        return [self[index]]


class Rotation:
    """The rotation over an epoch of a stream: the first row waits until the last one has come.

    Args:
        cutoff_len: tokens of a row at most.
    """

    def __init__(self, cutoff_len: int) -> None:
        self._first: Sample | None = None
        self._before: Sample | None = None  # the row that came last
        self._cutoff_len = cutoff_len

    def waiting(self) -> list[Sample]:
        """What is kept within an epoch: its first row and the one that came last, if there are."""
        return [row for row in (self._first, self._before) if row is not None]

    def wait(self, rows: list[Sample]) -> None:
        """Put back what was `waiting`."""
        self._first, self._before = rows or (None, None)

    def over(self, rows: Iterator[Sample]) -> Iterator[Sample]:
        """Each row with `mismatched`, the first one as the last.

        Raises:
            DataError: there is one row.
        """
        for row in rows:
            before, self._before = self._before, row
            if before is None:
                self._first = row
            else:
                yield with_answer_of(before, row, self._cutoff_len)
        first, before = self._first, self._before
        self._first = self._before = None
        if first is not None and before is not None:
            if first is before:
                raise too_few("a stream of one row")
            yield with_answer_of(before, first, self._cutoff_len)


def with_answer_of(other: Sample, own: Sample, cutoff_len: int) -> Sample:
    """`own` with `mismatched`: its prompt with the answer of another row."""
    prompt = own.input_ids[: _start(own)]
    first = _start(other)
    room = max(cutoff_len - len(prompt), 1)
    answer = other.input_ids[first : first + room]
    learned = np.ones(len(prompt) + len(answer), np.bool_)
    learned[: max(len(prompt), 1)] = False
    return replace(own, mismatched=Sample(np.concatenate([prompt, answer]), learned))


def too_few(found: str) -> DataError:
    """What is raised where there is no other answer."""
    return DataError(
        f"stage kto has {found}. Required: two or more, since the divergence is estimated from "
        "prompts with the answers of other rows. Take more data, or another val_size."
    )


def _start(sample: Sample) -> int:
    assert sample.starts is not None
    return int(sample.starts[0])
