"""The tokens of a row, and the options that decide about them: what all kinds of features share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmray.data.conversation import Conversation, RowError
from llmray.data.encoding import Encoder
from llmray.data.row_format import Kind
from llmray.data.templates import Renderer
from llmray.data.truncation import Dropped, Truncation


@dataclass(frozen=True)
class FeatureOptions:
    """Arguments that decide about features.

    `text_prefix` and `text_suffix` are ids before and after each text of stage pt; `packing` says
    that its texts are later laid into full blocks, so that none is cut. `end_token` is the token
    that is learned at the end of responses where the text has none there (efficient_eos).
    """

    cutoff_len: int
    truncation: Truncation = "structure"
    train_on_prompt: bool = False
    mask_history: bool = False
    packing: bool = False
    text_prefix: tuple[int, ...] = ()
    text_suffix: tuple[int, ...] = ()
    end_token: int | None = None


@dataclass(frozen=True)
class RowFeatures:
    """The tokens of a row; `targets` are pairs of ends of the runs of tokens that are learned.

    `cuts` are pairs too: before which token `cutoff_len` took tokens out, and how many. `instead`
    are pairs of a place and the token that is learned there instead of the one that stands there.
    `starts` is where each answer of a row begins, one after the other behind the prompt that they
    share; empty where the row is one sequence. `is_wanted` judges the one answer. A row that
    `is_prompt` has no targets: it is answered, not learned, and `said` is its conversation (see
    `spoken`) for who scores the answer.
    """

    input_ids: np.ndarray  # (T,) int32
    targets: tuple[int, ...]
    cuts: tuple[int, ...] = ()
    instead: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    is_wanted: bool | None = None
    is_prompt: bool = False
    said: str | None = None

    @property
    def is_truncated(self) -> bool:
        """Whether tokens were taken out."""
        return bool(self.cuts)

    @property
    def num_targets(self) -> int:
        """How many tokens are learned."""
        return sum(self.targets[1::2]) - sum(self.targets[::2])


@dataclass(frozen=True)
class Equal:
    """A pair that is left out, since its answers are the same tokens."""


Outcome = RowFeatures | Dropped | Equal | RowError
Build = Callable[[Sequence[Conversation], Encoder, Renderer | None, FeatureOptions], list[Outcome]]


@dataclass(frozen=True)
class StageFeatures:
    """One stage: how its features are built, and of what in a row."""

    build: Build
    kind: Kind

    @property
    def learns_past(self) -> bool:
        """Whether all responses of a conversation may be learned, not the last one alone."""
        return self.kind not in ("pair", "judged", "prompt")

    @property
    def keeps_said(self) -> bool:
        """Whether rows keep their conversation beside its tokens."""
        return self.kind == "prompt"

    @property
    def renders(self) -> bool:
        """Whether conversations are written in a text format, which takes a renderer."""
        return self.kind != "text"
