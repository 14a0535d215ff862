"""Conversations as JSON text, kept beside their tokens for who reads them in other words.

    read(write(conversation)) == conversation

Only what was said is kept: messages, system message, tools, and the response that the data has.
"""

from __future__ import annotations

import json
from typing import Any

from llmray.data.conversation import Conversation, Message, ToolCall


def write(conversation: Conversation) -> str:
    """The text of a conversation without answers to compare."""
    found: dict[str, Any] = {"messages": [_plain(message) for message in conversation.messages]}
    if conversation.system is not None:
        found["system"] = conversation.system
    if conversation.tools is not None:
        found["tools"] = conversation.tools
    if conversation.label is not None:
        found["label"] = _plain(conversation.label)
    return json.dumps(found)  # half a character stays as it is


def read(text: str) -> Conversation:
    """The conversation that `write` made a text of."""
    found = json.loads(text)
    return Conversation(
        tuple(map(_message, found["messages"])),
        found.get("system"),
        found.get("tools"),
        label=_message(found["label"]) if "label" in found else None,
    )


def _plain(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thought is not None:
        found["thought"] = message.thought
    if message.calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        found["calls"] = calls
    if message.results:
        found["results"] = message.results
    return found


def _message(found: dict[str, Any]) -> Message:
    return Message(
        found["role"],
        found["content"],
        found.get("thought"),
        tuple(ToolCall(call["name"], call["arguments"]) for call in found.get("calls", ())),
        tuple(found.get("results", ())),
    )
