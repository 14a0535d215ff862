"""A slot: one group of workers that Ray Train starts once and that trains trial after trial.

Its processes keep what they imported. A slot knows of no sweep: it takes a job, shows what became
of it, and ends when its group does.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from llmray.errors import ClusterError, LlmrayError
from llmray.orchestration import trial_board, worker
from llmray.orchestration.board import Job
from llmray.orchestration.failures import describe, is_lost
from llmray.orchestration.plan import Placement
from llmray.orchestration.train_job import TellsController, make_trainer
from llmray.orchestration.trial_board import Look

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

ABANDON_S = 10.0


@dataclass(frozen=True)
class Loss:
    """How a group of workers ended: in words, and whether another one may get further."""

    text: str
    error: LlmrayError | None = None  # of the user
    may_mend: bool = True

    def as_error(self) -> LlmrayError:
        """The same as an error for the user."""
        return self.error or ClusterError(
            f"Workers could not be started: {self.text}. Their logs are in "
            "/tmp/ray/session_latest/logs of their nodes. Mend the cause, and go on with "
            "resume=true."
        )


@dataclass
class Slot:
    """A group of workers, from its start to its end.

    Args:
        number: among the slots of the sweep.
        arguments: of the first trial: how workers meet.
        run_dir: where Ray Train keeps its own file.
        placement: of the workers.
        env_vars: of the workers.
    """

    number: int
    arguments: RunArguments
    run_dir: str
    placement: Placement
    env_vars: dict[str, str]
    trial: str | None = None  # its name, while the slot trains it
    is_closed: bool = False
    board: ActorHandle = field(init=False)
    _ended: threading.Event = field(init=False, default_factory=threading.Event)
    _error: BaseException | None = field(init=False, default=None)

    def start(self) -> None:
        """Start the group in a thread of its own."""
        self.board = trial_board.create()
        trainer = make_trainer(
            worker.train_trials,
            {
                "board": self.board,
                "threads": self.placement.resources.get("CPU"),
                "uses_gpu": self.placement.uses_gpu,
            },
            self.arguments,
            self.run_dir,
            self.placement,
            self.env_vars,
            max_failures=0,  # the sweep counts them, by trial
            callbacks=[TellsController(self.board)],
        )

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # told by `loss`
                self._error = error
            finally:
                self._ended.set()

        threading.Thread(target=fit, name=f"llmray-slot-{self.number}", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether the group is gone."""
        return self._ended.is_set()

    def look(self) -> Look:
        """What happened since the last look."""
        found: Look = ray.get(self.board.look.remote())
        return found

    def give(self, name: str, job: Job, attempts: int) -> None:
        """Let it train a trial that has had so many attempts."""
        self.trial = name
        ray.get(self.board.give_trial.remote(job, attempts))

    def judge(self, reason: str | None) -> None:
        """Answer a report of its trial: with a reason it ends at the next step border."""
        ray.get(self.board.judge.remote(reason))

    def stop(self, reason: str) -> None:
        """Ask its trial to end at the next step border."""
        ray.get(self.board.request_stop.remote(reason))

    def close(self) -> None:
        """Let its workers end when they are idle."""
        self.is_closed = True
        ray.get(self.board.close.remote())

    def end(self) -> None:
        """End the group at once, as far as it has begun."""
        controller = ray.get(self.board.controller.remote())
        if controller is not None and not self.has_ended:
            ray.kill(controller)
            self._ended.wait(ABANDON_S)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the group's end; whether it came."""
        return self._ended.wait(timeout_s)

    def loss(self, look: Look) -> Loss:
        """Why the group ended though it was not closed."""
        for _, failure in look.failures:
            return Loss(str(failure), failure, may_mend=False)
        error = self._error
        if isinstance(error, ControllerError):
            error = error.controller_failure
        if isinstance(error, RayTaskError) and isinstance(error.cause, LlmrayError):
            return Loss(str(error.cause), error.cause, may_mend=False)
        if isinstance(error, WorkerGroupError):
            failures = error.worker_failures
            return Loss(describe(failures), may_mend=any(is_lost(e) for e in failures.values()))
        if isinstance(error, RayActorError):
            if error.actor_init_failed:
                return Loss(_last_line(error), may_mend=False)
            return Loss("the process that leads its workers, or its node, is gone")
        if isinstance(error, RayError):
            return Loss(f"{type(error).__name__}: {error}".strip().splitlines()[0])
        return Loss(f"{type(error).__name__}: {error}" if error else "its workers ended")


def _last_line(error: BaseException) -> str:
    """Where Ray puts what was raised elsewhere, below the traceback."""
    return str(error).strip().splitlines()[-1]
