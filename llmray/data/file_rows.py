"""The rows of files in order, from any place of them, as all ranks come to know them.

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
from llmray.data.conversation import RowFormat
from llmray.data.pieces import DataFile, Piece
from llmray.data.planning import Plan, Shard
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
    """A place in the files: `taken` rows of the piece that begins at `start` of file `file`."""

    file: int = 0
    start: int = 0
    taken: int = 0


@dataclass(frozen=True)
class _Part:
    """What came of a rank's piece in a round; `rows` is the content of a shard's file."""

    places: tuple[Place, ...]  # of all pieces of the round
    rows: bytes | None = None
    counts: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    error: LlmrayError | None = None


class FileRows:
    """Rows of some files; iterating goes on from `place`.

    Attributes:
        place: that of the row that was given last.
    """

    def __init__(
        self,
        plan: Plan,
        table: str,
        layouts: Sequence[tuple[DataFile, RowFormat]],
        ranks: Ranks,
    ) -> None:
        """Read from the beginning.

        Args:
            plan: how rows are built; its shards are not looked at.
            table: what the rows are for, `train` or `eval`.
            layouts: files in order, with how their rows are laid out.
            ranks: who share the work.
        """
        self.ranks = ranks
        self.place = Place()
        self._plan, self._table, self._layouts = plan, table, layouts
        self._counts: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def start(self, place: Place) -> None:
        """Go on from a place when it is iterated next."""
        self.place = place
        self._counts = {}

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Sample]:
        pieces = self._pieces(self.place)
        taken = self.place.taken
        coming = self._thread.submit(self._load, pieces)
        while True:
            parts = self.ranks.gather(coming.result())
            _raise(parts)
            if not parts[0].places:
                break
            coming = self._thread.submit(self._load, pieces)
            for place, part in zip(parts[0].places, parts, strict=False):
                self._count(part)
                for index, row in _rows(part, taken):
                    self.place = replace(place, taken=index + 1)
                    yield row
                taken = 0
        self._report()

    def _pieces(self, begin: Place) -> Iterator[tuple[Place, Piece, RowFormat]]:
        for number, (file, layout) in enumerate(self._layouts):
            if number < begin.file:
                continue
            for piece in files.pieces(file, PIECE_BYTES):
                if number > begin.file or piece.start >= begin.start:
                    yield Place(number, piece.start), piece, layout

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
            shards.to_bytes(rows) if rows else None,
            found.counts,
            tuple(found.problems),
        )

    def _count(self, part: _Part) -> None:
        for name, count in part.counts.items():
            self._counts[name] = self._counts.get(name, 0) + count

    def _report(self) -> None:
        """Say what an epoch came to; a resumed one from where it was resumed."""
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


def _rows(part: _Part, first: int) -> Iterator[tuple[int, Sample]]:
    """Rows of a part from number `first` on, each with its number, in memory of its own."""
    if part.rows is None:
        return
    table = SampleTable([part.rows])
    for index in range(first, len(table)):
        sample = table[index]
        yield index, replace(sample, input_ids=np.array(sample.input_ids))


def _raise(parts: Sequence[_Part]) -> None:
    """Raise what went wrong on any rank, the same on all of them."""
    for part in parts:
        if part.error is not None:
            raise part.error
    build.raise_problems([ShardReport({}, part.counts, problems=part.problems) for part in parts])
