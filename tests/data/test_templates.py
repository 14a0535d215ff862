import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer

from llmray.arguments import template_rules
from llmray.arguments.data import DataArguments
from llmray.arguments.model import ModelArguments
from llmray.data import template_table, templates, tokenizer
from llmray.data.chat_template import ChatTemplateRenderer
from llmray.data.conversation import Conversation, Message, RowError, ToolCall
from llmray.data.template_jinja import as_jinja
from llmray.data.template_table import DIFFERENCES, UNVERIFIED
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

CALL = ToolCall("f", {"a": "b", "n": 1})
CALLING = Conversation(
    (
        Message("user", "Q1"),
        Message("function", "", calls=(CALL,)),
        Message("observation", "R"),
        Message("assistant", "A"),
    ),
    "SYS",
)
TOOLS = json.dumps([{"name": "f", "description": "DESCRIBED", "parameters": {"properties": {}}}])
THOUGHTS = Conversation(
    (
        Message("user", "Q1"),
        Message("assistant", "A1", "T1"),
        Message("user", "Q2"),
        Message("assistant", "A2", "T2"),
    )
)

# Texts of `DIALOGUE` and `CALLING`. For names of `DIFFERENCES` as their models' own templates
# write them, for all others as LLaMA-Factory 0.9.5 does.
Texts = dict[str, list[list[str]]]
EXPECTED: dict[str, Texts] = {
    name: entry["texts"]
    for entry in json.loads((Path(__file__).parent / "template_texts.json").read_text("utf-8"))
    for name in entry["names"]
}
REASONING = [name for name, template in TEMPLATES.items() if template.thought]


def renderer(name: str, system: str | None = None, **options: Any) -> TemplateRenderer:
    template = TEMPLATES[name]
    default = template.default_system if system is None else system
    return TemplateRenderer(template, default, bos="{bos}", eos="{eos}", **options)


def text_of(turns: list[Turn]) -> str:
    return "".join(turn.source + turn.target for turn in turns)


def pairs(turns: list[Turn]) -> list[list[str]]:
    return [[turn.source, turn.target] for turn in turns]


def test_every_template_has_its_text_here_or_is_named_as_unverified() -> None:
    assert sorted({*EXPECTED, *UNVERIFIED}) == sorted(TEMPLATES)
    assert sorted(TEMPLATES) == sorted(template_rules.TEMPLATES) == list(TEMPLATES)
    assert set(DIFFERENCES) <= set(TEMPLATES)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_writes_its_models_text(name: str) -> None:
    expected, made = EXPECTED[name], renderer(name)
    assert pairs(made.turns(DIALOGUE)) == expected["turns"]
    assert pairs(made.turns(CALLING)) == expected["function"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_default_system_takes_the_place_of_the_templates_own(name: str) -> None:
    given = renderer(name, "Be kind.").turns(DIALOGUE)
    assert given == renderer(name).turns(Conversation(DIALOGUE.messages, "Be kind."))
    assert text_of(given).count("Be kind.") == 1
    words = TEMPLATES[name].default_system
    assert not words or words not in text_of(renderer(name, "").turns(DIALOGUE))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_the_text_before_the_last_response(name: str) -> None:
    """As in training, so in inference: where earlier thoughts are kept in both or in neither."""
    cases = product((True, False, None), (True, False), (DIALOGUE, HARD, CALLING, THOUGHTS))
    for thinking, preserve, conversation in cases:
        made = renderer(
            name, enable_thinking=thinking, preserve_thinking=preserve, learns_past=preserve
        )
        turns = made.turns(conversation)
        before = text_of(turns).removesuffix(turns[-1].target)
        if thinking is None and conversation is THOUGHTS and name in REASONING:
            before += "".join(TEMPLATES[name].thought or ())
        assert made.prompt(conversation.messages[:-1], conversation.system) == before


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_as_jinja_renders_to_the_same_text(name: str) -> None:
    text = as_jinja(TEMPLATES[name], "{bos}", "{eos}")
    for thinking, conversation in product((True, False), (DIALOGUE, HARD, THOUGHTS)):
        own = ChatTemplateRenderer(text, {}, None, {"enable_thinking": thinking})
        named = renderer(name, enable_thinking=thinking, learns_past=False)
        whole = text_of(named.turns(conversation))
        assert own.text(conversation) == whole
        said = conversation.messages[:-1]
        assert own.prompt(said, conversation.system) == named.prompt(said, conversation.system)
        if TEMPLATES[name].thought is None and conversation is DIALOGUE:
            assert text_of(own.turns(conversation)) == whole


@pytest.mark.parametrize("conversation", [CALLING, Conversation(DIALOGUE.messages, tools=TOOLS)])
def test_the_template_as_jinja_refuses_tools(conversation: Conversation) -> None:
    own = ChatTemplateRenderer(as_jinja(TEMPLATES["qwen"], "", ""), {}, None)
    with pytest.raises(RowError, match="has no text for tools"):
        own.turns(conversation)


def test_results_in_jinja_stand_together_as_the_template_wants() -> None:
    made = as_jinja(replace(TEMPLATES["qwen3"], thought=None), "", "")
    results = Message("observation", "", results=("R1", "R2"))
    messages = (*DIALOGUE.messages[:2], results, Message("assistant", "A"))
    own = ChatTemplateRenderer(made, {}, None).turns(Conversation(messages))
    assert own == renderer("qwen3_nothink").turns(Conversation(messages))


def test_blanks_are_kept_except_where_the_model_takes_them_away() -> None:
    assert renderer("qwen").turns(HARD)[0].target == "\n\nstraße {eos} '\"\\ <|im_end|>\n"
    assert renderer("llama3").turns(HARD)[0].target == "straße {eos} '\"\\<|eot_id|>"
    seed = renderer("seed_oss").turns(HARD)[0]
    assert seed.target == "<seed:think></seed:think>\nstraße {eos} '\"\\{eos}"
    assert " \n{bos}" in seed.source


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"template=lama3 .*mean llama3\?.* docs/templates.md"):
        templates.find("lama3")


# --- tools ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_every_template_tells_of_tools_once(name: str, system: str | None) -> None:
    turns = renderer(name).turns(Conversation(CALLING.messages, system, TOOLS))
    assert text_of(turns).count("DESCRIBED") == 1
    assert ("Be kind." in text_of(turns)) == (system is not None)
    bare = renderer(name).turns(Conversation(CALLING.messages, system))
    assert [turn.target for turn in turns] == [turn.target for turn in bare]
    assert turns[1] == bare[1]


def test_tools_stand_in_the_system_message_as_qwen_writes_them() -> None:
    made = renderer("qwen3_nothink")
    with_system = made.turns(Conversation(CALLING.messages, "SYS", TOOLS))[0].source
    without = made.turns(Conversation(CALLING.messages, None, TOOLS))[0].source
    assert with_system.startswith("<|im_start|>system\nSYS\n\n# Tools\n\nYou may")
    assert without.startswith("<|im_start|>system\n# Tools\n\nYou may")
    assert '{"type": "function", "function": {"name": "f"' in with_system


def test_tools_stand_in_a_system_message_of_the_models_own_as_seed_writes_them() -> None:
    made = renderer("seed_oss")
    without = made.turns(Conversation(CALLING.messages, None, TOOLS))[0].source
    assert without.startswith("{bos}system\nYou are Doubao, a helpful AI assistant. You may call")
    assert "assist with the user query.\nTool List:\n" in without
    with_system = made.turns(Conversation(CALLING.messages, "SYS", TOOLS))[0].source
    assert with_system.startswith("{bos}system\nSYS\nTool List:\n")


def test_tools_stand_before_the_first_user_message_as_mistral_writes_them() -> None:
    [turn, _] = renderer("mistral").turns(Conversation(CALLING.messages, "SYS", TOOLS))
    assert turn.source.startswith('{bos}[AVAILABLE_TOOLS] [{"type": "function"')
    assert turn.source.endswith("}][/AVAILABLE_TOOLS][INST] SYS\n\nQ1[/INST]")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen",
            "<|im_start|>user\n<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n"
            "</tool_response><|im_end|>\n",
        ),
        ("minimax2", "]~b]tool\n<response>R1</response>\n<response>R2</response>[e~[\n"),
        ("chatml", "<|im_start|>tool\nR1<|im_end|>\n<|im_start|>tool\nR2<|im_end|>\n"),
        (
            "glm4_moe",
            "<|observation|>\n<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n"
            "</tool_response>",
        ),
    ],
)
def test_results_of_several_calls_stand_together(name: str, expected: str) -> None:
    messages = (*CALLING.messages[:2], Message("observation", "R1\nR2", results=("R1", "R2")))
    turns = renderer(name).turns(Conversation((*messages, CALLING.messages[3])))
    assert turns[1].source.startswith(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen", "W\n<tool_call>\n{"),
        ("glm4", "\nW<|assistant|>f\n{"),
        ("glm4_7", "</think>W<tool_call>f\n"),
        ("mistral", " W[TOOL_CALLS] [{"),
        ("minimax2", "W\n<minimax:tool_call>\n<invoke"),
    ],
)
def test_words_beside_calls_are_kept(name: str, expected: str) -> None:
    messages = (Message("user", "Q"), Message("function", "W", calls=(CALL,)))
    template = replace(TEMPLATES[name], thought=None) if name == "minimax2" else TEMPLATES[name]
    made = replace(renderer(name), template=template, enable_thinking=True)
    if name == "glm4_7":
        made = replace(made, learns_past=False, enable_thinking=False)
        turn = made.turns(Conversation(messages))[0]
        expected = expected.removeprefix("</think>")
    else:
        turn = made.turns(Conversation(messages))[0]
    assert turn.target.startswith(expected)


def test_tool_format_takes_the_place_of_the_templates_own() -> None:
    made = renderer("qwen", tool_format="llama3")
    [turn, _] = made.turns(Conversation(CALLING.messages, None, TOOLS))
    assert "Cutting Knowledge Date" in turn.source
    assert turn.target == '{"name": "f", "parameters": {"a": "b", "n": 1}}<|im_end|>\n'


# --- thoughts ---------------------------------------------------------------------------------

EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("options", "opened", "written"),
    [
        ({}, ["", ""], ["<think>\nT1\n</think>\n\nA1", "<think>\nT2\n</think>\n\nA2"]),
        ({"learns_past": False}, ["", ""], ["A1", "<think>\nT2\n</think>\n\nA2"]),
        ({"enable_thinking": False}, [EMPTY, EMPTY], ["A1", "A2"]),
        ({"enable_thinking": False, "learns_past": False}, ["", EMPTY], ["A1", "A2"]),
        (
            {"learns_past": False, "preserve_thinking": True, "enable_thinking": None},
            ["", ""],
            ["<think>\nT1\n</think>\n\nA1", "<think>\nT2\n</think>\n\nA2"],
        ),
    ],
)
def test_thoughts_are_kept_left_out_or_emptied(
    options: dict[str, Any], opened: list[str], written: list[str]
) -> None:
    turns = renderer("qwen3", **options).turns(THOUGHTS)
    for turn, before, said in zip(turns, opened, written, strict=True):
        assert turn.source.endswith(f"<|im_start|>assistant\n{before}")
        assert turn.target == f"{said}<|im_end|>\n"


@pytest.mark.parametrize(
    ("thinking", "opened", "written"), [(True, "", EMPTY), (False, EMPTY, ""), (None, EMPTY, "")]
)
def test_a_response_without_a_thought_has_an_empty_one(
    thinking: bool | None, opened: str, written: str
) -> None:
    for turn in renderer("qwen3", enable_thinking=thinking).turns(DIALOGUE):
        assert turn.source.endswith(f"assistant\n{opened}")
        assert turn.target.startswith(f"{written}A")


@pytest.mark.parametrize("name", REASONING)
def test_a_thought_inside_the_content_is_one_of_its_own(name: str) -> None:
    """In the template's marks or in <think>; marks of the row's are not kept."""
    start, end = (word.strip() for word in TEMPLATES[name].thought or ())
    for content in (f"{start}T{end}A", f"\n{start}\nT\n{end}\n\nA", "<think>\nT\n</think>\n\nA"):
        inside = Conversation((Message("user", "Q"), Message("assistant", content)))
        beside = Conversation((Message("user", "Q"), Message("assistant", "A", "T")))
        assert renderer(name).turns(inside) == renderer(name).turns(beside)


@pytest.mark.parametrize("name", REASONING)
def test_what_a_model_wrote_is_read_as_a_thought_and_words(name: str) -> None:
    """A chat goes on from it with the same text as in training."""
    made = renderer(name, preserve_thinking=True)
    for answer in (Message("assistant", "A", "T"), Message("assistant", "A", "")):
        question = Message("user", "Q")
        [turn] = made.turns(Conversation((question, answer)))
        assert made.read(turn.target.rstrip("\n")) == answer
        history = (question, made.read(turn.target.rstrip("\n")), question)
        assert made.prompt(history).startswith(turn.source + turn.target.rstrip("\n"))


def test_a_template_without_thoughts_keeps_them_as_words() -> None:
    content = "<think>T</think>A"
    inside = Conversation((Message("user", "Q"), Message("assistant", content)))
    assert renderer("qwen").turns(inside)[0].target == f"{content}<|im_end|>\n"
    beside = Conversation((Message("user", "Q"), Message("assistant", "A", "T")))
    assert renderer("qwen").turns(beside)[0].target == "<think>\nT\n</think>\n\nA<|im_end|>\n"


def test_thoughts_between_calls_stay_until_the_user_speaks_again() -> None:
    """As Qwen3's own template: the steps after the last user message keep their thoughts."""
    called = Message("function", "", "T1", (CALL,))
    steps = (Message("user", "Q"), called, Message("observation", "R"))
    made = renderer("qwen3", learns_past=False)
    now = made.turns(Conversation((*steps, Message("assistant", "A", "T2"))))
    assert now[0].target.startswith("<think>\nT1\n</think>\n\n<tool_call>")
    later = (
        *steps,
        Message("assistant", "A", "T2"),
        Message("user", "Q"),
        Message("assistant", "B"),
    )
    assert made.turns(Conversation(later))[0].target.startswith("<tool_call>")


def test_gemma4_says_in_the_system_message_that_it_thinks() -> None:
    on = renderer("gemma4").turns(DIALOGUE)[0].source
    off = renderer("gemma4", enable_thinking=False).turns(DIALOGUE)[0].source
    assert on.startswith("{bos}<|turn>system\n<|think|><turn|>\n<|turn>user")
    assert off.startswith("{bos}<|turn>user")
    assert off.endswith("<|channel>thought\n<channel|>")


def test_glm_is_told_in_the_users_words_not_to_think() -> None:
    off = renderer("glm4_moe", enable_thinking=False).turns(DIALOGUE)
    assert off[0].source.endswith("<|user|>\nQ1/nothink<|assistant|>\n<think></think>")


# --- ends of responses ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_ends_with_what_generation_stops_at(name: str) -> None:
    template = TEMPLATES[name]
    stops = templates.stop_words(template, "{eos}")
    target = renderer(name).turns(DIALOGUE)[-1].target
    if template.efficient_eos:
        assert stops[0] == "{eos}"
        assert "{eos}" not in target
    elif name == "empty":
        assert target == "A2"
    else:
        assert target.rstrip("\n").endswith(stops[0])


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
    with pytest.raises(DataError, match=r"does not write responses\. Name a template:"):
        tokenizer.renderer(DataArguments(), loaded)


# It writes tools, thoughts and calls.
CALLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ ARGUMENTS }}</call>{% endfor %}"
    "</end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
AS_OBJECT = CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
AS_TEXT = CALLS.replace("ARGUMENTS", "'in text ' + c.function.arguments")


@pytest.mark.parametrize(("text", "beside"), [(AS_OBJECT, ""), (AS_TEXT, "in text ")])
def test_calls_and_results_are_found_in_the_tokenizers_own_template(text: str, beside: str) -> None:
    tools = json.dumps([{"type": "function", "function": json.loads(TOOLS)[0]}])
    turns = ChatTemplateRenderer(text, {}, None).turns(replace(CALLING, tools=TOOLS))
    assert turns == [
        Turn(
            f"<tools>{tools}</tools><system>SYS</end><user>Q1</end><assistant>",
            f'<call>f {beside}{{"a": "b", "n": 1}}</call></end>',
        ),
        Turn("<tool>R</end><assistant>", "A</end>"),
    ]


def test_each_result_is_a_message_of_the_tokenizers_own_template() -> None:
    results = Message("observation", "R1\nR2", results=("R1", "R2"))
    called = replace(CALLING.messages[1], calls=(CALL, CALL))
    messages = (CALLING.messages[0], called, results, CALLING.messages[3])
    turns = ChatTemplateRenderer(AS_OBJECT, {}, None).turns(Conversation(messages))
    assert turns[1].source == "<tool>R1</end><tool>R2</end><assistant>"


def test_thoughts_reach_the_tokenizers_own_template() -> None:
    """By name where it knows the name, else inside the words."""
    turns = ChatTemplateRenderer(AS_OBJECT, {}, None).turns(THOUGHTS)
    assert turns[1].target == "<think>T2</think>A2</end>"
    plain = AS_OBJECT.replace("m.reasoning_content", "m.nothing")
    turns = ChatTemplateRenderer(plain, {}, None).turns(THOUGHTS)
    assert turns[1].target == "<think>\nT2\n</think>\n\nA2</end>"


def test_calls_are_found_where_the_last_response_has_an_empty_thought() -> None:
    text = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments }}</call>"
        "{% endfor %}</end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = ChatTemplateRenderer(text, {}, None).turns(CALLING)
    assert turns[0].target == "<call>f {'a': 'b', 'n': 1}</call></end>"
    assert turns[1].target == "<think></think>A</end>"


@pytest.mark.parametrize(
    ("text", "said", "words"),
    [
        (AS_OBJECT.replace("{{ m.content }}", ""), "W", "what is said beside the calls of"),
        (AS_OBJECT.replace("<think>{{ m.reasoning_content }}", ""), "", "the thought of"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "", "does not write the calls"),
    ],
)
def test_what_the_tokenizers_own_template_leaves_out_is_an_error(
    text: str, said: str, words: str
) -> None:
    call = ToolCall("look_up", {"word": "b"})
    response = Message("function", said, "Hm?", (call,))
    with pytest.raises(RowError, match=words):
        ChatTemplateRenderer(text, {}, None).turns(Conversation((Message("user", "Q"), response)))


def test_tools_that_the_tokenizers_own_template_does_not_tell_of_are_an_error() -> None:
    tools = json.dumps([{"name": "look_up", "description": "d"}])
    conversation = Conversation(DIALOGUE.messages, tools=tools)
    ChatTemplateRenderer(AS_OBJECT, {}, None).turns(conversation)
    silent = ChatTemplateRenderer(AS_OBJECT.replace("{% if tools %}", "{% if 0 %}"), {}, None)
    with pytest.raises(RowError, match=r"does not tell of tools \(look_up\)\. Name a template"):
        silent.turns(conversation)


@pytest.mark.parametrize(
    ("text", "keys", "told"),
    [
        ("{{ enable_thinking }}", {}, {"enable_thinking": True}),
        ("{{ enable_thinking }}", {"enable_thinking": None}, {}),
        ("words", {"enable_thinking": False, "preserve_thinking": True}, {}),
        ("<think> {{ clear_thinking }}", {"preserve_thinking": True}, {"clear_thinking": False}),
        ("{{ preserve_thinking }}", {"preserve_thinking": True}, {"preserve_thinking": True}),
    ],
)
def test_the_tokenizers_own_template_is_told_of_thoughts(
    text: str, keys: dict[str, Any], told: dict[str, bool]
) -> None:
    assert tokenizer.switches(text, DataArguments(**keys)) == told


@pytest.mark.parametrize("key", [{"enable_thinking": False}, {"preserve_thinking": True}])
def test_a_switch_that_the_tokenizers_own_template_lacks_is_an_error(key: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"has no switch for it\. Name a template: "):
        tokenizer.switches("<think>", DataArguments(**key))


# --- tokenizers -------------------------------------------------------------------------------


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(tmp_path: Path) -> None:
    made = make_tokenizer(tmp_path)
    made.pad_token = None
    made.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    loaded = tokenizer.load_tokenizer(tmp_path, ModelArguments())
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (2, 2, "right")
    with pytest.raises(DataError, match=r"template is not given, .* Name a template:"):
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
    assert sorted(template_rules.TEMPLATES) == sorted(template_table.TEMPLATES)
