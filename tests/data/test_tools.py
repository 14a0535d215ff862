"""Texts of tools: as models know them, and calls read back as they were written."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmray.arguments.template_rules import TOOL_FORMATS
from llmray.data import tools
from llmray.data.conversation import RowError, ToolCall
from llmray.data.tools import FORMATS, extract_calls, read_tools, write_calls

TOOL = {
    "name": "test_tool",
    "description": "tool_desc",
    "parameters": {
        "type": "object",
        "properties": {
            "foo": {"type": "string", "description": "foo_desc"},
            "bar": {"type": "number", "description": "bar_desc"},
        },
        "required": ["foo"],
    },
}
CALL = ToolCall("tool_name", {"foo": "bar", "size": 10})
EXPECTED: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "tool_texts.json").read_text(encoding="utf-8")
)


def test_names_are_those_of_the_arguments() -> None:
    assert sorted(FORMATS) == sorted(TOOL_FORMATS) == sorted(EXPECTED)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_writes_its_text(name: str) -> None:
    expected, made = EXPECTED[name], FORMATS[name]
    assert made.prompt([TOOL]) == expected["prompt"]
    assert write_calls(name, (CALL,)) == expected["one"]
    if made.is_single:
        with pytest.raises(RowError, match="2 calls at once, and tool_format=glm4 knows one"):
            write_calls(name, (CALL, CALL))
    else:
        assert write_calls(name, (CALL, CALL)) == expected["two"]


def value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 2 else 6)
    if kind == 6:
        return [value(draw, depth + 1) for _ in range(draw.randrange(3))]
    if kind == 7:
        return {f"k{i}": value(draw, depth + 1) for i in range(draw.randrange(3))}
    text = "".join(draw.choice("ab \"\\\n{}[](),:'=é😀<>/|1") for _ in range(draw.randrange(7)))
    return [draw.randrange(-5, 99), 1.5, True, None, text, "12"][kind]


def kinds(call: ToolCall) -> dict[str, Any]:
    """A tool whose schema tells texts from other values."""
    names = {key: "string" if isinstance(v, str) else "object" for key, v in call.arguments.items()}
    properties = {key: {"type": kind} for key, kind in names.items()}
    return {"name": call.name, "parameters": {"properties": properties}}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("said", ["", "Let me see {1}.\n[x]"])
def test_calls_are_read_back_as_they_were_written(name: str, said: str) -> None:
    draw = random.Random(7)
    for _ in range(150):
        count = 1 if FORMATS[name].is_single else draw.randrange(1, 4)
        calls = tuple(
            ToolCall(
                f"f.{i}" if name != "lfm2" else f"f{i}",
                {f"a{j}": value(draw) for j in range(draw.randrange(3))},
            )
            for i in range(count)
        )
        text = (said + FORMATS[name].beside if said else "") + write_calls(name, calls)
        assert extract_calls(name, text, [kinds(call) for call in calls]) == (said, calls)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "hello world",
        "",
        '{"a": 1}',
        "<tool_call>",
        "<tool_call>\n{\n</tool_call>",
        "[1, 2]",
        "f\n{",
    ],
)
def test_words_without_a_call_stay_words(name: str, text: str) -> None:
    assert extract_calls(name, text) == (text, ())


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("qwen3_5", "\n</parameter>\n<parameter=b>\nx"),
        ("glm4_moe", "</arg_value><arg_key>b</arg_key><arg_value>x"),
        ("minimax2", "</parameter>"),
        ("seed_oss", "</parameter>"),
        ("gemma4", '<|"|>'),
        ("qwen", "</tool_call>"),
        ("lfm2", "<|tool_call_end|>"),
    ],
)
def test_a_call_that_could_not_be_read_back_is_refused(name: str, mark: str) -> None:
    with pytest.raises(RowError, match=f"tool_format={name} uses as its marks"):
        write_calls(name, (ToolCall("f", {"a": f"before{mark}after"}),))


@pytest.mark.parametrize("call", [ToolCall("a b", {}), ToolCall("f", {"<x>": 1}), ToolCall("", {})])
def test_names_that_are_no_names_are_refused(call: ToolCall) -> None:
    with pytest.raises(RowError, match="Required: a name of letters"):
        write_calls("qwen", (call,))


def test_a_schema_tells_a_text_from_a_number() -> None:
    text = write_calls("qwen3_5", (ToolCall("f", {"zip": "01234", "n": "5"}),))
    typed = [{"name": "f", "parameters": {"properties": {"n": {"type": "string"}}}}]
    assert extract_calls("qwen3_5", text, typed)[1][0].arguments == {"zip": "01234", "n": "5"}
    assert extract_calls("qwen3_5", text)[1][0].arguments == {"zip": "01234", "n": 5}


def test_tools_are_read_with_and_without_their_type() -> None:
    wrapped = json.dumps([{"type": "function", "function": TOOL}])
    assert read_tools(wrapped) == read_tools(json.dumps(TOOL)) == [TOOL]


@pytest.mark.parametrize(("text", "words"), [("[", "are not JSON"), ("[1]", "a tool is 1")])
def test_wrong_tools_say_what_is_required(text: str, words: str) -> None:
    with pytest.raises(RowError, match=words):
        tools.read_tools(text)


def test_arguments_of_the_default_format_say_what_they_may_be() -> None:
    spec = {"type": "array", "description": "d", "items": {"type": "string"}, "enum": ["a", "b"]}
    tool = {"name": "f", "description": "d", "parameters": {"properties": {"x": spec}}}
    line = "  - x (array, should be one of [a, b], where each item should be string): d\n"
    assert line in FORMATS["default"].prompt([tool])
