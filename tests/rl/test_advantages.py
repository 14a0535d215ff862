"""The maths of rewards and advantages: worked numbers, and loops that do the same one by one."""

import math
import statistics

import pytest
import torch

from llmray.rl.advantages import (
    KlControl,
    RunningMoments,
    explained_variance,
    gae,
    group_advantages,
    kl_estimates,
    penalised,
    token_rewards,
    whiten,
)
from llmray.train.parallel import World

ALONE = World.single(torch.device("cpu"))


def rectangle(lengths, seed=0):
    """Random numbers (S, T) and the mask of responses of these lengths; noise behind their ends."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), width, generator=generator, dtype=torch.float64), mask


class Ranks:
    """The world of one rank among others, whose parts of each sum are known."""

    def __init__(self, others):
        self.others = iter(others)

    def sum(self, values):
        return [a + b for a, b in zip(values, next(self.others), strict=True)]


def test_estimates_of_the_divergence():
    """At p = 0.5, q = 0.25: d = ln 2; k1 = 0.6931, k2 = 0.2402, k3 = 0.5 - 1 + 0.6931 = 0.1931."""
    policy, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    found = [kl_estimates(policy, reference, kind).item() for kind in ("k1", "k2", "k3")]
    assert found == pytest.approx([math.log(2), math.log(2) ** 2 / 2, math.log(2) - 0.5], rel=1e-6)


def test_k1_and_k3_average_to_the_divergence_itself_and_k2_does_not():
    """Over p = (0.7, 0.2, 0.1), q = (0.4, 0.4, 0.2): sum p ln(p / q) = 0.1838."""
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]], dtype=torch.float64)
    true = (p * (p / q).log()).sum()
    means = {k: (p * kl_estimates(p.log(), q.log(), k)).sum() for k in ("k1", "k2", "k3")}
    assert means["k1"].item() == pytest.approx(true.item(), abs=1e-12)
    assert means["k3"].item() == pytest.approx(true.item(), abs=1e-12)
    assert abs(means["k2"] - true) > 1e-3
    assert (kl_estimates(p.log(), q.log(), "k3") >= 0).all()


def test_the_score_comes_at_the_last_token_of_a_response():
    """beta 0.5: rewards -0.5 * kl, the scores 10 and 20 at tokens 2 and 0; no token, no reward."""
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    found = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.5)
    assert found.tolist() == [[-0.5, -1.0, 8.5], [18.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_gae_by_hand():
    """gamma 0.9, lambda 0.5, r = (1, 0, 2), V = (0.5, 1, 0.2).

    delta_2 = 2 - 0.2 = 1.8; delta_1 = 0 + 0.9 * 0.2 - 1 = -0.82; delta_0 = 1 + 0.9 - 0.5 = 1.4;
    A_2 = 1.8; A_1 = -0.82 + 0.45 * 1.8 = -0.01; A_0 = 1.4 + 0.45 * -0.01 = 1.3955;
    returns 1.8955, 0.99, 2.
    """
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 0.2]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.3955, -0.01, 1.8]]))
    torch.testing.assert_close(returns, torch.tensor([[1.8955, 0.99, 2.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.7, 0.0), (1.0, 1.0)])
def test_gae_is_the_sum_of_discounted_differences(gamma, lam):
    """A_t = sum over l of (gamma * lam)^l * delta_{t+l}, each response by itself."""
    lengths = [5, 1, 7, 0, 3]
    rewards, mask = rectangle(lengths)
    values, _ = rectangle(lengths, seed=1)
    advantages, returns = gae(rewards * mask, values, mask, gamma, lam)
    for s, length in enumerate(lengths):
        r, v = rewards[s, :length].tolist(), [*values[s, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            a = sum((gamma * lam) ** (i - t) * deltas[i] for i in range(t, length))
            assert advantages[s, t].item() == pytest.approx(a, abs=1e-12)
            assert returns[s, t].item() == pytest.approx(a + v[t], abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_gae_with_lambda_1_and_gamma_1_is_what_is_still_to_come():
    rewards, mask = rectangle([4, 2])
    _, returns = gae(rewards * mask, torch.randn(2, 4).double(), mask, 1.0, 1.0)
    expected = (rewards * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, expected * mask)


def test_gae_of_no_token_at_all():
    nothing = torch.zeros(2, 0)
    advantages, returns = gae(nothing, nothing, nothing.bool(), 1.0, 0.95)
    assert advantages.shape == returns.shape == (2, 0)


def test_advantages_within_a_group():
    """Scores 1, 2, 3: mean 2, deviation 1, so -1, 0, 1 over 1.0001; 5, 5, 5 and a lone 7 give 0."""
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 7.0, math.nan, math.nan])
    found = group_advantages(scores, 3, ~scores.isnan())
    expected = [-1 / 1.0001, 0.0, 1 / 1.0001, *[0.0] * 6]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_advantages_within_a_group_one_by_one():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(3))
    valid = torch.tensor([True, True, False, True] * 3)
    found = group_advantages(scores, 4, valid).tolist()
    for first in range(0, 12, 4):
        kept = [scores[i].item() for i in range(first, first + 4) if valid[i]]
        for i in range(first, first + 4):
            score = scores[i].item()
            a = (score - statistics.mean(kept)) / (statistics.stdev(kept) + 1e-4)
            assert found[i] == pytest.approx(a if valid[i] else 0.0, rel=1e-5)


def test_equal_scores_whose_mean_is_rounded_are_no_advantage():
    assert group_advantages(torch.full((3,), 0.1), 3, torch.ones(3).bool()).tolist() == [0.0] * 3


def test_groups_are_whole():
    with pytest.raises(ValueError, match="5 responses are no groups of 2"):
        group_advantages(torch.zeros(5), 2, torch.ones(5).bool())


@pytest.mark.parametrize("shifts_mean", [True, False])
def test_whitening_counts_response_tokens_alone(shifts_mean):
    values, mask = rectangle([3, 1, 5])
    found = whiten(values, mask, ALONE, shifts_mean=shifts_mean)
    chosen = values[mask].tolist()
    mean, deviation = statistics.mean(chosen), statistics.stdev(chosen)
    expected = [(x - mean) / deviation + (0 if shifts_mean else mean) for x in chosen]
    assert found[mask].tolist() == pytest.approx(expected, rel=1e-6)
    assert not found[~mask].any()


def test_whitening_over_ranks():
    """Ours 1, 3; another rank holds 5, 7: mean 4, variance 20 / 3, also where we hold nothing."""
    mask = torch.tensor([[True, True, False]])
    world = Ranks([(2.0, 12.0), (1.0 + 9.0,)])
    found = whiten(torch.tensor([[1.0, 3.0, 9.0]]), mask, world)
    scale = (20 / 3) ** -0.5
    assert found.tolist()[0] == pytest.approx([-3 * scale, -scale, 0.0], rel=1e-6)
    empty = whiten(torch.ones(1, 3), torch.zeros(1, 3).bool(), Ranks([(2.0, 12.0), (2.0,)]))
    assert empty.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("values", [[[4.0, 4.0]], [[4.0]]])
def test_whitening_without_deviation_stays_finite(values):
    values = torch.tensor(values)
    assert whiten(values, torch.ones_like(values).bool(), ALONE).abs().max() == 0


def test_explained_variance():
    """Returns 1, 2, 3, 4: exact values explain all, their mean nothing, 2 R leaves all of it."""
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns + 5, returns, ALONE) == pytest.approx(1.0)
    assert explained_variance(torch.full((4,), 2.5), returns, ALONE) == pytest.approx(0.0)
    assert explained_variance(2 * returns, returns, ALONE) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(4), ALONE) == 0.0


def test_the_penalty_of_a_response_that_was_cut():
    scores, ended = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert penalised(scores, ended, 0.5).tolist() == [1.0, 1.5]
    assert penalised(scores, ended, None) is scores


def test_running_moments_are_those_of_all_scores_together():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, generator=generator).double() * 3 + 7 for n in (1, 4, 0, 6)]
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch, ALONE)
    seen = torch.cat(batches).tolist()
    assert (moments.mean, moments.deviation) == pytest.approx(
        (statistics.mean(seen), statistics.stdev(seen)), rel=1e-12
    )
    again = RunningMoments()
    again.load_state_dict(moments.state_dict())
    assert again == moments


def test_running_moments_over_ranks():
    """Ours 1, 3; another rank holds 5, 7."""
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]), Ranks([(2.0, 12.0), (10.0,)]))
    assert (moments.mean, moments.deviation) == pytest.approx((4.0, (20 / 3) ** 0.5))


def test_scores_are_normalised_by_all_that_were_seen():
    """Seen 2, 4: mean 3, deviation sqrt 2; a first lone score, and equal ones, become 0."""
    moments = RunningMoments()
    moments.update(torch.tensor([2.0]), ALONE)
    assert moments.normalised(torch.tensor([2.0])).tolist() == [0.0]
    moments.update(torch.tensor([4.0]), ALONE)
    found = moments.normalised(torch.tensor([4.0, 3.0]))
    assert found.tolist() == pytest.approx([1 / math.sqrt(2), 0.0])
    equal = RunningMoments()
    for _ in range(3):
        equal.update(torch.full((3,), 0.1), ALONE)
    assert equal.normalised(torch.tensor([0.1])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("kl", "beta"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 256 / 10_000)),
        (60.0, 0.2 * (1 + 0.2 * 256 / 10_000)),  # the error is clipped to 0.2
        (-3.0, 0.2 * (1 - 0.2 * 256 / 10_000)),
    ],
)
def test_adaptive_control_of_the_divergence(kl, beta):
    """TRL's: beta 0.2, target 6, horizon 10000, 256 responses; an error of 0.1 adds 0.256 %."""
    control = KlControl(0.2, target=6.0)
    control.update(kl, 256)
    assert control.beta == pytest.approx(beta, rel=1e-12)
    again = KlControl(0.9, target=6.0)
    again.load_state_dict(control.state_dict())
    assert again == control


def test_adaptive_control_brings_a_divergence_to_its_target():
    """Where the divergence is 1.2 / beta, beta ends at 0.2 for a target of 6."""
    control = KlControl(0.05, target=6.0, horizon=1000)
    for _ in range(500):
        control.update(1.2 / control.beta, 64)
    assert 1.2 / control.beta == pytest.approx(6.0, rel=1e-3)


def test_many_responses_at_once_halve_the_weight_at_most():
    control = KlControl(0.2, target=6.0, horizon=100)
    control.update(0.0, 512)
    assert control.beta == 0.1
    control.update(60.0, 512)
    assert control.beta == pytest.approx(0.1 * (1 + 0.2 * 5.12))


def test_fixed_control_stays():
    control = KlControl(0.3)
    control.update(100.0, 1000)
    assert control.beta == 0.3
