"""A worker's handle of an actor, without Ray: a fake actor answers as one does."""

from concurrent.futures import Future

import pytest

from llmray.orchestration.reward_actor import ActorReward, Pong, Scored, Seat
from llmray.rl.handles import HandleLost
from llmray.rl.merging import Merged


class Told:
    """What `remote` of a method gives."""

    def __init__(self, found):
        self.found = found

    def remote(self, *args):
        return self

    def future(self):
        future = Future()
        future.set_result(self.found)
        return future


class Actor:
    exchange = Told(None)

    def __init__(self):
        self.score = Told(Scored(Merged([1.0], 0.5, 70), 11))
        self.ping = Told(Pong("node", "address", 11, 2.5))


@pytest.fixture
def actor():
    return Actor()


@pytest.fixture
def handle(actor):
    seat = Seat("rm", 0, actor, {}, Pong("node", "address", 11))
    return ActorReward(seat, actor)


def test_a_ping_says_how_long_nothing_was_finished_and_leaves_the_load_alone(handle):
    assert handle.call("score", []).result(60) == [1.0]
    assert handle.load == 70
    assert handle.call("ping").result(60) == 2.5
    assert handle.load == 70


def test_another_life_has_no_load(handle, actor):
    handle.call("score", []).result(60)
    actor.ping = Told(Pong("node", "address", 12))
    assert handle.call("ping").result(60) is None
    assert handle.load == 0


def test_one_that_was_told_to_hang_is_only_back_in_another_life(handle, actor):
    handle.report_hung()
    with pytest.raises(HandleLost, match="still hangs"):
        handle.call("ping").result(60)
    actor.ping = Told(Pong("node", "address", 12, None))
    assert handle.call("ping").result(60) is None
