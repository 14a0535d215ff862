from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer

from llmray.arguments import capabilities
from llmray.arguments.data import DataArguments
from llmray.arguments.model import ModelArguments
from llmray.data import templates, tokenizer
from llmray.data.chat_template import ChatTemplateRenderer
from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.templates import TEMPLATES, TemplateRenderer, Turn
from llmray.errors import DataError, ModelError

DIALOGUE = Conversation(
    (
        Message("user", "Q1"),
        Message("assistant", "A1"),
        Message("user", "Q2"),
        Message("assistant", "A2"),
    )
)
HARD = Conversation(
    (
        Message("user", " \n{bos} {content} <|im_end|> "),
        Message("assistant", "\n\nstraße {eos} '\"\\ "),
        Message("user", ""),
        Message("assistant", ""),
    ),
    "SYS",
)

# Text of the dialogue without and with a system message, as the models' own templates write it.
EXPECTED: dict[str, dict[str, Any]] = {
    "llama3": {
        "opening": "B",
        "system": "<|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>",
        "turns": [
            (
                f"<|start_header_id|>user<|end_header_id|>\n\nQ{n}<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                f"A{n}<|eot_id|>",
            )
            for n in (1, 2)
        ],
    },
    "default": {
        "opening": "",
        "system": "System: SYSE\n",
        "turns": [(f"Human: Q{n}E\nAssistant:", f"A{n}E\n") for n in (1, 2)],
    },
    **{
        name: {
            "opening": f"<|im_start|>system\n{default}<|im_end|>\n" if default else "",
            "system": "<|im_start|>system\nSYS<|im_end|>\n",
            "turns": [
                (
                    f"<|im_start|>user\nQ{n}<|im_end|>\n<|im_start|>assistant\n",
                    f"A{n}<|im_end|>\n",
                )
                for n in (1, 2)
            ],
        }
        for name, default in {
            "chatml": "",
            "qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
            "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        }.items()
    },
}


def renderer(name: str, system: str | None = None) -> TemplateRenderer:
    template = TEMPLATES[name]
    default = template.default_system if system is None else system
    return TemplateRenderer(template, default, bos="B", eos="E")


def text_of(turns: list[Turn]) -> str:
    return "".join(turn.source + turn.target for turn in turns)


def test_every_template_has_its_text_here() -> None:
    assert set(EXPECTED) == set(TEMPLATES)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("system", [None, "SYS"])
def test_a_template_writes_its_models_text(name: str, system: str | None) -> None:
    expected = EXPECTED[name]
    opening = expected["opening"]
    if system is not None:
        prefix = TEMPLATES[name].prefix.replace("{bos}", "B")
        opening = prefix + expected["system"]
    first, second = expected["turns"]
    conversation = Conversation(DIALOGUE.messages, system)
    assert renderer(name).turns(conversation) == [
        Turn(opening + first[0], first[1]),
        Turn(*second),
    ]


@pytest.mark.parametrize("name", EXPECTED)
def test_default_system_takes_the_place_of_the_templates_own(name: str) -> None:
    given = renderer(name, "SYS").turns(DIALOGUE)
    assert given == renderer(name).turns(Conversation(DIALOGUE.messages, "SYS"))
    none = text_of(renderer(name, "").turns(DIALOGUE))
    assert "system" not in none.lower()


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("conversation", [DIALOGUE, HARD])
def test_the_prompt_is_the_text_before_the_last_response(
    name: str, conversation: Conversation
) -> None:
    turns = renderer(name).turns(conversation)
    before = text_of(turns)[: -len(turns[-1].target)]
    assert renderer(name).prompt(conversation.messages[:-1], conversation.system) == before


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("conversation", [DIALOGUE, HARD])
def test_the_template_as_jinja_renders_to_the_same_turns(
    name: str, conversation: Conversation
) -> None:
    own = ChatTemplateRenderer(templates.as_jinja(TEMPLATES[name], "B", "E"), {}, None)
    assert own.turns(conversation) == renderer(name).turns(conversation)


def test_blanks_are_kept_except_where_the_model_takes_them_away() -> None:
    assert renderer("qwen").turns(HARD)[0].target == "\n\nstraße {eos} '\"\\ <|im_end|>\n"
    assert renderer("llama3").turns(HARD)[0].target == "straße {eos} '\"\\<|eot_id|>"


def test_tools_are_refused_by_both_renderers() -> None:
    own = ChatTemplateRenderer("{{ messages }}", {}, None)
    called = Conversation((Message("user", "q"), Message("function", "{}")))
    for conversation in (called, Conversation(DIALOGUE.messages, tools="[1]")):
        for each in (own, renderer("qwen")):
            with pytest.raises(RowError, match="tool calls are not built yet"):
                each.turns(conversation)


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"template=lama3 .*mean llama3\? .*chatml, default"):
        templates.find("lama3")


# --- the tokenizer's own template -------------------------------------------------------------

# As reasoning models do: thoughts of earlier responses are dropped, an empty one is written into
# the last response.
THINKING = (
    "{% set last = messages | length - 1 %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1] %}"
    "{% if loop.index0 == last %}<think></think>{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Generation starts further on than a response in history does.
OPENS_THOUGHT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def test_responses_are_found_in_the_tokenizers_own_template(tiny_llama_dir: Path) -> None:
    loaded = tokenizer.load_tokenizer(tiny_llama_dir, ModelArguments())
    own = tokenizer.renderer(DataArguments(), loaded)
    chat = [{"role": message.role, "content": message.content} for message in DIALOGUE.messages]
    turns = own.turns(DIALOGUE)
    assert text_of(turns) == loaded.apply_chat_template(chat, tokenize=False)
    assert [turn.target for turn in turns] == ["A1<|im_end|>\n", "A2<|im_end|>\n"]
    assert own.prompt(DIALOGUE.messages[:3]) == loaded.apply_chat_template(
        chat[:3], tokenize=False, add_generation_prompt=True
    )


def test_default_system_reaches_the_tokenizers_own_template(tiny_llama_dir: Path) -> None:
    loaded = tokenizer.load_tokenizer(tiny_llama_dir, ModelArguments())
    own = tokenizer.renderer(DataArguments(default_system="SYS"), loaded)
    assert own.turns(DIALOGUE)[0].source.startswith("<|im_start|>system\nSYS<|im_end|>\n")


def test_thoughts_that_a_template_drops_from_history_are_not_looked_for() -> None:
    own = ChatTemplateRenderer(THINKING, {}, None)
    messages = (Message("user", "Q1"), Message("assistant", "<think>T</think>A1"))
    turns = own.turns(Conversation(messages + DIALOGUE.messages[2:]))
    assert turns == [
        Turn("<user>Q1</end><assistant>", "A1</end>"),
        Turn("<user>Q2</end><assistant>", "<think></think>A2</end>"),
    ]


def test_a_header_of_generation_that_history_lacks_is_not_part_of_the_source() -> None:
    own = ChatTemplateRenderer(OPENS_THOUGHT, {}, None)
    assert own.turns(DIALOGUE) == [
        Turn("<user>Q1</end><assistant>", "A1</end>"),
        Turn("<user>Q2</end><assistant>", "A2</end>"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "writes nothing for response 1",
        ),
        ("{{ messages | length }} {{ messages[-1].content }}", "writes the messages before"),
        ("{{ raise_exception('no system') }}", "refuses the conversation: no system"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses the conversation: access to"),
        ("{% for m in messages %}{{ m.content }", "refuses the conversation: unexpected"),
        (
            "{% for m in messages %}[{{ m.content }}{% if m.role == 'assistant' %}"
            "{{ 'x' if loop.last else m.content | length }}{% endif %}{% endfor %}",
            "changes the end of message 2",
        ),
    ],
)
def test_a_template_whose_responses_are_not_found_is_an_error(text: str, words: str) -> None:
    with pytest.raises(RowError) as error:
        ChatTemplateRenderer(text, {}, None).turns(DIALOGUE)
    assert words in str(error.value)
    assert "Name a template instead" in str(error.value)


def test_a_template_that_leaves_responses_out_is_refused_at_once(tmp_path: Path) -> None:
    loaded = make_tokenizer(tmp_path)
    loaded.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(DataError, match=r"does not write responses\. Name one: template: chatml"):
        tokenizer.renderer(DataArguments(), loaded)


# --- tokenizers -------------------------------------------------------------------------------


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(tmp_path: Path) -> None:
    made = make_tokenizer(tmp_path)
    made.pad_token = None
    made.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    loaded = tokenizer.load_tokenizer(tmp_path, ModelArguments())
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (2, 2, "right")
    with pytest.raises(DataError, match=r"template is not given, .* Name one: template: chatml"):
        tokenizer.renderer(DataArguments(), loaded)


def test_fitting_a_template_sets_the_end_of_turn_and_writes_the_template(tmp_path: Path) -> None:
    made = make_tokenizer(tmp_path)
    made.eos_token = "<|endoftext|>"
    made.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    plain = tokenizer.load_tokenizer(tmp_path, ModelArguments())
    assert (plain.eos_token, plain.chat_template) == ("<|endoftext|>", None)
    fitted = tokenizer.load_tokenizer(tmp_path, ModelArguments(), template="qwen")
    assert fitted.eos_token == "<|im_end|>"
    chat = [{"role": "user", "content": "Q1"}]
    assert fitted.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == renderer(
        "qwen"
    ).prompt([Message("user", "Q1")])
    # a token that this tokenizer does not have ends nothing
    assert tokenizer.load_tokenizer(tmp_path, ModelArguments(), "llama3").eos_token_id == 0


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded"):
        tokenizer.load_tokenizer(tmp_path, ModelArguments())


def test_texts_of_pt_end_with_the_end_of_text(tmp_path: Path) -> None:
    loaded = make_tokenizer(tmp_path)
    assert tokenizer.around_text(loaded, None) == ((), (2,))
    assert tokenizer.around_text(loaded, TEMPLATES["llama3"]) == ((), (2,))
    loaded.add_special_tokens({"additional_special_tokens": ["<|end_of_text|>"]})
    assert tokenizer.around_text(loaded, TEMPLATES["llama3"]) == ((), (320,))
    from tokenizers.processors import TemplateProcessing

    loaded.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer.around_text(loaded, None) == ((1,), (2,))


def test_arguments_know_every_template() -> None:
    assert sorted(capabilities.TEMPLATES) == sorted(templates.TEMPLATES)
