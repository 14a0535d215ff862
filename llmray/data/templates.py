"""Text formats of conversations: named templates as data, and conversations rendered by them.

A renderer turns a conversation into turns, each a source (what the model reads) and a target (what
it learns to write); all of them one after the other are the text. `chat_template` has the renderer
for the tokenizer's own template. A named template writes what the chat template of its model
writes: `DIFFERENCES` lists where LLaMA-Factory's template of that name writes something else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from llmray.data.conversation import Conversation, Message, RowError
from llmray.errors import DataError

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

    def prompt(self, messages: Sequence[Message], system: str | None = None) -> str:
        """The text after which the model is to write the response to the last message.

        Raises:
            RowError: the format cannot write these messages.
        """
        ...


@dataclass(frozen=True)
class Template:
    """A text format as data. `{bos}` and `{eos}` stand for the tokenizer's own tokens.

    Attributes:
        user: a prompt, up to the header of the response.
        response: a response, with its end.
        header: what stands before a response.
        system: a system message.
        default_system: the system message of conversations without one; none if empty.
        prefix: what stands before everything.
        strip: whether blanks around messages are taken away.
        end_of_turn: the token that ends a response, at which generation stops; empty: `{eos}`.
        more_stop_words: other tokens at which generation stops.
        end_of_text: the token after a text of stage pt, where it is not the tokenizer's `{eos}`.
    """

    user: str
    response: str
    header: str
    system: str
    default_system: str = ""
    prefix: str = ""
    strip: bool = False
    end_of_turn: str = ""
    more_stop_words: tuple[str, ...] = ()
    end_of_text: str = ""


_CHATML = {
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "header": "<|im_start|>assistant\n",
    "response": "{content}<|im_end|>\n",
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
    "end_of_turn": "<|im_end|>",
}

TEMPLATES: dict[str, Template] = {
    "chatml": Template(**_CHATML, more_stop_words=("<|im_start|>",)),  # type: ignore[arg-type]
    "default": Template(
        user="Human: {content}{eos}\n",
        header="Assistant:",
        response="{content}{eos}\n",
        system="System: {content}{eos}\n",
    ),
    "llama3": Template(
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        response="{content}<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        prefix="{bos}",
        strip=True,
        end_of_turn="<|eot_id|>",
        more_stop_words=("<|eom_id|>",),
        end_of_text="<|end_of_text|>",
    ),
    "qwen": Template(
        **_CHATML,  # type: ignore[arg-type]
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "smollm2": Template(
        **_CHATML,  # type: ignore[arg-type]
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
}

# Where a template writes other text than LLaMA-Factory's of the same name, as its model does.
DIFFERENCES: dict[str, str] = {
    "llama3": "Blanks around messages are taken away, as the model's chat template does.",
    "smollm2": "The default system message has no full stop at its end.",
}


def find(name: str) -> Template:
    """The template of a name.

    Raises:
        DataError: there is none; says the nearest and all names.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    close = get_close_matches(name, TEMPLATES, n=1, cutoff=0.4)
    near = f" Did you mean {close[0]}?" if close else ""
    raise DataError(
        f"template={name} is not known.{near} Required: one of {', '.join(sorted(TEMPLATES))}; or "
        "remove template to use the tokenizer's own chat template."
    )


@dataclass(frozen=True)
class TemplateRenderer:
    """Renders by a template, with the tokens of a tokenizer in their places."""

    template: Template
    default_system: str
    bos: str
    eos: str

    def turns(self, conversation: Conversation) -> list[Turn]:
        """The turns of a conversation; see `Renderer`."""
        refuse_tools(conversation)
        before = self._opening(conversation.system)
        turns = []
        pairs = zip(conversation.messages[::2], conversation.messages[1::2], strict=True)
        for prompt, response in pairs:
            source = before + self._write(self.template.user, prompt.content)
            target = self._write(self.template.response, response.content)
            turns.append(Turn(source + self._fill(self.template.header), target))
            before = ""
        return turns

    def prompt(self, messages: Sequence[Message], system: str | None = None) -> str:
        """The text before the next response; see `Renderer`."""
        text = self._opening(system)
        for message in messages:
            if message.role == "user":
                text += self._write(self.template.user, message.content)
            else:
                text += self._fill(self.template.header)
                text += self._write(self.template.response, message.content)
        return text + self._fill(self.template.header)

    def _opening(self, system: str | None) -> str:
        text = self._fill(self.template.prefix)
        said = self.default_system if system is None else system
        return text + self._write(self.template.system, said) if said else text

    def _write(self, slot: str, content: str) -> str:
        before, _, after = slot.partition(CONTENT)
        content = content.strip() if self.template.strip else content
        return self._fill(before) + content + self._fill(after)

    def _fill(self, text: str) -> str:
        if "{" not in text:
            return text
        return text.replace("{bos}", self.bos).replace("{eos}", self.eos)


def refuse_tools(conversation: Conversation) -> None:
    """Fail for conversations that call tools: their text formats are not built yet.

    Raises:
        RowError: the conversation has tools, calls or results.
    """
    roles = {message.role for message in conversation.messages}
    if conversation.tools or roles & {"function", "observation"}:
        found = "tools" if conversation.tools else "a call of a tool or its result"
        raise RowError(
            f"the conversation has {found}: text formats of tool calls are not built yet. Take "
            "rows without tools."
        )


def for_tokenizer(template: Template, tokenizer: Any, default_system: str | None) -> Renderer:
    """A renderer by `template` with the tokens of a tokenizer.

    Args:
        template: from `find`.
        tokenizer: from `tokenizer.load_tokenizer`.
        default_system: in place of the template's own, where not None.

    Raises:
        DataError: the template needs a token that the tokenizer does not have.
    """
    slots = (template.user, template.response, template.system, template.prefix)
    if tokenizer.eos_token is None and any("{eos}" in slot for slot in slots):
        raise DataError(
            "The template ends messages with the tokenizer's end-of-text token, and it has none. "
            "Name another template, or a tokenizer that has one."
        )
    return TemplateRenderer(
        template,
        template.default_system if default_system is None else default_system,
        tokenizer.bos_token or "",
        tokenizer.eos_token or "",
    )


def stop_words(template: Template, eos: str) -> tuple[str, ...]:
    """The tokens at which generation stops."""
    return (template.end_of_turn or eos, *template.more_stop_words)


def as_jinja(template: Template, bos: str, eos: str) -> str:
    """The template as a chat template that transformers renders to the same text."""

    def literal(text: str) -> str:
        return "{{ " + json.dumps(text.replace("{bos}", bos).replace("{eos}", eos)) + " }}"

    def slot(text: str, value: str) -> str:
        before, _, after = text.partition(CONTENT)
        strip = " | trim" if template.strip else ""
        return literal(before) + "{{ " + value + strip + " }}" + literal(after)

    system, header = slot(template.system, "message.content"), literal(template.header)
    default = ""
    if template.default_system:
        default = (
            "{% if messages[0].role != 'system' %}"
            + slot(template.system, json.dumps(template.default_system))
            + "{% endif %}"
        )
    return (
        (literal(template.prefix) if template.prefix else "")
        + default
        + "{% for message in messages %}"
        + "{% if message.role == 'system' %}"
        + system
        + "{% elif message.role == 'user' %}"
        + slot(template.user, "message.content")
        + "{% elif message.role == 'assistant' %}"
        + header
        + slot(template.response, "message.content")
        + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + header
        + "{% endif %}"
    )
