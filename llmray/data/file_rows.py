"""The rows of sets in order, from any place of them, as all ranks come to know them.

A round is one piece for each rank. A rank builds the rows of its piece in a thread, while the rows
of the round before are trained on; the exchange is a collective call of the caller's own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from logging import getLogger
from typing import Any

import numpy as np

from llmray.data import build, files, shards
from llmray.data.build import ShardReport
from llmray.data.pieces import DataFile, Piece
from llmray.data.planning import Plan, Shard
from llmray.data.quarantine import Quarantine
from llmray.data.row_format import RowFormat
from llmray.data.shards import Sample, SampleTable
from llmray.errors import LlmrayError

log = getLogger("llmray")

PIECE_BYTES = 1 << 19  # of source text; what a resume reads again is at most one piece


@dataclass(frozen=True)
class Ranks:
    """This rank among all; `gather` gives the values of all ranks to each, in rank order."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


@dataclass(frozen=True)
class Place:
    """A place in the files: `taken` rows of the piece that begins at `start` of file `file`.

    A row of the file that became several counts as these.
    """

    file: int = 0
    start: int = 0
    taken: int = 0


@dataclass(frozen=True)
class FileSet:
    """The files of a set of a stream, which count from `first_file`; at most `head` rows of them.

    Numbers of files are those of all sets together, so that each row has a number of its own.
    """

    first_file: int
    files: tuple[DataFile, ...]
    layout: RowFormat
    head: int | None = None


@dataclass(frozen=True)
class StreamRow:
    """A row of the files; `sample` is None where it is left out.

    `number` has its file and its row there, `place` is where the next one is. `goes_on` says that
    the next one is of the same row, which became several.
    """

    number: tuple[int, int]
    place: Place
    sample: Sample | None
    goes_on: bool = False


@dataclass(frozen=True)
class _Part:
    """What came of a rank's piece in a round; `rows` is the content of a shard's file.

    Of the piece's rows, which are `num_rows`, `numbers` are those in `rows`.
    """

    places: tuple[Place, ...]  # of all pieces of the round
    first_row: int = 0  # of the piece, in its file
    num_rows: int = 0
    rows: bytes | None = None
    numbers: tuple[int, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    bad: tuple[dict[str, Any], ...] = ()
    error: LlmrayError | None = None


class FileRows:
    """Rows of some sets, one after the other; iterating goes on from where it was started."""

    def __init__(
        self,
        plan: Plan,
        table: str,
        sets: Sequence[FileSet],
        ranks: Ranks,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Read from the beginning.

        Args:
            plan: how rows are built; its shards are not looked at.
            table: what the rows are for, `train` or `eval`.
            sets: in order.
            ranks: who share the work.
            quarantine: where rows go that cannot be read.
        """
        self.ranks = ranks
        self._begin = Place(sets[0].first_file if sets else 0)
        self._place = self._begin
        self._plan, self._table, self._sets = plan, table, sets
        self._quarantine = quarantine
        self._counts: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def start(self, place: Place | None = None) -> None:
        """Go on from a place, or the beginning, when it is iterated next."""
        self._place = place or self._begin
        self._counts = {}

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[StreamRow]:
        pieces = self._pieces(self._place)
        taken = self._place.taken
        coming = self._thread.submit(self._load, pieces)
        while True:
            parts = self.ranks.gather(coming.result())
            _raise(parts)
            if not parts[0].places:
                break
            coming = self._thread.submit(self._load, pieces)
            for place, part in zip(parts[0].places, parts, strict=False):
                self._count(part)
                yield from _rows(part, place, taken)
                taken = 0
        self._report()

    def _pieces(self, begin: Place) -> Iterator[tuple[Place, Piece, RowFormat]]:
        for each in self._sets:
            left = each.head
            for number, file in enumerate(each.files, each.first_file):
                if number < begin.file and left is None:
                    continue
                num_rows = 0
                for piece in files.pieces(file, PIECE_BYTES, left):
                    num_rows += piece.num_rows
                    if (number, piece.start) >= (begin.file, begin.start):
                        yield Place(number, piece.start), piece, each.layout
                left = None if left is None else left - num_rows

    def _load(self, pieces: Iterator[tuple[Place, Piece, RowFormat]]) -> _Part:
        """The next round, of which this rank builds one piece; what is wrong is told, not raised.

        All ranks cut the same files, so that they raise the same errors; but a file that one rank
        alone cannot read must not leave the others waiting.
        """
        try:
            taken = list(islice(pieces, self.ranks.world_size))
            places = tuple(place for place, _, _ in taken)
            if self.ranks.rank >= len(taken):
                return _Part(places)
            _, piece, layout = taken[self.ranks.rank]
            found = build.sort_rows(self._plan, Shard(self._table, ((piece, layout),)))
        except LlmrayError as error:
            return _Part((), error=error)
        rows = found.kept[self._table]
        return _Part(
            places,
            piece.first_row,
            piece.num_rows,
            shards.to_bytes(rows) if rows else None,
            tuple(found.numbers[self._table]),
            found.counts,
            tuple(found.problems),
            tuple(found.bad),
        )

    def _count(self, part: _Part) -> None:
        for name, count in part.counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        if self._quarantine is not None:
            self._quarantine.add(part.bad)

    def _report(self) -> None:
        """Say what came of the rows; after a resume of those since."""
        said = {
            "truncated": "cut to cutoff_len",
            "over_limit": "over cutoff_len left out",
            "empty": "empty ones left out",
            "without_target": "left out since no response is left within cutoff_len",
            "bad": "that cannot be read left out",
        }
        counts = self._counts
        parts = [f"{counts[name]} {words}" for name, words in said.items() if counts.get(name)]
        log.info("data: %d rows were streamed%s", counts.get("read", 0), _listed(parts))


def _listed(parts: Sequence[str]) -> str:
    return f"; of these {', '.join(parts)}" if parts else ""


def _rows(part: _Part, place: Place, first: int) -> Iterator[StreamRow]:
    """All rows of a part from number `first` on, what they hold in memory of its own."""
    table = SampleTable([part.rows]) if part.rows is not None else None
    kept: dict[int, list[int | None]] = {}
    for place_in_table, number in enumerate(part.numbers):
        kept.setdefault(number, []).append(place_in_table)
    taken = 0
    for number in range(part.num_rows):
        *more, last = kept.get(number, [None])
        for index in [*more, last]:
            taken += 1
            if taken <= first:
                continue
            sample = None
            if table is not None and index is not None:
                sample = table[index]
                sample = replace(sample, input_ids=np.array(sample.input_ids))
            where = (place.file, part.first_row + number)
            yield StreamRow(where, replace(place, taken=taken), sample, index != last)


def _raise(parts: Sequence[_Part]) -> None:
    """Raise what went wrong on any rank, the same on all of them."""
    for part in parts:
        if part.error is not None:
            raise part.error
    build.raise_problems([ShardReport({}, part.counts, problems=part.problems) for part in parts])
