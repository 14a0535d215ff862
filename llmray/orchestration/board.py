"""The board: a small actor of the driver, through which it and the workers speak.

The driver gives it the job and asks for a stop; rank 0 brings log lines and progress and learns of
the stop in the same call; any rank leaves its error. It outlives the workers, and so counts the
attempts. Secrets pass through its calls, in memory, and through nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from llmray.errors import LlmrayError
from llmray.train.observers import Observer, Record

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

EXCHANGE_EVERY_S = 0.5


@dataclass(frozen=True)
class Job:
    """What a worker needs; never printed, for it holds secrets."""

    arguments: RunArguments = field(repr=False)
    run_dir: str
    prepared: Any = field(repr=False)  # data.prepared.PreparedRef
    threads: float | None  # cores of a worker; None where its resources do not say
    uses_gpu: bool
    secrets: dict[str, str] = field(repr=False)
    core: Callable[..., Any] | None = field(repr=False)  # None: run.run
    log_level: int = logging.INFO
    holds: dict[str, float] = field(default_factory=dict)  # the resources of a worker
    folder: str = ""  # the driver's: where it was started
    seats: tuple[Any, ...] = field(default=(), repr=False)  # reward_actor.Seat
    metric: str | None = None  # of a sweep: the driver judges every record that has it
    group: str | None = None  # of a sweep: what its trials are called together in trackers
    num_trials: int = 1  # that may share what is computed of their data


@dataclass(frozen=True)
class Message:
    """One thing that the driver is told: a log line, a call of an observer, an actor that hangs."""

    kind: Literal["log", "start", "record", "save", "end", "hung"]
    content: tuple[Any, ...]


class Board:
    """The actor; every method returns at once."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._jobs_of: dict[str, Job] = {}
        self._stop: str | None = None
        self._messages: list[Message] = []
        self._failures: list[tuple[int, LlmrayError]] = []
        self._attempts = 0
        self._stopped: str | None = None
        self._controller: ActorHandle | None = None

    def give(self, job: Job) -> None:
        """Keep the job for the workers."""
        self._job = job

    def job(self) -> Job | None:
        """The job."""
        return self._job

    def give_to(self, whose: str, job: Job) -> None:
        """Keep the job for the actors of a reward model."""
        self._jobs_of[whose] = job

    def job_of(self, whose: str) -> Job:
        """What `give_to` was given."""
        return self._jobs_of[whose]

    def keep_controller(self, controller: ActorHandle) -> None:
        """Keep Ray Train's controller, so that the driver can end it."""
        self._controller = controller

    def controller(self) -> ActorHandle | None:
        """Ray Train's controller, None until it runs."""
        return self._controller

    def begin_attempt(self) -> int:
        """Count an attempt of the worker group; returns its number, from 1."""
        self._attempts += 1
        return self._attempts

    def request_stop(self, reason: str) -> None:
        """Ask the workers to stop at a step border."""
        self._stop = self._stop or reason

    def exchange(self, messages: list[Message]) -> Any:
        """Take rank 0's messages; returns why it shall stop, or None."""
        self._messages += messages
        return self._stop

    def collect(self) -> list[Message]:
        """The messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def finish(self, stopped: str | None) -> None:
        """Keep why the run ended before its last step, None if it did not."""
        self._stopped = stopped

    def outcome(self) -> str | None:
        """What `finish` was told."""
        return self._stopped

    def fail(self, rank: int, error: LlmrayError) -> None:
        """Keep the error that ended a rank."""
        self._failures.append((rank, error))

    def failures(self) -> list[tuple[int, LlmrayError]]:
        """The errors that ended ranks, the first one first."""
        return self._failures


def create(name: str | None = None) -> ActorHandle:
    """A board that lives as long as the driver, on the driver's node.

    Actors that Ray may start anew find it by its name among those of the driver.
    """
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0, max_concurrency=1, label_selector={"ray.io/node-id": here})(
        Board
    )
    return actor.options(name=name).remote()


class Relay(Observer):
    """Rank 0's end of the board: sends in the background, so that no step waits for it."""

    def __init__(self, board: ActorHandle, log_level: int) -> None:
        self._board = board
        self._queue: list[Message] = []
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._is_ended = False
        self._wakes = threading.Event()
        self._handler = _QueueHandler(self._put)
        self._handler.setLevel(log_level)
        logger = logging.getLogger("llmray")
        logger.handlers[:] = [self._handler]
        logger.setLevel(log_level)
        logger.propagate = False
        self._thread = threading.Thread(target=self._run, name="llmray-relay", daemon=True)
        self._thread.start()

    def reason(self) -> str | None:
        """Why the run shall stop, as of the last exchange; a `stop` of the loop."""
        return self._reason

    def on_start(self, step: int, total_steps: int) -> None:
        """Tell where the attempt starts."""
        self._put(Message("start", (step, total_steps)))

    def on_log(self, record: Record) -> None:
        """Tell a logged step."""
        self._put(Message("record", (record,)))

    def on_save(self, step: int, path: str) -> None:
        """Tell of a checkpoint."""
        self._put(Message("save", (step, path)))

    def on_end(self, metrics: Record) -> None:
        """Tell the end."""
        self._put(Message("end", (metrics,)))

    def close(self) -> None:
        """Send what is left and end the background thread."""
        self._is_ended = True
        self.wake()
        self._thread.join(timeout=10)
        logging.getLogger("llmray").removeHandler(self._handler)

    def _put(self, message: Message) -> None:
        with self._lock:
            self._queue.append(message)

    def wake(self) -> None:
        """Exchange without waiting for the next turn."""
        self._wakes.set()

    def take(self, answer: Any) -> None:
        """What the board answered to an exchange."""
        self._reason = answer

    def pause_s(self) -> float:
        """How long to wait before the next exchange."""
        return EXCHANGE_EVERY_S

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._wakes.wait(self.pause_s())
            self._wakes.clear()
            is_last = self._is_ended
            with self._lock:
                messages, self._queue = self._queue, []
            with suppress(RayError):  # the driver is gone: Ray ends this worker too
                self.take(ray.get(self._board.exchange.remote(messages)))


class _QueueHandler(logging.Handler):
    def __init__(self, put: Callable[[Message], None]) -> None:
        super().__init__()
        self._put = put

    def emit(self, record: logging.LogRecord) -> None:
        self._put(Message("log", (record.levelno, record.getMessage())))


def replay(message: Message, observer: Observer) -> None:
    """Do in the driver what rank 0 told: log the line, or call the observer."""
    if message.kind == "log":
        level, text = message.content
        logging.getLogger("llmray").log(level, "%s", text)
        return
    hooks: dict[str, Callable[..., None]] = {
        "start": observer.on_start,
        "record": observer.on_log,
        "save": observer.on_save,
        "end": observer.on_end,
    }
    hooks[message.kind](*message.content)
