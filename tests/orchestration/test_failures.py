"""Which failures of workers are retried, and how they are told."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from llmray.errors import DataError
from llmray.orchestration.failures import FailureRule, describe


class Board:
    """Takes what the rule says."""

    def __init__(self):
        self.said = []
        self.exchange = self

    def remote(self, messages):
        self.said += [message.content[1] for message in messages]


def died():
    return WorkerHealthCheckFailedError("health check failed", failure=ActorDiedError())


def lost_peer():
    return RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.2]:7")


def rule(max_failures=3):
    return FailureRule(Board(), max_failures)


def test_a_death_is_retried_and_said_with_what_is_left():
    failing = rule()
    failing.after_exception(None, {0: lost_peer(), 1: died()})
    assert failing.board.said == [
        "rank 1 died: its process or node is gone. The workers start again from the newest "
        "checkpoint; ray_max_failures allows 2 more failures"
    ]


def test_deaths_are_retried_however_often_they_look_alike():
    failing = rule(-1)
    for _ in range(5):
        failing.after_exception(None, {0: lost_peer(), 1: died()})
    assert "any number of" in failing.board.said[-1]


def test_an_error_of_the_user_ends_the_run_at_once():
    with pytest.raises(DataError, match="row 3"):
        rule().after_exception(None, {0: lost_peer(), 1: DataError("row 3 is bad")})


def test_the_same_exception_twice_ends_the_run():
    failing = rule()
    failing.after_exception(None, {0: KeyError("a")})
    failing.after_exception(None, {0: ValueError("b")})
    with pytest.raises(KeyError, match="a"):
        failing.after_exception(None, {0: KeyError("a")})


def test_the_last_failure_is_left_to_the_driver_to_tell():
    failing = rule(0)
    failing.after_exception(None, {1: died()})
    assert failing.board.said == []


def test_a_description_names_causes_not_consequences():
    said = describe({0: lost_peer(), 1: died(), 2: ValueError("bad\nsecond line")})
    assert said == ("rank 1 died: its process or node is gone; rank 2 failed: ValueError: bad")
    assert describe({0: lost_peer()}).startswith("rank 0 failed: RuntimeError: [gloo")
