"""Who answers which prompts of a step, and which responses are learned from together.

Both are chosen so that the number of ranks changes only who computes what. A mini-batch has as many
responses as there are lanes. Prompts are dealt to lanes, and lanes to ranks; where all lanes have
as many prompts, each mini-batch takes one response of every lane. So its responses are the same
however many ranks there are, and each rank holds its share of them, with no exchange.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmray.data.batches import deal


def in_places(lengths: np.ndarray, lanes: int) -> np.ndarray:
    """The prompts of a step by their places; place p is in lane p % lanes.

    From long to short, to and fro over the lanes, so that lanes have about as many tokens.

    Args:
        lengths: tokens of each prompt, (n,).
        lanes: responses of a mini-batch, over all ranks.

    Returns: numbers of prompts, (n,).
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    turns = [order[start : start + lanes] for start in range(0, len(order), lanes)]
    return np.concatenate([turn[::-1] if i % 2 else turn for i, turn in enumerate(turns)])


def places_of(lengths: np.ndarray, lanes: int, world_size: int, rank: int) -> list[int]:
    """The places that a rank answers: those of its lanes, of which all ranks have as many.

    Args:
        lengths: tokens of the prompts by their places, (n,).
        lanes: a multiple of `world_size`.
        world_size: ranks.
        rank: this one.
    """
    sums = [int(lengths[lane::lanes].sum()) for lane in range(lanes)]
    mine = set(deal(sums, world_size, lanes // world_size)[rank])
    return [place for place in range(len(lengths)) if place % lanes in mine]


def mini_batches(num_prompts: int, samples: int, lanes: int, seed: int) -> Tensor:
    """The mini-batch of each response of a step, over all ranks; drawn by `seed`.

    Where the prompts are no multiple of `lanes`, at the end of an epoch, responses are dealt
    regardless of lanes, and ranks may have unequal shares of a mini-batch.

    Args:
        num_prompts: of the step, over all ranks.
        samples: responses to each.
        lanes: responses of a mini-batch, over all ranks; the last one may have fewer.
        seed: of the draw.

    Returns: (num_prompts * samples,) int64, by place and sample.
    """
    generator = torch.Generator().manual_seed(seed)
    if num_prompts % lanes:
        return torch.randperm(num_prompts * samples, generator=generator) // lanes
    depth = num_prompts // lanes
    drawn = torch.rand((lanes, depth * samples), generator=generator).argsort(dim=1, stable=True)
    return drawn.view(lanes, depth, samples).transpose(0, 1).flatten()


def micro_batches(rows: Sequence[int], number: int, per_device: int) -> list[list[int]]:
    """Rows in `number` micro-batches of at most `per_device`; the last ones may be empty."""
    starts = range(0, number * per_device, per_device)
    return [list(rows[start : start + per_device]) for start in starts]
