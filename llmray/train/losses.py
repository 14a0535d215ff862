"""Objectives: what a batch's token outputs are worth. Pure tensor functions; layouts stay outside.

Shape suffixes: n targets of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from llmray.batch import Batch
from llmray.model.head import TokenOutput


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch, summed, not averaged.

    `loss` is a scalar with gradient; `metrics` are sums over the same units that
    `Objective.count` counts, so that both are divided by the count of the whole step.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss that is a sum over units: target tokens, pairs or samples."""

    def count(self, batch: Batch) -> int:
        """How many units `batch` holds; known before any forward pass."""
        ...

    def __call__(self, output: TokenOutput, batch: Batch) -> LossOutput:
        """The summed loss of `batch`."""
        ...


class StageObjective(Objective, Protocol):
    """The loss of a stage that learns from rows."""

    def described(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics as they are logged, from those of `LossOutput` as means over units."""
        ...


class LanguageModeling:
    """Next-token cross entropy, -sum of log p(target), in nats; its unit is the target token."""

    def count(self, batch: Batch) -> int:
        """The number of target tokens."""
        return batch.targets.numel()

    def __call__(self, output: TokenOutput, batch: Batch) -> LossOutput:
        """The negative sum of the log-probabilities of all targets."""
        return LossOutput(loss=-output.logprobs.sum())  # logprobs (n,)

    def described(self, means: Mapping[str, float]) -> dict[str, float]:
        """The loss says it all: there are none."""
        return dict(means)
