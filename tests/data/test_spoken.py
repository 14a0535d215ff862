"""Conversations as JSON text: what is read is what was written."""

from __future__ import annotations

import pytest

from llmray.data import spoken
from llmray.data.conversation import Conversation, Message, ToolCall

ASKED = Message("user", 'Quoted "so", and 中文 \n twice')
CALLS = (ToolCall("add", {"a": 1, "b": [2.5, None]}), ToolCall("ask", {}))


@pytest.mark.parametrize(
    "said",
    [
        Conversation((ASKED,)),
        Conversation((ASKED,), "", "[]", label=Message("assistant", "yes", "a thought")),
        Conversation(
            (
                ASKED,
                Message("function", "", calls=CALLS),
                Message("observation", "1\n2", results=("1", "2")),
            ),
            "Be short.",
        ),
        Conversation((Message("user", "half \ud800 of one"),)),
    ],
)
def test_what_is_read_is_what_was_written(said: Conversation) -> None:
    assert spoken.read(spoken.write(said)) == said
