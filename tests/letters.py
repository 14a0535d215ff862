"""Conversations of single letters, a token each: what stays of a row and what of it is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from llmray.data.conversation import Conversation, Message
from llmray.data.encoding import Encoded, Encoder
from llmray.data.features import FeatureOptions, RowFeatures, supervised
from llmray.data.templates import Turn


@dataclass(frozen=True)
class Letters:
    """A renderer whose sources are small letters and whose targets are capital ones."""

    def turns(self, conversation: Conversation) -> list[Turn]:
        pairs = zip(conversation.messages[::2], conversation.messages[1::2], strict=True)
        return [Turn(prompt.content, response.content) for prompt, response in pairs]

    def prompt(
        self, messages: Sequence[Message], system: str | None = None, tools: str | None = None
    ) -> str:
        return "".join(message.content for message in messages) + "h"


class OneTokenALetter:
    """An encoder whose ids are the code points of the text."""

    def encode(self, wholes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        bounds = np.cumsum([0, *map(len, wholes)])
        return np.array([ord(letter) for letter in "".join(wholes)], np.int32), bounds

    def encode_parts(self, parts: Sequence[Sequence[str]]) -> Encoded:
        ids, bounds = self.encode(["".join(part) for part in parts])
        borders = [np.cumsum([len(text) for text in part]).tolist() for part in parts]
        return Encoded(ids, bounds, borders)

    def borders(self, parts: Sequence[str], ids: np.ndarray) -> list[int]:
        assert "".join(parts) == "".join(map(chr, ids))
        return np.cumsum([len(text) for text in parts]).tolist()


ENCODER = cast("Encoder", OneTokenALetter())


def dialogue(*words: str) -> Conversation:
    roles: list[Any] = ["user", "assistant"]
    return Conversation(tuple(Message(roles[i % 2], word) for i, word in enumerate(words)))


def shown(row: Any) -> tuple[str, str]:
    """The kept text, and the same with all but the targets blanked out."""
    assert isinstance(row, RowFeatures)
    text = "".join(map(chr, row.input_ids))
    learned = np.zeros(len(text), bool)
    for start, stop in zip(row.targets[::2], row.targets[1::2], strict=True):
        learned[start:stop] = True
    assert row.num_targets == learned.sum()
    return text, "".join(
        letter if is_target else "." for letter, is_target in zip(text, learned, strict=True)
    )


def build(conversation: Conversation, cutoff_len: int = 100, **options: Any) -> RowFeatures:
    made = FeatureOptions(cutoff_len, **options)
    [row] = supervised([conversation], ENCODER, Letters(), made)
    assert isinstance(row, RowFeatures)
    return row
