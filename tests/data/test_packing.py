from pathlib import Path

import numpy as np
import pytest

from llmray.data import packing, shards
from llmray.data.features import RowFeatures
from llmray.data.packing import PackedTable, pack
from llmray.data.shards import SampleTable


def skewed(count: int, capacity: int) -> np.ndarray:
    """Mostly short rows, some long ones, some cut to the capacity."""
    lengths = np.random.default_rng(0).lognormal(np.log(capacity) - 2.5, 1.2, count)
    return np.clip(lengths, 2, capacity).astype(np.int32)


def uniform(count: int, capacity: int) -> np.ndarray:
    return np.random.default_rng(1).integers(2, capacity + 1, count).astype(np.int32)


def long_rows(count: int, capacity: int) -> np.ndarray:
    """About half of a bin each: the case that is hard to fill."""
    return np.random.default_rng(2).integers(capacity // 3, capacity * 2 // 3, count, np.int32)


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """How many bins first fit needs, the longest first: written down as it is defined.

    The leftmost bin with room is found by descending a tree of maxima.
    """
    leaves = 1 << (len(lengths) - 1).bit_length()
    room = np.full(2 * leaves, capacity, np.int64)
    used = 0
    for length in sorted(lengths, reverse=True):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        used = max(used, node - leaves + 1)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return used


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


@pytest.mark.parametrize("draw", [skewed, uniform, long_rows])
@pytest.mark.parametrize("capacity", [64, 2048])
def test_each_row_is_in_one_bin_and_no_bin_overflows(draw, capacity: int) -> None:
    lengths = draw(5000, capacity)
    made = pack(lengths, capacity)
    assert sorted(made.rows.tolist()) == list(range(5000))
    sums = np.add.reduceat(lengths[made.rows], made.bounds[:-1])
    assert sums.max() <= capacity
    assert sums.sum() == lengths.sum()
    assert made.bounds[0] == 0
    assert made.bounds[-1] == 5000
    assert np.all(np.diff(made.bounds) > 0)


@pytest.mark.parametrize("draw", [skewed, uniform, long_rows])
@pytest.mark.parametrize("capacity", [64, 2048])
def test_about_as_full_as_first_fit(draw, capacity: int) -> None:
    lengths = draw(4000, capacity)
    ours, theirs = pack(lengths, capacity), first_fit_decreasing(lengths.tolist(), capacity)
    assert ours.num_bins <= theirs * 1.005
    exact = lengths.sum() / (ours.num_bins * capacity)
    assert ours.efficiency(lengths) == pytest.approx(exact)


@pytest.mark.parametrize("draw", [skewed, uniform, long_rows])
def test_classes_of_bins_give_what_best_fit_gives_row_by_row(draw) -> None:
    lengths = draw(600, 97)
    assert pack(lengths, 97).num_bins == best_fit_decreasing(lengths.tolist(), 97)


def test_by_hand() -> None:
    """7 opens a bin, 5 another, which 5 fills; 3 fills the first; 2, 2, 2, 2 and 1 share one."""
    made = pack(np.array([2, 5, 2, 7, 1, 2, 3, 5, 2], np.int32), 10)
    bins = [
        made.rows[first:last].tolist()
        for first, last in zip(made.bounds[:-1], made.bounds[1:], strict=True)
    ]
    assert bins == [[0, 2, 4, 5, 8], [1, 7], [3, 6]]
    assert made.num_alone == 0


def test_rows_that_nothing_fits_beside_are_alone() -> None:
    made = pack(np.array([6, 6, 10, 6, 4], np.int32), 10)
    assert (made.num_bins, made.num_alone) == (4, 3)
    assert made.efficiency(np.array([6, 6, 10, 6, 4])) == 32 / 40


def test_a_row_longer_than_a_bin_is_a_defect() -> None:
    with pytest.raises(ValueError, match="a row has 11 tokens, a bin 10"):
        pack(np.array([4, 11], np.int32), 10)


def test_no_rows_are_no_bins() -> None:
    assert pack(np.empty(0, np.int32), 10).num_bins == 0


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = pack(skewed(1000, 64), 64)
    packing.write(tmp_path, made)
    read = packing.read(str(tmp_path), 64)
    assert read.rows.tolist() == made.rows.tolist()
    assert read.bounds.tolist() == made.bounds.tolist()
    assert isinstance(read.rows, np.memmap)
    before = [(tmp_path / name).read_bytes() for name in packing.FILES]
    packing.write(tmp_path, pack(skewed(1000, 64), 64))
    assert [(tmp_path / name).read_bytes() for name in packing.FILES] == before


def test_a_table_in_bins(tmp_path: Path) -> None:
    """Bins of 5: rows 1 and 2 (3 + 2 tokens), row 0 with row 3 (3 + 1)."""
    rows = [[1, 2, 3], [4, 5, 6], [7, 8], [9]]
    targets = [(1, 3), (2, 3), (1, 2), ()]
    path = tmp_path / "a.arrow"
    shards.write(
        path,
        [
            RowFeatures(np.array(ids, np.int32), runs, False)
            for ids, runs in zip(rows, targets, strict=True)
        ],
    )
    table = SampleTable([str(path)])
    bins = PackedTable(table, pack(table.lengths, 5))
    assert (len(bins), bins.num_rows, bins.num_tokens) == (2, 4, 9)
    held = [[sample.input_ids.tolist() for sample in bins.samples(i)] for i in range(2)]
    assert sorted(ids for row in held for ids in row) == sorted(rows)
    assert bins.lengths.tolist() == [sum(map(len, row)) for row in held]
    masks = [sample.target_mask.sum() for i in range(2) for sample in bins.samples(i)]
    assert bins.target_counts.sum() == sum(masks) == 4
    assert bins.lengths.dtype == bins.target_counts.dtype == np.int32
    with pytest.raises(IndexError):
        bins.samples(2)
