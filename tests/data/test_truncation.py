import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from letters import ENCODER, build, dialogue, shown

from llmray.arguments.data import DataArguments
from llmray.data import templates, tokenizer
from llmray.data.chat_template import ChatTemplateRenderer
from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.encoding import Encoder
from llmray.data.features import FeatureOptions, RowFeatures, supervised, texts
from llmray.data.templates import Renderer, Turn
from llmray.data.truncation import Dropped, outline


@dataclass(frozen=True)
class Framed:
    """Prompts as (S)[...]: and responses as ...; with a token a letter."""

    def turns(self, conversation: Conversation) -> list[Turn]:
        before = f"({conversation.system})" if conversation.system else ""
        turns = []
        for prompt, response in zip(
            conversation.messages[::2], conversation.messages[1::2], strict=True
        ):
            if response.role == "function":
                target = f"<{response.content.upper()}>;"
            else:
                target = f"{response.content};"
            turns.append(Turn(f"{before}[{prompt.content}]:", target))
            before = ""
        return turns

    def prompt(
        self, messages: Sequence[Message], system: str | None = None, tools: str | None = None
    ) -> str:
        raise RowError("not asked for")


def cut(conversation: Conversation, cutoff_len: int, **options: Any) -> Any:
    made = FeatureOptions(cutoff_len, **options)
    [row] = supervised([conversation], ENCODER, Framed(), made)
    return row


@pytest.mark.parametrize(
    ("cutoff_len", "expected"),
    [
        (17, ("[abcdefgh]:STUVW;", "...........STUVW;")),
        # budgets for 11 and 6 in 16: the target is below half and stays, the prompt gets 10
        (16, ("[abcdefg]:STUVW;", "..........STUVW;")),
        # 11 and 6 in 10: the target gets int(10 * 6 / 17) = 3, so the prompt 7
        (10, ("[abcd]:ST;", ".......ST;")),
        # the least that says anything: structure and one token of the response
        (5, ("[]:S;", "...S;")),
        (4, ("[", ".")),
    ],
)
def test_structure_stays_and_content_is_cut(cutoff_len: int, expected: tuple[str, str]) -> None:
    row = cut(dialogue("abcdefgh", "STUVW"), cutoff_len)
    assert shown(row) == expected
    assert row.is_truncated == (cutoff_len < 17)


def test_llamafactory_cuts_the_end_of_the_prompt_and_of_the_response() -> None:
    row = cut(dialogue("abcdefgh", "STUVW"), 10, truncation="llamafactory")
    assert shown(row) == ("[abcdefSTU", ".......STU")


def test_the_longest_content_of_a_prompt_is_cut_first() -> None:
    """Of 20: target 3 is below half, the prompt gets 17: 5 of structure, 12 of the contents."""
    conversation = Conversation(
        (Message("user", "abc"), Message("assistant", "ST")), system="s" * 30
    )
    assert shown(cut(conversation, 20))[0] == f"({'s' * 9})[abc]:ST;"
    # of 12 the prompt gets 9: 4 for two contents, 2 each
    assert shown(cut(conversation, 12))[0] == "(ss)[ab]:ST;"


def test_turns_without_room_for_their_structure_leave_whole() -> None:
    conversation = dialogue("ab", "ST", "cd", "UV", "ef", "WX")
    assert shown(cut(conversation, 14)) == ("[ab]:ST;[c]:U;", ".....ST;....U;")
    assert shown(cut(conversation, 12)) == ("[ab]:ST;", ".....ST;")
    last = cut(conversation, 12, mask_history=True)
    assert shown(last) == ("[ef]:WX;", ".....WX;")


def test_train_on_prompt_learns_what_stays_of_prompts() -> None:
    row = cut(dialogue("abcdefgh", "STUVW"), 10, train_on_prompt=True)
    assert shown(row) == ("[abcd]:ST;", ".abcd]:ST;")


def test_calls_of_tools_stay_whole_or_leave() -> None:
    roles: list[Any] = ["user", "function", "observation", "assistant"]
    words = ["abcdef", "call", "klmnopqr", "DONE"]
    pairs = zip(roles, words, strict=True)
    conversation = Conversation(tuple(Message(role, word) for role, word in pairs))
    # 16 and 10: of the room for the second turn the target gets int(10 * 5 / 16) = 3
    assert shown(cut(conversation, 26))[0] == "[abcdef]:<CALL>;[klmn]:DO;"
    assert shown(cut(conversation, 11))[0] == "[a]:<CALL>;"
    assert shown(cut(conversation, 9)) == ("[", ".")


def test_a_format_that_changes_content_keeps_what_is_alike_at_both_ends() -> None:
    class Shouting(Framed):
        def turns(self, conversation: Conversation) -> list[Turn]:
            turns = super().turns(conversation)
            return [Turn(turn.source.upper().replace("A", "aa"), turn.target) for turn in turns]

    conversation = dialogue("abc", "ST")
    turns = Shouting().turns(conversation)
    [found] = outline(Shouting(), conversation, turns)
    assert found == (["[", "aaBC", "]:"], ["", "ST", ";"])


def test_a_format_that_refuses_marks_has_content_alone() -> None:
    class Strict(Framed):
        def turns(self, conversation: Conversation) -> list[Turn]:
            if not conversation.messages[0].content.isascii():
                raise RowError("no")
            return super().turns(conversation)

    conversation = dialogue("abc", "ST")
    [found] = outline(Strict(), conversation, Strict().turns(conversation))
    assert found == (["", "[abc]:", ""], ["", "ST;", ""])


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        ("keep_start", ("[abcd]:S", ".......S")),
        ("keep_end", ("bcd]:ST;", ".....ST;")),
    ],
)
def test_one_end_of_the_row_stays(truncation: Any, expected: tuple[str, str]) -> None:
    row = cut(dialogue("abcd", "ST"), 8, truncation=truncation)
    assert shown(row) == expected
    assert row.is_truncated


def test_keep_start_with_mask_history_learns_no_other_response_than_the_last() -> None:
    conversation = dialogue("a", "S", "b", "T")
    row = cut(conversation, 6, truncation="keep_start", mask_history=True)
    assert shown(row) == ("[a]:S;", "......")
    row = cut(conversation, 7, truncation="keep_end", mask_history=True)
    assert shown(row) == (";[b]:T;", ".....T;")


def test_rows_over_the_limit_are_refused_or_dropped() -> None:
    conversation = dialogue("abcd", "ST")
    assert cut(conversation, 9, truncation="drop") == Dropped(10)
    error = cut(conversation, 9, truncation="error")
    assert isinstance(error, RowError)
    assert "the row has 10 tokens. Required: at most cutoff_len=9" in str(error)
    for truncation in ("drop", "error"):
        row = cut(conversation, 10, truncation=truncation)
        assert shown(row)[0] == "[abcd]:ST;"


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        ("structure", "^ab"),
        ("llamafactory", "^ab"),
        ("keep_start", "^ab"),
        ("keep_end", "cd$"),
        ("drop", Dropped(6)),
    ],
)
def test_texts_are_cut_at_an_end(truncation: Any, expected: Any) -> None:
    options = FeatureOptions(3, truncation, text_prefix=(ord("^"),), text_suffix=(ord("$"),))
    [row] = texts([dialogue("abcd")], ENCODER, None, options)
    assert row == expected if isinstance(row, Dropped) else shown(row)[0] == expected
    refusing = FeatureOptions(3, "error", text_suffix=(ord("$"),))
    [error] = texts([dialogue("abcd")], ENCODER, None, refusing)
    assert isinstance(error, RowError)


# --- with a real tokenizer ---------------------------------------------------------------------


def renderers(tiny: Any) -> dict[str, Renderer]:
    return {
        "chatml": templates.for_tokenizer(templates.find("chatml"), tiny, DataArguments()),
        "default": templates.for_tokenizer(templates.find("default"), tiny, DataArguments()),
        "own": ChatTemplateRenderer(tiny.chat_template, tiny.special_tokens_map, None),
    }


@pytest.mark.parametrize("name", ["chatml", "default", "own"])
def test_every_cut_row_is_a_row_of_shorter_messages(name: str, tiny_llama_dir: Path) -> None:
    """Whatever the cutoff: the text is what the format writes of heads of the messages."""
    from transformers import AutoTokenizer

    tiny = AutoTokenizer.from_pretrained(str(tiny_llama_dir))
    renderer = renderers(tiny)[name]
    encoder = Encoder(tokenizer.tokenizer_json(tiny))
    words = ["What is the sea? ", "The capital. Eat!", "A poem about Paris?", "No. Sleep well."]
    conversation = Conversation(dialogue(*(word * 3 for word in words)).messages, "You are short.")
    [whole] = supervised([conversation], encoder, renderer, FeatureOptions(10_000))
    assert isinstance(whole, RowFeatures)
    pattern = re.compile(
        "".join(
            re.escape(text) if number % 2 == 0 else "(.*)"
            for turn in outline(renderer, conversation, renderer.turns(conversation))
            for number, text in [*enumerate(turn.source), *enumerate(turn.target)]
        ),
        re.DOTALL,
    )
    assert pattern.fullmatch(tiny.decode(whole.input_ids))
    contents = [conversation.system, *(message.content for message in conversation.messages)]
    num_whole = 0
    for cutoff_len in range(len(whole.input_ids) - 1, 60, -3):
        [row] = supervised([conversation], encoder, renderer, FeatureOptions(cutoff_len))
        assert isinstance(row, RowFeatures)
        assert len(row.input_ids) <= cutoff_len
        found = pattern.fullmatch(tiny.decode(row.input_ids))
        if found is None:
            continue  # the second turn did not fit
        num_whole += 1
        for part, content in zip(found.groups(), contents, strict=True):
            assert content is not None
            assert content.startswith(part)
        learned = np.zeros(len(row.input_ids), bool)
        for start, stop in zip(row.targets[::2], row.targets[1::2], strict=True):
            learned[start:stop] = True
        responses = [
            turn.target.replace(content, part) if content else ""
            for turn, content, part in zip(
                renderer.turns(conversation), contents[2::2], found.groups()[2::2], strict=True
            )
        ]
        assert tiny.decode(row.input_ids[learned]) == "".join(responses)
    assert num_whole > 5


def test_a_row_within_the_limit_is_the_same_whatever_the_truncation() -> None:
    rows = [
        build(dialogue("ab", "CD", "e", "FG"), 7, truncation=truncation)
        for truncation in (
            "structure",
            "llamafactory",
            "error",
            "drop",
            "keep_start",
            "keep_end",
        )
    ]
    assert {shown(row) for row in rows} == {("abCDeFG", "..CD.FG")}
