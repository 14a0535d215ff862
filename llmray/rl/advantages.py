"""From scores to advantages: token rewards, GAE, groups, whitening, scaling. Pure functions.

Shape suffixes: S responses of this rank, T tokens of the longest one. Rectangles `_ST` are filled
on the right; `mask_ST` says where a token is. Logarithms are natural, so divergences are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmray.train.parallel import World

KlEstimator = Literal["k1", "k2", "k3"]

GROUP_EPSILON = 1e-4  # beside a group's deviation, as in TRL
LEAST_FACTOR = 0.5  # that the weight of the divergence changes by at once
VARIANCE_EPSILON = 1e-8  # beside the variance where values are whitened, as in TRL


def kl_estimates(logprobs: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    """The divergence of the policy from the reference, estimated at each token that was drawn.

    http://joschu.net/blog/kl-approx.html with d = logprobs - reference: k1 = d is unbiased and may
    be negative; k2 = d^2 / 2 is biased; k3 = exp(-d) - 1 + d is unbiased and never negative.

    Args:
        logprobs, reference: of any one shape, nats.
        estimator: which.
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


def token_rewards(scores_S: Tensor, kl_ST: Tensor, mask_ST: Tensor, beta: float) -> Tensor:
    """-beta times the divergence at each token, and the score at the last one.

    https://arxiv.org/abs/1909.08593, eq. 2, by tokens. A response without tokens has no reward.

    Returns: (S, T), 0 outside of responses.
    """
    rewards_ST = torch.where(mask_ST, -beta * kl_ST, 0.0)
    lengths_S = mask_ST.sum(1)
    rows = lengths_S.nonzero().squeeze(1)
    rewards_ST[rows, lengths_S[rows] - 1] += scores_S[rows].to(rewards_ST)
    return rewards_ST


def gae(
    rewards_ST: Tensor, values_ST: Tensor, mask_ST: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, https://arxiv.org/abs/1506.02438, eq. 16.

    delta_t = r_t + gamma * V_{t+1} - V_t, where the value after the last token is 0;
    A_t = delta_t + gamma * lam * A_{t+1}; the returns are A_t + V_t.

    Returns: advantages and returns, (S, T) each, 0 outside of responses.
    """
    values_ST = torch.where(mask_ST, values_ST, 0.0)
    advantages_ST = torch.zeros_like(values_ST)
    following_S = torch.zeros_like(values_ST[:, 0]) if values_ST.shape[1] else values_ST.sum(1)
    next_value_S = following_S
    for t in reversed(range(values_ST.shape[1])):
        delta_S = rewards_ST[:, t] + gamma * next_value_S - values_ST[:, t]
        # behind a response both are 0, so its last token starts anew
        following_S = torch.where(mask_ST[:, t], delta_S + gamma * lam * following_S, 0.0)
        next_value_S = values_ST[:, t]
        advantages_ST[:, t] = following_S
    return advantages_ST, torch.where(mask_ST, advantages_ST + values_ST, 0.0)


def group_advantages(scores_S: Tensor, group: int, valid_S: Tensor) -> Tensor:
    """How much better a response is than the others to its prompt, in deviations.

    https://arxiv.org/abs/2402.03300, section 4.1.2: (s - mean) / (deviation + 1e-4) over the valid
    ones of `group` responses that follow one another, with the deviation of a sample (n - 1), as
    TRL has it. 0 where a group has one score, or none that differs.

    Returns: (S,), 0 where not valid.

    Raises:
        ValueError: the responses are not whole groups.
    """
    if len(scores_S) % group:
        raise ValueError(f"{len(scores_S)} responses are no groups of {group}")
    valid = valid_S.view(-1, group)
    scores = torch.where(valid, scores_S.view(-1, group).double(), 0.0)
    counts = valid.sum(1, keepdim=True)
    centred = torch.where(valid, scores - scores.sum(1, keepdim=True) / counts.clamp_min(1), 0.0)
    variances = centred.square().sum(1, keepdim=True) / (counts - 1).clamp_min(1)
    # equal scores differ from their mean by rounding alone, which must not be blown up
    differs = centred.abs().amax(1, keepdim=True) > 1e-12 * scores.abs().amax(1, keepdim=True)
    advantages = torch.where(differs, centred / (variances.sqrt() + GROUP_EPSILON), 0.0)
    return advantages.flatten().to(scores_S.dtype)


def whiten(values_ST: Tensor, mask_ST: Tensor, world: World, *, shifts_mean: bool = True) -> Tensor:
    """Values scaled to deviation 1 over the masked tokens of all ranks; a collective call.

    (x - mean) / sqrt(variance + 1e-8) with the variance of a sample (n - 1), as TRL has it.

    Args:
        values_ST, mask_ST: this rank's, which may hold no token.
        world: all ranks.
        shifts_mean: bring the mean to 0; else it stays where it is.

    Returns: (S, T), 0 outside of responses.
    """
    chosen = values_ST[mask_ST].double()
    count, mean, squares = pooled(chosen, world)
    scale = (squares / max(1.0, count - 1) + VARIANCE_EPSILON) ** -0.5
    whitened = (values_ST.double() - mean) * scale + (0.0 if shifts_mean else mean)
    return torch.where(mask_ST, whitened, 0.0).to(values_ST.dtype)


def pooled(values: Tensor, world: World) -> tuple[float, float, float]:
    """Count, mean and sum of squared distances to it, over all ranks' `values` (n,); collective."""
    count, total = world.sum([float(values.numel()), float(values.double().sum())])
    mean = total / count if count else 0.0
    [squares] = world.sum([float((values.double() - mean).square().sum())])
    return count, mean, squares


def explained_variance(values: Tensor, returns: Tensor, world: World) -> float:
    """1 - variance(returns - values) / variance(returns) over all ranks; a collective call.

    1 where values foretell returns, 0 where a constant would do as well; 0 without variance.

    Args:
        values, returns: of this rank's tokens, (n,).
        world: all ranks.
    """
    _, _, left = pooled(returns.double() - values.double(), world)
    _, _, whole = pooled(returns, world)
    return 1 - left / whole if whole > 0 else 0.0


def penalised(scores_S: Tensor, ended_S: Tensor, penalty: float | None) -> Tensor:
    """Scores less `penalty` where the response was cut before it ended, as in TRL; None: as is."""
    return scores_S if penalty is None else torch.where(ended_S, scores_S, scores_S - penalty)


@dataclass
class RunningMoments:
    """Mean and deviation of all scores seen so far; Resumable.

    Batches are merged by Chan, Golub and LeVeque 1979. The deviation is that of a sample (n - 1).
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances to the mean

    @property
    def deviation(self) -> float:
        """Of the scores seen; 0 while there are fewer than two."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, scores: Tensor, world: World) -> None:
        """Take in all ranks' `scores` (n,); a collective call."""
        count, mean, squares = pooled(scores, world)
        total = self.count + count
        if not count:
            return
        distance = mean - self.mean
        self.mean += distance * count / total
        self.squares += squares + distance**2 * self.count * count / total
        self.count = total

    def normalised(self, scores: Tensor) -> Tensor:
        """(scores - mean) / deviation, as LLaMA-Factory means ppo_score_norm.

        While all scores seen are equal there is nothing to divide by, and they become 0.
        """
        centred = scores.double() - self.mean
        # deviations that are rounding alone count as none
        if self.deviation <= 1e-12 * abs(self.mean):
            return torch.zeros_like(scores)
        return (centred / self.deviation).to(scores.dtype)

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put all fields back."""
        vars(self).update(state)


@dataclass
class KlControl:
    """The weight `beta` of the divergence; Resumable.

    Adaptive, https://arxiv.org/abs/1909.08593 section 2.2 with TRL's gain:
    e = clip(kl / target - 1, -0.2, 0.2); beta <- beta * max(1/2, 1 + e * n / horizon). The bound is
    ours: with more than 5 * horizon responses at once beta would be negative. Without `target` it
    stays as it is.

    Args:
        beta: at the start.
        target: divergence of a whole response, nats; None: fixed.
        horizon: responses after which beta has followed, roughly.
    """

    beta: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, num_responses: float) -> None:
        """Once for each rollout batch, after its rewards were formed.

        Args:
            kl: summed over the tokens of a response, averaged over responses of all ranks.
            num_responses: of all ranks.
        """
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= max(LEAST_FACTOR, 1 + error * num_responses / self.horizon)

    def state_dict(self) -> dict[str, Any]:
        """What changes: beta."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a beta; target and horizon are the run's own."""
        self.beta = state["beta"]
