from collections.abc import Sequence
from typing import Any, cast

import pytest
from letters import ENCODER, Letters, build, dialogue, shown

from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.features import FeatureOptions, RowFeatures, openings, prompts, supervised, texts
from llmray.data.templates import Turn
from llmray.data.truncation import Dropped, budgets


def test_responses_are_targets() -> None:
    row = build(dialogue("ab", "CD", "e", "FG"))
    assert shown(row) == ("abCDeFG", "..CD.FG")
    assert row.targets == (2, 4, 5, 7)
    assert not row.is_truncated


def test_train_on_prompt_learns_all_but_the_first_token() -> None:
    row = build(dialogue("ab", "CD", "e", "FG"), train_on_prompt=True)
    assert shown(row) == ("abCDeFG", ".bCDeFG")
    assert row.targets == (1, 7)


def test_mask_history_learns_the_last_response_alone() -> None:
    row = build(dialogue("ab", "CD", "e", "FG", "h", "IJ"), mask_history=True)
    assert shown(row) == ("abCDeFGhIJ", "........IJ")


def test_the_first_token_is_no_target_even_of_a_response() -> None:
    assert shown(build(dialogue("", "CD"))) == ("CD", ".D")


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        # target 3 is below half of 10: kept whole, the source gets the other 7
        ((20, 3, 10), (7, 3)),
        # source 4 is below half of 10: kept whole, the target gets the other 6
        ((4, 20, 10), (4, 6)),
        # neither: the target gets int(10 * 12 / 20) = 6
        ((8, 12, 10), (4, 6)),
        # half is not below half: int(10 * 5 / 25) = 2 of the target
        ((20, 5, 10), (8, 2)),
        ((5, 20, 10), (2, 8)),
        # int(3 * 2 / 9) = 0: no target is left
        ((7, 2, 3), (3, 0)),
        ((1, 1, 10), (1, 1)),
    ],
)
def test_budgets_by_worked_examples(lengths: tuple[int, int, int], kept: tuple[int, int]) -> None:
    assert budgets(*lengths) == kept


def test_a_long_row_is_cut_turn_by_turn_from_the_first() -> None:
    """Room 10: turn 1 needs 3 + 3, all kept; 4 remain: the target (1) is below half, source 3."""
    conversation = dialogue("abc", "DEF", "ghijk", "L", "m", "N")
    row = build(conversation, cutoff_len=10, truncation="llamafactory")
    assert row.is_truncated
    assert shown(row) == ("abcDEFghiL", "...DEF...L")
    assert row.cuts == (9, 2, 10, 2)  # jk before L, mN at the end


def test_with_mask_history_the_last_turn_gets_its_room_first() -> None:
    """Room 10: the last turn needs 1 + 1, the second 5 + 1; 2 remain for abc and DEF: 1 and 1."""
    conversation = dialogue("abc", "DEF", "ghijk", "L", "m", "N")
    row = build(conversation, cutoff_len=10, truncation="llamafactory", mask_history=True)
    assert shown(row) == ("aDghijkLmN", ".........N")


def test_turns_that_do_not_fit_leave_the_row() -> None:
    """Room 4: int(4 * 3 / 6) = 2 of DEF; the room is used up, so the rest is not there."""
    row = build(dialogue("abc", "DEF", "g", "H"), cutoff_len=4, truncation="llamafactory")
    assert shown(row) == ("abDE", "..DE")


@pytest.mark.parametrize("length", [49, 98, 107])
def test_a_row_of_exactly_the_cutoff_is_not_cut(length: int) -> None:
    """Though int(49 * (1 / 49)) is 0 in floating point."""
    row = build(dialogue("a" * (length - 1), "B"), length, truncation="llamafactory")
    assert not row.is_truncated
    assert row.num_targets == 1


def test_a_row_without_a_target_says_so() -> None:
    row = build(dialogue("abcdefg", "HI"), cutoff_len=3, truncation="llamafactory")
    assert shown(row) == ("abc", "...")
    assert row.targets == ()


def prompted(*words: str, cutoff_len: int = 100) -> RowFeatures:
    [row] = prompts([dialogue(*words)], ENCODER, Letters(), FeatureOptions(cutoff_len))
    assert isinstance(row, RowFeatures)
    return row


def test_a_prompt_is_all_before_the_last_response() -> None:
    row = prompted("ab", "CD", "e", "FG")
    assert shown(row) == ("abCDehFG", "......FG")
    assert row.cuts == ()


def test_a_long_prompt_keeps_its_end_and_a_long_response_its_head() -> None:
    """Room 6: 8 tokens of prompt and 2 of response, which is kept whole: 4 are left of the prompt.

    Room 4: 3 and 6, neither below half: int(4 * 6 / 9) = 2 of the response, 2 of the prompt.
    """
    row = prompted("abcdefg", "HI", cutoff_len=6)
    assert shown(row) == ("efghHI", "....HI")
    assert row.cuts == (0, 4)
    row = prompted("ab", "CDEFGH", cutoff_len=4)
    assert shown(row) == ("bhCD", "..CD")
    assert row.cuts == (0, 1, 4, 4)


@pytest.mark.parametrize(
    ("truncation", "expected", "cuts"),
    [
        ("structure", "efgh", (0, 4)),
        ("keep_end", "efgh", (0, 4)),
        ("llamafactory", "abcd", (4, 4)),
        ("keep_start", "abcd", (4, 4)),
    ],
)
def test_openings_are_prompts_without_targets(
    truncation: Any, expected: str, cuts: tuple[int, ...]
) -> None:
    """Of abcdefg, with h as the header of a response, 4 tokens."""
    conversations = [dialogue("ab"), dialogue("abcdefg")]
    rows: list[Any] = openings(conversations, ENCODER, Letters(), FeatureOptions(4, truncation))
    assert [shown(row)[0] for row in rows] == ["abh", expected]
    assert [(row.targets, row.is_prompt, row.cuts) for row in rows] == [
        ((), True, ()),
        ((), True, cuts),
    ]
    dropping = FeatureOptions(4, "drop")
    assert openings(conversations, ENCODER, Letters(), dropping)[1] == Dropped(8)
    [error] = openings(conversations[1:], ENCODER, Letters(), FeatureOptions(4, "error"))
    assert isinstance(error, RowError)


def test_prompts_that_cannot_be_written_are_errors_in_their_places() -> None:
    class Refusing(Letters):
        def prompt(
            self, messages: Sequence[Message], system: str | None = None, tools: str | None = None
        ) -> str:
            if messages[0].content == "bad":
                raise RowError("no")
            return super().prompt(messages, system, tools)

    rows = prompts(
        [dialogue("a", "B"), dialogue("bad", "B"), dialogue("c", "D")],
        ENCODER,
        Refusing(),
        FeatureOptions(100),
    )
    assert shown(rows[0]) == ("ahB", "..B")
    assert isinstance(rows[1], RowError)
    assert shown(rows[2]) == ("chD", "..D")


def test_a_row_that_cannot_be_written_is_an_error_in_its_place() -> None:
    class Refusing(Letters):
        def turns(self, conversation: Conversation) -> list[Turn]:
            if conversation.messages[0].content == "bad":
                raise RowError("no")
            return super().turns(conversation)

    rows = supervised(
        [dialogue("a", "B"), dialogue("bad", "B"), dialogue("c", "D")],
        ENCODER,
        Refusing(),
        FeatureOptions(10),
    )
    assert [type(row) for row in rows] == [RowFeatures, RowError, RowFeatures]
    assert shown(rows[2]) == ("cD", ".D")


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        # blocks are laid over whole texts later
        (True, [("^abcdef$", ".abcdef$"), ("^a$", ".a$")]),
        (False, [("^abc", ".abc"), ("^a$", ".a$")]),
    ],
)
def test_texts_have_their_ends_and_are_cut_only_where_they_stand_alone(
    packing: bool, expected: list[tuple[str, str]]
) -> None:
    options = FeatureOptions(4, packing=packing, text_prefix=(ord("^"),), text_suffix=(ord("$"),))
    rows = texts([dialogue("abcdef"), dialogue("a")], ENCODER, None, options)
    assert [shown(row) for row in rows] == expected
    assert [cast("RowFeatures", row).is_truncated for row in rows] == [not packing, False]


def test_a_blank_text_is_empty() -> None:
    [row] = texts([dialogue(" \n")], ENCODER, None, FeatureOptions(4, text_suffix=(1,)))
    assert isinstance(row, RowFeatures)
    assert len(row.input_ids) == 0


# --- responses whose end stands nowhere in the text ---------------------------------------------

END = ord("!")


def test_an_end_that_is_not_in_the_text_is_learned_where_the_next_prompt_begins() -> None:
    """Of abCDeFG!, the places 2 to 7 are learned; at 4, where e stands, the end is."""
    row = build(dialogue("ab", "CD", "e", "FG"), end_token=END)
    assert shown(row) == ("abCDeFG!", "..CDeFG!")
    assert row.instead == (4, END)


def test_masked_history_learns_no_end_of_an_earlier_response() -> None:
    row = build(dialogue("ab", "CD", "e", "FG", "h", "I"), end_token=END, mask_history=True)
    assert shown(row) == ("abCDeFGhI!", "........I!")
    assert row.instead == ()


def test_a_cut_row_has_room_for_its_end() -> None:
    row = build(dialogue("abc", "DEF", "ghijk", "L", "m", "N"), cutoff_len=11, end_token=END)
    assert row.is_truncated
    assert shown(row) == ("abcDEFghiL!", "...DEFg..L!")
    assert row.instead == (6, END)
    assert not build(dialogue("abc", "DEF"), cutoff_len=7, end_token=END).is_truncated


def test_a_response_that_was_cut_away_has_no_end() -> None:
    """Room 3 - 1 for 7 and 2: int(2 * 2 / 9) = 0 of the target."""
    row = build(dialogue("abcdefg", "HI"), cutoff_len=3, end_token=END, truncation="llamafactory")
    assert row.targets == ()
