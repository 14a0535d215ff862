import numpy as np
import pytest
import torch

from llmray.data.batches import Batches, Order, by_length, deal
from llmray.errors import CheckpointError, DataError

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
    order: Order = "random",
    drop_last: bool = False,
) -> Batches:
    return Batches(lengths, per_device, accumulation, world_size, rank, seed, order, drop_last)


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
        [rows] = batches(12, 1, 1, order="sequential").step(epoch, 8)
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
        "steps_per_epoch": 9,
        "order": "random",
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


def test_grouping_by_length_is_that_of_transformers() -> None:
    """With the permutation that transformers draws first, its sampler gives the same order."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(len(LENGTHS), generator=generator).numpy()
    generator = torch.Generator().manual_seed(7)
    theirs = get_length_grouped_indices(LENGTHS.tolist(), 6, generator=generator)
    assert by_length(order, LENGTHS, 6).tolist() == theirs


def test_steps_of_grouped_rows_are_alike_and_hold_each_row_once() -> None:
    grouped, random = batches(order="group_by_length"), batches()
    for epoch in (0, 1):
        rows = [np.concatenate(all_ranks_of(grouped, epoch, k)) for k in range(9)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(100))
        spread = np.mean([np.ptp(LENGTHS[step]) for step in rows])
        other = [np.concatenate(all_ranks_of(random, epoch, k)) for k in range(9)]
        assert spread < 0.7 * np.mean([np.ptp(LENGTHS[step]) for step in other])


def all_ranks_of(plan: Batches, epoch: int, k: int) -> list[np.ndarray]:
    return [plan.rows(epoch, k)]


def test_the_last_step_is_left_out_where_it_is_not_full() -> None:
    plan = batches(drop_last=True)
    assert plan.steps_per_epoch == 8
    plan.step(0, 7)
    assert plan.state_dict()["epoch"] == 1
    with pytest.raises(IndexError):
        plan.step(0, 8)


def test_a_run_without_a_full_step_is_refused() -> None:
    with pytest.raises(DataError, match=r"dataloader_drop_last=true leaves no step.*11 rows.*12"):
        batches(lengths=LENGTHS[:11], drop_last=True)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"order": "group_by_length"}, "train_sampling_strategy"),
        ({"drop_last": True}, "dataloader_drop_last"),
    ],
)
def test_another_order_or_epoch_is_refused_at_a_resume(keys: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        batches(**keys).load_state_dict(batches().state_dict())


def test_looking_ahead_leaves_the_position_where_it_is() -> None:
    plan = batches()
    plan.step(0, 2)
    before = plan.state_dict()
    ahead = plan.micro_batches(1, 5)
    assert plan.state_dict() == before
    plan.pass_by(0, 3)
    assert plan.state_dict()["step"] == 4
    assert all(np.array_equal(a, b) for a, b in zip(ahead, plan.step(1, 5), strict=True))
