"""The losses of ppo: worked numbers, loops, gradients, and independence of the split."""

import math

import pytest
import torch

from llmray.batch import Batch
from llmray.model.head import TokenOutput
from llmray.train.ppo_losses import (
    ActorCritic,
    GroupRelative,
    divergence,
    policy_losses,
    value_losses,
)


def batch(lengths, seed=0, **given):
    """A batch of responses of these lengths, with random numbers given for their targets."""
    n = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    names = ("old_logprobs", "advantages", "old_values", "returns", "reference")
    drawn = {name: torch.randn(n, generator=generator) for name in names}
    owners = torch.tensor([s for s, length in enumerate(lengths) for _ in range(length)])
    return Batch(
        input_ids=torch.zeros(1, n + 1, dtype=torch.long),
        position_ids=torch.arange(n + 1)[None],
        targets=torch.arange(n),
        target_ids=torch.zeros(n, dtype=torch.long),
        target_sample=owners.long(),
        num_samples=len(lengths),
        num_tokens=n + 1,
        given=drawn | given,
    )


def output(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logprobs, values, entropy = (torch.randn(n, generator=generator) for _ in range(3))
    return TokenOutput(
        logprobs.requires_grad_(), entropy=entropy.abs(), values=values.requires_grad_()
    )


def test_clipping_of_the_policy():
    """c = 0.2, A = 1: ratios 1.5, 1, 0.5 lose -1.2 (clipped), -1, -0.5; A = -1: 1.5, 1, 0.8."""
    ratio = torch.tensor([1.5, 1.0, 0.5, 1.5, 1.0, 0.5])
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    found = policy_losses(ratio.log(), torch.zeros(6), signs, 0.2)
    assert found.losses.tolist() == pytest.approx([-1.2, -1.0, -0.5, 1.5, 1.0, 0.8])
    assert found.is_clipped.tolist() == [True, False, False, False, False, True]


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([1.5, 0.9]).log().requires_grad_()
    policy_losses(logprobs, torch.zeros(2), torch.ones(2), 0.2).losses.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.9])


def test_clipping_of_the_value():
    """V_old = 0, c = 0.2, R = 1.

    V = 1: clipped to 0.2, 0.5 * max(0, 0.64) = 0.32. V = 0.1: 0.5 * 0.81 = 0.405, not clipped.
    V = -1: 0.5 * max(4, 1.44) = 2, the plain one.
    """
    values = torch.tensor([1.0, 0.1, -1.0])
    losses, clipped = value_losses(values, torch.zeros(3), torch.ones(3), 0.2)
    assert losses.tolist() == pytest.approx([0.32, 0.405, 2.0])
    assert clipped.tolist() == [True, False, False]


def test_divergence_of_an_update():
    """At rho = 2: 2 - 1 - ln 2 = 0.3069; never negative, near d^2 / 2 for small d."""
    found = divergence(torch.tensor([math.log(2), 0.0, -0.01]), torch.zeros(3))
    assert found.tolist() == pytest.approx([1 - math.log(2), 0.0, 0.5e-4], rel=1e-2)


def test_actor_critic_is_the_sum_over_tokens():
    rows, said = batch([3, 1, 4]), output(8)
    found = ActorCritic(0.2, 0.3, value_coef=0.1, entropy_coef=0.01)(said, rows)
    total = value_total = clipped = 0.0
    given = {name: tensor.tolist() for name, tensor in rows.given.items()}
    for i in range(8):
        rho = math.exp(said.logprobs[i].item() - given["old_logprobs"][i])
        a, v, old = given["advantages"][i], said.values[i].item(), given["old_values"][i]
        near = min(max(v, old - 0.3), old + 0.3)
        value = 0.5 * max((v - given["returns"][i]) ** 2, (near - given["returns"][i]) ** 2)
        total += max(-a * rho, -a * min(max(rho, 0.8), 1.2)) + 0.1 * value
        total -= 0.01 * said.entropy[i].item()
        value_total += value
        clipped += -a * min(max(rho, 0.8), 1.2) > -a * rho
    assert found.loss.item() == pytest.approx(total, rel=1e-5)
    assert found.metrics["value_loss"].item() == pytest.approx(value_total, rel=1e-5)
    assert found.metrics["clip_fraction"].item() == clipped
    assert ActorCritic(0.2, 0.3, 0.1).count(rows) == 8


def k3(policy, reference):
    return torch.exp(reference - policy) - 1 + policy - reference


def test_group_relative_is_a_mean_per_response_then_a_sum_over_responses():
    rows, said = batch([3, 0, 4]), output(7)
    objective = GroupRelative(0.2, k3, beta=lambda: 0.04)
    found = objective(said, rows)
    total = 0.0
    for part in (range(3), range(3, 7)):
        losses = []
        for i in part:
            new, a = said.logprobs[i].item(), rows.given["advantages"][i].item()
            rho = math.exp(new - rows.given["old_logprobs"][i].item())
            d = rows.given["reference"][i].item() - new
            losses.append(
                max(-a * rho, -a * min(max(rho, 0.8), 1.2)) + 0.04 * (math.exp(d) - 1 - d)
            )
        total += sum(losses) / len(losses)
    assert found.loss.item() == pytest.approx(total, rel=1e-5)
    assert objective.count(rows) == 2  # the response without tokens is none


@pytest.mark.parametrize(
    "objective",
    [ActorCritic(0.2, 0.2, 0.1, 0.01), GroupRelative(0.2, k3, lambda: 0.1, 0.01)],
)
def test_a_batch_is_the_sum_of_its_responses(objective):
    lengths = [3, 1, 4]
    whole, said = batch(lengths), output(8)
    losses, count, at = 0.0, 0, 0
    for length in lengths:
        part = slice(at, at + length)
        alone = batch([length], **{name: t[part] for name, t in whole.given.items()})
        picked = TokenOutput(
            said.logprobs[part], entropy=said.entropy[part], values=said.values[part]
        )
        losses += objective(picked, alone).loss.item()
        count += objective.count(alone)
        at += length
    assert objective(said, whole).loss.item() == pytest.approx(losses, rel=1e-5)
    assert objective.count(whole) == count


@pytest.mark.parametrize(
    "objective", [ActorCritic(0.2, 0.2, 0.1), GroupRelative(0.2, k3, lambda: 1)]
)
def test_a_rank_without_responses_takes_part(objective):
    said = output(0)
    found = objective(said, batch([]))
    found.loss.backward()
    assert found.loss.item() == objective.count(batch([])) == 0
    assert said.logprobs.grad.shape == (0,)


def test_a_first_update_has_the_ratio_1_and_another_one_is_seen():
    rows, said = batch([4]), output(4)
    same = {**rows.given, "old_logprobs": said.logprobs.detach()}
    objective = ActorCritic(0.2, 0.2, 0.1)
    assert objective(said, batch([4], **same)).metrics["ratio_off"] == 0
    same["old_logprobs"] = said.logprobs.detach() + torch.tensor([0, 2e-4, 0, 0])
    found = objective(said, batch([4], **same)).metrics
    assert found["ratio_off"] == 1
    assert found["ratio_error"].item() == pytest.approx(2e-4, rel=1e-2)
