"""Special tokens in the data as plain text, while those of the text format stay special.

`split_special_tokens`: what a row says cannot end its message or begin another. Before a row is
written in a format, each special token in it becomes one private character (`hidden`); before the
text is tokenized, that becomes the token's letters again, and the format's tokens become characters
(`revealed`) that a renamed tokenizer knows in their place (`renamed`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmray.data.conversation import Conversation, Message, ToolCall

LETTERS, TOKENS = 0xF0000, 0x100000  # beginnings of Unicode's two private planes
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte that has no token; no format writes one
LARGEST = 0xFFFD  # characters of a private plane


@dataclass(frozen=True)
class PlainText:
    """The special tokens of a tokenizer, kept apart by who wrote them."""

    special: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer_json: str) -> PlainText:
        """From the text of a tokenizer.json."""
        added = json.loads(tokenizer_json)["added_tokens"]
        found = {t["content"] for t in added if t["special"] and not BYTE.fullmatch(t["content"])}
        assert len(found) <= LARGEST, "more special tokens than private characters"
        return cls(tuple(sorted(found, key=lambda token: (-len(token), token))))

    def hidden(self, said: Any) -> Any:
        """A text, message, conversation or JSON value with private characters for its tokens."""
        match said:
            case str():
                return self._hides.sub(self._hide, said)
            case Message():
                return replace(
                    said,
                    content=self.hidden(said.content),
                    thought=self.hidden(said.thought),
                    calls=self.hidden(said.calls),
                    results=self.hidden(said.results),
                )
            case ToolCall():
                return replace(
                    said, name=self.hidden(said.name), arguments=self.hidden(said.arguments)
                )
            case Conversation():
                return replace(
                    said,
                    messages=self.hidden(said.messages),
                    system=self.hidden(said.system),
                    tools=self.hidden(said.tools),
                    chosen=self.hidden(said.chosen),
                    rejected=self.hidden(said.rejected),
                )
            case Mapping():
                return {self.hidden(key): self.hidden(value) for key, value in said.items()}
            case tuple() | list():
                return type(said)(self.hidden(one) for one in said)
        return said

    def revealed(self, text: str) -> str:
        """A written text as the renamed tokenizer reads it."""
        return self._reveals.sub(self._reveal, text)

    def renamed(self, tokenizer_json: str) -> str:
        """A tokenizer whose special tokens are private characters, with the same ids."""
        raw = json.loads(tokenizer_json)
        names = {token: chr(TOKENS + index) for index, token in enumerate(self.special)}
        for token in raw["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocabulary = raw["model"].get("vocab")
        if isinstance(vocabulary, dict):
            raw["model"]["vocab"] = {names.get(t, t): i for t, i in vocabulary.items()}
        elif isinstance(vocabulary, list):
            raw["model"]["vocab"] = [[names.get(t, t), score] for t, score in vocabulary]
        unknown = raw["model"].get("unk_token")
        if unknown in names:
            raw["model"]["unk_token"] = names[unknown]
        return json.dumps(raw)

    @cached_property
    def _hides(self) -> re.Pattern[str]:
        count = max(1, len(self.special))
        private = "".join(f"{chr(b)}-{chr(b + count - 1)}" for b in (LETTERS, TOKENS))
        return re.compile("|".join([*map(re.escape, self.special), f"[{private}]"]))

    @cached_property
    def _reveals(self) -> re.Pattern[str]:
        letters = f"[{chr(LETTERS)}-{chr(LETTERS + max(1, len(self.special)) - 1)}]"
        return re.compile("|".join([*map(re.escape, self.special), letters]))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.special)}

    def _hide(self, found: re.Match[str]) -> str:
        index = self._index.get(found[0])
        # what looks like our own characters must not become a token
        return UNKNOWN if index is None else chr(LETTERS + index)

    def _reveal(self, found: re.Match[str]) -> str:
        index = self._index.get(found[0])
        return self.special[ord(found[0]) - LETTERS] if index is None else chr(TOKENS + index)
