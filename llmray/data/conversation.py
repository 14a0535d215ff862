"""Conversations: who said what, with what a stage needs to know of the answers.

How rows hold them stands in `row_format`, how they are read in `formattings`. Text formats are left
to `templates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["user", "assistant", "observation", "function"]
PROMPTS, RESPONSES = ("user", "observation"), ("assistant", "function")


class RowError(Exception):
    """A row is wrong; the message says what was found and what is required, not where.

    `text` is what stands in the file, of a row that could not be read from it.
    """

    def __init__(self, message: str, text: str | None = None) -> None:
        super().__init__(message)
        self.text = text


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by its name, with arguments as JSON knows them."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: user and observation prompt, assistant and function respond.
        content: the text; of a function, what is said beside the calls.
        thought: what a response thought first; None where the row has no thought of its own.
            Thoughts that stand inside `content` stay there: only a template knows their marks.
        calls: the calls of a function, one or more.
        results: of an observation, the results of several calls; `content` is all of them.
    """

    role: Role
    content: str
    thought: str | None = None
    calls: tuple[ToolCall, ...] = ()
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate: a prompt (user, observation), a response (assistant, function).

    `messages` ends with a response; with the prompt, where there are responses to compare, `chosen`
    and one or more `rejected`, or the stage reads none. `is_wanted` judges the last response.
    `tools` is the JSON text of the tools that responses may call. `label` is the response that the
    data has where the stage asks for one: it is shown to who scores, never to the model.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None
    chosen: Message | None = None
    rejected: tuple[Message, ...] = ()
    is_wanted: bool | None = None
    label: Message | None = None

    def pairs(self) -> list[Conversation]:
        """This conversation with one `rejected` at a time; itself where there is one or none."""
        if len(self.rejected) < 2:
            return [self]
        return [replace(self, rejected=(one,)) for one in self.rejected]
