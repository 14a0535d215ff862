"""What a rollout is learned from: responses, their scores, and what policy and reference say.

Scores are on their way while log-probabilities are computed; nothing is gathered on one rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmray.batch import Batch
from llmray.errors import RewardError
from llmray.model.head import TokenOutput
from llmray.rl.handles import Answer
from llmray.rl.rewards import Rewards, Scored
from llmray.rl.rollout import Prompt, Rollout, Sampler
from llmray.train.parallel import World


class Speaks(Protocol):
    """A policy and its reference, asked about tokens; `engine.Engine` is one."""

    world: World

    def logprobs(self, batch: Batch, *, entropy: bool = False) -> TokenOutput:
        """What the policy says at the batch's targets, without gradient."""
        ...

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The reference's log-probabilities at the targets, (n,)."""
        ...


@dataclass
class Phases:
    """Seconds that a rank spent in each part of a rollout and its update."""

    rollout: float = 0.0
    logprobs: float = 0.0
    waiting: float = 0.0  # for scores, beyond what the others hid
    update: float = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time inside to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    @property
    def total(self) -> float:
        """All of them."""
        return self.rollout + self.logprobs + self.waiting + self.update


@dataclass(frozen=True)
class Experience:
    """A rollout with all that was found out about it, on the host.

    `scores_S` are as given, NaN where masked; `is_scored_S` is false where a reward had no score,
    also where `reward_error_value` stands for it. `values_ST` is None without a value head.
    """

    rollout: Rollout
    mask_ST: Tensor
    scores_S: Tensor  # float32
    is_scored_S: Tensor
    parts: dict[str, Tensor]  # (S,) of each source
    logprobs_ST: Tensor  # of the policy that sampled, recomputed without dropout
    reference_ST: Tensor
    values_ST: Tensor | None
    entropy_ST: Tensor
    phases: Phases = field(default_factory=Phases)

    @property
    def valid_S(self) -> Tensor:
        """Responses that are learned from: they have a token, and a score or what stands for it."""
        return self.scores_S.isfinite() & (self.rollout.lengths_S > 0)


@dataclass(frozen=True)
class Collector:
    """Experience from prompts.

    Args:
        speaker: policy and reference.
        sampler: responses by the policy.
        rewards: scores of responses.
        flat: whether batches are flat rows.
        pad_id: fills rectangles.
        rows: responses of one forward pass.
    """

    speaker: Speaks
    sampler: Sampler
    rewards: Rewards
    flat: bool
    pad_id: int
    rows: int

    def collect(self, prompts: Sequence[Prompt], rollout: int) -> Experience:
        """Sample, score, and ask policy and reference; on this rank alone.

        Args:
            prompts: of this rank, maybe none.
            rollout: its number.

        Raises:
            RewardError: there is no score.
        """
        phases = Phases()
        pending: list[tuple[Sequence[int], Future[Scored]]] = []

        def send(rows: Sequence[int], answers: Sequence[Answer]) -> None:
            pending.append((rows, self.rewards.submit(answers)))

        with phases.of("rollout"):
            sampled = self.sampler.sample(prompts, rollout, send)
        mask_ST = sampled.mask_ST
        with phases.of("logprobs"):
            said = self._ask(sampled, mask_ST)
        with phases.of("waiting"):
            scores_S, is_scored_S, parts = _received(self.rewards, pending, len(sampled.responses))
        return Experience(
            rollout=sampled,
            mask_ST=mask_ST,
            scores_S=scores_S,
            is_scored_S=is_scored_S,
            parts=parts,
            logprobs_ST=said["logprobs"],
            reference_ST=said["reference"],
            values_ST=said.get("values"),
            entropy_ST=said["entropy"],
            phases=phases,
        )

    def _ask(self, sampled: Rollout, mask_ST: Tensor) -> dict[str, Tensor]:
        """What policy and reference say of the responses' tokens, (S, T) each."""
        lengths = [
            len(prompt.ids) + len(response)
            for prompt, response in zip(sampled.prompts, sampled.responses, strict=True)
        ]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        found: dict[str, Tensor] = {
            name: torch.zeros(mask_ST.shape) for name in ("logprobs", "reference", "entropy")
        }
        for start in range(0, len(order), self.rows):
            rows = order[start : start + self.rows]
            batch = sampled.batch(rows, flat=self.flat, pad_id=self.pad_id)
            output = self.speaker.logprobs(batch, entropy=True)
            assert output.entropy is not None, "it was asked for"
            told = {
                "logprobs": output.logprobs,
                "entropy": output.entropy,
                "reference": self.speaker.reference_logprobs(batch),
            }
            if output.values is not None:
                told["values"] = output.values
                found.setdefault("values", torch.zeros(mask_ST.shape))
            index = torch.tensor(rows)
            for name, values in told.items():
                part_RT = torch.zeros(len(rows), mask_ST.shape[1])
                part_RT[mask_ST[index]] = values.float().cpu()
                found[name][index] = part_RT
        return found


def _received(
    rewards: Rewards, pending: Sequence[tuple[Sequence[int], Future[Scored]]], count: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The scores of `count` responses, which are scores, and each source's, when all are there."""
    scores_S = torch.full((count,), torch.nan)
    is_given_S = torch.zeros(count, dtype=torch.bool)
    parts: dict[str, Tensor] = {}
    for rows, future in pending:
        try:
            scored = rewards.wait(future)
        except RewardError:
            for _, other in pending:
                other.cancel()
            raise
        index = torch.tensor(rows, dtype=torch.long)
        scores_S[index] = torch.tensor(scored.scores, dtype=torch.float32)
        is_given_S[index[sorted(scored.given)]] = True
        for name, found in scored.parts.items():
            part_S = parts.setdefault(name, torch.full((count,), torch.nan))
            part_S[index] = torch.tensor(found, dtype=torch.float32)
    return scores_S, scores_S.isfinite() & ~is_given_S, parts
