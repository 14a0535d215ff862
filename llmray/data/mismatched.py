"""Judged rows with the answer of another row: from them stage kto estimates how far it has come.

The answer is that of the row before, in the order of the table, and the last one's for the first:
a rotation over the whole table, which follows from nothing but the table.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmray.data.shards import Sample, SampleTable
from llmray.errors import DataError


class JudgedTable:
    """The rows of a table, each with `mismatched`.

    An answer that does not fit behind the other prompt loses its end.

    Attributes:
        lengths: tokens of each row, without the mismatched answer, (num_rows,) int32.
        target_counts: targets of each row, (num_rows,) int32.
    """

    def __init__(self, table: SampleTable, cutoff_len: int, name: str) -> None:
        """Wrap a table.

        Args:
            table: of judged rows.
            cutoff_len: tokens of a row at most.
            name: of the table, for an error.

        Raises:
            DataError: it has one row, to which there is no other answer.
        """
        if len(table) < 2:
            raise DataError(
                f"stage kto has {len(table)} row in table {name}. Required: two or more, since the "
                "divergence is estimated from prompts with the answers of other rows. Take more "
                "data, or another val_size."
            )
        self._table, self._cutoff_len = table, cutoff_len
        self.target_counts = table.target_counts
        self.lengths = table.lengths

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        own, other = self._table[index], self._table[index - 1 if index else len(self) - 1]
        return replace(own, mismatched=self._behind(own, other))

    @property
    def num_rows(self) -> int:
        """Rows, as many as `len`."""
        return len(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without mismatched answers."""
        return self._table.num_tokens

    @property
    def num_wanted(self) -> int:
        """Rows whose answer is wanted."""
        return self._table.num_wanted

    def samples(self, index: int) -> list[Sample]:
        """The sample of a row."""
        return [self[index]]

    def _behind(self, own: Sample, other: Sample) -> Sample:
        """The prompt of one row with the answer of another."""
        prompt = own.input_ids[: _start(own)]
        first = _start(other)
        room = max(self._cutoff_len - len(prompt), 1)
        answer = other.input_ids[first : first + room]
        learned = np.ones(len(prompt) + len(answer), np.bool_)
        learned[: max(len(prompt), 1)] = False
        return Sample(np.concatenate([prompt, answer]), learned)


def _start(sample: Sample) -> int:
    assert sample.starts is not None
    return int(sample.starts[0])
