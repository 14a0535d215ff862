"""What scores a response: one source or the weighted sum of several, each by a pool of its own.

Text in, one float an answer out, whatever stands behind: reward models, servers, functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

from llmray.arguments.rlhf import RewardKind, kind_of, names_of
from llmray.rl.handles import Answer, Desk, Handle, InProcess, PoolScores
from llmray.rl.pool import Pool, PoolCounts, PoolOptions, Reason
from llmray.rl.reward_api import ApiOptions, RewardApi
from llmray.rl.reward_function import FunctionReward


@dataclass(frozen=True)
class Scored:
    """The rewards of some answers: their sum, NaN where masked, and each source's by its name.

    `given` are the places where a source had no score and `reward_error_value` stands for it.
    """

    scores: list[float]
    parts: dict[str, list[float]]
    given: frozenset[int] = frozenset()


class Rewards(Protocol):
    """What the step of ppo asks for scores; `names` are those of the parts."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources that are added."""
        ...

    def submit(self, answers: Sequence[Answer]) -> Future[Scored]:
        """Start scoring; the future has the scores, or a `RewardError`."""
        ...

    def wait(self, future: Future[Scored]) -> Scored:
        """What `submit` gave, when it is there; raises its `RewardError`."""
        ...

    def counts(self) -> PoolCounts:
        """What has happened so far."""
        ...

    @property
    def num_served(self) -> float:
        """How many score for this rank: its own, and its part of those that all ranks ask."""
        ...


@dataclass(frozen=True)
class Elsewhere:
    """What of the rewards is outside the process that asks.

    Attributes:
        handles: of reward models, by their names in reward_model.
        on_evict: told of one that a pool took out; see `Pool`.
        folder: where modules of functions are looked for.
    """

    handles: Mapping[str, Sequence[Handle]]
    on_evict: Callable[[Handle, Reason], None]
    folder: Path


@dataclass(frozen=True)
class Source:
    """One of the rewards that are added: its name in metrics, its weight, and who scores.

    `num_ranks` is how many ask those of its pool, 1 where each rank has its own.
    """

    name: str
    weight: float
    pool: Pool
    num_ranks: int = 1


class WeightedRewards:
    """The weighted sum of the scores of several sources.

    Args:
        sources: at least one; names differ.
        desk: of those handles that score while their scores are waited for.
    """

    def __init__(self, sources: Sequence[Source], desk: Desk | None = None) -> None:
        self._sources = tuple(sources)
        self._desk = desk

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources that are added."""
        return tuple(source.name for source in self._sources)

    def submit(self, answers: Sequence[Answer]) -> Future[Scored]:
        """Start scoring with all sources; the first failure of one is that of the sum."""
        asked = [source.pool.submit(answers) for source in self._sources]
        whole: Future[Scored] = Future()
        lock = Lock()  # pools answer from threads of their own; the last one sums

        def collect(done: Future[PoolScores]) -> None:
            error = done.exception()
            with lock:
                if whole.done():
                    return
                if error is not None:
                    whole.set_exception(error)
                elif all(future.done() for future in asked):
                    whole.set_result(self._sum([future.result() for future in asked]))

        for future in asked:
            future.add_done_callback(collect)
        return whole

    def wait(self, future: Future[Scored]) -> Scored:
        """What `submit` gave, when it is there; raises its `RewardError`."""
        return future.result() if self._desk is None else self._desk.wait(future)

    def counts(self) -> PoolCounts:
        """Of all sources together."""
        counts = [source.pool.counts for source in self._sources]
        names = PoolCounts.__dataclass_fields__
        return PoolCounts(**{name: sum(getattr(c, name) for c in counts) for name in names})

    @property
    def num_served(self) -> float:
        """How many score for this rank: its own, and its part of those that all ranks ask."""
        return sum(source.pool.num_handles / source.num_ranks for source in self._sources)

    def close(self) -> None:
        """End the pools."""
        for source in self._sources:
            source.pool.close()

    def _sum(self, scores: list[PoolScores]) -> Scored:
        weights = [source.weight for source in self._sources]
        pairs = zip(*scores, strict=True)
        total = [math.fsum(w * s for w, s in zip(weights, each, strict=True)) for each in pairs]
        parts = zip(self._sources, scores, strict=True)
        given = frozenset().union(*(each.given for each in scores))
        return Scored(total, {source.name: list(found) for source, found in parts}, given)


def handle_of(reward_model: str, *, folder: Path, api: ApiOptions, num_requests: int = 8) -> Handle:
    """The handle of a server or of a function.

    Args:
        reward_model: an address or `module:function`.
        folder: where modules of functions are looked for.
        api: how a server is asked.
        num_requests: to a server at one time; a function runs once at a time.

    Raises:
        ArgumentsError: the address or the function is none.
    """
    if kind_of(reward_model) == "api":
        return InProcess(reward_model, RewardApi(reward_model, api), num_requests)
    return InProcess(reward_model, FunctionReward.named(reward_model, folder))


__all__ = [
    "Elsewhere",
    "PoolOptions",
    "RewardKind",
    "Rewards",
    "Scored",
    "Source",
    "WeightedRewards",
    "handle_of",
    "kind_of",
    "names_of",
]
