"""Rows of a set whose id an earlier row has, for sets whose ids dataset_info.json names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

import numpy as np

from llmray.data import files
from llmray.data.pieces import Piece
from llmray.data.row_format import RowFormat

DIGEST = np.dtype([("first", "<u8"), ("second", "<u8")])


def repeated_rows(pieces: Iterable[tuple[Piece, RowFormat]]) -> np.ndarray:
    """Numbers of rows, from 0, whose id stood before: (num_repeated,) int64, rising.

    Reads all rows; none, where the set's layout names no id. A row without an id repeats none.

    Args:
        pieces: all of a set, in order.
    """
    digests = b"".join(_digests(pieces))
    ids = np.frombuffer(digests, DIGEST)
    _, firsts = np.unique(ids, return_index=True)
    is_first = np.zeros(len(ids), bool)
    is_first[firsts] = True
    return np.flatnonzero(~is_first)


def _digests(pieces: Iterable[tuple[Piece, RowFormat]]) -> Iterator[bytes]:
    number = 0
    for piece, layout in pieces:
        column = layout.column("id")
        if column is None:
            return
        for row in files.read(piece):
            value = row.get(column) if isinstance(row, Mapping) else None
            said = f"row {number}" if value is None else f"id {value!r}"
            yield blake2b(said.encode(errors="replace"), digest_size=DIGEST.itemsize).digest()
            number += 1
