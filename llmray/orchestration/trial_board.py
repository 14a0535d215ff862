"""The board of a slot: as a run's board, for one trial after another, with a word on each report.

The driver gives a trial, rank 0 asks for it and says when it is over; both count trials, so that
neither takes an answer for one to an earlier question.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from llmray.errors import LlmrayError
from llmray.model.mapped import Load
from llmray.orchestration.board import Board, Job, Message, Relay
from llmray.train.observers import Record

POLL_S = 0.05
CLOSED = -1  # the offer after which workers end


@dataclass(frozen=True)
class Look:
    """What the driver sees at one look; the messages are those since the last."""

    messages: list[Message]
    is_idle: bool  # the workers wait for a trial, and have told all of the one before
    stopped: str | None  # why the last one ended before its last step
    failures: list[tuple[int, LlmrayError]] = field(repr=False)
    attempts: int  # of the trial, those before this slot counted
    busy_s: float  # from the first to the last line of all trials here
    idle_s: float  # between trials, while there was another
    loads: list[tuple[str, Load]]  # of base weights by all ranks, with the node's address
    asked_after_s: float | None  # from the board's beginning until workers asked for a trial


class TrialBoard(Board):
    """The actor; every method returns at once."""

    def __init__(self) -> None:
        super().__init__()
        self._born = time.monotonic()
        self._number = self._over = 0  # trials given, and trials over
        self._is_idle = self._is_closed = False
        self._judged = 0
        self._began: float | None = None
        self._busy_s = self._idle_s = 0.0
        self._idle_since: float | None = None
        self._loads: list[tuple[str, Load]] = []
        self._asked_after_s: float | None = None

    def give_trial(self, job: Job, attempts: int) -> None:
        """Give the next trial, which has had so many attempts before."""
        self._job, self._attempts = job, attempts
        self._number += 1
        self._judged = 0
        self._stop = self._stopped = None
        self._failures = []
        self._is_idle = False

    def close(self) -> None:
        """Let the workers end when they next ask."""
        self._is_closed = True

    def offer(self) -> int:
        """For rank 0: the number of the trial to train, 0 where none is there yet, or `CLOSED`."""
        if self._number > self._over:
            self._began = time.monotonic()
            if self._idle_since is not None:
                self._idle_s += self._began - self._idle_since
                self._idle_since = None
            return self._number
        self._is_idle = True
        if self._asked_after_s is None:
            self._asked_after_s = time.monotonic() - self._born
        return CLOSED if self._is_closed else 0

    def is_over(self, number: int) -> None:
        """Rank 0 has told all of a trial, whether it ended well or not."""
        self._over, self._idle_since = number, time.monotonic()
        if self._began is not None:
            self._busy_s += time.monotonic() - self._began

    def count_loads(self, address: str, loads: list[Load]) -> None:
        """Keep what a rank on that node loaded."""
        self._loads += [(address, load) for load in loads]

    def exchange(self, messages: list[Message]) -> tuple[str | None, int]:
        """Take rank 0's messages; returns why it shall stop, and how many reports were judged."""
        self._messages += messages
        return self._stop, self._judged

    def judge(self, reason: str | None) -> None:
        """The driver has looked at one more report; with a reason the trial ends."""
        self._judged += 1
        self._stop = self._stop or reason

    def look(self) -> Look:
        """What there is to see."""
        return Look(
            messages=self.collect(),
            is_idle=self._is_idle,
            stopped=self._stopped,
            failures=self._failures,
            attempts=self._attempts,
            busy_s=self._busy_s,
            idle_s=self._idle_s,
            loads=self._loads,
            asked_after_s=self._asked_after_s,
        )


def create() -> ActorHandle:
    """A board that lives as long as the driver, on the driver's node."""
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0, max_concurrency=1, label_selector={"ray.io/node-id": here})(
        TrialBoard
    )
    return actor.remote()


class TrialRelay(Relay):
    """Rank 0's end: at the step border after a report it waits until the driver has judged it."""

    def __init__(self, board: ActorHandle, log_level: int, metric: str) -> None:
        self._metric = metric
        self._reported = self._judged = 0
        super().__init__(board, log_level)

    def on_log(self, record: Record) -> None:
        """Tell a logged step, one with the metric at once."""
        if self._metric in record:
            self._reported += 1
        super().on_log(record)
        if self._metric in record:
            self.wake()

    def reason(self) -> str | None:
        """Why the trial shall stop, as the driver said after the last report."""
        while self._judged < self._reported and self._reason is None:
            time.sleep(POLL_S / 5)
        return self._reason

    def take(self, answer: Any) -> None:
        """What the board answered to an exchange."""
        self._reason, self._judged = answer

    def pause_s(self) -> float:
        """How long to wait before the next exchange."""
        return POLL_S if self._judged < self._reported else super().pause_s()


def wait_for_offer(board: ActorHandle) -> int:
    """The number of the next trial for rank 0, or `CLOSED`."""
    while not (number := ray.get(board.offer.remote())):
        time.sleep(POLL_S)
    return int(number)
