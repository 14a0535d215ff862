"""Rewards from a reward model in this process: the scorer of `llmray score`, asked for answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llmray.errors import RewardError
from llmray.rl.handles import Answer


class TextScores(Protocol):
    """Token sequences of texts and their rewards; `train.score.Scorer` is one."""

    def encode(self, texts: Sequence[str]) -> Sequence[HasIds]:
        """The tokens of whole texts."""
        ...

    def run(self, sequences: Sequence[np.ndarray]) -> list[float]:
        """The rewards of token sequences; not finite where the model says so."""
        ...


class HasIds(Protocol):
    """Tokens of a text."""

    @property
    def ids(self) -> np.ndarray:
        """(T,) int32."""
        ...


class ModelReward:
    """Scores by a reward model that reads whole texts, prompt and response.

    Args:
        scorer: the model.
    """

    def __init__(self, scorer: TextScores) -> None:
        self._scorer = scorer

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards of `answers`, in order; a reward may still be NaN.

        Raises:
            RewardError: the text of one has no token for the model.
        """
        encoded = self._scorer.encode([answer.text for answer in answers])
        empty = next((a.id for a, e in zip(answers, encoded, strict=True) if not len(e.ids)), None)
        if empty is not None:
            raise RewardError(
                f"answer {empty} has no token for the reward model. A tokenizer that knows the "
                "policy's text is required: name another reward_model."
            )
        return self._scorer.run([each.ids for each in encoded])
