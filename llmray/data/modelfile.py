"""A Modelfile, by which Ollama serves an exported folder: `ollama create NAME -f Modelfile`.

Texts with a named template get it in Ollama's language; without one Ollama reads the chat template
of the tokenizer's files. Tools have no place in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from llmray.data.template_table import Template

CONTENT = "{content}"
CONTEXT = 4096  # tokens that Ollama keeps, where the model has as many


def as_modelfile(
    template: Template | None, *, stop: Iterable[str], eos: str, system: str, context: int | None
) -> str:
    """The Modelfile's text.

    Args:
        template: a named one; None for the tokenizer's own.
        stop: the tokens that end a response.
        eos: the tokenizer's end token.
        system: the system message of conversations without one; may be empty.
        context: how many tokens the model has positions for, where that is known.
    """
    lines = ["FROM ."]
    if template is not None:
        lines += ["", f'TEMPLATE """{_as_go(template, eos)}"""']
    if system:
        lines += ["", f'SYSTEM """{system}"""']
    lines += [""]
    lines += [f"PARAMETER stop {json.dumps(word, ensure_ascii=False)}" for word in stop]
    lines += [f"PARAMETER num_ctx {min(context or CONTEXT, CONTEXT)}"]
    return "\n".join(lines) + "\n"


def _as_go(template: Template, eos: str) -> str:
    """The template in the language of Go's text/template; Ollama puts the begin token itself."""

    def text(words: str) -> str:
        filled = words.replace("{bos}", "").replace("{eos}", eos)
        return filled.replace("{{", '{{ "{{" }}')

    def slot(words: str, value: str) -> str:
        before, _, after = words.partition(CONTENT)
        return text(before) + "{{ " + value + " }}" + text(after)

    system = slot(template.system, "$.System")
    # the first user message is at 0, or at 1 behind the system message
    fused = "{{ if and $.System (le $i 1) }}" + system + "{{ end }}"
    before, _, after = template.user.partition(CONTENT)
    user = text(before) + (fused if template.fuses_system else "") + "{{ .Content }}" + text(after)
    return (
        text(template.prefix)
        + ("" if template.fuses_system else "{{ if .System }}" + system + "{{ end }}")
        + '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}'
        + user
        + '{{ else if eq .Role "assistant" }}'
        + text(template.header)
        + slot(template.response, ".Content")
        + text(template.between)
        + "{{ end }}{{ end }}"
        + text(template.header)
    )
