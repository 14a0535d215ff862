import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from llmray.data import mixing
from llmray.data.mixing import drawn, interleaved, table_order
from llmray.errors import DataError

PEER = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}
SIZES = [(3, 4, 5), (5, 1), (2, 2, 2), (40, 7, 300)]


def by_datasets(sizes: Any, strategy: str, probabilities: Any, seed: int) -> list[int]:
    import datasets

    starts = np.cumsum([0, *sizes])
    sets = [
        datasets.Dataset.from_dict({"row": list(range(start, start + size))})
        for start, size in zip(starts[:-1].tolist(), sizes, strict=True)
    ]
    mixed = datasets.interleave_datasets(
        sets, list(probabilities) or None, seed, stopping_strategy=PEER[strategy]
    )
    return list(mixed["row"])


@pytest.mark.parametrize("strategy", PEER)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("draws", [False, True])
def test_rows_come_as_hugging_face_interleaves_them(strategy: Any, sizes: Any, draws: bool) -> None:
    share = np.arange(1, len(sizes) + 1)
    probabilities = (share / share.sum()).tolist() if draws else ()
    for seed in (0, 42):
        found = interleaved(sizes, strategy, probabilities, seed).tolist()
        assert found == by_datasets(sizes, strategy, probabilities, seed)


@pytest.mark.parametrize("draws_at_a_time", [1, 2, 7, 64])
@pytest.mark.parametrize("strategy", PEER)
def test_how_many_draws_are_made_at_a_time_changes_nothing(
    strategy: Any, draws_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for interleave_once, which draws among fewer sets after each block: a permutation."""
    whole = interleaved((5, 9, 30), strategy, (0.5, 0.2, 0.3), 3)
    monkeypatch.setattr(mixing, "DRAWS", draws_at_a_time)
    parts = interleaved((5, 9, 30), strategy, (0.5, 0.2, 0.3), 3)
    if strategy == "interleave_once":
        assert sorted(parts) == sorted(whole) == list(range(44))
    else:
        assert parts.tolist() == whole.tolist()


def test_sets_in_turns_by_worked_examples() -> None:
    assert interleaved((2, 3), "interleave_under", (), 0).tolist() == [0, 2, 1, 3]
    assert interleaved((2, 3), "interleave_over", (), 0).tolist() == [0, 2, 1, 3, 0, 4]
    assert interleaved((2, 3), "interleave_once", (), 0).tolist() == [0, 2, 1, 3, 4]


@pytest.mark.parametrize("strategy", PEER)
def test_a_set_of_probability_0_is_never_drawn_nor_waited_for(strategy: Any) -> None:
    found = interleaved((4, 6), strategy, (1.0, 0.0), 0)
    assert found.tolist() == [0, 1, 2, 3]


def test_probabilities_are_those_of_the_rows() -> None:
    """Of 100,000 draws a share of 0.3 is within 4 standard deviations, 0.006, of it."""
    found = interleaved((10**6, 10**5), "interleave_under", (0.7, 0.3), 1)
    share = np.mean(found >= 10**6)
    assert len(found) == pytest.approx(10**5 / 0.3, rel=0.02)
    assert share == pytest.approx(0.3, abs=0.006)


def test_rows_are_drawn_without_replacement_while_they_last() -> None:
    assert sorted(set(drawn(10, 7, 0).tolist())) == sorted(drawn(10, 7, 0).tolist())
    assert drawn(10, 7, 0).tolist() != drawn(10, 7, 1).tolist()
    more = drawn(4, 10, 0)
    assert sorted(more[:4]) == sorted(more[4:8]) == [0, 1, 2, 3]
    assert len(set(more[8:].tolist())) == 2
    assert drawn(4, None, 0).tolist() == [0, 1, 2, 3]


def test_the_order_of_a_table() -> None:
    assert table_order((3, 2), (None, None), None, "concat", (), 0) is None
    assert table_order((3,), (None,), None, "interleave_over", (0.5, 0.5), 0) is None
    head = table_order((5, 4), (3, None), 2, "concat", (), 0)
    assert head is not None
    assert head.tolist() == [*drawn(5, 3, 0)[:2].tolist(), 5, 6]
    mixed = table_order((5, 4), (2, None), None, "interleave_over", (), 0)
    first, second = drawn(5, 2, 0).tolist()
    assert mixed is not None
    assert mixed.tolist() == [first, 5, second, 6, first, 7, second, 8]


def test_a_table_that_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match=r"about 1e\+12 rows. Required: at most"):
        interleaved((1000, 1000), "interleave_over", (1.0 - 1e-9, 1e-9), 0)
    rows = interleaved((1000, 1000), "interleave_once", (1.0 - 1e-9, 1e-9), 0)
    assert sorted(rows) == list(range(2000))


def test_a_million_rows_take_no_object_each() -> None:
    started = time.perf_counter()
    tracemalloc.start()
    for strategy in ("interleave_under", "interleave_over", "interleave_once"):
        interleaved((10**6, 10**6), strategy, (0.5, 0.5), 0)  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert time.perf_counter() - started < 200
