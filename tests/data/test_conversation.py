import json
from typing import Any

import pytest

from llmray.data.conversation import Conversation, Message, RowError, ToolCall
from llmray.data.formattings import to_conversation
from llmray.data.row_format import RowFormat

SHAREGPT = RowFormat("sharegpt")
OPENAI = RowFormat("openai")
ADD = ToolCall("add", {"a": 1, "b": "x"})


def said(*words: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in words)  # type: ignore[arg-type]


def test_alpaca_joins_prompt_and_query_and_takes_history_and_system() -> None:
    layout = RowFormat("alpaca", {"history": "before", "system": "sys"})
    row = {
        "instruction": "do",
        "input": "this",
        "output": "done",
        "before": [["q", "a"]],
        "sys": "be kind",
        "unrelated": 3,
    }
    assert to_conversation(row, layout) == Conversation(
        said(("user", "q"), ("assistant", "a"), ("user", "do\nthis"), ("assistant", "done")),
        "be kind",
    )


@pytest.mark.parametrize("query", ["", None])
def test_an_empty_query_adds_nothing(query: str | None) -> None:
    row = {"instruction": "do", "input": query, "output": ""}
    assert to_conversation(row, RowFormat()).messages == said(("user", "do"), ("assistant", ""))


def test_a_column_that_is_not_listed_keeps_its_default_name() -> None:
    layout = RowFormat("alpaca", {"prompt": "ask"})
    row = {"ask": "a", "input": "b", "output": "c"}
    assert to_conversation(row, layout).messages == said(("user", "a\nb"), ("assistant", "c"))


def test_text_needs_no_response() -> None:
    layout = RowFormat("alpaca", {"prompt": "text"})
    assert to_conversation({"text": "a"}, layout, "text").messages == said(("user", "a"))


def test_sharegpt_takes_the_system_message_out() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    }
    assert to_conversation(row, SHAREGPT) == Conversation(
        said(("user", "q"), ("assistant", "a")), "s"
    )


def test_sharegpt_by_other_tags() -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    layout = RowFormat("sharegpt", {"messages": "turns"}, tags)
    row = {"turns": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a"}]}
    assert to_conversation(row, layout).messages == said(("user", "q"), ("assistant", "a"))


def sharegpt(*turns: tuple[Any, Any], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **columns}


def openai(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


@pytest.mark.parametrize(
    ("text", "beside", "calls"),
    [
        ('{"name": "add", "arguments": {"a": 1, "b": "x"}}', "", (ADD,)),
        ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": \\"x\\"}"}', "", (ADD,)),
        (
            '[{"name": "add", "arguments": {"a": 1, "b": "x"}}, {"name": "no"}]',
            "",
            (ADD, ToolCall("no", {})),
        ),
        (
            '<think>{hm}</think>\n{"name": "add", "arguments": {"a": 1, "b": "x"}}',
            "<think>{hm}</think>",
            (ADD,),
        ),
    ],
)
def test_a_function_call_is_read_with_what_stands_before_it(
    text: str, beside: str, calls: tuple[ToolCall, ...]
) -> None:
    row = sharegpt(
        ("human", "q"), ("function_call", text), ("observation", "o"), ("gpt", "a"), t="[1]"
    )
    found = to_conversation(row, RowFormat("sharegpt", {"tools": "t"}))
    assert [m.role for m in found.messages] == ["user", "function", "observation", "assistant"]
    assert found.messages[1] == Message("function", beside, calls=calls)
    assert found.tools == "[1]"


def test_openai_messages_keep_thoughts_words_beside_calls_and_results() -> None:
    """Arguments as JSON text and as an object; two results of two calls are one message."""
    calls = [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'},
        },
        {
            "id": "2",
            "type": "function",
            "function": {"name": "add", "arguments": {"a": 1, "b": "x"}},
        },
    ]
    row = openai(
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": "Wait.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "tool", "content": "2", "tool_call_id": "2"},
        {"role": "assistant", "content": "a", "tool_calls": None},
        tools=[{"name": "add"}],
    )
    assert to_conversation(row, OPENAI) == Conversation(
        (
            Message("user", "q!"),
            Message("function", "Wait.", "hm", (ADD, ADD)),
            Message("observation", "1\n2", results=("1", "2")),
            Message("assistant", "a"),
        ),
        "s",
        '[{"name": "add"}]',
    )


def test_parts_hold_words_thoughts_and_calls() -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1, "b": "x"}})
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "tool_call", "value": call},
        {"type": "tool_call", "value": json.loads(call)},
    ]
    row = openai(
        {"role": "user", "content": [{"type": "text", "value": "q"}]},
        {"role": "assistant", "content": parts},
        {"role": "tool", "content": [{"type": "text", "value": "r"}]},
        {"role": "assistant", "content": [*parts[:1], {"type": "text", "value": "a"}]},
    )
    assert to_conversation(row, OPENAI).messages == (
        Message("user", "q"),
        Message("function", "", "hm", (ADD, ADD)),
        Message("observation", "r"),
        Message("assistant", "a", "hm"),
    )


def test_openai_calls_may_come_without_words() -> None:
    call = {"function": {"name": "add", "arguments": ""}}
    row = openai(
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    )
    assert to_conversation(row, OPENAI).messages[1] == Message(
        "function", "", calls=(ToolCall("add", {}),)
    )


@pytest.mark.parametrize("system", [None, "be kind"])
def test_the_system_message_is_the_rows_own(system: str | None) -> None:
    first = [{"role": "system", "content": system}] if system else []
    row = openai(*first, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert to_conversation(row, OPENAI).system == system


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"content": None}, "'content' of message 2 is null"),
        ({"content": "", "tool_calls": [{"name": "x"}, 3]}, "message 2 has a call int 3"),
        (
            {"content": "", "tool_calls": [{"function": {"name": "x", "arguments": "1, 2"}}]},
            "arguments str '1, 2'",
        ),
        ({"content": "a", "reasoning_content": 3}, "'reasoning_content' of message 2 is int 3"),
        ({"content": [{"type": "image_url"}]}, "training on media is not built yet"),
    ],
)
def test_a_wrong_openai_message_says_what_is_wrong(answer: dict[str, Any], words: str) -> None:
    row = openai({"role": "user", "content": "q"}, {"role": "assistant", **answer})
    with pytest.raises(RowError) as error:
        to_conversation(row, OPENAI)
    assert words in str(error.value)
    assert "Required: " in str(error.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("{}", "message 2 has a call dict {}"),
        ("add(1)", "message 2 has a call str 'add(1)'"),
        ("[]", "message 2 calls no tool"),
        ('{"name": "add", "arguments": [1]}', "calls add with arguments list [1]"),
    ],
)
def test_a_wrong_function_call_says_what_is_wrong(call: str, words: str) -> None:
    with pytest.raises(RowError) as error:
        to_conversation(sharegpt(("human", "q"), ("function_call", call)), SHAREGPT)
    assert words in str(error.value)


def test_tools_that_are_no_list_are_refused() -> None:
    row = openai({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, tools=3)
    with pytest.raises(RowError, match=r"'tools' is int 3\. Required: a list of tools"):
        to_conversation(row, OPENAI)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("text", ["the row is str 'text'", "Required: an object"]),
        (None, ["the row is null"]),
        ({"instuction": "a", "output": "b"}, ["'instruction' is missing", "mean 'instuction'?"]),
        ({"instruction": "a"}, ["column 'output' is missing", "the row has instruction"]),
        ({"instruction": 3, "output": "b"}, ["'instruction' is int 3. Required: text"]),
        ({"instruction": "a", "output": None}, ["'output' is null. Required: text"]),
        ({"instruction": "a", "output": "b", "input": ["c"]}, ["'input' is list ['c']"]),
    ],
)
def test_a_wrong_alpaca_row_says_what_is_required(row: Any, words: list[str]) -> None:
    with pytest.raises(RowError) as error:
        to_conversation(row, RowFormat())
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("history", ["q", [["q"]], [["q", 1]], ["ab"]])
def test_a_wrong_history_is_refused(history: Any) -> None:
    row = {"instruction": "a", "output": "b", "h": history}
    with pytest.raises(RowError, match=r"'h'.*Required: "):
        to_conversation(row, RowFormat("alpaca", {"history": "h"}))


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "the conversation is empty"),
        ([("system", "s")], "the conversation is empty"),
        ([("human", "q")], "the last message, 1, has no response"),
        ([("gpt", "a"), ("human", "q")], "message 1 is from gpt, out of turn"),
        ([("system", "s"), ("gpt", "a")], "message 2 is from gpt, out of turn"),
        ([("human", "q"), ("human", "q")], "message 2 is from human, out of turn"),
        ([("human", "q"), ("system", "s")], "message 2 is from system, out of turn"),
        ([("humen", "q")], "message 1 is from 'humen', an unknown role. Did you mean 'human'?"),
        ([("human", 3)], "'value' of message 1 is int 3; it has from, value"),
        ([(None, "q")], "'from' of message 1 is null"),
    ],
)
def test_a_wrong_conversation_says_which_message(turns: list[Any], words: str) -> None:
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    with pytest.raises(RowError) as error:
        to_conversation(row, SHAREGPT)
    assert words in str(error.value)
    assert "Required: " in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "column 'conversations' is missing"),
        ({"conversations": "q"}, "'conversations' is str 'q'. Required: a list"),
        ({"conversations": ["q"]}, "message 1 is str 'q'. Required: an object"),
        ({"conversations": [{"role": "human", "value": "q"}]}, "'from' of message 1 is missing"),
    ],
)
def test_rows_of_other_shapes_are_refused(row: Any, words: str) -> None:
    with pytest.raises(RowError) as error:
        to_conversation(row, SHAREGPT)
    assert words in str(error.value)


def test_media_and_text_from_conversations_are_not_built() -> None:
    row = {"conversations": [], "images": ["a.png"]}
    with pytest.raises(RowError, match="training on media is not built yet"):
        to_conversation(row, RowFormat("sharegpt", {"images": "images"}))
    with pytest.raises(RowError, match="stage pt learns plain text"):
        to_conversation(row, SHAREGPT, "text")


# --- pairs and judged responses ---------------------------------------------------------------

PROMPT = [{"from": "human", "value": "q"}]
ANSWERED = [*PROMPT, {"from": "gpt", "value": "a"}]
GOOD, WORSE = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "worse"}


def test_a_pair_of_alpaca_has_two_responses_to_one_prompt() -> None:
    row = {"instruction": "do", "input": "this", "better": "good", "rejected": "worse", "h": []}
    found = to_conversation(row, RowFormat("alpaca", {"chosen": "better", "history": "h"}), "pair")
    assert found == Conversation(
        said(("user", "do\nthis")),
        chosen=Message("assistant", "good"),
        rejected=(Message("assistant", "worse"),),
    )


def test_a_pair_of_sharegpt_ends_with_the_prompt() -> None:
    row = {
        "conversations": [{"from": "system", "value": "s"}, *ANSWERED, *PROMPT],
        "chosen": GOOD,
        "rejected": {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
    }
    assert to_conversation(row, SHAREGPT, "pair") == Conversation(
        said(("user", "q"), ("assistant", "a"), ("user", "q")),
        "s",
        chosen=Message("assistant", "good"),
        rejected=(Message("function", "", calls=(ToolCall("f", {}),)),),
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": PROMPT, "chosen": GOOD}, "column 'rejected' is missing"),
        (
            {"conversations": PROMPT, "chosen": "good", "rejected": WORSE},
            "message 'chosen' is str 'good'. Required: an object",
        ),
        (
            {"conversations": PROMPT, "chosen": GOOD, "rejected": PROMPT[0]},
            "'rejected' is from human. Required: a response, from gpt or function_call",
        ),
        (
            {"conversations": ANSWERED, "chosen": GOOD, "rejected": WORSE},
            "the last message, 2, is a response. Required: human, gpt in turns",
        ),
        ({"conversations": [], "chosen": GOOD, "rejected": WORSE}, "the conversation is empty"),
        (
            {"conversations": PROMPT, "chosen": GOOD, "rejected": []},
            "'rejected' is empty. Required: one answer or more",
        ),
        (
            {"conversations": PROMPT, "chosen": {**GOOD, "value": " "}, "rejected": WORSE},
            "'chosen' is empty. Required: an answer",
        ),
        (
            {"conversations": PROMPT, "chosen": GOOD, "rejected": [WORSE, {**WORSE, "value": ""}]},
            "'rejected' is empty. Required: an answer",
        ),
    ],
)
def test_a_wrong_pair_is_refused(row: Any, words: str) -> None:
    with pytest.raises(RowError) as error:
        to_conversation(row, SHAREGPT, "pair")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        (RowFormat("alpaca"), {"instruction": "q", "chosen": "a", "rejected": ["b", "c"]}),
        (
            SHAREGPT,
            {
                "conversations": PROMPT,
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": [{"from": "gpt", "value": letter} for letter in "bc"],
            },
        ),
    ],
)
def test_several_rejected_are_several_pairs(layout: RowFormat, row: Any) -> None:
    pairs = to_conversation(row, layout, "pair").pairs()
    assert [pair.messages for pair in pairs] == [said(("user", "q"))] * 2
    assert [pair.chosen for pair in pairs] == [Message("assistant", "a")] * 2
    assert [pair.rejected for pair in pairs] == [(Message("assistant", letter),) for letter in "bc"]


def test_rejected_texts_must_be_texts() -> None:
    row = {"instruction": "q", "chosen": "a", "rejected": ["b", 3]}
    with pytest.raises(RowError, match=r"'rejected' is int 3\. Required: text"):
        to_conversation(row, RowFormat("alpaca"), "pair")


def test_a_judged_response_says_something() -> None:
    row = {"instruction": "q", "output": " ", "kto_tag": True}
    with pytest.raises(RowError, match=r"the last response is empty\. Required"):
        to_conversation(row, RowFormat("alpaca"), "judged")


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        (RowFormat("alpaca"), {"instruction": "q", "output": "a", "kto_tag": False}),
        (RowFormat("sharegpt", {"kto_tag": "label"}), {"conversations": ANSWERED, "label": False}),
    ],
)
def test_a_judged_row_says_whether_its_response_is_wanted(layout: RowFormat, row: Any) -> None:
    found = to_conversation(row, layout, "judged")
    assert found == Conversation(said(("user", "q"), ("assistant", "a")), is_wanted=False)
    tag = layout.column("kto_tag")
    assert tag is not None
    for wrong in ("true", 1, None):
        with pytest.raises(RowError, match=f"'{tag}' is .*Required: true for a wanted response"):
            to_conversation({**row, tag: wrong}, layout, "judged")
    with pytest.raises(RowError, match=f"column '{tag}' is missing"):
        to_conversation({k: v for k, v in row.items() if k != tag}, layout, "judged")
