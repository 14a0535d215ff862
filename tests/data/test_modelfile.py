"""Modelfiles write what the templates write, by a reader of the part of Go's language they use."""

import re

import pytest
from jinja2 import Environment

from llmray.data import templates
from llmray.data.conversation import Message
from llmray.data.modelfile import as_modelfile
from llmray.data.templates import TemplateRenderer

TALK = [Message("user", "Hi {{ you }}"), Message("assistant", "Hello."), Message("user", "More?")]


# the part of Go's text/template that is used, as jinja; the order matters
AS_JINJA = (
    (r"{{ range .*? }}", "{% for m in messages %}"),
    (r'{{ if eq .Role "(\w+)" }}', r"{% if m[0] == '\1' %}"),
    (r'{{ else if eq .Role "(\w+)" }}', r"{% elif m[0] == '\1' %}"),
    (
        r"{{ if and \$.System \(le \$i 1\) }}(.*?){{ end }}",
        r"{% if system and loop.index0 <= 1 %}\1{% endif %}",
    ),
    (r"{{ if .System }}(.*?){{ end }}", r"{% if system %}\1{% endif %}"),
    (r"{{ end }}{{ end }}", "{% endif %}{% endfor %}"),
    (r"{{ \$?.System }}", "{{ system }}"),
    (r"{{ .Content }}", "{{ m[1] }}"),
)


def rendered(text, system, messages):
    """What Ollama makes of a template; messages are (role, content), the system's among them."""
    for go, jinja in AS_JINJA:
        text = re.sub(go, jinja, text, flags=re.S)
    return (
        Environment(keep_trailing_newline=True)
        .from_string(text)
        .render(system=system, messages=messages)
    )


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen", "gemma", "llama2", "mistral", "phi4"])
def test_the_text_is_the_template_s(name, system):
    template = templates.find(name)
    text = as_modelfile(template, stop=("<s>",), eos="</s>", system=system, context=None)
    body = re.search(r'TEMPLATE """(.*?)"""', text, re.S).group(1)
    messages = [("system", system)] if system else []
    messages += [(message.role, message.content) for message in TALK]
    expected = TemplateRenderer(template, system, "", "</s>").prompt(TALK, system)
    assert rendered(body, system, messages) == expected


def test_what_else_stands_in_it():
    template = templates.find("chatml")
    text = as_modelfile(template, stop=("<|im_end|>",), eos="</s>", system="Hi", context=2048)
    assert text.startswith("FROM .\n")
    assert 'SYSTEM """Hi"""' in text
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 2048\n' in text
    bare = as_modelfile(None, stop=("</s>",), eos="</s>", system="", context=1 << 20)
    assert bare == 'FROM .\n\nPARAMETER stop "</s>"\nPARAMETER num_ctx 4096\n'
