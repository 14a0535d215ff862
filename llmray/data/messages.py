"""Rows that list their messages, as sharegpt and openai do: roles and calls read, turns checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from llmray.data.conversation import (
    PROMPTS,
    RESPONSES,
    Conversation,
    Message,
    Role,
    RowError,
    ToolCall,
)
from llmray.data.row_format import (
    Kind,
    Row,
    RowFormat,
    names_of,
    nearest,
    rejected_of,
    shown,
    text_of,
    tools_of,
    value_of,
)


def sharegpt(row: Row, layout: RowFormat, kind: Kind) -> Conversation:
    """A row with a list of messages; calls of tools stand in the text of their message."""
    return _messages(row, layout, kind, _said)


def openai(row: Row, layout: RowFormat, kind: Kind) -> Conversation:
    """A row with a list of messages as the chat API has them; calls have a key of their own."""
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
    said = value_of(row, layout, "messages")
    if not isinstance(said, list | tuple):
        raise RowError(f"{name!r} is {shown(said)}. Required: a list of messages.")

    def spoken(which: str, message: Any) -> Spoken:
        return read(layout, which, _object(layout, which, message))

    turns = [spoken(f"message {number}", message) for number, message in enumerate(said, start=1)]
    system = text_of(row, layout, "system", optional=True) or None
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1].content
    first = len(said) - len(turns) + 1
    label = None
    if kind == "prompt" and turns and turns[-1][0] in RESPONSES:
        label = turns.pop()[1]
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

    if kind == "prompt" and label is None:
        chosen = value_of(row, layout, "chosen", optional=True)
        label = None if chosen is None else answer("chosen", chosen)
    return Conversation(
        messages,
        system,
        tools_of(row, layout),
        label=label,
        chosen=answer("chosen", value_of(row, layout, "chosen")) if kind == "pair" else None,
        rejected=rejected_of(row, layout, partial(answer, "rejected")) if kind == "pair" else (),
    )


def _object(layout: RowFormat, which: str, message: Any) -> Row:
    if isinstance(message, Mapping):
        return message
    raise RowError(
        f"{which} is {shown(message)}. Required: an object with "
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
        raise RowError(f"'reasoning_content' of {which} is {shown(thought)}. Required: text.")
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
                f"{which} has a part {shown(part)}. Required: parts of type "
                f"{', '.join(read)}, with text or value; training on media is not built yet."
            )
    return read


def _role(layout: RowFormat, which: str, message: Row) -> str:
    said = _tagged(layout, which, message, "role_tag")
    roles = _roles(layout)
    if said not in roles:
        raise RowError(
            f"{which} is from {said!r}, an unknown role.{nearest(said, roles)} Required: "
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
    found = f"is {shown(message[key])}" if key in message else "is missing"
    raise RowError(
        f"{key!r} of {which} {found}; it has {names_of(message)}. Required: text. "
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
            f"{where} has a call {shown(entry)}. Required: an object with name and arguments."
        )
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError):  # refused below, as it stands in the row
            arguments = json.loads(arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RowError(
            f"{where} calls {inner['name']} with arguments {shown(arguments)}. Required: an "
            "object, or its JSON text."
        )
    return ToolCall(inner["name"], dict(arguments))
