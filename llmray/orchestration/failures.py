"""What to do when workers fail: retry what a new group can mend, end what would fail again.

Lives in Ray Train's controller, and so imports little.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import UserCallback

from llmray.errors import LlmrayError
from llmray.orchestration.board import Message

# how a rank fails whose peer is gone: torch.distributed's errors, and gloo's plain RuntimeError
LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)", re.IGNORECASE)
LOST_PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")


class FailureRule(UserCallback):
    """Says what failed; raises, which Ray Train does not retry, where every attempt would fail.

    That is an error of the user (`LlmrayError`), or the same exception a second time while no
    process died.
    """

    def __init__(self, board: ActorHandle, max_failures: int) -> None:
        self.board = board
        self.max_failures = max_failures
        self.count = 0
        self.seen: set[tuple[str, str]] = set()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train when ranks have failed, before it decides on a retry."""
        self.count += 1
        if not self.worth_retrying(worker_exceptions):
            raise min(worker_exceptions.values(), key=_severity)
        left = self.max_failures - self.count
        if self.max_failures >= 0 and left < 0:
            return  # Ray Train ends the run, and the driver says why
        what = describe(worker_exceptions)
        allowed = "any number of" if self.max_failures < 0 else left
        text = (
            f"{what}. The workers start again from the newest checkpoint; ray_max_failures allows "
            f"{allowed} more failures"
        )
        self.board.exchange.remote([Message("log", (logging.WARNING, text))])

    def worth_retrying(self, failures: dict[int, Exception]) -> bool:
        """Whether a new group of workers may get further than this one."""
        if any(isinstance(error, LlmrayError) for error in failures.values()):
            return False
        if any(is_lost(error) for error in failures.values()):
            return True
        kinds = {(type(error).__name__, str(error)) for error in failures.values()}
        is_new = not self.seen & kinds
        self.seen |= kinds
        return is_new


def _severity(error: Exception) -> int:
    return 0 if isinstance(error, LlmrayError) else 2 if is_lost(error) else 1


def is_dead(error: Exception) -> bool:
    """Whether a rank's process is gone."""
    cause = getattr(error, "health_check_failure", error)  # ray 2.60 wraps the death of an actor
    return isinstance(cause, RayError)


def is_lost(error: Exception) -> bool:
    """Whether a rank's process is gone, or it failed because another one's is."""
    lost_peer = type(error).__name__ in LOST_PEER_TYPES or LOST_PEER.search(str(error))
    return is_dead(error) or lost_peer is not None


def describe(failures: Mapping[int, Exception]) -> str:
    """What happened to the ranks, in a few words; those that only lost a peer are left out."""
    causes = {rank: e for rank, e in failures.items() if is_dead(e) or not is_lost(e)} or failures
    said = []
    for rank, error in sorted(causes.items()):
        lines = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {lines[0] if lines else ''}"
        gone = "died: its process or node is gone"
        said.append(f"rank {rank} {gone if is_dead(error) else 'failed: ' + text}")
    return "; ".join(said)
