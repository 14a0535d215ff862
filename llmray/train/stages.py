"""The stages: which objective reads a batch, and whether against a reference. A stage is a row.

What a row of the data becomes in a stage is in `llmray.data.features`: OF_STAGE names its features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmray.arguments.run import RunArguments
from llmray.train.losses import LanguageModeling, RewardModeling, StageObjective
from llmray.train.preference import REFERENCE_FREE, Judged, Preference


@dataclass(frozen=True)
class Stage:
    """One training stage.

    `objective` makes the loss; `best` names the metric by which checkpoints are compared and
    whether a smaller or a larger value is better; `uses_reference` says whether the loss compares
    with a reference model. A stage that `scores` trains a value head and predicts no token; one
    that `samples` learns from its own responses, and its objective says only what is logged.
    """

    objective: Callable[[RunArguments], StageObjective]
    best: tuple[str, str]
    uses_reference: Callable[[RunArguments], bool] = lambda arguments: False
    scores: bool = False
    samples: bool = False


def _language_modeling(arguments: RunArguments) -> StageObjective:
    return LanguageModeling()


def _reward_modeling(arguments: RunArguments) -> StageObjective:
    return RewardModeling()


def _preference(arguments: RunArguments) -> StageObjective:
    return Preference(arguments.rlhf)


def _judged(arguments: RunArguments) -> StageObjective:
    return Judged(arguments.rlhf)


def _compares(arguments: RunArguments) -> bool:
    return arguments.rlhf.pref_loss not in REFERENCE_FREE


STAGES: dict[str, Stage] = {
    "pt": Stage(objective=_language_modeling, best=("eval_loss", "min")),
    "sft": Stage(objective=_language_modeling, best=("eval_loss", "min")),
    "rm": Stage(objective=_reward_modeling, best=("eval_loss", "min"), scores=True),
    "dpo": Stage(_preference, best=("eval_loss", "min"), uses_reference=_compares),
    "ppo": Stage(
        objective=_language_modeling,
        best=("eval_score", "max"),
        uses_reference=lambda arguments: True,
        samples=True,
    ),
    "kto": Stage(_judged, best=("eval_loss", "min"), uses_reference=lambda arguments: True),
}


def temperature(arguments: RunArguments) -> float:
    """What divides the logits, of policy and reference alike: what a stage samples with."""
    return arguments.generating.temperature if STAGES[arguments.finetuning.stage].samples else 1.0
