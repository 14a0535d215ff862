"""Rows of a data set as conversations: who said what, checked for types and order.

What stands in `dataset_info.json` about a set is a `RowFormat`; `sources` reads it. Text formats
are left to `templates`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

Role = Literal["user", "assistant", "observation", "function"]
Row = Mapping[str, Any]
# What a stage reads of a row: a text; a conversation with its responses; a prompt with a response
# to prefer and one to reject; a conversation whose last response is wanted or not; what comes
# before the last response, which may be missing.
Kind = Literal["text", "responses", "pair", "judged", "prompt"]

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
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
    "id": None,
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
# Where formatting openai differs.
OPENAI_COLUMNS: dict[str, str | None] = {"messages": "messages", "tools": "tools"}
OPENAI_TAGS: dict[str, str] = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
}
PROMPTS, RESPONSES = ("user", "observation"), ("assistant", "function")
MEDIA = ("images", "videos", "audios")


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
    `tools` is the JSON text of the tools that responses may call.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None
    chosen: Message | None = None
    rejected: tuple[Message, ...] = ()
    is_wanted: bool | None = None

    def pairs(self) -> list[Conversation]:
        """This conversation with one `rejected` at a time; itself where there is one or none."""
        if len(self.rejected) < 2:
            return [self]
        return [replace(self, rejected=(one,)) for one in self.rejected]


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a set are laid out.

    `columns` are the names that dataset_info.json gives, by what they hold; others keep their
    default names where a row has them.
    """

    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def column(self, use: str) -> str | None:
        """The name of the column for a use of `COLUMNS`, None where none is read."""
        own = OPENAI_COLUMNS if self.formatting == "openai" else {}
        return self.columns.get(use, own.get(use, COLUMNS[use]))

    def tag(self, name: str) -> str:
        """The word for a name of `TAGS`."""
        own = OPENAI_TAGS if self.formatting == "openai" else {}
        return self.tags.get(name, own.get(name, TAGS[name]))


def to_conversation(row: Any, layout: RowFormat, kind: Kind = "responses") -> Conversation:
    """The conversation that a row holds.

    Args:
        row: a row of the set, of whatever type the file had.
        layout: where in the row things stand.
        kind: what of it is read.

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
    found = FORMATTINGS[layout.formatting](row, layout, kind)
    if kind == "pair":
        _require_words(layout, "chosen", [found.chosen])
        _require_words(layout, "rejected", found.rejected)
    if kind == "judged":
        _require_words(layout, "response", found.messages[-1:])
        return replace(found, is_wanted=_judgement(row, layout))
    return found


def _require_words(layout: RowFormat, use: str, answers: Sequence[Message | None]) -> None:
    """Fail if an answer that is to be compared or judged says nothing."""
    for answer in answers:
        if answer is not None and not (answer.content.strip() or answer.thought or answer.calls):
            what = "the last response" if use == "response" else repr(layout.column(use))
            raise RowError(f"{what} is empty. Required: an answer. Mend the row, or take it out.")


def _judgement(row: Row, layout: RowFormat) -> bool:
    value = _value(row, layout, "kto_tag")
    if not isinstance(value, bool):
        raise RowError(
            f"{layout.column('kto_tag')!r} is {_kind(value)}. Required: true for a wanted "
            "response, or false."
        )
    return value


def _alpaca(row: Row, layout: RowFormat, kind: Kind) -> Conversation:
    messages = _history(row, layout)
    parts = [_text(row, layout, "prompt"), _text(row, layout, "query", optional=True)]
    messages.append(Message("user", "\n".join(part for part in parts if part)))

    def response(use: str) -> Message:
        text = _text(row, layout, use)
        assert text is not None
        return Message("assistant", text)

    def said(value: Any) -> Message:
        if not isinstance(value, str):
            name = layout.column("rejected")
            raise RowError(f"{name!r} is {_kind(value)}. Required: text, the rejected, or several.")
        return Message("assistant", value)

    if kind in ("responses", "judged"):
        messages.append(response("response"))
    return Conversation(
        tuple(messages),
        _text(row, layout, "system", optional=True) or None,
        _tools(row, layout),
        chosen=response("chosen") if kind == "pair" else None,
        rejected=_rejected(row, layout, said) if kind == "pair" else (),
    )


def _rejected(row: Row, layout: RowFormat, read: Callable[[Any], Message]) -> tuple[Message, ...]:
    """The answers to reject of a row: one, or a list of them."""
    value = _value(row, layout, "rejected")
    if not isinstance(value, list | tuple):
        return (read(value),)
    if not value:
        raise RowError(f"{layout.column('rejected')!r} is empty. Required: one answer or more.")
    return tuple(map(read, value))


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


def _sharegpt(row: Row, layout: RowFormat, kind: Kind) -> Conversation:
    return _messages(row, layout, kind, _said)


def _openai(row: Row, layout: RowFormat, kind: Kind) -> Conversation:
    return _messages(row, layout, kind, _said_to_openai)


Spoken = tuple[str, Message]  # a role, system among them, and the message
Read = Callable[[RowFormat, str, Row], Spoken]


def _messages(row: Row, layout: RowFormat, kind: Kind, read: Read) -> Conversation:
    if kind == "text":
        raise RowError(
            f"formatting is {layout.formatting}, and stage pt learns plain text. Take a set of "
            "text, or stage: sft."
        )
    name = layout.column("messages")
    said = _value(row, layout, "messages")
    if not isinstance(said, list | tuple):
        raise RowError(f"{name!r} is {_kind(said)}. Required: a list of messages.")

    def spoken(which: str, message: Any) -> Spoken:
        return read(layout, which, _object(layout, which, message))

    turns = [spoken(f"message {number}", message) for number, message in enumerate(said, start=1)]
    system = _text(row, layout, "system", optional=True) or None
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1].content
    first = len(said) - len(turns) + 1
    if kind == "prompt" and turns and turns[-1][0] in RESPONSES:
        turns.pop()  # only what is asked is read
    messages = _alternating(layout, turns, first, ends_with_prompt=kind in ("pair", "prompt"))

    def answer(use: str, value: Any) -> Message:
        name = layout.column(use)
        role, message = spoken(f"message {name!r}", value)
        if role not in RESPONSES:
            raise RowError(
                f"{name!r} is from {layout.tag(f'{role}_tag')}. Required: a response, from "
                f"{layout.tag('assistant_tag')} or {layout.tag('function_tag')}."
            )
        return message

    return Conversation(
        messages,
        system,
        _tools(row, layout),
        chosen=answer("chosen", _value(row, layout, "chosen")) if kind == "pair" else None,
        rejected=_rejected(row, layout, partial(answer, "rejected")) if kind == "pair" else (),
    )


def _object(layout: RowFormat, which: str, message: Any) -> Row:
    if isinstance(message, Mapping):
        return message
    raise RowError(
        f"{which} is {_kind(message)}. Required: an object with "
        f"{layout.tag('role_tag')!r} and {layout.tag('content_tag')!r}."
    )


def _said(layout: RowFormat, which: str, message: Row) -> Spoken:
    role = _role(layout, which, message)
    content = _tagged(layout, which, message, "content_tag")
    if role != "function":
        return role, Message(_as_role(role), content)
    text, value = _split_calls(content)
    return role, Message("function", text, calls=_calls(which, value))


def _said_to_openai(layout: RowFormat, which: str, message: Row) -> Spoken:
    role = _role(layout, which, message)
    found = message.get("tool_calls")
    content_key = layout.tag("content_tag")
    parts = message.get(content_key)
    thought = message.get("reasoning_content")
    if thought is not None and not isinstance(thought, str):
        raise RowError(f"'reasoning_content' of {which} is {_kind(thought)}. Required: text.")
    if isinstance(parts, list | tuple):
        read = _read_parts(which, parts)
        message = {**message, content_key: read["text"]}
        thought, found = thought or read["reasoning"], found or read["tool_call"]
    elif parts is None and found:
        message = {**message, content_key: ""}
    content = _tagged(layout, which, message, "content_tag")
    if found and role == "assistant":
        calls = _calls(which, found)
        return "function", Message("function", content, thought or None, calls)
    return role, Message(_as_role(role), content, thought or None)


def _read_parts(which: str, parts: Sequence[Any]) -> dict[str, Any]:
    """What the parts of a message hold by their type; calls as a list."""
    read: dict[str, Any] = {"text": "", "reasoning": "", "tool_call": []}
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if kind == "tool_call":
            read[kind].append(_split_calls(value)[1] if isinstance(value, str) else value)
        elif kind in read and isinstance(value, str):
            read[kind] += value
        else:
            raise RowError(
                f"{which} has a part {_kind(part)}. Required: parts of type "
                f"{', '.join(read)}, with text or value; training on media is not built yet."
            )
    return read


def _role(layout: RowFormat, which: str, message: Row) -> str:
    said = _tagged(layout, which, message, "role_tag")
    roles = _roles(layout)
    if said not in roles:
        raise RowError(
            f"{which} is from {said!r}, an unknown role.{_nearest(said, roles)} Required: "
            f"one of {', '.join(roles)}; tags in dataset_info.json can name others."
        )
    return roles[said]


def _as_role(role: str) -> Role:
    return "user" if role == "system" else role  # type: ignore[return-value]


def _tagged(layout: RowFormat, which: str, message: Row, tag: str) -> str:
    key = layout.tag(tag)
    value = message.get(key)
    if isinstance(value, str):
        return value
    found = f"is {_kind(message[key])}" if key in message else "is missing"
    raise RowError(
        f"{key!r} of {which} {found}; it has {_names(message)}. Required: text. "
        f"Mend the row, or name the key as {tag} among the set's tags."
    )


def _roles(layout: RowFormat) -> dict[str, str]:
    return {
        layout.tag(f"{role}_tag"): role
        for role in ("user", "assistant", "observation", "function", "system")
    }


def _alternating(
    layout: RowFormat, turns: list[Spoken], first: int, ends_with_prompt: bool
) -> tuple[Message, ...]:
    """The messages in turns, results of tools that follow one another as one message."""
    user, assistant = layout.tag("user_tag"), layout.tag("assistant_tag")
    end = user if ends_with_prompt else assistant
    required = f"Required: {user}, {assistant} in turns, the last from {end}."
    if not turns:
        raise RowError(f"the conversation is empty. {required}")
    messages: list[Message] = []
    for number, (role, message) in enumerate(turns, start=first):
        if role == "observation" and messages and messages[-1].role == "observation":
            messages[-1] = _with_result(messages[-1], message.content)
        elif role not in (PROMPTS, RESPONSES)[len(messages) % 2]:
            raise RowError(
                f"message {number} is from {layout.tag(f'{role}_tag')}, out of turn. {required}"
            )
        else:
            messages.append(message)
    if len(messages) % 2 != ends_with_prompt:
        last = first + len(turns) - 1
        has = "is a response" if ends_with_prompt else "has no response"
        raise RowError(f"the last message, {last}, {has}. {required}")
    return tuple(messages)


def _with_result(message: Message, content: str) -> Message:
    results = (*(message.results or (message.content,)), content)
    return Message("observation", "\n".join(results), results=results)


def _split_calls(content: str) -> tuple[str, Any]:
    """What stands before the calls of a function's text, and the JSON of the calls."""
    starts = [at for at in (content.find("{"), content.find("[")) if at >= 0]
    while starts:
        at = min(starts)
        try:
            return content[:at].rstrip(), json.loads(content[at:])
        except ValueError:
            starts = [a for a in (content.find(c, at + 1) for c in "{[") if a >= 0]
    return "", content


def _calls(where: str, value: Any) -> tuple[ToolCall, ...]:
    """The calls that a row has as an object, or a list of them."""
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise RowError(f"{where} calls no tool. Required: an object with name and arguments.")
    return tuple(_call(where, entry) for entry in entries)


def _call(where: str, entry: Any) -> ToolCall:
    inner = entry.get("function", entry) if isinstance(entry, Mapping) else entry
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RowError(
            f"{where} has a call {_kind(entry)}. Required: an object with name and arguments."
        )
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError):  # refused below, as it stands in the row
            arguments = json.loads(arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RowError(
            f"{where} calls {inner['name']} with arguments {_kind(arguments)}. Required: an "
            "object, or its JSON text."
        )
    return ToolCall(inner["name"], dict(arguments))


def _tools(row: Row, layout: RowFormat) -> str | None:
    """The tools of a row as JSON text, None where there is none."""
    name = layout.column("tools")
    tools = row.get(name) if name is not None else None
    if isinstance(tools, list | tuple | Mapping):
        tools = json.dumps(tools, ensure_ascii=False)
    if tools is not None and not isinstance(tools, str):
        raise RowError(f"{name!r} is {_kind(tools)}. Required: a list of tools, or its JSON text.")
    return tools if tools and tools.strip() not in ("", "[]", "{}", "null") else None


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


FORMATTINGS: dict[str, Callable[[Row, RowFormat, Kind], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "openai": _openai,
}
