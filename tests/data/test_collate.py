from dataclasses import replace

import numpy as np
import pytest
import torch

from llmray.data.collate import collate, split
from llmray.data.shards import Sample


def sample(ids: list[int], targets: list[int]) -> Sample:
    mask = np.zeros(len(ids), bool)
    mask[targets] = True
    return Sample(np.array(ids, np.int32), mask)


SAMPLES = [sample([5, 6, 7], [1, 2]), sample([8], []), sample([9, 3, 0, 4], [3])]


def test_a_flat_row_by_hand() -> None:
    """Token 6 at place 1 is predicted from place 0, 7 from 1; 4, at place 4 + 3, from 6."""
    batch = collate(SAMPLES, flat=True, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 0, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch.targets.tolist() == [0, 1, 6]
    assert batch.target_ids.tolist() == [6, 7, 4]
    assert batch.target_sample.tolist() == [0, 0, 2]
    assert batch.ends is not None
    assert batch.ends.tolist() == [2, 3, 7]
    assert (batch.num_samples, batch.num_tokens) == (3, 8)
    assert batch.segments is not None
    assert batch.segments.lengths_q == batch.segments.lengths_k == (3, 1, 4)
    assert batch.attention_mask is None


def test_a_rectangle_by_hand() -> None:
    """Rows of 4: token 4 of row 2 is predicted from place 2 * 4 + 2."""
    batch = collate(SAMPLES, flat=False, pad_id=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [8, 2, 2, 2], [9, 3, 0, 4]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.targets.tolist() == [0, 1, 10]
    assert batch.target_ids.tolist() == [6, 7, 4]
    assert batch.ends is not None
    assert batch.ends.tolist() == [2, 4, 11]
    assert (batch.num_samples, batch.num_tokens) == (3, 8)
    assert batch.segments is None


def test_both_layouts_have_the_same_targets() -> None:
    draw = np.random.default_rng(0)
    samples = []
    for length in draw.integers(1, 30, 20).tolist():
        mask = draw.random(length) < 0.5
        mask[0] = False
        samples.append(Sample(draw.integers(0, 99, length).astype(np.int32), mask))
    flat, padded = (collate(samples, flat=flag, pad_id=1) for flag in (True, False))
    assert torch.equal(flat.target_ids, padded.target_ids)
    assert torch.equal(flat.target_sample, padded.target_sample)
    for batch in (flat, padded):
        ids = batch.input_ids.flatten()
        assert torch.equal(ids[batch.targets + 1], batch.target_ids)
        assert batch.targets.dtype == batch.input_ids.dtype == torch.int64
    assert torch.equal(
        flat.position_ids.flatten()[flat.targets], padded.position_ids.flatten()[padded.targets]
    )


@pytest.mark.parametrize("flat", [True, False])
def test_no_rows_are_one_token_without_a_target(flat: bool) -> None:
    batch = collate([], flat=flat, pad_id=7)
    assert batch.input_ids.tolist() == [[7]]
    assert len(batch.targets) == len(batch.target_ids) == len(batch.target_sample) == 0
    assert (batch.num_samples, batch.num_tokens) == (0, 0)


def test_a_pad_id_that_is_also_a_target_stays_one() -> None:
    batch = collate([sample([5, 7], [1]), sample([5], [])], flat=False, pad_id=7)
    assert batch.target_ids.tolist() == [7]


@pytest.mark.parametrize("flat", [True, False])
def test_a_token_is_learned_where_another_one_stands(flat: bool) -> None:
    row = replace(SAMPLES[0], instead=np.array([[2, 99]], np.int32))
    batch = collate([row], flat=flat, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    assert batch.target_ids.tolist() == [6, 99]


def test_samples_of_like_length_share_a_rectangle() -> None:
    """12 cells: 9 stands alone, since two would have 18; 4, 4 and 3 have 12; 2, 1, 1 have 6."""
    assert split([2, 9, 4, 1, 4, 3, 1], 12) == [[1], [2, 4, 5], [0, 3, 6]]


def test_a_sample_larger_than_the_cells_stands_alone() -> None:
    assert split([20, 20, 1], 12) == [[0], [1], [2]]
    assert split([], 12) == []


# --- answers that share a prompt -----------------------------------------------------------------

PAIR = replace(sample([5, 6, 7, 8, 9], [2, 3, 4]), starts=np.array([2, 4], np.int32))


def test_a_pair_in_a_flat_row_by_hand() -> None:
    """Prompt 5 6, chosen 7 8, rejected 9 at place 4, which place 1 predicts, behind one token."""
    batch = collate([sample([3], []), PAIR], flat=True, pad_id=0)
    assert batch.input_ids.tolist() == [[3, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 0, 1, 2, 3, 2]]
    assert batch.targets.tolist() == [2, 3, 2]
    assert batch.target_ids.tolist() == [7, 8, 9]
    assert batch.target_sample.tolist() == [1, 1, 2]
    assert (batch.num_samples, batch.num_tokens) == (3, 6)
    assert batch.segments is not None
    assert batch.segments.lengths_q == (1, 4, 1)
    assert batch.segments.lengths_k == (1, 4, 3)
    assert batch.segments.key_index is not None
    assert batch.segments.key_index.tolist() == [0, 1, 2, 3, 4, 1, 2, 5]


def test_a_pair_in_a_rectangle_is_two_rows() -> None:
    batch = collate([PAIR, PAIR], flat=False, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]] * 2
    assert batch.targets.tolist() == [1, 2, 5, 9, 10, 13]
    assert batch.target_ids.tolist() == [7, 8, 9, 7, 8, 9]
    assert batch.target_sample.tolist() == [0, 0, 1, 2, 2, 3]
    assert (batch.num_samples, batch.num_tokens) == (4, 14)


def test_a_pair_without_a_prompt() -> None:
    """Nothing predicts the first tokens 5 and 8."""
    row = replace(sample([5, 6, 7, 8, 9], [1, 2, 4]), starts=np.array([0, 3], np.int32))
    batch = collate([row], flat=True, pad_id=0)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.targets.tolist() == [0, 1, 3]
    assert batch.target_ids.tolist() == [6, 7, 9]
    assert batch.target_sample.tolist() == [0, 0, 1]


def test_judged_rows_bring_mismatched_ones() -> None:
    other = sample([5, 6, 1], [2])
    row = replace(sample([5, 6, 7], [2]), is_wanted=False, mismatched=other)
    batch = collate([replace(row, is_wanted=True), row], flat=True, pad_id=0)
    assert batch.is_wanted is not None
    assert batch.is_wanted.tolist() == [True, False]
    assert batch.mismatched is not None
    assert batch.mismatched.input_ids.tolist() == [[5, 6, 1, 5, 6, 1]]
    moved = batch.map(lambda tensor: tensor + 0)
    assert moved.mismatched is not None
    assert moved.mismatched.target_ids.tolist() == [1, 1]
