"""Rows read while training: files piece by piece, each piece by one rank, shuffled in a buffer.

The rows of a stream and their order follow from the files, the seed and buffer_size alone. Ranks
take the pieces of the files in turns and exchange what came of them, so that every rank knows the
whole stream and none tokenizes what another does. Steps are then dealt as those of prepared data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from logging import getLogger
from typing import Any

import numpy as np

from llmray.data.batches import check_order, check_step, share
from llmray.data.mismatched import Rotation
from llmray.data.quarantine import Quarantine
from llmray.data.shards import Sample
from llmray.data.stream_mixing import MixedRows
from llmray.errors import DataError

log = getLogger("llmray")

DRAWS = 4096  # random numbers that are drawn at once


@dataclass(frozen=True)
class StreamOptions:
    """How rows become steps.

    `block_len` lays the tokens of all rows into blocks; `buffer_size` of None keeps the order of
    the files. `held_out` has numbers of rows that are not given. `drop_last` leaves out the last
    step of an epoch when it is not full. With `judged_len`, the most tokens of a row, each comes
    with the answer of another one.
    """

    per_device: int
    accumulation: int
    seed: int
    buffer_size: int | None
    block_len: int | None = None
    held_out: frozenset[tuple[int, int]] = frozenset()
    drop_last: bool = False
    judged_len: int | None = None


@dataclass
class _Position:
    """Where a stream stands: all but what lies in its buffer."""

    epoch: int = 0
    num_drawn: int = 0  # rows of the epoch that left the buffer


class Stream:
    """Steps over rows that are read on the way; Resumable, by any number of ranks.

    An epoch's last step may be smaller, as that of prepared data.

    Attributes:
        global_batch: rows of a full step, over all ranks and micro-batches.
        quarantine: where rows go that cannot be read, if they are put aside.
    """

    def __init__(
        self, rows: MixedRows, options: StreamOptions, quarantine: Quarantine | None = None
    ) -> None:
        self._source, self._options, self.quarantine = rows, options, quarantine
        self._ranks = rows.ranks
        self.global_batch = options.per_device * options.accumulation * self._ranks.world_size
        self._at = _Position()
        self._buffer: list[Sample] = []
        self._rest = np.empty(0, np.int32)  # tokens that do not fill a block yet
        self._rotation = None if options.judged_len is None else Rotation(options.judged_len)
        self._random: tuple[tuple[int, int], np.ndarray] | None = None
        self._rows = self._shuffled()

    def step(self) -> list[list[Sample]]:
        """The rows of this rank's micro-batches in the next step; all ranks call it together.

        Every rank has as many micro-batches as the others; those of a last step may be empty.

        Raises:
            DataError: a file or a row is wrong, or no row is there.
        """
        rows = self._take() or self._next_epoch()
        options, ranks = self._options, self._ranks
        lengths = np.array([len(row.input_ids) for row in rows], np.int32)
        dealt = share(lengths, options.per_device, ranks.world_size, ranks.rank)
        return [[rows[index] for index in part.tolist()] for part in dealt]

    def close(self) -> None:
        """End the threads that read ahead."""
        self._source.close()

    def state_dict(self) -> dict[str, Any]:
        """The position in the files, the buffer, and what the order of rows follows from."""
        return {
            "position": asdict(self._at),
            "rows": self._source.state(),
            "rest": self._rest.tolist(),
            "buffer": pack_samples(self._buffer),
            "rotation": pack_samples([] if self._rotation is None else self._rotation.waiting()),
            "seed": self._options.seed,
            "buffer_size": self._options.buffer_size,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position.

        Raises:
            CheckpointError: rows came in another order there, so the position says nothing here.
        """
        options = self._options
        names = {"seed": "seed (or data_seed)", "buffer_size": "buffer_size"}
        check_order(state, asdict(options), names)
        check_step(state, options.per_device, options.accumulation, self._ranks.world_size)
        self._at = _Position(**state["position"])
        self._source.start(state["rows"])
        self._rest = np.array(state["rest"], np.int32)
        self._buffer = unpack_samples(state["buffer"])
        if self._rotation is not None:
            self._rotation.wait(unpack_samples(state["rotation"]))
        self._rows = self._shuffled()

    def _take(self) -> list[Sample]:
        """The next rows of the epoch, as many as a step has; none at its end."""
        rows = list(islice(self._rows, self.global_batch))
        is_full = len(rows) == self.global_batch
        return rows if is_full or not self._options.drop_last else []

    def _next_epoch(self) -> list[Sample]:
        self._source.start()
        self._at = _Position(epoch=self._at.epoch + 1)
        self._rows = self._shuffled()
        rows = self._take()
        if not rows:
            raise DataError(
                "No row of the stream is left to train on: its files are empty, or no row has a "
                "response within cutoff_len, or all are set aside, or fewer are there than a step "
                "has and dataloader_drop_last leaves these out. Take more data, "
                "raise cutoff_len, lower val_size, or remove dataloader_drop_last."
            )
        return rows

    def _shuffled(self) -> Iterator[Sample]:
        """Rows in the order in which they are learned: one of the buffer, which is filled anew."""
        size = self._options.buffer_size or 1
        units, buffer = self._units(), self._buffer
        while True:
            buffer.extend(islice(units, size - len(buffer)))
            if not buffer:
                return
            index = self._draw(len(buffer))
            self._at.num_drawn += 1
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()

    def _draw(self, size: int) -> int:
        """A number below `size` that follows from the seed, the epoch and how many came before."""
        if size == 1:
            return 0
        block, at = divmod(self._at.num_drawn, DRAWS)
        key = (self._at.epoch, block)
        if self._random is None or self._random[0] != key:
            seeds = [self._options.seed % (1 << 64), *key]
            self._random = (key, np.random.default_rng(seeds).random(DRAWS))
        return int(self._random[1][at] * size)

    def _units(self) -> Iterator[Sample]:
        """Rows, or blocks of their tokens, in the order of the files."""
        block_len = self._options.block_len
        if block_len is None:
            kept = self._kept()
            yield from kept if self._rotation is None else self._rotation.over(kept)
            return
        rows = self._kept()
        while True:
            while len(self._rest) >= block_len:
                ids, self._rest = self._rest[:block_len], self._rest[block_len:]
                yield block(ids)
            row = next(rows, None)
            if row is None:
                break
            self._rest = np.concatenate([self._rest, row.input_ids])
        rest, self._rest = self._rest, self._rest[:0]
        if len(rest) > 1:  # a single token is no target
            yield block(rest)

    def _kept(self) -> Iterator[Sample]:
        for row in self._source:
            if row.sample is not None and row.number not in self._options.held_out:
                yield row.sample


def block(ids: np.ndarray) -> Sample:
    """Tokens of which all but the first are learned."""
    mask = np.ones(len(ids), np.bool_)
    mask[0] = False
    return Sample(ids.copy(), mask)


def pack_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples as a few tensors, for a checkpoint: for each field values and rows of each sample."""
    import torch

    packed: dict[str, Any] = {}
    others = [sample.mismatched for sample in samples if sample.mismatched is not None]
    if others:  # all rows have one, or none has
        packed["mismatched"] = pack_samples(others)
    for field in fields(Sample):
        if field.name == "mismatched":
            continue
        values = [getattr(sample, field.name) for sample in samples]
        arrays = [np.array([v]) if isinstance(v, bool) else v for v in values]
        present = [array for array in arrays if array is not None]
        if present:
            sizes = [-1 if array is None else len(array) for array in arrays]
            packed[field.name] = {
                "values": torch.from_numpy(np.concatenate(present)),
                "sizes": torch.tensor(sizes),
            }
    return packed


def unpack_samples(packed: Mapping[str, Any]) -> list[Sample]:
    """The samples that `pack_samples` got."""
    columns: dict[str, list[Any]] = {}
    for name, column in packed.items():
        if name == "mismatched":
            columns[name] = unpack_samples(column)
            continue
        values, at = column["values"].numpy(), 0
        arrays: list[Any] = []
        for size in column["sizes"].tolist():
            arrays.append(None if size < 0 else values[at : at + size].copy())
            at += max(size, 0)
        columns[name] = [bool(a[0]) for a in arrays] if name == "is_wanted" else arrays
    count = len(columns["input_ids"]) if columns else 0
    return [Sample(**{name: arrays[i] for name, arrays in columns.items()}) for i in range(count)]
