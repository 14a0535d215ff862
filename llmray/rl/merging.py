"""Requests of several callers scored together, up to a budget of tokens; one thread does it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Thread

from llmray.rl.handles import Answer, Scores


@dataclass(frozen=True)
class Merged:
    """The scores of a request, and what they took.

    Attributes:
        scores: in the order of its answers.
        busy_s: this request's share, by tokens, of the seconds in which it was scored.
        waiting_tokens: of all requests of other callers that wait now.
    """

    scores: list[float]
    busy_s: float
    waiting_tokens: int


@dataclass
class _Request:
    answers: Sequence[Answer]
    caller: str
    future: Future[Merged]
    tokens: int


class Merging:
    """Scores requests in the order of their arrival, several at a time where they fit.

    Args:
        served: what scores.
        budget: most tokens that are scored at one time; one request at least is. None scores each
            request by itself, so that nothing depends on what else came.
    """

    def __init__(self, served: Scores, budget: int | None) -> None:
        self._served = served
        self._budget = budget
        self._waiting: deque[_Request] = deque()
        self._changed = Condition()
        self._is_closed = False
        self._is_at_work = False
        self._since = time.monotonic()  # it finished something, or got something to do
        self._thread = Thread(target=self._work, name="merging", daemon=True)
        self._thread.start()

    def submit(self, answers: Sequence[Answer], caller: str = "") -> Future[Merged]:
        """Ask for scores; the future fails as what scores does."""
        tokens = sum(answer.num_tokens for answer in answers)
        request = _Request(answers, caller, Future(), tokens)
        with self._changed:
            if not self._waiting and not self._is_at_work:
                self._since = time.monotonic()
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    @property
    def quiet_s(self) -> float | None:
        """Seconds since it finished something, or got something to do; None where it has nothing.

        It hangs where they are many, however long a request has waited for its turn.
        """
        with self._changed:
            has_work = bool(self._waiting) or self._is_at_work
            return time.monotonic() - self._since if has_work else None

    def close(self) -> None:
        """End the thread; what still waits is cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        for request in self._waiting:
            request.future.cancel()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                together = self._take()
                self._is_at_work = True
            self._score(together)
            with self._changed:
                self._is_at_work = False

    def _take(self) -> list[_Request]:
        together = [self._waiting.popleft()]
        tokens = together[0].tokens
        while self._waiting and self._budget is not None:
            tokens += self._waiting[0].tokens
            if tokens > self._budget:
                break
            together.append(self._waiting.popleft())
        return together

    def _score(self, together: list[_Request]) -> None:
        started = time.perf_counter()
        try:
            scores = self._served.score([a for request in together for a in request.answers])
        except Exception as error:  # a boundary: whoever asked is told
            if len(together) == 1:
                together[0].future.set_exception(error)
                return
            for request in together:  # it is one's fault, not that of all
                self._score([request])
            return
        finally:
            self._since = time.monotonic()
        seconds = time.perf_counter() - started
        tokens = max(1, sum(request.tokens for request in together))
        with self._changed:
            waiting = list(self._waiting)
        start = 0
        for request in together:
            found = scores[start : start + len(request.answers)]
            start += len(request.answers)
            busy = seconds * request.tokens / tokens
            others = sum(each.tokens for each in waiting if each.caller != request.caller)
            request.future.set_result(Merged(found, busy, others))
