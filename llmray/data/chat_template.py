"""Conversations rendered by the tokenizer's own chat template, and where responses stand in it.

The template is rendered by transformers in its sandbox. A response is found by rendering what
comes before it; where the text of an earlier response depends on what follows (reasoning models
drop their thoughts), by rendering the same messages with a marker in its place. What cannot be
found is an error: no row is ever made without its targets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from llmray.data import tools
from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.template_table import THINK
from llmray.data.templates import Turn

MARKER = "response-goes-here"
REMEDY = "Name a template instead (template: ...), or mend the row."

Chat = list[dict[str, Any]]
# Templates differ in how they take calls: arguments as an object or as text, and nothing said
# beside calls as no words or as null. The first that writes the calls is taken.
CALL_SHAPES = ((dict, ""), (json.dumps, ""), (dict, None), (json.dumps, None))


@dataclass(frozen=True)
class _Script:
    """A conversation as a chat template takes it."""

    chat: Chat
    tools: list[Any] | None


@dataclass(frozen=True)
class ChatTemplateRenderer:
    """Renders by a chat template in jinja, with the special tokens that it may name.

    `switches` are further names that the template is told, such as enable_thinking.
    """

    chat_template: str
    special_tokens: Mapping[str, Any]
    default_system: str | None
    switches: Mapping[str, bool] = field(default_factory=dict)

    def turns(self, conversation: Conversation) -> list[Turn]:
        """The turns of a conversation; see `templates.Renderer`."""
        script, text = self._scripted(
            conversation.messages, conversation.system, conversation.tools
        )
        chat = script.chat
        turns, at = [], 0
        responses = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        for number, index in enumerate(responses, start=1):
            start = self._start(script, index, text)
            following = responses[number] if number < len(responses) else None
            stop = len(text) if following is None else self._stop(script, index, following, text)
            if not at <= start < stop:
                raise RowError(
                    f"the tokenizer's chat template writes nothing for response {number}. {REMEDY}"
                )
            turns.append(Turn(text[at:start], text[start:stop]))
            at = stop
        _check_written(conversation.messages, turns)
        return turns

    def text(self, conversation: Conversation) -> str:
        """The whole text of a conversation.

        Raises:
            RowError: the template refuses it.
        """
        return self._scripted(conversation.messages, conversation.system, conversation.tools)[1]

    def prompt(
        self, messages: Sequence[Message], system: str | None = None, tools: str | None = None
    ) -> str:
        """The text before the next response; see `templates.Renderer`."""
        script, _ = self._scripted(messages, system, tools)
        return self._render(script, script.chat, opens_response=True)

    def check(self) -> None:
        """Fail if the template does not write what a response says.

        Raises:
            RowError: it does not.
        """
        probe = Conversation((Message("user", "question"), Message("assistant", MARKER)))
        if MARKER not in self.turns(probe)[0].target:
            raise RowError("the tokenizer's chat template does not write responses.")

    def _scripted(
        self, messages: Sequence[Message], system: str | None, given: str | None
    ) -> tuple[_Script, str]:
        """The conversation in the shape that the template writes, and its text."""
        known = None
        if given:
            known = [{"type": "function", "function": t} for t in tools.read_tools(given)]
        has_calls = any(message.calls for message in messages)
        failure: RowError | None = None
        for shape in CALL_SHAPES if has_calls else CALL_SHAPES[:1]:
            script = _Script(self._chat(messages, system, shape), known)
            try:
                text = self._render(script, script.chat)
            except RowError as error:
                failure = failure or error
                continue
            if all(_writes(text, message) for message in messages):
                _check_told(text, known)
                return script, text
            failure = failure or RowError(
                f"the tokenizer's chat template does not write the calls of tools. {REMEDY}"
            )
        assert failure is not None
        raise failure

    def _chat(self, messages: Sequence[Message], system: str | None, shape: Any) -> Chat:
        said = self.default_system if system is None else system
        chat: Chat = [{"role": "system", "content": said}] if said else []
        number = 0  # of the first call that waits for its result
        for message in messages:
            if message.role == "observation":
                for offset, result in enumerate(message.results or (message.content,)):
                    made = {"role": "tool", "content": result, "tool_call_id": _id(number + offset)}
                    chat.append(made)
                number += len(message.results or (message.content,))
            elif message.role == "user":
                chat.append({"role": "user", "content": message.content})
            else:
                chat.append(self._response(message, shape, number))
        return chat

    def _response(self, message: Message, shape: Any, number: int) -> dict[str, Any]:
        made: dict[str, Any] = {"role": "assistant", "content": message.content}
        if message.thought is not None and "reasoning_content" in self.chat_template:
            made["reasoning_content"] = message.thought
        elif message.thought is not None:
            made["content"] = message.thought.join(THINK) + message.content
        if message.calls:
            write, nothing = shape
            made["content"] = made["content"] or nothing
            made["tool_calls"] = [
                {
                    "id": _id(number + offset),
                    "type": "function",
                    "function": {"name": call.name, "arguments": write(call.arguments)},
                }
                for offset, call in enumerate(message.calls)
            ]
        return made

    def _render(self, script: _Script, chat: Chat, opens_response: bool = False) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            [text], _ = render_jinja_template(
                [chat],
                tools=script.tools,
                chat_template=self.chat_template,
                add_generation_prompt=opens_response,
                **self.switches,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(
                f"the tokenizer's chat template refuses the conversation: {error}. {REMEDY}"
            ) from error
        return str(text)

    def _start(self, script: _Script, index: int, text: str) -> int:
        """Where the response at `index` begins: after the header that generation starts from."""
        chat = script.chat
        before = self._render(script, chat[:index], opens_response=True)
        if text.startswith(before):
            return len(before)
        # the header of generation goes further than that of history, for instance with <think>
        shared = _shared_length(before, text)
        closed = len(self._render(script, chat[:index]))
        content = (chat[index]["content"] or "").strip()
        if shared >= closed and content and text[shared:].lstrip().startswith(content):
            return shared
        if shared >= closed and not content and "tool_calls" in chat[index]:
            return shared
        raise RowError(
            f"the tokenizer's chat template writes the messages before response {index} in another "
            f"way when more follow, so the response's place is not known. {REMEDY}"
        )

    def _stop(self, script: _Script, index: int, following: int, text: str) -> int:
        """Where the response at `index` ends, when another one follows at `following`."""
        chat = script.chat
        whole = self._render(script, chat[: index + 1])
        if text.startswith(whole):
            return len(whole)
        marked = [*chat[:index], _marked(chat[index])]
        end = self._render(script, marked).rpartition(MARKER)[2]
        rest = self._render(script, [*marked, *chat[index + 1 : following]], opens_response=True)
        tail = rest.rpartition(MARKER)[2]
        before_next = self._start(script, following, text)
        if MARKER in rest and tail.startswith(end) and text[:before_next].endswith(tail):
            return before_next - len(tail) + len(end)
        raise RowError(
            f"the tokenizer's chat template changes the end of message {index + 1} when more "
            f"follow, so the response's end is not known. {REMEDY}"
        )


def _id(number: int) -> str:
    return f"call{number:05d}"  # some templates require nine letters and digits


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A response whose words, or whose last call's name, are the marker."""
    calls = message.get("tool_calls")
    if not calls:
        return {"role": "assistant", "content": MARKER}
    bare = {key: value for key, value in message.items() if key != "reasoning_content"}
    if message["content"]:
        return {**bare, "content": MARKER}
    last = {**calls[-1], "function": {**calls[-1]["function"], "name": MARKER}}
    return {**bare, "tool_calls": [*calls[:-1], last]}


def _writes(text: str, message: Message) -> bool:
    """Whether a text has the names and the first words of a message's calls."""
    return all(
        call.name in text and all(f"{key}" in text for key in call.arguments)
        for call in message.calls
    )


def _check_told(text: str, known: Sequence[Any] | None) -> None:
    """Fail if a text does not tell of the tools there are."""
    for tool in known or ():
        if tool["function"]["name"] not in text:
            raise RowError(
                f"the tokenizer's chat template does not tell of tools ({tool['function']['name']})"
                f". {REMEDY}"
            )


def _check_written(messages: Sequence[Message], turns: Sequence[Turn]) -> None:
    """Fail if a response lacks its calls, its words beside them, or the last one its thought."""
    responses = [m for m in messages if m.role in ("assistant", "function")]
    for number, (message, turn) in enumerate(zip(responses, turns, strict=True), start=1):
        missing = next((call.name for call in message.calls if call.name not in turn.target), None)
        if missing is not None:
            what = f"the call of {missing}"
        elif message.calls and message.content.strip() not in turn.target:
            what = "what is said beside the calls"
        elif number == len(turns) and (message.thought or "").strip() not in turn.target:
            what = "the thought"
        else:
            continue
        raise RowError(
            f"the tokenizer's chat template leaves out {what} of response {number}. {REMEDY}"
        )


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
