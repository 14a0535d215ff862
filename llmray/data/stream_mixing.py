"""Sets of a stream one after the other, or in turns as `mixing` puts those of prepared data.

A set's end is only met, not known; so one row of each set is always read ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmray.data import mixing
from llmray.data.file_rows import FileRows, Place, Ranks, StreamRow
from llmray.data.mixing import Strategy
from llmray.errors import DataError


@dataclass(frozen=True)
class Mixing:
    """How sets become one: the keys of that name, and the seed of the draws."""

    strategy: Strategy = "concat"
    probabilities: tuple[float, ...] = ()
    seed: int = 0


class _Ahead:
    """A set from which one row is read ahead.

    Attributes:
        place: of the row after the one that was taken last; None at the beginning.
    """

    def __init__(self, reader: FileRows) -> None:
        self.reader = reader
        self.place: Place | None = None
        self._rows: Iterator[StreamRow] = iter(())
        self._next: StreamRow | None = None

    def start(self, place: Place | None) -> None:
        self.place = place
        self.reader.start(place)
        self._rows = iter(self.reader)
        self._next = next(self._rows, None)

    @property
    def is_used_up(self) -> bool:
        return self._next is None

    def take(self) -> StreamRow:
        row, self._next = self._next, next(self._rows, None)
        assert row is not None
        self.place = row.place
        return row


class MixedRows:
    """The rows of the sets of a stream; iterating goes on from where it was started."""

    def __init__(self, readers: Sequence[FileRows], names: Sequence[str], mixed: Mixing) -> None:
        """Read from the beginning.

        Args:
            readers: of each set; of all of them together where they follow one another.
            names: what to call each.
            mixed: how they become one.
        """
        self._sets = [_Ahead(reader) for reader in readers]
        self._names, self._mixed = names, mixed
        self._in_order = mixed.strategy == "concat" or len(readers) == 1
        self.start()

    @property
    def ranks(self) -> Ranks:
        """Who share the work."""
        return self._sets[0].reader.ranks

    def start(self, state: Mapping[str, Any] | None = None) -> None:
        """Go on from what `state` gave, or from the beginning, when it is iterated next."""
        none = [None] * len(self._sets)
        places = none if state is None else state["places"]
        self._places = [None if place is None else Place(**place) for place in places]
        self._num_draws = 0 if state is None else int(state["num_draws"])
        # the set of the row that became several, of which some are still to come
        self._open: int | None = None if state is None else state["open"]
        self._done = np.array(none if state is None else state["done"], bool)
        # of the block of draws at hand: which sets were used up before it
        self._were_done = np.array(none if state is None else state["were_done"], bool)

    def state(self) -> dict[str, Any]:
        """Where iterating stands, in JSON types."""
        return {
            "places": [None if place is None else asdict(place) for place in self._places],
            "num_draws": self._num_draws,
            "open": self._open,
            "done": self._done.tolist(),
            "were_done": self._were_done.tolist(),
        }

    def close(self) -> None:
        """End the threads."""
        for each in self._sets:
            each.reader.close()

    def __iter__(self) -> Iterator[StreamRow]:
        if self._in_order:
            [only] = self._sets
            only.reader.start(self._places[0])
            for row in only.reader:
                self._places[0] = row.place
                yield row
            return
        for each, place in zip(self._sets, self._places, strict=True):
            each.start(place)
            self._require_rows(each)
        if self._open is not None:
            yield from self._take(self._open)
        if self._mixed.probabilities:
            yield from self._drawn()
        else:
            yield from self._in_turns()

    def _require_rows(self, each: _Ahead) -> None:
        if each.place is None and each.is_used_up:
            name = self._names[self._sets.index(each)]
            raise DataError(
                f"{name} has no rows. Required: at least one to interleave. Mend its files, or "
                "leave it out."
            )

    def _in_turns(self) -> Iterator[StreamRow]:
        strategy, count = self._mixed.strategy, len(self._sets)
        while True:
            turn = self._num_draws % count
            if turn == 0 and self._ends_before_round(strategy):
                return
            self._num_draws += 1
            if strategy == "interleave_once" and self._sets[turn].is_used_up:
                continue
            yield from self._take(turn)

    def _ends_before_round(self, strategy: Strategy) -> bool:
        if strategy == "interleave_under":
            return any(each.is_used_up for each in self._sets)
        return bool(self._done.all())

    def _drawn(self) -> Iterator[StreamRow]:
        strategy = self._mixed.strategy
        probabilities = np.array(self._mixed.probabilities, np.float64)
        waited_for = probabilities > 0  # a set that is never drawn is not
        while not self._is_over(waited_for):
            block, at = divmod(self._num_draws, mixing.DRAWS)
            if at == 0:
                self._were_done = self._done.copy()
            is_once = strategy == "interleave_once"
            weights = np.where(self._were_done & is_once, 0, probabilities)
            for number in self._draws(block, weights)[at:]:
                self._num_draws += 1
                if is_once and self._sets[number].is_used_up:
                    continue
                yield from self._take(number)
                if self._is_over(waited_for):
                    return

    def _is_over(self, waited_for: np.ndarray) -> bool:
        used_up = self._done[waited_for]
        return bool(used_up.any() if self._mixed.strategy == "interleave_under" else used_up.all())

    def _draws(self, block: int, weights: np.ndarray) -> list[int]:
        """The sets of a block of rows; those before it took as many numbers of the generator."""
        generator = np.random.default_rng(self._mixed.seed)
        generator.bit_generator.advance(block * mixing.DRAWS)  # type: ignore[attr-defined]
        chosen = generator.choice(len(weights), mixing.DRAWS, p=weights / weights.sum())
        return [int(number) for number in chosen]

    def _take(self, number: int) -> Iterator[StreamRow]:
        """The next row of a set, all that it became; the set begins again where it is used up."""
        each = self._sets[number]
        if each.is_used_up:
            each.start(None)
        goes_on = True
        while goes_on:
            row = each.take()
            goes_on = row.goes_on
            self._places[number] = each.place
            self._done[number] |= each.is_used_up
            self._open = number if goes_on else None
            yield row
