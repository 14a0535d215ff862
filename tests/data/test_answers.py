"""Pairs and judged answers as rows; a token a letter, prompts as [...]: and answers as ...;"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from letters import ENCODER, dialogue, shown

from llmray.arguments.data import DataArguments
from llmray.data import templates, tokenizer
from llmray.data.answers import judged, pairwise
from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.encoding import Encoder
from llmray.data.features import FeatureOptions, RowFeatures
from llmray.data.row_features import Equal
from llmray.data.templates import Turn
from llmray.data.truncation import Dropped, budgets


@dataclass(frozen=True)
class Framed:
    def turns(self, conversation: Conversation) -> list[Turn]:
        pairs = zip(conversation.messages[::2], conversation.messages[1::2], strict=True)
        if any(message.content == "refused" for message in conversation.messages):
            raise RowError("no")
        return [Turn(f"[{one.content}]:", f"{other.content};") for one, other in pairs]

    def prompt(
        self, messages: Sequence[Message], system: str | None = None, tools: str | None = None
    ) -> str:
        raise RowError("not asked for")


def pair(*prompt: str, chosen: str, rejected: str) -> Conversation:
    answers = [Message("assistant", text) for text in (chosen, rejected)]
    return replace(dialogue(*prompt), chosen=answers[0], rejected=(answers[1],))


def pair_row(conversation: Conversation, cutoff_len: int = 100, **options: Any) -> Any:
    [row] = pairwise([conversation], ENCODER, Framed(), FeatureOptions(cutoff_len, **options))
    return row


def test_a_pair_is_a_prompt_and_two_answers() -> None:
    row = pair_row(pair("ab", chosen="CDE", rejected="F"))
    assert shown(row) == ("[ab]:CDE;F;", ".....CDE;F;")
    assert row.starts == (5, 9)
    assert not row.is_truncated


def test_earlier_responses_are_prompt() -> None:
    row = pair_row(pair("a", "B", "c", chosen="D", rejected="E"))
    assert shown(row) == ("[a]:B;[c]:D;E;", "..........D;E;")


def test_pairs_come_in_their_places() -> None:
    whole = [
        pair("a", chosen="B", rejected="C"),
        pair("refused", chosen="B", rejected="C"),
        pair("d", chosen="E", rejected="F"),
    ]
    rows = pairwise(whole, ENCODER, Framed(), FeatureOptions(50))
    assert shown(rows[0])[0] == "[a]:B;C;"
    assert isinstance(rows[1], RowError)
    assert shown(rows[2])[0] == "[d]:E;F;"


def test_equal_answers_are_no_pair() -> None:
    assert pair_row(pair("a", chosen="BC", rejected="BC")) == Equal()
    # of BCD; and BCE; two tokens stay: B and the end
    assert pair_row(pair("a", chosen="BCD", rejected="BCE"), 6) == Equal()


def test_what_formats_write_before_one_answer_alone_is_no_target() -> None:
    class Thinking(Framed):
        def turns(self, conversation: Conversation) -> list[Turn]:
            [turn] = super().turns(conversation)
            silent = "()" if "T" not in turn.target else ""
            return [Turn(turn.source + silent, turn.target)]

    both = [pair("a", chosen="TB", rejected="C")]
    [row] = pairwise(both, ENCODER, Thinking(), FeatureOptions(50))
    assert shown(row) == ("[a]:TB;()C;", "....TB;..C;")
    assert isinstance(row, RowFeatures)
    assert row.starts == (4, 7)


@pytest.mark.parametrize(
    ("cutoff_len", "expected", "starts"),
    [
        (14, ("[abcdefgh]:ST;U;", "...........ST;U;"), (11, 14)),
        # 11 and 3 in 10: the answer is below half and stays whole, the prompt gets 7
        (10, ("[abcd]:ST;U;", ".......ST;U;"), (7, 10)),
        # 11 and 3 in 5: int(5 * 3 / 14) = 1, but an answer keeps a token and its end
        (5, ("[]:S;U;", "...S;U;"), (3, 5)),
    ],
)
def test_structure_stays_in_both_answers(cutoff_len: int, expected: Any, starts: Any) -> None:
    row = pair_row(pair("abcdefgh", chosen="ST", rejected="U"), cutoff_len)
    assert (shown(row), row.starts) == (expected, starts)


def test_answers_get_equal_room_and_a_shorter_one_stays_whole() -> None:
    """Of 7 + 13 in 12: int(12 * 13 / 20) = 7, so 5 of the prompt; the answers keep 6 and ;"""
    row = pair_row(pair("abcd", chosen="ABCDEFGHIJKL", rejected="abcdefgh"), 12)
    assert shown(row)[0] == "[ab]:ABCDEF;abcdef;"
    row = pair_row(pair("abcd", chosen="ABCDEFGHIJKL", rejected="abc"), 12)
    assert shown(row)[0] == "[ab]:ABCDEF;abc;"
    assert row.cuts == (3, 2, 11, 6)


def test_the_longer_answer_decides_whichever_it_is() -> None:
    one = pair_row(pair("abcd", chosen="ABCDEFGHIJKL", rejected="xyz"), 12)
    other = pair_row(pair("abcd", chosen="xyz", rejected="ABCDEFGHIJKL"), 12)
    assert shown(one)[0] == "[ab]:ABCDEF;xyz;"
    assert shown(other)[0] == "[ab]:xyz;ABCDEF;"


def test_old_turns_leave_first() -> None:
    row = pair_row(pair("a", "B", "c", chosen="DEF", rejected="G"), 9)
    assert shown(row) == ("[c]:DEF;G;", "....DEF;G;")


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        ("keep_start", ("[abcd]:SU", ".......SU")),
        ("keep_end", ("cd]:STV;U;", "....STV;U;")),
        ("error", "the row has 11 tokens"),
        ("drop", Dropped(11)),
    ],
)
def test_other_truncations(truncation: Any, expected: Any) -> None:
    row = pair_row(pair("abcd", chosen="STV", rejected="U"), 8, truncation=truncation)
    if isinstance(expected, str):
        assert isinstance(row, RowError)
        assert expected in str(row)
    else:
        assert row == expected if isinstance(row, Dropped) else shown(row) == expected


def test_without_a_prompt_the_first_tokens_are_no_targets() -> None:
    """keep_end in 3: of STVW; and UXYZ; the last three; nothing stands before them."""
    row = pair_row(pair("a", chosen="STVW", rejected="UXYZ"), 3, truncation="keep_end")
    assert shown(row) == ("VW;YZ;", ".W;.Z;")
    assert row.starts == (0, 3)


def test_nothing_that_fits_is_a_row_without_targets() -> None:
    row = pair_row(pair("abcd", chosen="ST", rejected="U"), 4)
    assert row.targets == ()
    assert len(row.input_ids) == 1
    # int(4 * 3 / 10) = 1 of the answers, S and U
    row = pair_row(pair("abcd", chosen="ST", rejected="U"), 4, truncation="llamafactory")
    assert shown(row) == ("[abSU", "...SU")


END = ord("!")


def test_an_end_that_is_not_in_the_text_belongs_to_each_answer() -> None:
    row = pair_row(pair("ab", chosen="CDE", rejected="F"), end_token=END)
    assert shown(row) == ("[ab]:CDE;!F;!", ".....CDE;!F;!")
    row = pair_row(pair("ab", chosen="CDEFGH", rejected="F"), 8, end_token=END)
    # 5 and 8 in 8: int(8 * 8 / 13) = 4 of the answer: two letters and the ends
    assert shown(row) == ("[a]:CD;!F;!", "....CD;!F;!")


def test_llamafactory_truncation_is_its_rule_token_by_token() -> None:
    """Its rule: budgets of the prompt and the longer answer; heads of the prompt and of both."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        lengths = draw.integers(1, 40, 3).tolist()
        cutoff_len = int(draw.integers(2, 60))
        words = ["".join(draw.choice(list("abcdefgh"), n)) for n in lengths]
        row = pair_row(
            pair(words[0], chosen="x" + words[1], rejected="y" + words[2]),
            cutoff_len,
            truncation="llamafactory",
        )
        prompt, chosen, rejected = f"[{words[0]}]:", f"x{words[1]};", f"y{words[2]};"
        longer = max(len(chosen), len(rejected))
        kept = len(prompt), longer
        if len(prompt) + longer > cutoff_len:
            kept = budgets(len(prompt), longer, cutoff_len)
        expected = prompt[: kept[0]] + chosen[: kept[1]] + rejected[: kept[1]]
        assert "".join(map(chr, row.input_ids)) == expected
        assert row.starts == (kept[0], kept[0] + len(chosen[: kept[1]]))


def test_judged_answers_are_rows_of_one() -> None:
    conversations = [
        replace(dialogue("a", "B", "cd", "EF"), is_wanted=True),
        replace(dialogue("g", "H"), is_wanted=False),
    ]
    rows: list[Any] = judged(conversations, ENCODER, Framed(), FeatureOptions(12))
    assert [shown(row) for row in rows] == [("[cd]:EF;", ".....EF;"), ("[g]:H;", "....H;")]
    assert [(row.starts, row.is_wanted) for row in rows] == [((5,), True), ((4,), False)]


def test_with_a_real_tokenizer_each_answer_is_the_conversation_s_own_tokens(
    tiny_llama_dir: Path,
) -> None:
    from transformers import AutoTokenizer

    tiny = AutoTokenizer.from_pretrained(str(tiny_llama_dir))
    data = DataArguments(mask_history=True)
    renderer = templates.for_tokenizer(templates.find("chatml"), tiny, data)
    encoder = Encoder(tokenizer.tokenizer_json(tiny))
    conversation = pair("What is it?", "The sea.", "And?", chosen=" The wind.", rejected="No!")
    [row] = pairwise([conversation], encoder, renderer, FeatureOptions(500))
    assert isinstance(row, RowFeatures)
    first, second = row.starts
    for answer, kept in (
        (" The wind.", row.input_ids[:second]),
        ("No!", np.concatenate([row.input_ids[:first], row.input_ids[second:]])),
    ):
        said = [*conversation.messages, Message("assistant", answer)]
        chat = [{"role": message.role, "content": message.content} for message in said]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
        whole = tiny(text, add_special_tokens=False)["input_ids"]
        assert kept.tolist() == whole[: len(kept)]
        assert tiny.decode(whole[len(kept) :]).strip() == ""
    assert row.num_targets == len(row.input_ids) - first
