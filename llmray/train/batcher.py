"""Micro-batches across callers: the texts of many requests in common forward passes.

While one forward pass runs, what is asked for is collected; nothing waits for a full batch.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from logging import getLogger
from threading import Condition, Thread

from llmray.errors import RewardError
from llmray.train.score import Ids

log = getLogger("llmray")

LONGEST_WAIT_S = 0.01  # for callers that have just been answered and will ask again
SHARE_WAITED = 0.05  # of the time of a forward pass


class Busy(RewardError):
    """More texts are waiting than a `Batcher` takes."""


@dataclass
class _Job:
    """The sequences of one caller: `taken` are under way or done, `left` have no score yet."""

    sequences: Sequence[Ids]
    future: Future[list[float]]
    scores: list[float]
    left: int
    taken: int = 0


class Batcher:
    """A queue of sequences with a thread that scores them.

    Callers take turns, one sequence each, so that a long request does not hold up short ones.

    Args:
        run: the scores of sequences, in their order.
        max_tokens: of the sequences given to `run` at once.
        max_waiting: sequences that may wait.
    """

    def __init__(
        self, run: Callable[[list[Ids]], list[float]], *, max_tokens: int, max_waiting: int = 4096
    ) -> None:
        self.num_waiting = 0
        self.num_batches = 0
        self._run = run
        self._max_tokens = max_tokens
        self._max_waiting = max_waiting
        self._jobs: deque[_Job] = deque()
        self._changed = Condition()
        self._is_closed = False
        self._last_size = 0
        self._thread = Thread(target=self._work, name="score", daemon=True)
        self._thread.start()

    def submit(self, sequences: Sequence[Ids]) -> Future[list[float]]:
        """The scores of sequences, in their order, as soon as all are known.

        Raises:
            Busy: too many are waiting.
            RewardError: the batcher is closed.
        """
        future: Future[list[float]] = Future()
        if not sequences:
            future.set_result([])
            return future
        with self._changed:
            if self._is_closed:
                raise RewardError("scoring has ended. Start the server anew.")
            if self.num_waiting + len(sequences) > self._max_waiting:
                raise Busy(
                    f"{self.num_waiting} texts are waiting, and at most {self._max_waiting} may. "
                    "Send fewer at once, or try again later."
                )
            self.num_waiting += len(sequences)
            blank = [math.nan] * len(sequences)
            self._jobs.append(_Job(sequences, future, blank, len(sequences)))
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """End the thread; what still waits is cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        for job in self._jobs:
            job.future.cancel()

    def _work(self) -> None:
        last_seconds = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if self._last_size > 1:
                    wait = min(LONGEST_WAIT_S, SHARE_WAITED * last_seconds)
                    self._changed.wait_for(self._is_like_last, wait)
                if self._is_closed:
                    return
                batch = self._take()
            started = time.perf_counter()
            if batch:
                self._score(batch)
            self._last_size, last_seconds = len(batch), time.perf_counter() - started

    def _is_like_last(self) -> bool:
        """Whether as many wait as were answered last, or nothing more is to be waited for."""
        return self.num_waiting >= self._last_size or self._is_closed

    def _take(self) -> list[tuple[_Job, int]]:
        """The next sequences, as many as fit; of those who have gone none."""
        batch: list[tuple[_Job, int]] = []
        room = self._max_tokens
        while self._jobs:
            job = self._jobs.popleft()
            if job.future.done():  # cancelled, or failed with another batch
                self.num_waiting -= len(job.sequences) - job.taken
                continue
            length = len(job.sequences[job.taken])
            if batch and length > room:
                self._jobs.appendleft(job)
                break
            batch.append((job, job.taken))
            room -= length
            job.taken += 1
            self.num_waiting -= 1
            if job.taken < len(job.sequences):
                self._jobs.append(job)
        return batch

    def _score(self, batch: list[tuple[_Job, int]]) -> None:
        self.num_batches += 1
        try:
            scores = self._run([job.sequences[number] for job, number in batch])
        except Exception as error:  # whoever asked is told; the thread goes on for others
            log.error("scoring failed: %s: %s", type(error).__name__, error)
            for job, _ in batch:
                if _is_open(job.future):
                    job.future.set_exception(error)
            return
        for (job, number), score in zip(batch, scores, strict=True):
            job.scores[number] = score
            job.left -= 1
            if not job.left and _is_open(job.future):
                job.future.set_result(job.scores)


def _is_open(future: Future[list[float]]) -> bool:
    """Whether somebody still waits for it: it was neither cancelled nor answered."""
    return not future.done() and future.set_running_or_notify_cancel()
