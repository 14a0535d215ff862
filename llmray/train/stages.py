"""The stages: which features a row becomes, and which objective reads them. A stage is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmray.train.losses import LanguageModeling, Objective


@dataclass(frozen=True)
class Stage:
    """One training stage.

    `objective` makes the loss; `best` names the metric by which checkpoints are compared and
    whether a smaller or a larger value is better.
    """

    objective: Callable[[], Objective]
    best: tuple[str, str]


STAGES: dict[str, Stage] = {
    "pt": Stage(objective=LanguageModeling, best=("eval_loss", "min")),
    "sft": Stage(objective=LanguageModeling, best=("eval_loss", "min")),
}
