"""Prompts in lanes, lanes on ranks, and mini-batches that take from every lane."""

import numpy as np
import pytest
import torch

from llmray.rl.dealing import in_places, micro_batches, mini_batches, places_of


def test_prompts_are_dealt_from_long_to_short_to_and_fro():
    lengths = np.array([3, 9, 5, 1, 7, 2, 8], np.int32)
    order = in_places(lengths, 3)
    assert lengths[order].tolist() == [9, 8, 7, 2, 3, 5, 1]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_have_whole_lanes_and_as_many(world_size):
    lengths = np.random.default_rng(0).integers(1, 50, 32).astype(np.int32)
    lengths = lengths[in_places(lengths, 8)]
    shares = [places_of(lengths, 8, world_size, rank) for rank in range(world_size)]
    assert sorted(place for share in shares for place in share) == list(range(32))
    assert {len(share) for share in shares} == {32 // world_size}
    lanes = [{place % 8 for place in share} for share in shares]
    assert sum(map(len, lanes)) == 8
    tokens = [int(lengths[share].sum()) for share in shares]
    assert max(tokens) < 1.2 * min(tokens)


def test_each_mini_batch_has_one_response_of_each_lane():
    found = mini_batches(8, 3, 4, seed=5)
    lanes = torch.arange(8).repeat_interleave(3) % 4
    assert found.shape == (24,)
    for number in range(6):
        assert sorted(lanes[found == number].tolist()) == [0, 1, 2, 3]
    assert torch.equal(found, mini_batches(8, 3, 4, seed=5))
    assert not torch.equal(found, mini_batches(8, 3, 4, seed=6))
    # lanes are drawn each by itself
    assert len({tuple(found[lanes == lane].tolist()) for lane in range(4)}) > 1


def test_the_rest_of_an_epoch_fills_all_mini_batches_but_the_last():
    found = mini_batches(3, 3, 4, seed=0)
    assert found.bincount().tolist() == [4, 4, 1]


def test_micro_batches_may_be_empty():
    assert micro_batches([4, 5, 6], 3, 2) == [[4, 5], [6], []]
