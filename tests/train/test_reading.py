"""Reading ahead: the same batches in the same order, before they are asked for; errors told."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from llmray.batch import Batch
from llmray.data.batches import Batches
from llmray.data.shards import Sample
from llmray.train.reading import Ahead, Reader, Rows, Work

LENGTHS = np.random.default_rng(0).integers(2, 40, 50).astype(np.int32)


class Table:
    """Rows of given lengths; notes which thread read which."""

    def __init__(self) -> None:
        self.lengths = LENGTHS
        self.target_counts = LENGTHS - 1
        self.read: list[tuple[int, str]] = []

    def samples(self, index: int) -> list[Sample]:
        self.read.append((index, threading.current_thread().name))
        ids = np.arange(LENGTHS[index], dtype=np.int32) + index
        mask = np.ones(len(ids), np.bool_)
        mask[0] = False
        return [Sample(ids, mask)]


def reader(ahead: Ahead, last_step: int | None = None) -> Reader:
    rows = Rows(Table(), flat=True, pad_id=0)  # type: ignore[arg-type]
    return Reader(rows, Batches(LENGTHS, 2, 3, 1, 0, 1, "random"), ahead, last_step)


def equal(one: list[Batch], two: list[Batch]) -> bool:
    pairs = zip(one, two, strict=True)
    return all(
        torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets)
        for a, b in pairs
    )


@pytest.mark.parametrize("ahead", [Ahead(1, 1), Ahead(1), Ahead(3), Ahead(4, 7)])
def test_threads_change_nothing(ahead: Ahead) -> None:
    alone, helped = reader(Ahead()), reader(ahead, last_step=20)
    for step in range(4, 20):  # as after a resume, over the border of an epoch of 9 steps
        assert equal(alone.step(step), helped.step(step))
        assert alone.batches.state_dict() == helped.batches.state_dict()
    helped.close()


def test_rows_are_read_before_they_are_asked_for_and_not_beyond_the_end() -> None:
    helped = reader(Ahead(2, 3), last_step=4)
    helped.step(0)
    assert sorted(helped._waiting) == [1]  # 6 micro-batches wanted, 3 a step
    for step in (1, 2, 3):
        helped.step(step)
    assert helped._waiting == {}
    helped.close()
    read = helped.rows.table.read  # type: ignore[attr-defined]
    assert len(read) == 4 * 6
    assert all(name.startswith("read") for _, name in read)


def test_an_error_in_a_thread_is_raised_where_the_step_is_asked_for() -> None:
    helped = reader(Ahead(2))
    helped.rows.table.lengths = LENGTHS  # type: ignore[misc]
    helped.rows.table.__class__ = type("Broken", (Table,), {"samples": lambda *_: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        helped.step(0)
    helped.close()


def test_work_is_that_of_the_rows() -> None:
    """Lengths 3 and 5: 8 tokens, 6 targets, 9 + 25 squares."""
    lengths = np.array([3, 5], np.int32)
    table = Table()
    table.lengths, table.target_counts = lengths, lengths - 1
    rows = Rows(table, flat=True, pad_id=0)  # type: ignore[arg-type]
    made = Reader(rows, Batches(lengths, 2, 1, 1, 0, 1, "random"), Ahead())
    assert made.work(0) == Work(8, 6, 34)


def test_pinned_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    reader(Ahead(pins=True)).step(0)
    assert len(pinned) == 3 * 6
