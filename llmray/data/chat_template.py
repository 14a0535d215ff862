"""Conversations rendered by the tokenizer's own chat template, and where responses stand in it.

The template is rendered by transformers in its sandbox. A response is found by rendering what
comes before it; where the text of an earlier response depends on what follows (reasoning models
drop their thoughts), by rendering the same messages with a marker in its place. What cannot be
found is an error: no row is ever made without its targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.templates import Turn, refuse_tools

MARKER = "response-goes-here"
REMEDY = "Name a template instead (template: ...), or mend the row."

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class ChatTemplateRenderer:
    """Renders by a chat template in jinja, with the special tokens that it may name."""

    chat_template: str
    special_tokens: Mapping[str, Any]
    default_system: str | None

    def turns(self, conversation: Conversation) -> list[Turn]:
        """The turns of a conversation; see `templates.Renderer`."""
        refuse_tools(conversation)
        chat = self._chat(conversation.messages, conversation.system)
        text = self._render(chat)
        turns, at = [], 0
        responses = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        for number, index in enumerate(responses, start=1):
            start = self._start(chat, index, text)
            following = responses[number] if number < len(responses) else None
            stop = len(text) if following is None else self._stop(chat, index, following, text)
            if not at <= start < stop:
                raise RowError(
                    f"the tokenizer's chat template writes nothing for response {number}. {REMEDY}"
                )
            turns.append(Turn(text[at:start], text[start:stop]))
            at = stop
        return turns

    def prompt(self, messages: Sequence[Message], system: str | None = None) -> str:
        """The text before the next response; see `templates.Renderer`."""
        return self._render(self._chat(messages, system), opens_response=True)

    def check(self) -> None:
        """Fail if the template does not write what a response says.

        Raises:
            RowError: it does not.
        """
        probe = Conversation((Message("user", "question"), Message("assistant", MARKER)))
        if MARKER not in self.turns(probe)[0].target:
            raise RowError("the tokenizer's chat template does not write responses.")

    def _chat(self, messages: Sequence[Message], system: str | None) -> Chat:
        said = self.default_system if system is None else system
        chat = [{"role": "system", "content": said}] if said else []
        return chat + [{"role": m.role, "content": m.content} for m in messages]

    def _render(self, chat: Chat, opens_response: bool = False) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            [text], _ = render_jinja_template(
                [chat],
                chat_template=self.chat_template,
                add_generation_prompt=opens_response,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(
                f"the tokenizer's chat template refuses the conversation: {error}. {REMEDY}"
            ) from error
        return str(text)

    def _start(self, chat: Chat, index: int, text: str) -> int:
        """Where the response at `index` begins: after the header that generation starts from."""
        before = self._render(chat[:index], opens_response=True)
        if text.startswith(before):
            return len(before)
        # the header of generation goes further than that of history, for instance with <think>
        shared = _shared_length(before, text)
        closed = len(self._render(chat[:index]))
        content = chat[index]["content"].strip()
        if shared >= closed and content and text[shared:].lstrip().startswith(content):
            return shared
        raise RowError(
            f"the tokenizer's chat template writes the messages before response {index} in another "
            f"way when more follow, so the response's place is not known. {REMEDY}"
        )

    def _stop(self, chat: Chat, index: int, following: int, text: str) -> int:
        """Where the response at `index` ends, when another one follows at `following`."""
        whole = self._render(chat[: index + 1])
        if text.startswith(whole):
            return len(whole)
        marked = [*chat[:index], {"role": "assistant", "content": MARKER}]
        end = self._render(marked).rpartition(MARKER)[2]
        rest = self._render([*marked, *chat[index + 1 : following]], opens_response=True)
        tail = rest.rpartition(MARKER)[2]
        before_next = self._start(chat, following, text)
        if MARKER in rest and tail.startswith(end) and text[:before_next].endswith(tail):
            return before_next - len(tail) + len(end)
        raise RowError(
            f"the tokenizer's chat template changes the end of message {index + 1} when more "
            f"follow, so the response's end is not known. {REMEDY}"
        )


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
