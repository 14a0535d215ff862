"""A reward model as an actor, and a worker's handle of it.

Ranks ask actors directly. What an actor needs it asks the board for, so that no secret passes
through Ray's tables; Ray starts a dead one anew, and then it asks again.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from llmray import downloads, hub
from llmray.errors import LlmrayError, RewardError
from llmray.orchestration.board import Message
from llmray.orchestration.roles import Member
from llmray.rl.handles import Answer, Handle, HandleLost
from llmray.rl.merging import Merged, Merging
from llmray.rl.pool import Reason
from llmray.rl.rewards import kind_of, names_of

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

SHOWN_WITHIN_S = 5.0  # to ask an actor where it is


@dataclass(frozen=True)
class Pong:
    """What an actor says of itself: where it is, which of its lives this is, and if it gets on.

    `quiet_s` is that of `Merging`.
    """

    node_id: str
    address: str
    pid: int
    quiet_s: float | None = None


@dataclass(frozen=True)
class Scored:
    """Scores, and what they took; of which life of the actor."""

    merged: Merged
    pid: int


class RewardActor:
    """A reward model that answers ranks.

    Args:
        board: the name of the board, whose job names the model's files and what may read them.
        of: the key of the reward model there.
        name: as it is in reward_model.
        threads: of torch, None to leave it alone.
        uses_gpu: whether it has one.
    """

    def __init__(self, board: str, of: str, name: str, threads: int | None, uses_gpu: bool) -> None:
        self._board, self._of, self._name = board, of, name
        self._threads, self._uses_gpu = threads, uses_gpu
        self._merging: Merging | None = None
        self._failure: LlmrayError | None = None
        self._load()

    async def score(self, answers: Sequence[Answer], caller: str) -> Scored:
        """The scores of answers.

        Raises:
            LlmrayError: there is none, or the model could not be loaded.
        """
        asked = self._loaded().submit(answers, caller)
        return Scored(await asyncio.wrap_future(asked), os.getpid())

    async def ping(self) -> Pong:
        """Answer, if the model is there; after a restart it may not have come at once.

        Raises:
            LlmrayError: the model cannot be loaded.
        """
        if self._merging is None:
            self._load()
        quiet_s = self._loaded().quiet_s
        node_id = ray.get_runtime_context().get_node_id()
        return Pong(node_id, ray.util.get_node_ip_address(), os.getpid(), quiet_s)

    def _loaded(self) -> Merging:
        if self._merging is None:
            assert self._failure is not None, "loading succeeds or fails"
            raise self._failure
        return self._merging

    def _load(self) -> None:
        import torch

        from llmray import reinforcement  # heavy, and the driver imports this module

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        job = ray.get(ray.get_actor(self._board).job_of.remote(self._of))
        os.environ.update(job.secrets)
        arguments: RunArguments = job.arguments
        try:
            with downloads.as_fetched():  # the node was made ready before
                model_dir = policy_files(arguments)
                served = reinforcement.reward_model(
                    self._name, arguments, model_dir, use_cpu=not self._uses_gpu
                )
        except LlmrayError as error:  # an error in a constructor would lose its type
            self._failure = error
            return
        rlhf = arguments.rlhf
        is_fixed = rlhf.reward_batching == "fixed"
        self._merging = Merging(served, None if is_fixed else rlhf.reward_batch_tokens)


def policy_files(arguments: RunArguments) -> Path:
    """The folder of the policy's model; with its weights where the reward model is an adapter."""
    is_base = arguments.rlhf.reward_model_type == "lora"
    return hub.resolve(arguments.model.model_name_or_path, arguments.model, weights=is_base)


@dataclass(frozen=True)
class Seat:
    """An actor of a reward model, as workers get it."""

    name: str  # as it is in reward_model
    number: int  # of those of this model, from 0
    actor: ActorHandle
    resources: dict[str, float]
    pong: Pong  # at the start of the run
    of: str = ""  # the key of its reward model among those of the driver
    apart: str = ""  # what tells that from another one of the same name

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.name}{self.apart}[{self.number}]"


class ActorReward:
    """A worker's handle of an actor; a `Handle`.

    Args:
        seat: the actor.
        board: is told when it hangs.
    """

    def __init__(self, seat: Seat, board: ActorHandle) -> None:
        self.name = seat.title
        self.load = 0
        self.busy_s: float | None = 0.0
        self._actor, self._board = seat.actor, board
        self._pid = seat.pong.pid
        self._hung_pid: int | None = None
        self._caller = uuid.uuid4().hex

    def call(self, method: str, *args: Any) -> Future[Any]:
        """See `Handle`."""
        told: Future[Any] = Future()
        more = (self._caller,) if method == "score" else ()
        asked = getattr(self._actor, method).remote(*args, *more).future()
        asked.add_done_callback(partial(self._pass_on, told))
        return told

    def report_hung(self) -> None:
        """Have the driver kill it; only another life of it is then let back in."""
        self._hung_pid = self._pid
        self._board.exchange.remote([Message("hung", (self.name, self._pid))])

    def _pass_on(self, told: Future[Any], asked: Future[Any]) -> None:
        if not told.set_running_or_notify_cancel():
            return
        error = asked.exception()
        if error is not None:
            told.set_exception(as_ours(self.name, error))
            return
        found = asked.result()
        if isinstance(found, Scored):
            self.load, self._pid = found.merged.waiting_tokens, found.pid
            self.busy_s = (self.busy_s or 0.0) + found.merged.busy_s
            told.set_result(found.merged.scores)
        elif found.pid == self._hung_pid:
            told.set_exception(HandleLost(f"{self.name} still hangs"))
        else:
            if found.pid != self._pid:
                self._pid, self.load = found.pid, 0
            told.set_result(found.quiet_s)


def as_ours(name: str, error: BaseException) -> BaseException:
    """A failure of a call as the pool tells them apart."""
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, LlmrayError):
            return cause
        return RewardError(f"{name} raised {type(cause).__name__}: {cause}")
    if isinstance(error, RayError):
        first_line = (str(error).strip().splitlines() or [""])[0]
        return HandleLost(f"{type(error).__name__}: {first_line}")
    return error


def on_evict(handle: Handle, reason: Reason) -> None:
    """What a worker's pool does with an actor that it took out: a hung one is to be killed."""
    if reason == "hung" and isinstance(handle, ActorReward):
        handle.report_hung()


def members(arguments: RunArguments, seats: Sequence[Seat]) -> list[Member]:
    """The rewards of a run as rows of a table, with where actors are now.

    An actor that does not answer at once is shown where it was first.
    """
    names = arguments.rlhf.reward_models
    titles, seated = dict(zip(names, names_of(names), strict=True)), {seat.name for seat in seats}
    found = []
    for name in names:
        if name not in seated:
            what = {"api": "server"}.get(kind_of(name), kind_of(name))
            found.append(Member(f"reward {titles[name]} ({what})", name))
    for seat in seats:
        pong = seat.pong
        with suppress(RayError, LlmrayError):
            pong = ray.get(seat.actor.ping.remote(), timeout=SHOWN_WITHIN_S)
        role = f"reward {titles[seat.name]} (model)"
        at = (pong.address, pong.node_id, pong.pid)
        found.append(Member(role, f"actor {seat.number}", *at, seat.resources))
    return found


def handles(seats: Sequence[Seat], board: ActorHandle) -> dict[str, list[Handle]]:
    """A worker's handles of the actors, by the names in reward_model."""
    found: dict[str, list[Handle]] = {}
    for seat in seats:
        found.setdefault(seat.name, []).append(ActorReward(seat, board))
    return found
