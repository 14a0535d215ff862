from typing import Any

import pytest

from llmray.data.conversation import Conversation, Message, RowError, RowFormat, to_conversation

SHAREGPT = RowFormat("sharegpt")


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
    assert to_conversation({"text": "a"}, layout, needs_response=False).messages == said(
        ("user", "a")
    )


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


def test_tools_calls_and_results_keep_their_roles() -> None:
    turns = [("human", "q"), ("function_call", "{}"), ("observation", "o"), ("gpt", "a")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "t": "[1]"}
    found = to_conversation(row, RowFormat("sharegpt", {"tools": "t"}))
    assert [m.role for m in found.messages] == ["user", "function", "observation", "assistant"]
    assert found.tools == "[1]"


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
        to_conversation(row, SHAREGPT, needs_response=False)
