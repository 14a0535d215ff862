"""Rewards from a reward model in this process: the scorer of `llmray score`, asked for answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from llmray.arguments.run import RunArguments
from llmray.data.conversation import Conversation, RowError
from llmray.errors import RewardError
from llmray.rl.handles import Answer
from llmray.rl.reward_words import Words, fitted
from llmray.train.score import Scorer

NO_LIMIT = 1 << 30  # tokens


class HasIds(Protocol):
    """Tokens of an answer, and whether some were cut off to fit."""

    @property
    def ids(self) -> np.ndarray:
        """(T,) int32."""
        ...

    @property
    def is_cut(self) -> bool:
        """Whether the end is missing."""
        ...


class TextScores(Protocol):
    """Token sequences of answers and their rewards; `train.score.Scorer` is one."""

    def encode(self, texts: Sequence[str]) -> Sequence[HasIds]:
        """The tokens of whole texts."""
        ...

    def encode_conversations(
        self, conversations: Sequence[Conversation], *, allows_empty: bool = False
    ) -> Sequence[HasIds | RowError]:
        """The tokens of conversations that end with a response."""
        ...

    def run(self, sequences: Sequence[np.ndarray]) -> list[float]:
        """The rewards of token sequences; not finite where the model says so."""
        ...


class ModelReward:
    """Scores by a reward model that reads whole texts, or conversations in its own format.

    Args:
        scorer: the model.
        words: what it reads of an answer.
    """

    def __init__(self, scorer: TextScores, words: Words = "text") -> None:
        self._scorer, self._words = scorer, words

    @classmethod
    def load(cls, asked: RunArguments, policy: RunArguments, policy_dir: Path) -> ModelReward:
        """The reward model of a run file, for the answers of a policy.

        Args:
            asked: the run file that `llmray score` would have for it.
            policy: the run.
            policy_dir: the policy's folder.

        Raises:
            LlmrayError: it is not there, or does not fit.
        """
        arguments, words = fitted(asked, policy, policy_dir)
        scorer = Scorer.load(arguments)
        limit = scorer.max_positions or NO_LIMIT
        # what is cut is refused: the reward is read at the end
        options = replace(scorer.options, cutoff_len=limit, truncation="error")
        return cls(replace(scorer, options=options), words)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards of `answers`, in order; a reward may still be NaN.

        Raises:
            RewardError: one cannot be written for the model, or is too long for it.
        """
        encoded = self._encoded(answers)
        for answer, found in zip(answers, encoded, strict=True):
            problem = None
            if isinstance(found, RowError):
                problem = f"cannot be written in the reward model's format: {found}"
            elif not len(found.ids):
                problem = (
                    "has no token for the reward model. A tokenizer that knows the policy's text "
                    "is required: name another reward_model."
                )
            elif found.is_cut:
                problem = (
                    f"is longer than the {len(found.ids)} tokens that the reward model takes, and "
                    "the reward is read at its end. Set a smaller cutoff_len or max_new_tokens."
                )
            if problem is not None:
                raise RewardError(f"answer {answer.id} {problem}")
        return self._scorer.run([e.ids for e in encoded if not isinstance(e, RowError)])

    def _encoded(self, answers: Sequence[Answer]) -> Sequence[HasIds | RowError]:
        if self._words == "text":
            return self._scorer.encode([answer.text for answer in answers])
        conversations = []
        for answer in answers:
            assert answer.conversation is not None, "prompts of stage ppo keep theirs"
            conversations.append(answer.conversation)
        return self._scorer.encode_conversations(conversations, allows_empty=True)
