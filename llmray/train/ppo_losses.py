"""Objectives of stage ppo: clipped policy and value losses, entropy, divergence as a loss.

Beside the model's output they read what a rollout left at each target, in `Batch.given`:
`old_logprobs` and `advantages`; `old_values` and `returns` where there is a value head; `reference`
(log-probabilities) where the divergence is a loss. Shape suffixes: n targets of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmray.batch import Batch
from llmray.model.head import TokenOutput
from llmray.train.losses import LossOutput

RATIO_TOLERANCE = 1e-4  # how far the first mini-batch's ratio may be from 1, in float32


@dataclass(frozen=True)
class Clipped:
    """Policy losses of tokens, and whether clipping took the gradient from them."""

    losses: Tensor  # (n,)
    is_clipped: Tensor  # (n,) bool
    ratio: Tensor  # (n,)


def policy_losses(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Clipped:
    """max(-A * rho, -A * clip(rho, 1 - c, 1 + c)), https://arxiv.org/abs/1707.06347, eq. 7.

    Args:
        logprobs: of the policy as it is, (n,), with gradient.
        old: of the policy that drew the tokens, (n,).
        advantages: (n,).
        clip: c, > 0.
    """
    ratio = torch.exp(logprobs - old)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return Clipped(torch.maximum(plain, clipped), clipped > plain, ratio)


def value_losses(
    values: Tensor, old: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), as TRL has it.

    Returns: the losses (n,), and whether the clipped one was the larger, (n,) bool.
    """
    plain = (values - returns).square()
    clipped = (torch.clamp(values, old - clip, old + clip) - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def divergence(logprobs: Tensor, old: Tensor) -> Tensor:
    """How far the update has come from the policy that drew, (n,) nats: rho - 1 - log rho >= 0.

    The expectation under the old policy is KL(old, new); http://joschu.net/blog/kl-approx.html.
    """
    difference = logprobs - old
    return torch.expm1(difference) - difference


@dataclass(frozen=True)
class ActorCritic:
    """Stage ppo with a value head; its unit is the token of a response.

    The loss is the mean over tokens of: policy loss + value_coef * value loss
    - entropy_coef * entropy.
    """

    clip_range: float
    value_clip_range: float
    value_coef: float
    entropy_coef: float = 0.0

    def count(self, batch: Batch) -> int:
        """The number of response tokens."""
        return batch.targets.numel()

    def __call__(self, output: TokenOutput, batch: Batch) -> LossOutput:
        """The summed loss of `batch`; needs `values`, and `entropy` where it has a coefficient."""
        assert output.values is not None, "the model has a value head"
        given = batch.given
        old = given["old_logprobs"]
        policy = policy_losses(output.logprobs, old, given["advantages"], self.clip_range)
        value, is_value_clipped = value_losses(
            output.values, given["old_values"], given["returns"], self.value_clip_range
        )
        losses = policy.losses + self.value_coef * value
        if self.entropy_coef:
            losses = losses - self.entropy_coef * _entropy(output)
        metrics = _metrics(policy, output.logprobs.detach(), old, torch.Tensor.sum)
        metrics["value_loss"] = value.detach().sum()
        metrics["value_clip_fraction"] = is_value_clipped.sum()
        return LossOutput(losses.sum(), metrics)


@dataclass(frozen=True)
class GroupRelative:
    """Stage ppo without a value head, https://arxiv.org/abs/2402.03300, eq. 3; unit: the response.

    The loss is the mean over responses of the mean over their tokens of: policy loss + beta * k3
    - entropy_coef * entropy, with k3 the divergence from the reference.

    Args:
        clip_range, entropy_coef: as above.
        divergence: the estimate of the divergence from the reference, of log-probabilities (n,).
        beta: asked at each call, since it is controlled.
    """

    clip_range: float
    divergence: Callable[[Tensor, Tensor], Tensor]
    beta: Callable[[], float]
    entropy_coef: float = 0.0

    def count(self, batch: Batch) -> int:
        """The number of responses that have tokens."""
        return int(batch.target_sample.unique().numel())

    def __call__(self, output: TokenOutput, batch: Batch) -> LossOutput:
        """The summed loss of `batch`; needs `entropy` where it has a coefficient."""
        given = batch.given
        lengths = torch.bincount(batch.target_sample, minlength=max(1, batch.num_samples))
        weights = 1.0 / lengths[batch.target_sample]  # (n,): a response's sum to 1

        def total(values: Tensor) -> Tensor:
            return (values * weights).sum()

        old = given["old_logprobs"]
        policy = policy_losses(output.logprobs, old, given["advantages"], self.clip_range)
        losses = policy.losses
        kl = self.divergence(output.logprobs, given["reference"])
        losses = losses + self.beta() * kl
        if self.entropy_coef:
            losses = losses - self.entropy_coef * _entropy(output)
        metrics = _metrics(policy, output.logprobs.detach(), old, total)
        metrics["kl_loss"] = total(kl.detach())
        return LossOutput(total(losses), metrics)


def _entropy(output: TokenOutput) -> Tensor:
    assert output.entropy is not None, "the engine was asked for entropies"
    return output.entropy


def _metrics(
    policy: Clipped, logprobs: Tensor, old: Tensor, total: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sums, in the objective's unit, of what is watched of an update."""
    off = (policy.ratio.detach() - 1).abs()
    return {
        "policy_loss": total(policy.losses.detach()),
        "clip_fraction": total(policy.is_clipped.float()),
        "approx_kl": total(divergence(logprobs, old)),
        "ratio_off": total((off > RATIO_TOLERANCE).float()),
        "ratio_error": total(off),
    }
