"""What is shown of a rollout: scores, divergence, lengths, seconds; over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmray.rl import advantages
from llmray.rl.advantages import KlEstimator
from llmray.rl.experience import Experience
from llmray.train.parallel import World


@dataclass(frozen=True)
class Judged:
    """A rollout of all ranks in numbers; means over its valid responses where not said otherwise.

    `num_scored` are the valid ones whose score is one, and not `reward_error_value`.
    `kl` is the divergence from the reference, nats, summed over the tokens of a response;
    `entropy` a mean over tokens; `response_length` and `without_eos` are over all responses.
    """

    num_responses: float
    num_valid: float
    num_scored: float
    score: float
    score_deviation: float
    kl: float
    entropy: float
    response_length: float
    without_eos: float


def kl_by_response(found: Experience, estimator: KlEstimator) -> Tensor:
    """The divergence from the reference of each response, (S,) nats."""
    kl_ST = advantages.kl_estimates(found.logprobs_ST, found.reference_ST, estimator)
    return torch.where(found.mask_ST, kl_ST, 0.0).sum(1)


def of_experience(found: Experience, estimator: KlEstimator, world: World) -> Judged:
    """The figures of a rollout of all ranks; a collective call."""
    valid_S = found.valid_S
    count, mean, squares = advantages.pooled(found.scores_S[valid_S], world)
    kl_S = kl_by_response(found, estimator)[valid_S]
    sums = [
        float(kl_S.double().sum()),
        float(found.entropy_ST[found.mask_ST].double().sum()),
        float(found.mask_ST.sum()),
        float(len(valid_S)),
        float((~found.rollout.ended_S).sum()),
        float((valid_S & found.is_scored_S).sum()),
    ]
    kl, entropy, tokens, responses, cut, scored = world.sum(sums)
    return Judged(
        num_responses=responses,
        num_valid=count,
        num_scored=scored,
        score=mean,
        score_deviation=math.sqrt(squares / (count - 1)) if count > 1 else 0.0,
        kl=kl / max(1.0, count),
        entropy=entropy / max(1.0, tokens),
        response_length=tokens / max(1.0, responses),
        without_eos=cut / max(1.0, responses),
    )


def together(parts: Sequence[Judged]) -> Judged:
    """The figures of several rollouts as of one; at least one response of each is valid."""
    valid = sum(part.num_valid for part in parts)
    responses = sum(part.num_responses for part in parts)

    def mean(name: str, by: str, total: float) -> float:
        return sum(getattr(part, by) * getattr(part, name) for part in parts) / total

    score = mean("score", "num_valid", valid)
    squares = sum(
        (part.num_valid - 1) * part.score_deviation**2 + part.num_valid * (part.score - score) ** 2
        for part in parts
    )
    tokens = sum(part.num_responses * part.response_length for part in parts)
    said = sum(part.num_responses * part.response_length * part.entropy for part in parts)
    return Judged(
        num_responses=responses,
        num_valid=valid,
        num_scored=sum(part.num_scored for part in parts),
        score=score,
        score_deviation=math.sqrt(squares / (valid - 1)) if valid > 1 else 0.0,
        kl=mean("kl", "num_valid", valid),
        entropy=said / max(1.0, tokens),
        response_length=tokens / responses,
        without_eos=mean("without_eos", "num_responses", responses),
    )


def described(judged: Judged) -> dict[str, float]:
    """The figures as they are logged."""
    shown = {name: value for name, value in vars(judged).items() if not name.startswith("num_")}
    return shown | {"unscored": judged.num_responses - judged.num_scored}


def sampling_error(found: Experience, world: World) -> float | None:
    """How far log-probabilities at the draws are from those found later for the same tokens.

    Returns: the mean absolute difference over the tokens of all ranks, nats; None where no draw's
        is known. A collective call.
    """
    drawn_ST = found.rollout.drawn_ST
    known_ST = ~drawn_ST.isnan()
    errors = (drawn_ST - found.logprobs_ST)[known_ST].abs()
    total, count = world.sum([float(errors.double().sum()), float(known_ST.sum())])
    return total / count if count else None


def of_parts(found: Experience, names: Sequence[str], world: World) -> dict[str, float]:
    """The mean score of each source, where there are several; a collective call."""
    if len(names) < 2:
        return {}
    told = {}
    for name in names:
        part_S = found.parts.get(name, torch.zeros(0))
        _, told[f"score_{name}"], _ = advantages.pooled(part_S[part_S.isfinite()], world)
    return told


def idle_share(found: Experience, busy_s: float, num_served: float, world: World) -> float:
    """The share of a step in which what scores had nothing to do; a collective call.

    Args:
        found: with its phases, whose sum is the time of the step.
        busy_s: that what scores was busy for this rank.
        num_served: how many score for this rank.
        world: all ranks.
    """
    busy, served, total = world.sum([busy_s, num_served, found.phases.total])
    could = served * total / world.world_size
    return min(1.0, max(0.0, 1.0 - busy / max(could, 1e-9)))


def of_phases(found: Experience, num_learned: int, world: World) -> dict[str, float]:
    """Tokens a second of rollout and update over all ranks, and the share of time of each phase.

    Args:
        found: with its phases.
        num_learned: tokens that this rank's updates read.
        world: all ranks; a collective call.
    """
    phases = found.phases
    sampled = float(found.rollout.lengths_S.sum())
    names = ("rollout", "logprobs", "waiting", "update")
    seconds = [getattr(phases, name) for name in names]
    tokens, learned, *sums = world.sum([sampled, float(num_learned), *seconds])
    total, world_size = max(sum(sums), 1e-9), world.world_size
    told = {f"share_{name}": each / total for name, each in zip(names, sums, strict=True)}
    told["rollout_tokens_per_second"] = tokens * world_size / max(sums[0], 1e-9)
    told["update_tokens_per_second"] = learned * world_size / max(sums[3], 1e-9)
    return told
