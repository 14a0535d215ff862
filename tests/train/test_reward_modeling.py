"""The pairwise loss of stage rm: by hand, under training, and its state."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build_model

from llmray.arguments.optimizer import OptimizerArguments
from llmray.data.collate import collate
from llmray.data.shards import Sample
from llmray.errors import TrainingError
from llmray.model import value_head
from llmray.model.head import TokenModel, TokenOutput
from llmray.train import optimizers, schedules
from llmray.train.engine import Engine
from llmray.train.losses import RewardModeling
from llmray.train.parallel import World
from llmray.train.precision import PRECISIONS


def batch(num_pairs, seed=0, flat=True):
    """Pairs that share a prompt; chosen answers are of low tokens, rejected ones of high."""
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(num_pairs):
        prompt = draw.integers(3, 300, 4)
        for low in (3, 200):
            answer = draw.integers(low, low + 100, draw.integers(2, 6))
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            samples.append(Sample(ids, np.arange(len(ids)) >= 4))
    return collate(samples, flat=flat, pad_id=0)


def engine(*, seed=0):
    torch.manual_seed(0)
    model = build_model("llama", amplify=2.0)
    head = value_head.create(model, seed)
    token_model = TokenModel(model, flat=True, value_head=head, only_scores=True)
    trainable = {n: p for n, p in token_model.named_parameters() if p.requires_grad}
    options = OptimizerArguments(learning_rate=0.003)
    return Engine(
        token_model,
        trainable,
        optimizers.build(token_model, trainable, options),
        schedules.schedule(options, 20),
        world=World.single(torch.device("cpu")),
        precision=PRECISIONS["fp32"],
        max_grad_norm=1.0,
    )


def test_the_loss_by_hand():
    """Rewards (2, 1), (0, 3), (1, 1): margins 1, -3, 0.

    -log sigmoid(m) = log(1 + e^-m): 0.3132617 + 3.0485874 + 0.6931472 = 4.0549962.
    One of three pairs is in order; a tie is not. d/dm = -sigmoid(-m): -0.2689414, -0.9525741, -0.5.
    """
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0, 1.0], requires_grad=True)
    output = TokenOutput(torch.zeros(0), scores=scores)
    found = RewardModeling()(output, batch(3))
    assert found.loss.item() == pytest.approx(4.0549962, abs=1e-6)
    assert {name: value.item() for name, value in found.metrics.items()} == {
        "accuracy": 1,
        "margin": -2.0,
        "reward_chosen": 3.0,
        "reward_rejected": 5.0,
    }
    assert RewardModeling().count(batch(3)) == 3
    found.loss.backward()
    expected = [-0.2689414, 0.2689414, -0.9525741, 0.9525741, -0.5, 0.5]
    assert scores.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_loss_equals_that_of_trl():
    """Six pairs; by `benchmarks/trl_losses.py`."""
    known = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
    rewards = torch.tensor(known["policy"], dtype=torch.float64).T.flatten()
    for at, expected in enumerate(known["rewards"]):
        pair = TokenOutput(torch.zeros(0), scores=rewards[2 * at : 2 * at + 2])
        assert RewardModeling()(pair, batch(1)).loss.item() == pytest.approx(expected, rel=1e-9)


def test_rewards_far_apart_give_finite_losses():
    scores = torch.tensor([0.0, 1000.0, 1000.0, 0.0])
    found = RewardModeling()(TokenOutput(torch.zeros(0), scores=scores), batch(2))
    assert found.loss.item() == 1000.0


def test_a_pair_whose_reward_is_no_number_is_named():
    """Of pairs 7, 3 and 5 the second has one."""
    scores = torch.tensor([2.0, 1.0, 0.0, math.nan, 1.0, 1.0])
    pairs = replace(batch(3), rows=(7, 3, 5))
    with pytest.raises(TrainingError, match="the reward of an answer is nan: row 3 of the table"):
        RewardModeling()(TokenOutput(torch.zeros(0), scores=scores), pairs)


def test_margins_rise_and_nothing_depends_on_the_split():
    whole, parts = engine(), engine()
    pairs = batch(8)
    one = whole.forward_backward([pairs], RewardModeling())
    halves = [batch(8), batch(8)]
    two = parts.forward_backward(halves, RewardModeling())
    assert (one.count, two.count) == (8, 16)
    assert two.loss.item() == pytest.approx(one.loss.item(), abs=1e-6)
    whole.optim_step()
    parts.optim_step()
    for ours, theirs in zip(whole._trainable.values(), parts._trainable.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)

    first = one.metrics["margin"].item()
    for _ in range(15):
        last = whole.forward_backward([pairs], RewardModeling())
        whole.optim_step()
    assert last.metrics["margin"].item() > first + 1
    assert last.metrics["accuracy"].item() == 1
    assert last.loss.item() < 0.5 * math.log(2)


def test_a_resume_is_bitwise_and_holds_the_value_head():
    straight = engine()
    for step in range(4):
        straight.forward_backward([batch(2, seed=step)], RewardModeling())
        straight.optim_step()
        if step == 1:
            state = torch.utils._pytree.tree_map(
                lambda x: x.clone() if isinstance(x, torch.Tensor) else x, straight.state_dict()
            )
    assert "value_head.summary.weight" in state["trainable"]
    resumed = engine(seed=9)
    resumed.load_state_dict(state)
    for step in range(2, 4):
        resumed.forward_backward([batch(2, seed=step)], RewardModeling())
        resumed.optim_step()
    for name, parameter in straight._trainable.items():
        assert torch.equal(parameter, resumed._trainable[name]), name
