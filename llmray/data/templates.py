"""Text formats of conversations: conversations rendered by named templates.

A renderer turns a conversation into turns, each a source (what the model reads) and a target (what
it learns to write); all of them one after the other are the text. `template_table` has the
templates, `tools` the texts of tools, `chat_template` renders by the tokenizer's own template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol

from llmray.data import tools
from llmray.data.conversation import Conversation, Message
from llmray.data.template_table import TEMPLATES as TEMPLATES
from llmray.data.template_table import THINK, Template
from llmray.errors import DataError

if TYPE_CHECKING:
    from llmray.arguments.data import DataArguments

CONTENT = "{content}"


@dataclass(frozen=True)
class Turn:
    """A prompt with all that stands before its response, and the response with its end."""

    source: str
    target: str


class Renderer(Protocol):
    """Turns conversations into text; picklable."""

    def turns(self, conversation: Conversation) -> list[Turn]:
        """The turns of a conversation that ends with a response.

        Raises:
            RowError: the format cannot write this conversation.
        """
        ...

    def prompt(
        self, messages: Sequence[Message], system: str | None = None, tools: str | None = None
    ) -> str:
        """The text after which the model is to write the response to the last message.

        Raises:
            RowError: the format cannot write these messages.
        """
        ...


def find(name: str) -> Template:
    """The template of a name.

    Raises:
        DataError: there is none; says the nearest and all names.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    close = get_close_matches(name, TEMPLATES, n=1, cutoff=0.6)
    near = f" Did you mean {close[0]}?" if close else ""
    raise DataError(
        f"template={name} is not known.{near} Required: a name that stands in docs/templates.md; "
        "or remove template to use the tokenizer's own chat template."
    )


@dataclass(frozen=True)
class TemplateRenderer:
    """Renders by a template, with the tokens of a tokenizer in their places.

    Attributes:
        template: the format.
        default_system: the system message of conversations without one.
        bos: the tokenizer's begin token.
        eos: its end token.
        tool_format: a name of `tools.FORMATS`; empty: the template's.
        enable_thinking: whether a response without a thought has an empty one before it: True in
            what the model writes, False and None in its prompt; False also leaves thoughts out.
        preserve_thinking: whether the thoughts of earlier responses stay in the text.
        learns_past: whether earlier responses are learned: then they keep their thoughts too.
    """

    template: Template
    default_system: str
    bos: str
    eos: str
    tool_format: str = ""
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    learns_past: bool = True

    @property
    def tools_as(self) -> str:
        """The name of the format of tools."""
        return self.tool_format or self.template.tool_format

    def turns(self, conversation: Conversation) -> list[Turn]:
        """The turns of a conversation; see `Renderer`."""
        messages = conversation.messages
        keeps_past = self.preserve_thinking or self.learns_past
        given = (conversation.system, conversation.tools)
        before, fused = self._opening(*given), self._fused(*given)
        turns = []
        for index in range(0, len(messages) - 1, 2):
            source = self._prompt(messages[index], fused)
            opened, target = self._response(messages, index + 1, keeps_past)
            turns.append(Turn(before + source + self._fill(self.template.header) + opened, target))
            before, fused = self._fill(self.template.between), ""
        return turns

    def prompt(
        self, messages: Sequence[Message], system: str | None = None, tools: str | None = None
    ) -> str:
        """The text before the next response; see `Renderer`."""
        text = self._opening(system, tools)
        fused = self._fused(system, tools)
        header = self._fill(self.template.header)
        for index, message in enumerate(messages):
            if message.role in ("user", "observation"):
                text += self._prompt(message, fused)
                fused = ""
            else:
                opened, target = self._response(messages, index, self.preserve_thinking)
                text += header + opened + target + self._fill(self.template.between)
        has_thoughts = self.template.thought is not None
        return text + header + (self._empty() if has_thoughts and not self.enable_thinking else "")

    def read(self, text: str) -> Message:
        """The response that a model wrote after a prompt, its thought apart from what it says.

        Args:
            text: without the token that ended it, but with the template's marks.
        """
        thought, content = split_thought(Message("assistant", text), self.template.thought)
        before, _, after = self.template.response.partition(CONTENT)
        content = content.removesuffix(self._fill(after).rstrip("\n"))
        return Message("assistant", content.removeprefix(self._fill(before)), thought)

    def _opening(self, system: str | None, given: str | None) -> str:
        """What stands before the first message."""
        template = self.template
        by_itself = (
            self._write(template.tools, self._told(given)) if given and template.tools else ""
        )
        said = "" if template.fuses_system else self._system(system, given)
        parts = [by_itself, said] if template.tools_before == "system" else [said, by_itself]
        return self._fill(template.prefix) + "".join(parts)

    def _fused(self, system: str | None, given: str | None) -> str:
        """The system message as it stands inside the first user message."""
        return self._system(system, given) if self.template.fuses_system else ""

    def _system(self, system: str | None, given: str | None) -> str:
        said = self.default_system if system is None else system
        if self.template.strip == "all":
            said = said.strip()
        if given and not self.template.tools:
            made = tools.FORMATS[self.tools_as]
            said += (made.gap if said else made.alone) + self._told(given)
        if self.enable_thinking:
            said = self.template.thinking_system + said
        return self._write(self.template.system, said) if said else ""

    def _told(self, given: str) -> str:
        """The text that tells of tools."""
        known = tools.read_tools(given)
        if self.template.tool_list and self.tools_as == self.template.tool_format:
            return self._write(self.template.tool_list, json.dumps(known, ensure_ascii=False))
        return tools.FORMATS[self.tools_as].prompt(known)

    def _prompt(self, message: Message, fused: str) -> str:
        template = self.template
        if message.role == "user":
            said = message.content.strip() if template.strip == "all" else message.content
            is_off = self.enable_thinking is False and not said.endswith(template.unthinking)
            return self._write(
                template.user, fused + said + (template.unthinking if is_off else "")
            )
        results = message.results or (message.content,)
        slot = template.observation or template.user
        joined = template.joint.join(self._write(slot, result) for result in results)
        return self._write(template.results, joined)

    def _response(
        self, messages: Sequence[Message], index: int, keeps_past: bool
    ) -> tuple[str, str]:
        """What a response's prompt ends with beside the header, and the response."""
        message = messages[index]
        thought, content = split_thought(message, self.template.thought)
        body = self._body(message, content)
        if self.template.thought is None:
            return "", (thought.join(THINK) if thought else "") + body
        is_past = any(later.role == "user" for later in messages[index + 1 :])
        is_last = index + 1 >= len(messages)
        is_silent = thought is None or self.enable_thinking is False
        if not keeps_past and (is_past or (is_silent and not is_last)):
            return "", self.template.past_thought + body
        if self.enable_thinking is False:
            return self._empty(), body
        if thought is not None:
            return "", thought.join(self.template.thought) + body
        return ("", self._empty() + body) if self.enable_thinking else (self._empty(), body)

    def _body(self, message: Message, content: str) -> str:
        """A response without its thought."""
        template = self.template
        if template.strip != "none":
            content = content.strip()
        if not message.calls:
            return self._write(template.response, content)
        calls = tools.write_calls(self.tools_as, message.calls)
        said = ""
        if content:
            said = self._fill(template.response.partition(CONTENT)[0]) + content
            said += tools.FORMATS[self.tools_as].beside
        return said + self._write(template.function or template.response, calls)

    def _empty(self) -> str:
        thought = self.template.thought
        return self._fill("".join(thought)) if thought else ""

    def _write(self, slot: str, content: str) -> str:
        before, _, after = slot.partition(CONTENT)
        return self._fill(before) + content + self._fill(after)

    def _fill(self, text: str) -> str:
        if "{" not in text:
            return text
        return text.replace("{bos}", self.bos).replace("{eos}", self.eos)


def split_thought(message: Message, words: tuple[str, str] | None) -> tuple[str | None, str]:
    """The thought of a response, None if it has none, and what it says after it.

    A thought that the row has by itself is taken as it is. One that begins the content is found
    by `words`, the template's, or by the usual ones; without `words` it stays in the content.
    """
    if message.thought is not None or words is None:
        return message.thought, message.content
    said = message.content.lstrip()
    for pair in (words, THINK):
        start, end = (word.strip() for word in pair)
        if said.startswith(start) and end in said:
            thought, _, rest = said[len(start) :].partition(end)
            return thought.strip("\n"), rest.lstrip("\n")
    return None, message.content


def for_tokenizer(template: Template, tokenizer: Any, data_args: DataArguments) -> TemplateRenderer:
    """A renderer by `template` with the tokens of a tokenizer.

    Args:
        template: from `find`.
        tokenizer: from `tokenizer.load_tokenizer`.
        data_args: default_system, tool_format, enable_thinking, preserve_thinking, mask_history.

    Raises:
        DataError: the template needs a token that the tokenizer does not have.
    """
    slots = (template.user, template.response, template.system, template.prefix)
    needs_eos = template.efficient_eos or any("{eos}" in slot for slot in slots)
    if tokenizer.eos_token is None and needs_eos:
        raise DataError(
            "The template ends messages with the tokenizer's end-of-text token, and it has none. "
            "Name another template, or a tokenizer that has one."
        )
    system = data_args.default_system
    return TemplateRenderer(
        template,
        template.default_system if system is None else system,
        tokenizer.bos_token or "",
        tokenizer.eos_token or "",
        data_args.tool_format or "",
        data_args.enable_thinking,
        data_args.preserve_thinking,
        learns_past=not data_args.mask_history,
    )


def stop_words(template: Template, eos: str) -> tuple[str, ...]:
    """The tokens at which generation stops."""
    return (template.end_of_turn or eos, *template.more_stop_words)
