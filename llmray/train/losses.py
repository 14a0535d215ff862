"""Objectives: what a batch's token outputs are worth. Pure tensor functions; layouts stay outside.

Shape suffixes: n targets of a batch, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmray.batch import Batch
from llmray.errors import TrainingError
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


@runtime_checkable
class StepObjective(Protocol):
    """What an objective has that reads something of the whole step, no sum over its units.

    Before the first backward pass the engine adds `statistics` of all micro-batches of all ranks
    up, without gradient, and goes on with what `informed` gives.
    """

    @property
    def needs_statistics(self) -> bool:
        """Whether it does read something."""
        ...

    def statistics(self, batch: Batch, logprobs: Callable[[Batch], Tensor]) -> Tensor:
        """What is added up, (k,) float64.

        Args:
            batch: with the reference's log-probabilities.
            logprobs: the policy's at the targets of a batch, (n,).
        """
        ...

    def informed(self, sums: Sequence[float], *, learns: bool) -> Objective:
        """The objective of the step; `learns` says whether it is one of training."""
        ...


@runtime_checkable
class LearningObjective(Protocol):
    """What an objective has that learns something itself, which checkpoints keep."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learned."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put that back."""
        ...


def sums_by_sample(values: Tensor, batch: Batch) -> Tensor:
    """Values of the n targets of a batch added up by sample, (num_samples,) float64."""
    sums = torch.zeros(batch.num_samples, dtype=torch.float64, device=values.device)
    return sums.index_add(0, batch.target_sample, values.double())


def require_finite(values_S: Tensor, batch: Batch, what: str) -> None:
    """Fail if the value of an answer is not a number; looks only where that costs no wait.

    Args:
        values_S: one for each answer of the batch, (num_samples,).
        batch: whose rows are named.
        what: the values are, for the message.

    Raises:
        TrainingError: names the row.
    """
    if values_S.device.type != "cpu" or bool(values_S.isfinite().all()):
        return
    place = int((~values_S.isfinite()).nonzero()[0, 0])
    per_row = max(1, batch.num_samples // max(1, len(batch.rows)))
    row = f"row {batch.rows[place // per_row]} of the table" if batch.rows else "a row"
    raise TrainingError(
        f"the {what} of an answer is {values_S[place].item()}: {row}, counted from 0. "
        "Finite numbers are required. Look at it with llmray render; lower learning_rate, or train "
        "in bf16 or fp32 instead of fp16."
    )


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


class RewardModeling:
    """Pairwise ranking of responses by their rewards; its unit is the pair.

    -log sigmoid(r_chosen - r_rejected), equation 1 of https://arxiv.org/abs/2203.02155 for two
    responses. Samples 2 i and 2 i + 1 are the chosen and the rejected response of pair i.
    """

    def count(self, batch: Batch) -> int:
        """The number of pairs."""
        return batch.num_samples // 2

    def __call__(self, output: TokenOutput, batch: Batch) -> LossOutput:
        """The summed loss; metrics are the accuracy, the margin and both rewards."""
        assert output.scores is not None, "the model gives rewards"
        require_finite(output.scores, batch, "reward")
        chosen_P, rejected_P = output.scores[0::2], output.scores[1::2]
        margins_P = chosen_P - rejected_P
        metrics = {
            "accuracy": (margins_P > 0).sum(),
            "margin": margins_P.sum(),
            "reward_chosen": chosen_P.sum(),
            "reward_rejected": rejected_P.sum(),
        }
        metrics = {name: value.detach() for name, value in metrics.items()}
        return LossOutput(loss=-F.logsigmoid(margins_P).sum(), metrics=metrics)

    def described(self, means: Mapping[str, float]) -> dict[str, float]:
        """The means over pairs, as they are."""
        return dict(means)
