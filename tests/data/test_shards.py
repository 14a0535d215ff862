from pathlib import Path

import numpy as np
import pytest

from llmray.data import shards
from llmray.data.features import RowFeatures
from llmray.data.shards import SampleTable

ROWS = [
    RowFeatures(np.array([5, 6, 7], np.int32), (1, 3)),
    RowFeatures(np.array([8, 9, 1, 2, 3], np.int32), (1, 2, 4, 5)),
    RowFeatures(np.array([4, 4], np.int32), (1, 2), (2, 7)),
]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    shards.write(tmp_path / "a.arrow", ROWS[:2], [0, 4])
    shards.write(tmp_path / "b.arrow", ROWS[2:], [1])
    return [str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow")]


def test_rows_come_back_over_shards(paths: list[str]) -> None:
    table = SampleTable(paths)
    assert len(table) == 3
    assert table.num_tokens == 10
    assert table.lengths.tolist() == [3, 5, 2]
    assert table.target_counts.tolist() == [2, 2, 1]
    assert table.lengths.dtype == table.target_counts.dtype == np.int32
    samples = [table[i] for i in range(3)]
    assert [s.input_ids.tolist() for s in samples] == [r.input_ids.tolist() for r in ROWS]
    assert [s.target_mask.tolist() for s in samples] == [
        [False, True, True],
        [False, True, False, False, True],
        [False, True],
    ]


def test_tokens_that_are_learned_in_the_place_of_others_come_back(tmp_path: Path) -> None:
    rows = [ROWS[0], RowFeatures(np.array([5, 6, 7], np.int32), (1, 3), (), (2, 9))]
    shards.write(tmp_path / "a.arrow", rows, [0, 1])
    table = SampleTable([str(tmp_path / "a.arrow")])
    assert [table[i].target_ids().tolist() for i in range(2)] == [[6, 7], [6, 9]]
    assert table[1].input_ids.tolist() == [5, 6, 7]


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_row_beyond(paths: list[str], index: int) -> None:
    with pytest.raises(IndexError):
        SampleTable(paths)[index]


@pytest.mark.parametrize(
    ("block_len", "expected"),
    [
        (4, [[5, 6, 7, 8], [9, 1, 2, 3], [4, 4]]),
        (5, [[5, 6, 7, 8, 9], [1, 2, 3, 4, 4]]),  # full blocks, no rest
        (7, [[5, 6, 7, 8, 9, 1, 2], [3, 4, 4]]),  # the second reaches over both shards
        (99, [[5, 6, 7, 8, 9, 1, 2, 3, 4, 4]]),
    ],
)
def test_blocks_hold_every_token_once(
    paths: list[str], block_len: int, expected: list[list[int]]
) -> None:
    table = SampleTable(paths, block_len)
    samples = [table[i] for i in range(len(table))]
    assert [s.input_ids.tolist() for s in samples] == expected
    assert table.lengths.tolist() == [len(ids) for ids in expected]
    for sample, count in zip(samples, table.target_counts, strict=True):
        assert sample.target_mask.tolist() == [False] + [True] * count


def test_the_order_of_a_table_may_leave_rows_out_and_repeat_others(paths: list[str]) -> None:
    order = np.array([2, 0, 2], np.int64)
    table = SampleTable(paths, order=order)
    assert [table[i].input_ids.tolist() for i in range(3)] == [[4, 4], [5, 6, 7], [4, 4]]
    assert table.lengths.tolist() == [2, 3, 2]
    assert table.target_counts.tolist() == [1, 2, 1]
    assert table.num_tokens == 7
    blocks = SampleTable(paths, 3, order)
    assert [blocks[i].input_ids.tolist() for i in range(3)] == [[4, 4, 5], [6, 7, 4], [4]]
    assert blocks.num_tokens == 7


def test_rows_keep_their_numbers(paths: list[str]) -> None:
    assert [shards.row_numbers(Path(path)).tolist() for path in paths] == [[0, 4], [1]]


def test_no_shards_are_no_rows() -> None:
    for block_len in (None, 4):
        assert len(SampleTable([], block_len)) == 0


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shards.write(tmp_path / name, ROWS, [0, 1, 2])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
