"""Handles: how the loop calls a role without knowing where it lives, and the one for this process.

A role that moves to a machine of its own changes its handle, not the loop.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar

from llmray.data.conversation import Conversation
from llmray.errors import RewardError

T = TypeVar("T")


class HandleLost(RewardError):
    """The one behind a handle is gone or does not serve; others may take over what it was asked."""


class PoolScores(list[float]):
    """Scores in the order of the answers; `given` are the places of those that are `error_value`.

    At these nothing was scored: each attempt failed.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        super().__init__(scores)
        self.given: set[int] = set()


class HandleAway(HandleLost):
    """The one behind a handle does not serve for now, whatever it is asked; it is waited for."""


class Handle(Protocol):
    """One that can be called from afar.

    Attributes:
        name: for messages.
        load: tokens of other callers that waited there at its last answer.
        busy_s: seconds in which it has served this caller; None where it does not say so.

    What scores has the methods `score(answers) -> list[float]` and `ping() -> float | None`, the
    seconds since it last finished something, of whatever caller; None where it has nothing to do,
    and where it does not say. A future fails with `HandleLost` where another handle may be tried,
    though what was asked may have been the cause; with `HandleAway` where it was not; with anything
    else where the request is at fault.
    """

    name: str
    load: int
    busy_s: float | None

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start `method`; the future has its result."""
        ...


@dataclass(frozen=True)
class Answer:
    """A response to be scored, as text; picklable.

    `id` names it across retries: which rollout, which row, which sample. `prompt` and `response`
    are as people read them; `text` is both together as the policy read and wrote them, in its
    template with its special tokens. `label` is the response of the data set, for rewards that
    verify. `conversation` is the prompt's with the response as its last message, for those who
    read other words than the policy; None where the prompt was no conversation.
    """

    id: str
    prompt: str
    response: str
    text: str
    label: str = ""
    num_tokens: int = 1
    conversation: Conversation | None = None


class Scores(Protocol):
    """What gives rewards: one float an answer."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards, in order."""
        ...


class Desk:
    """Where calls lie that the thread which waits for them makes itself.

    For work that uses all cores by itself. A second thread that computes makes OpenMP's (libgomp's)
    threads more than there are cores, after which they sleep between any two operations: of a
    small model's training this took a third (torch 2.13, two cores).
    """

    def __init__(self) -> None:
        self._calls: _Calls = SimpleQueue()

    def wait(self, future: Future[T]) -> T:
        """The result of `future`, making calls until it is there; its error where it fails."""
        future.add_done_callback(lambda done: self._calls.put(None))
        while not future.done():
            _serve(self._calls)
        return future.result()


class InProcess:
    """A handle of an object in this process; its methods run in threads of their own.

    A call that never returns does not keep the process from ending.

    Args:
        name: for messages.
        served: what has the methods.
        num_threads: how many calls run at one time.
        desk: takes the calls in place of threads.
    """

    def __init__(
        self, name: str, served: Any, num_threads: int = 1, desk: Desk | None = None
    ) -> None:
        self.name = name
        self.load = 0
        self.busy_s: float | None = None if desk is None else 0.0
        self._served = served
        self._calls: _Calls = SimpleQueue() if desk is None else desk._calls
        num_threads = num_threads if desk is None else 0
        for _ in range(num_threads):
            Thread(target=_serve, args=(self._calls,), name=f"handle-{name}", daemon=True).start()
        self._end = weakref.finalize(self, _end, self._calls, num_threads)

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start a method of the object; `ping` is answered where it has none."""
        future: Future[Any] = Future()
        called = getattr(self._served, method, None)
        if called is None and method != "ping":
            raise AttributeError(f"{self.name} has no method {method}")
        if self.busy_s is not None:
            called = self._timed(called or (lambda: None))
        self._calls.put((future, called or (lambda: None), args))
        return future

    def _timed(self, called: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return called(*args)
            finally:
                self.busy_s = (self.busy_s or 0.0) + time.perf_counter() - began

        return timed

    def close(self) -> None:
        """Let the running calls end, and start no more."""
        self._end()


_Calls = SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]


def _serve(calls: _Calls) -> None:
    """Make calls one after the other until there is a None."""
    while (asked := calls.get()) is not None:
        future, called, args = asked
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(called(*args))
            except BaseException as error:  # a boundary: it is the caller's
                future.set_exception(error)
        del asked, future, called, args  # nothing is kept while waiting


def _end(calls: _Calls, num_threads: int) -> None:
    """Cancel what waits, and end the threads."""
    with suppress(Empty):
        while (asked := calls.get_nowait()) is not None:
            asked[0].cancel()
    for _ in range(num_threads):
        calls.put(None)
