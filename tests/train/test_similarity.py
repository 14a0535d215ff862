"""Scores against arithmetic worked by hand."""

import math

import pytest

from llmray.train.similarity import similarity, words


def test_the_same_text_is_a_hundred_percent():
    text = "The sea is wide and blue."
    assert similarity([text], [text]) == pytest.approx(
        {"bleu-4": 100, "rouge-1": 100, "rouge-2": 100, "rouge-l": 100, "exact_match": 100}
    )


def test_nothing_in_common_is_nothing():
    found = similarity(["abcdef"], ["uvwxyz"])
    assert found["rouge-1"] == found["rouge-l"] == found["exact_match"] == 0
    assert found["bleu-4"] < 5


def test_rouge_by_hand():
    """the cat sat / the cat lay down: 2 of 3 and 2 of 4 words, F = 2 * 2/3 * 1/2 / (7/6) = 4/7.

    One pair of neighbours is shared, of 2 and of 3: F = 2 * 1/2 * 1/3 / (5/6) = 2/5. The longest
    common subsequence is `the cat`: F as of words.
    """
    found = similarity(["the cat sat"], ["the cat lay down"])
    assert found["rouge-1"] == pytest.approx(400 / 7, abs=1e-3)
    assert found["rouge-2"] == pytest.approx(40, abs=1e-3)
    assert found["rouge-l"] == pytest.approx(400 / 7, abs=1e-3)


def test_bleu_by_hand():
    """abcde against abcdf: 4/5 letters, 3/4, 2/3, 1/2 of two, three, four; of equal length."""
    expected = 100 * math.exp(sum(map(math.log, (4 / 5, 3 / 4, 2 / 3, 1 / 2))) / 4)
    assert similarity(["abcde"], ["abcdf"])["bleu-4"] == pytest.approx(expected, abs=1e-3)


def test_scores_are_means_over_rows_and_blanks_around_do_not_count():
    found = similarity(["same\n", "other"], ["same", "one"])
    assert found["exact_match"] == 50
    assert found["rouge-1"] == 50


def test_an_empty_response_scores_nothing():
    found = similarity(["", "  "], ["text", ""])
    assert found["exact_match"] == 50  # nothing was to be said, and nothing was
    assert found["rouge-l"] == found["bleu-4"] == 0
    assert set(similarity([], []).values()) == {0.0}


def test_chinese_is_cut_into_words():
    assert words("我来到北京清华大学, hello world") == [
        "我",
        "来到",
        "北京",
        "清华大学",
        ",",
        "hello",
        "world",
    ]
    found = similarity(["我爱北京"], ["我爱上海"])  # 我 爱 北京 / 我 爱 上海: 2 of 3
    assert found["rouge-1"] == pytest.approx(200 / 3, abs=1e-3)
    assert found["rouge-2"] == pytest.approx(50, abs=1e-3)
