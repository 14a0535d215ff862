from pathlib import Path

import numpy as np
import pytest

from llmray.data import shards
from llmray.data.mismatched import JudgedTable
from llmray.data.row_features import RowFeatures
from llmray.data.shards import SampleTable
from llmray.errors import DataError

ROWS = [
    RowFeatures(np.array([1, 2, 3], np.int32), (2, 3), starts=(2,), is_wanted=True),
    RowFeatures(np.array([4, 5, 6, 7], np.int32), (1, 4), starts=(1,), is_wanted=False),
    RowFeatures(np.array([8, 9, 9, 9], np.int32), (3, 4), starts=(3,), is_wanted=True),
]


@pytest.fixture
def table(tmp_path: Path) -> SampleTable:
    shards.write(tmp_path / "a.arrow", ROWS[:1])
    shards.write(tmp_path / "b.arrow", ROWS[1:])
    return SampleTable([str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow")])


def test_answers_go_round_the_whole_table(table: SampleTable) -> None:
    """Over the border of shards; the first prompt gets the last answer, 9."""
    judged = JudgedTable(table, 10, "train")
    assert [judged[i].is_wanted for i in range(3)] == [True, False, True]
    assert judged.num_wanted == 2
    others = [judged[i].mismatched for i in range(3)]
    assert [one.input_ids.tolist() for one in others if one] == [
        [1, 2, 9],
        [4, 3],
        [8, 9, 9, 5, 6, 7],
    ]
    assert [one.target_mask.tolist() for one in others if one][2] == [False] * 3 + [True] * 3
    assert judged[1].input_ids.tolist() == [4, 5, 6, 7]


def test_an_answer_that_does_not_fit_loses_its_end(table: SampleTable) -> None:
    row = JudgedTable(table, 4, "train")[2].mismatched
    assert row is not None
    assert row.input_ids.tolist() == [8, 9, 9, 5]


def test_the_order_of_the_table_is_that_of_the_rotation(tmp_path: Path) -> None:
    shards.write(tmp_path / "a.arrow", ROWS)
    table = SampleTable([str(tmp_path / "a.arrow")], None, np.array([2, 0, 2], np.int64))
    judged = JudgedTable(table, 10, "train")
    assert judged.num_wanted == 3
    others = [judged[i].mismatched for i in range(3)]
    # the answers of rows 2, 2, 0 behind the prompts of rows 2, 0, 2
    assert [one.input_ids.tolist() for one in others if one] == [
        [8, 9, 9, 9],
        [1, 2, 9],
        [8, 9, 9, 3],
    ]


def test_one_row_has_no_other_answer(tmp_path: Path) -> None:
    shards.write(tmp_path / "a.arrow", ROWS[:1])
    with pytest.raises(DataError, match="1 row in table eval"):
        JudgedTable(SampleTable([str(tmp_path / "a.arrow")]), 10, "eval")
