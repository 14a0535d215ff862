"""A named template as a chat template in jinja, for tokenizers that have none of their own.

It writes what `templates` writes in inference: the thoughts of earlier responses are left out. It
has no text for tools and their calls, and refuses them.
"""

from __future__ import annotations

import json

from llmray.data.template_table import THINK, Template

CONTENT = "{content}"
NO_TOOLS = "{{ raise_exception('This chat template has no text for tools.') }}"


def as_jinja(template: Template, bos: str, eos: str) -> str:
    """The template as a chat template that transformers renders to the same text."""
    return _Writer(template, bos, eos).text()


class _Writer:
    def __init__(self, template: Template, bos: str, eos: str) -> None:
        self.template = template
        self.bos, self.eos = bos, eos

    def text(self) -> str:
        template = self.template
        empty = self.literal("".join(template.thought)) if template.thought else ""
        return (
            "{% if tools %}" + NO_TOOLS + "{% endif %}"
            "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
            "{% set ns = namespace(last=-1, fused='', thought='', said='') %}"
            + self.literal(template.prefix)
            + self.system()
            + "{% for message in rest %}{% if message.role == 'user' %}"
            "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
            "{% for message in rest %}"
            "{% if message.tool_calls %}" + NO_TOOLS + "{% endif %}"
            "{% if message.role == 'user' %}"
            + self.user()
            + "{% elif message.role == 'tool' %}"
            + self.observation()
            + "{% elif message.role == 'assistant' %}"
            + self.literal(template.header)
            + self.response(empty)
            + ("{% if not loop.last or add_generation_prompt %}" if template.between else "")
            + self.literal(template.between)
            + ("{% endif %}" if template.between else "")
            + "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}"
            + self.literal(template.header)
            + ("{% if not enable_thinking %}" + empty + "{% endif %}" if empty else "")
            + "{% endif %}"
        )

    def literal(self, text: str) -> str:
        if not text:
            return ""
        return "{{ " + self.quoted(text) + " }}"

    def quoted(self, text: str) -> str:
        filled = text.replace("{bos}", self.bos).replace("{eos}", self.eos)
        return json.dumps(filled, ensure_ascii=False)

    def slot(self, text: str, value: str) -> str:
        """A text with a value in it, written to the output."""
        before, _, after = text.partition(CONTENT)
        return self.literal(before) + "{{ " + value + " }}" + self.literal(after)

    def trimmed(self, value: str, *kinds: str) -> str:
        return f"({value} | trim)" if self.template.strip in kinds else value

    def system(self) -> str:
        template = self.template
        first = self.trimmed("messages[0].content", "all")
        words = self.quoted(template.thinking_system)
        with_words = f"(({words} if enable_thinking else '') ~ said)"
        before, _, after = template.system.partition(CONTENT)
        whole = f"{self.quoted(before)} ~ said ~ {self.quoted(after)}"
        return (
            "{% if messages[0].role == 'system' %}{% set said = " + first + " %}"
            "{% set rest = messages[1:] %}{% else %}"
            "{% set said = " + self.quoted(template.default_system) + " %}"
            "{% set rest = messages %}{% endif %}"
            + ("{% set said = " + with_words + " %}" if template.thinking_system else "")
            + "{% if said %}"
            + (
                "{% set ns.fused = " + whole + " %}"
                if template.fuses_system
                else "{{ " + whole + " }}"
            )
            + "{% endif %}"
        )

    def user(self) -> str:
        template = self.template
        said = self.trimmed("message.content", "all")
        if template.unthinking:
            words = self.quoted(template.unthinking)
            is_off = f"not enable_thinking and not message.content.endswith({words})"
            said = f"({said} ~ ({words} if {is_off} else ''))"
        if template.fuses_system:
            said = f"(ns.fused ~ {said})"
        return self.slot(template.user, said) + "{% set ns.fused = '' %}"

    def observation(self) -> str:
        template = self.template
        before, _, after = template.results.partition(CONTENT)
        follows = "rest[loop.index0 - 1].role == 'tool'"
        last = "loop.last or rest[loop.index0 + 1].role != 'tool'"
        return (
            "{% if not loop.first and "
            + follows
            + " %}"
            + self.literal(template.joint)
            + "{% else %}"
            + self.literal(before)
            + "{% endif %}"
            + self.slot(template.observation or template.user, "message.content")
            + ("{% if " + last + " %}" + self.literal(after) + "{% endif %}" if after else "")
        )

    def response(self, empty: str) -> str:
        template = self.template
        said = self.trimmed("ns.said", "all", "responses")
        body = self.slot(template.response, said)
        own = "message.reasoning_content"
        if template.thought is None:
            start, end = map(self.quoted, THINK)
            given = "{{ " + f"{start} ~ {own} ~ {end}" + " }}"
            return (
                "{% set ns.said = message.content %}"
                "{% if " + own + " %}" + given + "{% endif %}" + body
            )
        start, end = (self.quoted(word.strip()) for word in template.thought)
        before, after = map(self.quoted, template.thought)
        past = self.literal(template.past_thought)
        return (
            "{% set ns.said = message.content %}{% set ns.thought = none %}"
            "{% if " + own + " is string %}{% set ns.thought = " + own + " %}"
            "{% elif message.content.lstrip().startswith("
            + start
            + ") and "
            + end
            + " in message.content %}"
            "{% set ns.thought = message.content.lstrip()[" + start + " | length:]"
            ".split(" + end + ")[0].strip('\\n') %}"
            "{% set ns.said = message.content.split(" + end + ", 1)[1].lstrip('\\n') %}"
            "{% endif %}"
            "{% set is_silent = ns.thought is none or not enable_thinking %}"
            "{% if loop.index0 < ns.last or (is_silent and not loop.last) %}"
            + past
            + "{% elif is_silent %}"
            + empty
            + "{% else %}{{ "
            + before
            + " ~ ns.thought ~ "
            + after
            + " }}{% endif %}"
            + body
        )
