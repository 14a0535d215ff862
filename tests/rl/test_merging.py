"""Requests of several callers, scored together."""

import threading
import time

import pytest

from llmray.errors import RewardError
from llmray.rl.handles import Answer
from llmray.rl.merging import Merging


def answers(*numbers, tokens=10):
    return [Answer(str(n), "p", "r", f"{n}", num_tokens=tokens) for n in numbers]


class Slow:
    """Scores by the number in the text; the first request waits until it may go on."""

    def __init__(self):
        self.seen, self.may_go_on = [], threading.Event()
        self.began = threading.Event()

    def score(self, asked):
        self.seen.append([a.id for a in asked])
        self.began.set()
        assert self.may_go_on.wait(60)
        if any(a.text == "13" for a in asked):
            raise RewardError("not thirteen")
        return [float(a.text) for a in asked]


@pytest.fixture
def slow():
    return Slow()


def scored(slow, budget, *requests):
    """What each of the requests got, the first of which is scored while the others come."""
    merging = Merging(slow, budget)
    futures = [merging.submit(requests[0])]
    assert slow.began.wait(60)
    futures += [merging.submit(asked, f"rank {len(asked)}") for asked in requests[1:]]
    slow.may_go_on.set()
    found = [future.exception(60) or future.result() for future in futures]
    merging.close()
    return found


def test_what_comes_meanwhile_is_scored_together_up_to_the_budget(slow):
    found = scored(slow, 40, answers(1), answers(2, 3), answers(4), answers(5, 6))
    assert [each.scores for each in found] == [[1.0], [2.0, 3.0], [4.0], [5.0, 6.0]]
    assert slow.seen == [["1"], ["2", "3", "4"], ["5", "6"]]
    assert [each.waiting_tokens for each in found] == [50, 0, 20, 0]
    assert found[1].busy_s == pytest.approx(2 * found[2].busy_s)


def test_without_a_budget_each_request_is_alone_whatever_came(slow):
    scored(slow, None, answers(1), answers(2, 3), answers(4))
    assert slow.seen == [["1"], ["2", "3"], ["4"]]


def test_one_request_at_fault_does_not_fail_the_others(slow):
    found = scored(slow, 100, answers(1), answers(2), answers(13), answers(4))
    assert [getattr(each, "scores", None) for each in found] == [[1.0], [2.0], None, [4.0]]
    assert str(found[2]) == "not thirteen"


def test_a_request_above_the_budget_is_scored(slow):
    found = scored(slow, 5, answers(1), answers(2, 3))
    assert found[1].scores == [2.0, 3.0]


def test_what_waits_at_the_end_is_cancelled(slow):
    merging = Merging(slow, None)
    merging.submit(answers(1))
    assert slow.began.wait(60)
    waiting = merging.submit(answers(2))
    ending = threading.Thread(target=merging.close)
    ending.start()
    while not merging._is_closed:
        pass
    slow.may_go_on.set()
    ending.join(60)
    assert waiting.cancelled()


def test_how_long_nothing_was_finished(slow):
    merging = Merging(slow, None)
    assert merging.quiet_s is None
    futures = [merging.submit(answers(1)), merging.submit(answers(13))]
    assert slow.began.wait(60)
    time.sleep(0.5)
    before = merging.quiet_s
    assert before >= 0.5
    slow.began.clear()
    slow.may_go_on.set()
    assert futures[0].result(60).scores == [1.0]
    assert futures[1].exception(60)
    end = time.monotonic() + 60
    while merging.quiet_s is not None:
        assert time.monotonic() < end
    slow.may_go_on.clear()
    merging.submit(answers(2))
    assert slow.began.wait(60)
    assert merging.quiet_s < before  # from when it got something to do
    slow.may_go_on.set()
    merging.close()
