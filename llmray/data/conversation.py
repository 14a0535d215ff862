"""Rows of a data set as conversations: who said what, checked for types and order.

What stands in `dataset_info.json` about a set is a `RowFormat`; `sources` reads it. Text formats
are left to `templates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

Role = Literal["user", "assistant", "observation", "function"]
Row = Mapping[str, Any]

# Columns of a row by what they hold; None: not read unless dataset_info.json names it.
COLUMNS: dict[str, str | None] = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": None,
    "messages": "conversations",
    "system": None,
    "tools": None,
    "images": None,
    "videos": None,
    "audios": None,
    "chosen": None,
    "rejected": None,
    "kto_tag": None,
}
TAGS: dict[str, str] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
MEDIA = ("images", "videos", "audios")


class RowError(Exception):
    """A row is wrong; the message says what was found and what is required, not where."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate: a prompt (user, observation), a response (assistant, function).

    `messages` ends with a response, except where the stage reads prompts alone. `tools` is the
    JSON text of the tools that responses may call.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a set are laid out.

    `columns` are the names that dataset_info.json gives, by what they hold; others keep their
    default names where a row has them.
    """

    formatting: Literal["alpaca", "sharegpt"] = "alpaca"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def column(self, use: str) -> str | None:
        """The name of the column for a use of `COLUMNS`, None where none is read."""
        return self.columns.get(use, COLUMNS[use])

    def tag(self, name: str) -> str:
        """The word for a name of `TAGS`."""
        return self.tags.get(name, TAGS[name])


def to_conversation(row: Any, layout: RowFormat, needs_response: bool = True) -> Conversation:
    """The conversation that a row holds.

    Args:
        row: a row of the set, of whatever type the file had.
        layout: where in the row things stand.
        needs_response: whether a row without a response is wrong; false for plain text.

    Raises:
        RowError: the row is wrong.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {_kind(row)}. Required: an object of columns.")
    for use in MEDIA:
        if use in layout.columns and row.get(layout.columns[use]):
            raise RowError(
                f"{layout.columns[use]!r} names {use}: training on media is not built yet. "
                "Take a set of text."
            )
    return FORMATTINGS[layout.formatting](row, layout, needs_response)


def _alpaca(row: Row, layout: RowFormat, needs_response: bool) -> Conversation:
    messages = _history(row, layout)
    parts = [_text(row, layout, "prompt"), _text(row, layout, "query", optional=True)]
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    if needs_response:
        response = _text(row, layout, "response")
        assert response is not None
        messages.append(Message("assistant", response))
    return Conversation(
        tuple(messages),
        _text(row, layout, "system", optional=True) or None,
        _tools(row, layout),
    )


def _history(row: Row, layout: RowFormat) -> list[Message]:
    name = layout.column("history")
    pairs = _value(row, layout, "history", optional=True)
    if pairs is None:
        return []
    messages = []
    if not isinstance(pairs, list | tuple):
        raise RowError(f"{name!r} is {_kind(pairs)}. Required: a list of [prompt, response].")
    for number, pair in enumerate(pairs, start=1):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise RowError(f"entry {number} of {name!r} is {_kind(pair)}. Required: two texts.")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _sharegpt(row: Row, layout: RowFormat, needs_response: bool) -> Conversation:
    if not needs_response:
        raise RowError(
            "formatting is sharegpt, and stage pt learns plain text. Take a set of text, or "
            "stage: sft."
        )
    name = layout.column("messages")
    said = _value(row, layout, "messages")
    if not isinstance(said, list | tuple):
        raise RowError(f"{name!r} is {_kind(said)}. Required: a list of messages.")
    turns = [_turn(layout, number, message) for number, message in enumerate(said, start=1)]
    system = _text(row, layout, "system", optional=True) or None
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    messages = _alternating(layout, turns, first=len(said) - len(turns) + 1)
    return Conversation(messages, system, _tools(row, layout))


def _turn(layout: RowFormat, number: int, message: Any) -> tuple[str, str]:
    role_tag, content_tag = layout.tag("role_tag"), layout.tag("content_tag")
    if not isinstance(message, Mapping):
        raise RowError(
            f"message {number} is {_kind(message)}. Required: an object with {role_tag!r} and "
            f"{content_tag!r}."
        )
    for tag, key in (("role_tag", role_tag), ("content_tag", content_tag)):
        if not isinstance(message.get(key), str):
            found = f"is {_kind(message[key])}" if key in message else "is missing"
            raise RowError(
                f"{key!r} of message {number} {found}; it has {_names(message)}. Required: text. "
                f"Mend the row, or name the key as {tag} among the set's tags."
            )
    roles = _roles(layout)
    said = message[role_tag]
    if said not in roles:
        raise RowError(
            f"message {number} is from {said!r}, an unknown role.{_nearest(said, roles)} Required: "
            f"one of {', '.join(roles)}; tags in dataset_info.json can name others."
        )
    return roles[said], message[content_tag]


def _roles(layout: RowFormat) -> dict[str, str]:
    return {
        layout.tag(f"{role}_tag"): role
        for role in ("user", "assistant", "observation", "function", "system")
    }


def _alternating(
    layout: RowFormat, turns: list[tuple[str, str]], first: int
) -> tuple[Message, ...]:
    user, assistant = layout.tag("user_tag"), layout.tag("assistant_tag")
    required = f"Required: {user}, {assistant} in turns, the last from {assistant}."
    if not turns:
        raise RowError(f"the conversation is empty. {required}")
    allowed = (("user", "observation"), ("assistant", "function"))
    for index, (role, _) in enumerate(turns):
        if role not in allowed[index % 2]:
            raise RowError(
                f"message {first + index} is from {layout.tag(f'{role}_tag')}, out of turn. "
                f"{required}"
            )
    if len(turns) % 2:
        raise RowError(f"the last message, {first + len(turns) - 1}, has no response. {required}")
    return tuple(Message(role, content) for role, content in turns)  # type: ignore[arg-type]


def _tools(row: Row, layout: RowFormat) -> str | None:
    tools = _text(row, layout, "tools", optional=True)
    return tools if tools and tools.strip() not in ("[]", "{}", "null") else None


def _value(row: Row, layout: RowFormat, use: str, optional: bool = False) -> Any:
    name = layout.column(use)
    if name is not None and name in row:
        return row[name]
    if name is None or optional:
        return None
    raise RowError(
        f"column {name!r} is missing; the row has {_names(row)}.{_nearest(name, row)} Required: "
        f"the {use}. Mend the row, or name its column as {use} among the set's columns."
    )


def _text(row: Row, layout: RowFormat, use: str, optional: bool = False) -> str | None:
    value = _value(row, layout, use, optional)
    if isinstance(value, str) or (value is None and optional):
        return value
    raise RowError(f"{layout.column(use)!r} is {_kind(value)}. Required: text, the {use}.")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "nothing"


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(name, list(map(str, known)), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


FORMATTINGS: dict[str, Callable[[Row, RowFormat, bool], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
