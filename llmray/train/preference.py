"""Losses of preference: pairs of answers (stage dpo) and judged answers (stage kto).

Pure functions of log-probabilities, and the objectives that read them from a batch. Shape suffixes:
P pairs, S samples (answers), n targets of a batch. Log-probabilities are natural logarithms, summed
over the targets of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmray.arguments.rlhf import RlhfArguments
from llmray.batch import Batch
from llmray.model.head import TokenOutput
from llmray.train.losses import LossOutput, require_finite, sums_by_sample

Logprobs = Callable[[Batch], Tensor]  # (n,) at the targets of a batch, without gradient

REFERENCE_FREE = ("orpo", "simpo")  # losses of pairs that compare with no reference


@dataclass(frozen=True)
class Pairs:
    """What a loss of pairs reads; each of shape (P,).

    `chosen` and `rejected` are those of the policy, with gradient, `chosen_len` and `rejected_len`
    the numbers of targets. The reference's are None where a loss compares with none.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference) of the chosen and the rejected answers, (P,) each."""
        assert self.reference_chosen is not None
        assert self.reference_rejected is not None
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def averaged(self) -> Pairs:
        """The same by token."""

        def by(values: Tensor | None, lengths: Tensor) -> Tensor | None:
            return None if values is None else values / lengths

        return replace(
            self,
            chosen=self.chosen / self.chosen_len,
            rejected=self.rejected / self.rejected_len,
            reference_chosen=by(self.reference_chosen, self.chosen_len),
            reference_rejected=by(self.reference_rejected, self.rejected_len),
        )


@dataclass(frozen=True)
class PairStatistics:
    """What a loss reads of the whole step beside its pairs.

    `chosen_kl` and `rejected_kl` are the means of log(policy / reference) over the chosen and the
    rejected answers, at least 0; `shift` is the running mean of rewards.
    """

    chosen_kl: float = 0.0
    rejected_kl: float = 0.0
    shift: float = 0.0


def sigmoid_loss(pairs: Pairs, options: RlhfArguments, _: PairStatistics) -> Tensor:
    """DPO, eq. 7 of https://arxiv.org/abs/2305.18290, (P,).

    With `dpo_label_smoothing` e: (1 - e) times it plus e times that of the labels turned round,
    eq. 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    chosen_P, rejected_P = pairs.ratios
    logits_P = options.pref_beta * (chosen_P - rejected_P)
    turned = options.dpo_label_smoothing
    return -(1 - turned) * F.logsigmoid(logits_P) - turned * F.logsigmoid(-logits_P)


def hinge_loss(pairs: Pairs, options: RlhfArguments, _: PairStatistics) -> Tensor:
    """SLiC, https://arxiv.org/abs/2305.10425, of the ratios to a reference as 2309.06657, (P,)."""
    chosen_P, rejected_P = pairs.ratios
    return torch.relu(1 - options.pref_beta * (chosen_P - rejected_P))


def ipo_loss(pairs: Pairs, options: RlhfArguments, _: PairStatistics) -> Tensor:
    """Identity PO, eq. 17 of https://arxiv.org/abs/2310.12036, (P,); by token, the paper sums."""
    chosen_P, rejected_P = pairs.averaged.ratios
    return (chosen_P - rejected_P - 1 / (2 * options.pref_beta)) ** 2


def kto_pair_loss(pairs: Pairs, options: RlhfArguments, step: PairStatistics) -> Tensor:
    """KTO of both answers of a pair, https://arxiv.org/abs/2402.01306, the mean of the two, (P,).

    The divergence that each half compares with is estimated from the other half.
    """
    chosen_P, rejected_P = pairs.ratios
    beta = options.pref_beta
    wanted_P = 1 - torch.sigmoid(beta * (chosen_P - step.rejected_kl))
    unwanted_P = 1 - torch.sigmoid(beta * (step.chosen_kl - rejected_P))
    return (wanted_P + unwanted_P) / 2


def orpo_loss(pairs: Pairs, options: RlhfArguments, _: PairStatistics) -> Tensor:
    """ORPO, eq. 6 and 7 of https://arxiv.org/abs/2403.07691, (P,): no reference."""
    by_token = pairs.averaged
    odds_P = _log_odds(by_token.chosen) - _log_odds(by_token.rejected)
    return -by_token.chosen - options.pref_beta * F.logsigmoid(odds_P)


def simpo_loss(pairs: Pairs, options: RlhfArguments, _: PairStatistics) -> Tensor:
    """SimPO, eq. 6 of https://arxiv.org/abs/2405.14734, (P,): no reference."""
    by_token = pairs.averaged
    margin_P = options.pref_beta * (by_token.chosen - by_token.rejected)
    return -F.logsigmoid(margin_P - options.simpo_gamma)


PREFERENCE_LOSSES: dict[str, Callable[[Pairs, RlhfArguments, PairStatistics], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "kto_pair": kto_pair_loss,
    "orpo": orpo_loss,
    "simpo": simpo_loss,
}


def bco_loss(pairs: Pairs, options: RlhfArguments, step: PairStatistics) -> Tensor:
    """Binary classifier optimization, eq. 11 of https://arxiv.org/abs/2404.04656, (P,).

    The part of MPO (https://arxiv.org/abs/2411.10442) that judges each answer by itself.
    """
    chosen_P, rejected_P = pairs.ratios
    beta = options.pref_beta
    wanted_P = -F.logsigmoid(beta * chosen_P - step.shift)
    return wanted_P - F.logsigmoid(-(beta * rejected_P - step.shift))


def kto_losses(ratios_S: Tensor, is_wanted_S: Tensor, kl: float, options: RlhfArguments) -> Tensor:
    """KTO, eq. 8 of https://arxiv.org/abs/2402.01306, (S,).

    Args:
        ratios_S: log(policy / reference) of the answers.
        is_wanted_S: which are wanted.
        kl: the divergence of the policy from the reference, at least 0.
        options: beta and the weights of wanted and unwanted answers.
    """
    beta = options.pref_beta
    wanted_S = options.kto_chosen_weight * (1 - torch.sigmoid(beta * (ratios_S - kl)))
    unwanted_S = options.kto_rejected_weight * (1 - torch.sigmoid(beta * (kl - ratios_S)))
    return torch.where(is_wanted_S, wanted_S, unwanted_S)


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log-probabilities; near p = 1 as if p were 1 - 1e-6."""
    logps = logps.clamp(max=-1e-6)
    near = logps > -math.log(2)  # there log(-expm1) keeps its digits, elsewhere log1p(-exp) does
    # each branch is given harmless values where the other is taken: else its gradient were nan
    small = torch.log(-torch.expm1(torch.where(near, logps, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, logps)))
    return logps - torch.where(near, small, large)


def lengths_by_sample(batch: Batch) -> Tensor:
    """Targets of each sample, (S,) float64."""
    return torch.bincount(batch.target_sample, minlength=batch.num_samples).double()


def beyond_the_shorter(batch: Batch) -> Tensor:
    """Which targets of pairs stand beyond the length of the pair's shorter answer, (n,) bool."""
    lengths_S = lengths_by_sample(batch)
    shorter_S = lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
    starts_S = lengths_S.cumsum(0) - lengths_S
    places = torch.arange(len(batch.target_sample), device=lengths_S.device)
    return places - starts_S[batch.target_sample] >= shorter_S[batch.target_sample]


@dataclass
class RunningMean:
    """The mean of all values seen so far; Resumable."""

    mean: float = 0.0
    count: float = 0.0

    def add(self, total: float, count: float) -> None:
        """Take values in, by their sum and number."""
        self.count += count
        self.mean += (total - count * self.mean) / max(self.count, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Both fields."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put both back."""
        self.mean, self.count = float(state["mean"]), float(state["count"])


@dataclass(frozen=True)
class Preference:
    """Stage dpo; its unit is the pair: samples 2 i and 2 i + 1 are chosen and rejected of pair i.

    `step` holds what losses read of the whole step; `shift` is the running mean of rewards that
    `pref_bco_weight` reads.
    """

    options: RlhfArguments
    step: PairStatistics = field(default_factory=PairStatistics)
    shift: RunningMean = field(default_factory=RunningMean)

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.options.pref_loss not in REFERENCE_FREE

    @property
    def needs_statistics(self) -> bool:
        """Whether the loss reads something of the whole step."""
        return self.options.pref_loss == "kto_pair" or self.options.pref_bco_weight > 0

    def count(self, batch: Batch) -> int:
        """The number of pairs."""
        return batch.num_samples // 2

    def __call__(self, output: TokenOutput, batch: Batch) -> LossOutput:
        """The summed loss of the pairs, and the sums of their metrics."""
        options, logprobs = self.options, output.logprobs
        sums_S = sums_by_sample(logprobs, batch)
        require_finite(sums_S, batch, "log-probability")
        if options.ld_alpha is not None:
            weights = torch.where(beyond_the_shorter(batch), options.ld_alpha, 1.0)
            pairs = self._pairs(sums_by_sample(logprobs * weights, batch), batch)
        else:
            pairs = self._pairs(sums_S, batch)
        losses_P = PREFERENCE_LOSSES[options.pref_loss](pairs, options, self.step)
        if options.pref_bco_weight:
            weight = options.pref_bco_weight
            losses_P = (losses_P + weight * bco_loss(pairs, options, self.step)) / (1 + weight)
        if options.pref_ftx:
            losses_P = losses_P - options.pref_ftx * sums_S[0::2] / pairs.chosen_len
        whole = self._pairs(sums_S.detach(), batch)
        return LossOutput(losses_P.sum(), self._metrics(whole))

    def statistics(self, batch: Batch, logprobs: Logprobs) -> Tensor:
        """Sums of log(policy / reference) of chosen and of rejected answers, and their number."""
        pairs = self._pairs(sums_by_sample(logprobs(batch), batch), batch)
        chosen_P, rejected_P = pairs.ratios
        number = torch.tensor(float(len(chosen_P)), dtype=torch.float64, device=chosen_P.device)
        return torch.stack([chosen_P.sum(), rejected_P.sum(), number])

    def informed(self, sums: Sequence[float], *, learns: bool) -> Preference:
        """The objective of a step whose pairs have these `statistics` together."""
        chosen, rejected, number = sums
        if learns:
            self.shift.add(self.options.pref_beta * (chosen + rejected), 2 * number)
        kl_chosen, kl_rejected = (max(s / max(number, 1.0), 0.0) for s in (chosen, rejected))
        return replace(self, step=PairStatistics(kl_chosen, kl_rejected, self.shift.mean))

    def described(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics as they are."""
        return dict(means)

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return self.shift.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self.shift.load_state_dict(state)

    def _pairs(self, sums_S: Tensor, batch: Batch) -> Pairs:
        lengths_S = lengths_by_sample(batch)
        reference = batch.reference
        if not self.uses_reference:
            reference = None
        elif reference is None:
            raise ValueError("the batch lacks the reference's log-probabilities")
        return Pairs(
            sums_S[0::2],
            sums_S[1::2],
            lengths_S[0::2],
            lengths_S[1::2],
            None if reference is None else reference[0::2],
            None if reference is None else reference[1::2],
        )

    def _metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        by_token = self.options.pref_loss in ("ipo", *REFERENCE_FREE)
        read = pairs.averaged if by_token else pairs
        chosen_P, rejected_P = read.ratios if self.uses_reference else (read.chosen, read.rejected)
        rewards = self.options.pref_beta * chosen_P, self.options.pref_beta * rejected_P
        metrics = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": rewards[0] > rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": read.chosen,
            "logps/rejected": read.rejected,
        }
        if self.uses_reference:
            ratios = pairs.ratios
            metrics["kl"] = (ratios[0] + ratios[1]) / 2
            metrics["chosen_falls"] = ratios[0] < 0
        return {name: values.double().sum() for name, values in metrics.items()}


@dataclass(frozen=True)
class Judged:
    """Stage kto; its unit is the answer.

    `kl` is the divergence of the policy from the reference, estimated over the whole step from
    prompts with answers of other rows; `share_wanted` of its answers are wanted.
    """

    options: RlhfArguments
    kl: float = 0.0
    share_wanted: float = 1.0

    needs_statistics = True
    uses_reference = True

    def count(self, batch: Batch) -> int:
        """The number of answers."""
        return batch.num_samples

    def __call__(self, output: TokenOutput, batch: Batch) -> LossOutput:
        """The summed loss of the answers, and the sums of their metrics."""
        options = self.options
        sums_S = sums_by_sample(output.logprobs, batch)
        require_finite(sums_S, batch, "log-probability")
        if batch.is_wanted is None:  # no answers
            nothing = sums_S.sum()
            return LossOutput(nothing, {name: nothing.detach() for name in _SUMS})
        assert batch.reference is not None
        ratios_S = sums_S - batch.reference
        losses_S = kto_losses(ratios_S, batch.is_wanted, self.kl, options)
        if options.pref_ftx:
            # a mean over the wanted answers of the step, which is divided by all its answers
            by_token = -sums_S / lengths_by_sample(batch) * batch.is_wanted
            losses_S = losses_S + options.pref_ftx / max(self.share_wanted, 1e-12) * by_token
        return LossOutput(losses_S.sum(), self._metrics(sums_S.detach(), ratios_S.detach(), batch))

    def statistics(self, batch: Batch, logprobs: Logprobs) -> Tensor:
        """The sum of log(policy / reference) of mismatched answers, and how many are wanted."""
        if batch.mismatched is None:
            return torch.zeros(3, dtype=torch.float64)
        assert batch.mismatched.reference is not None
        assert batch.is_wanted is not None
        sums_S = sums_by_sample(logprobs(batch.mismatched), batch.mismatched)
        ratio = (sums_S - batch.mismatched.reference).sum()
        number = torch.full_like(ratio, batch.num_samples)
        return torch.stack([ratio, batch.is_wanted.sum().to(ratio), number])

    def informed(self, sums: Sequence[float], *, learns: bool) -> Judged:
        """The objective of a step whose answers have these `statistics` together."""
        ratio, wanted, number = sums
        number = max(number, 1.0)
        return replace(self, kl=max(ratio / number, 0.0), share_wanted=wanted / number)

    def described(self, means: Mapping[str, float]) -> dict[str, float]:
        """Means over wanted and over unwanted answers apart; those that are there."""
        found = {}
        for name in ("rewards", "logps"):
            for side in ("chosen", "rejected"):
                if means.get(f"share_{side}", 0.0) > 0:
                    found[f"{name}/{side}"] = means[f"{name}_{side}"] / means[f"share_{side}"]
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        if means.get("share_chosen", 0.0) > 0:
            found["chosen_falls"] = means["falls"] / means["share_chosen"]
        return {**found, "kl": means["kl"]} if "kl" in means else found

    def _metrics(self, sums_S: Tensor, ratios_S: Tensor, batch: Batch) -> dict[str, Tensor]:
        assert batch.is_wanted is not None
        wanted, unwanted = batch.is_wanted, ~batch.is_wanted
        rewards_S = self.options.pref_beta * ratios_S
        values = (
            *(rewards_S * wanted, rewards_S * unwanted, sums_S * wanted, sums_S * unwanted),
            *(wanted, unwanted, (ratios_S < 0) & wanted, torch.full_like(rewards_S, self.kl)),
        )
        return {name: v.double().sum() for name, v in zip(_SUMS, values, strict=True)}


_SUMS = (
    *("rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected"),
    *("share_chosen", "share_rejected", "falls", "kl"),
)


def effective_weights(num_wanted: int, num_rows: int, options: RlhfArguments) -> float:
    """How much all wanted answers weigh against all unwanted ones.

    kto_chosen_weight * wanted / (kto_rejected_weight * unwanted), which is to lie between 1 and
    4 / 3 by eq. 10 of https://arxiv.org/abs/2402.01306; infinite without unwanted weight.
    """
    unwanted = options.kto_rejected_weight * (num_rows - num_wanted)
    wanted = options.kto_chosen_weight * num_wanted
    return wanted / unwanted if unwanted else math.inf
