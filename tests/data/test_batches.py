import numpy as np
import pytest
import torch

from llmray.data.batches import Batches, deal
from llmray.errors import CheckpointError

SPLITS = [  # per_device, accumulation, world_size: all with 12 rows a step
    (12, 1, 1),
    (1, 12, 1),
    (1, 1, 12),
    (3, 2, 2),
    (2, 2, 3),
    (4, 1, 3),
]
LENGTHS = np.random.default_rng(0).integers(1, 500, 100).astype(np.int32)


def batches(
    per_device: int = 3,
    accumulation: int = 2,
    world_size: int = 2,
    rank: int = 0,
    *,
    lengths: np.ndarray = LENGTHS,
    seed: int = 42,
    shuffle: bool = True,
) -> Batches:
    return Batches(lengths, per_device, accumulation, world_size, rank, seed, shuffle)


def all_ranks(split: tuple[int, int, int], epoch: int, k: int) -> list[list[np.ndarray]]:
    return [batches(*split, rank).step(epoch, k) for rank in range(split[2])]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("epoch", [0, 3])
def test_each_row_comes_once_an_epoch(split: tuple[int, int, int], epoch: int) -> None:
    steps = batches(*split).steps_per_epoch
    assert steps == 9  # ceil(100 / 12)
    seen = [
        row
        for k in range(steps)
        for micro_batches in all_ranks(split, epoch, k)
        for rows in micro_batches
        for row in rows.tolist()
    ]
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("k", [0, 5, 8])
def test_the_rows_of_a_step_do_not_depend_on_how_they_are_split(
    split: tuple[int, int, int], k: int
) -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(42 + 1)).tolist()
    ranks = all_ranks(split, 1, k)
    rows = [row for micro_batches in ranks for part in micro_batches for row in part.tolist()]
    assert sorted(rows) == sorted(order[12 * k : 12 * k + 12])
    [count] = {len(micro_batches) for micro_batches in ranks}
    assert 1 <= count <= split[1]
    sizes = [len(part) for micro_batches in ranks for part in micro_batches]
    assert max(sizes) <= split[0]
    if k < 8:
        assert set(sizes) == {split[0]}


def test_one_micro_batch_keeps_the_order_of_the_permutation() -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(42)).numpy()
    [rows] = batches(12, 1, 1).step(0, 2)
    assert rows.tolist() == order[24:36].tolist()


def test_without_shuffling_the_order_is_that_of_the_table() -> None:
    for epoch in (0, 1):
        [rows] = batches(12, 1, 1, shuffle=False).step(epoch, 8)
        assert rows.tolist() == [96, 97, 98, 99]


def test_tokens_are_balanced_over_ranks() -> None:
    """The time that ranks wait for the slowest one: (largest - mean) / largest."""

    def waiting(sums: list[int]) -> float:
        return (max(sums) - sum(sums) / len(sums)) / max(sums)

    dealt, in_turn = [], []
    for k in range(8):
        parts = all_ranks((2, 2, 3), 0, k)
        dealt.append(waiting([sum(int(LENGTHS[rows].sum()) for rows in part) for part in parts]))
        [rows] = batches(12, 1, 1).step(0, k)
        in_turn.append(waiting(LENGTHS[rows].reshape(3, 4).sum(axis=1).tolist()))
    assert np.mean(dealt) < 0.05
    assert np.mean(in_turn) > 0.15


def test_the_largest_goes_to_the_smallest_bin_with_room() -> None:
    """7, 6 | then 5 joins 6 (11), 4 joins 7 (11), 3 joins either: bins of at most 3."""
    assert deal([3, 7, 5, 6, 4], 2, 3) == [[0, 1, 4], [2, 3]]
    assert deal([9, 1, 1, 1], 2, 2) == [[0, 3], [1, 2]]
    assert deal([], 2, 1) == [[], []]


def test_ranks_without_rows_have_empty_micro_batches() -> None:
    short = LENGTHS[:13]
    parts = [batches(1, 2, 6, rank, lengths=short).step(0, 1) for rank in range(6)]
    assert [[len(rows) for rows in part] for part in parts] == [[1], [0], [0], [0], [0], [0]]


def test_position_and_its_return() -> None:
    plan = batches()
    assert plan.state_dict() == {
        "epoch": 0,
        "step": 0,
        "seed": 42,
        "global_batch": 12,
        "num_rows": 100,
    }
    plan.step(1, 4)
    assert (plan.state_dict()["epoch"], plan.state_dict()["step"]) == (1, 5)
    plan.step(1, 8)
    assert (plan.state_dict()["epoch"], plan.state_dict()["step"]) == (2, 0)
    other = batches(4, 1, 3, rank=2)
    other.load_state_dict(plan.state_dict())
    assert other.state_dict() == plan.state_dict()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 7}, "seed (or data_seed) is 42, here it is 7"),
        ({"lengths": LENGTHS[:50]}, "number of rows is 100, here it is 50"),
        ({"per_device": 6}, "step has 12 rows, here it has 24 = per_device_train_batch_size 6 x"),
    ],
)
def test_a_position_in_another_order_is_refused(changed: dict, words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        batches(**changed).load_state_dict(batches().state_dict())
    assert words in str(error.value)


def test_a_step_beyond_the_epoch_is_a_defect() -> None:
    with pytest.raises(IndexError):
        batches().step(0, 9)
