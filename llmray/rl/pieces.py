"""What a pool of handles deals out: answers that are sent together, and those that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from llmray.rl.handles import Answer, Handle, PoolScores


@dataclass
class Submission:
    """What was asked for at one time, and what of it is there."""

    scores: PoolScores
    left: int
    future: Future[PoolScores]


@dataclass
class Piece:
    """Answers that are sent together, and where their scores go.

    Attributes:
        attempts: how often they failed in a way that may be their own fault.
        avoided: the handle that failed last.
        is_suspect: a handle was lost over them; they are sent to one that has nothing else, so that
            nothing else is lost with it.
        away_since: when they first found a handle away.
    """

    answers: list[Answer]
    places: list[tuple[Submission, int]]
    attempts: int = 0
    avoided: Handle | None = None
    is_suspect: bool = False
    away_since: float | None = None
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum([answer.num_tokens for answer in self.answers])

    def part(self, which: slice) -> Piece:
        """Some of its answers, with the same past."""
        return replace(self, answers=self.answers[which], places=self.places[which])

    @property
    def has_past(self) -> bool:
        """Whether they failed before, so that they are not mixed with others."""
        return bool(self.attempts) or self.away_since is not None


class Queue:
    """Pieces that wait, and how many tokens they have together."""

    def __init__(self) -> None:
        self.pieces: deque[Piece] = deque()
        self.tokens = 0

    def put(self, pieces: Sequence[Piece]) -> None:
        """Add at the end."""
        self.pieces.extend(pieces)
        self.tokens += sum(piece.tokens for piece in pieces)

    def put_first(self, pieces: Sequence[Piece]) -> None:
        """Add at the head, in this order."""
        self.pieces.extendleft(reversed(pieces))
        self.tokens += sum(piece.tokens for piece in pieces)

    def pop(self) -> Piece:
        """Take out the first."""
        piece = self.pieces.popleft()
        self.tokens -= piece.tokens
        return piece

    def drop(self, submission: Submission) -> None:
        """Take out the pieces that are of one submission alone."""
        kept = [p for p in self.pieces if any(owner is not submission for owner, _ in p.places)]
        self.pieces, self.tokens = deque(kept), sum(piece.tokens for piece in kept)


def fill(sizes: Sequence[int], budget: int) -> int:
    """How many of `sizes`, from the first on, fit into `budget`; at least one."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > budget and count:
            return count
    return len(sizes)


def why_not_scores(scores: Any, expected: int) -> str | None:
    """What is wrong with an answer as a whole, None where nothing is."""
    if not isinstance(scores, list):
        return f"gave a {type(scores).__name__} where a list of numbers is required"
    if len(scores) != expected:
        return f"gave {len(scores)} scores for {expected} answers"
    odd = [s for s in scores if isinstance(s, bool) or not isinstance(s, int | float)]
    return f"gave {odd[0]!r} where a number is required" if odd else None
