"""A pool of handles that score: batches by tokens, the less loaded first, failover. No Ray.

One thread owns all of its state and acts on what is posted to it: submissions, answers, deadlines.
A handle that is lost or hangs is taken out, what it was asked goes to others, and it is let back in
when it answers again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from logging import getLogger
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal

from llmray.errors import RewardError
from llmray.rl.handles import Answer, Handle, HandleAway, HandleLost, PoolScores
from llmray.rl.pieces import Piece, Queue, Submission, fill, why_not_scores

log = getLogger("llmray")

Reason = Literal["lost", "hung"]


@dataclass(frozen=True)
class PoolOptions:
    """How a pool works; times in seconds.

    Attributes:
        batch_tokens: most tokens of a batch; one answer at least is in each.
        batching: of what waits when a handle is free (arrival), or of what was submitted together,
            in its order (fixed), so that nothing depends on when things happen.
        slots: batches that a handle is given at one time, one of which waits for the other.
        request_timeout_s: without an answer for so long a handle hangs, unless it says that it
            finished something for others meanwhile; may be infinite.
        timeout_s: how long to wait where all handles are gone, or let in again only to be lost.
        max_attempts: after so many failures that may be its own fault an answer has no score;
            answers that were sent together are sent in halves then.
        on_error: what then happens: the run fails, the answer is masked (its score is NaN), or it
            gets `error_value`.
        probe_every_s: how often a handle that was taken out is asked whether it is back.
    """

    batch_tokens: int = 8192
    batching: Literal["arrival", "fixed"] = "arrival"
    slots: int = 2
    request_timeout_s: float = 120.0
    timeout_s: float = 600.0
    max_attempts: int = 3
    on_error: Literal["fail", "mask", "value"] = "fail"
    error_value: float = 0.0
    probe_every_s: float = 2.0


@dataclass(frozen=True)
class PoolCounts:
    """What has happened so far; `busy_s` is that of all handles together."""

    scored: int = 0
    failed: int = 0  # without a score: masked, or given the value
    retried: int = 0
    evicted: int = 0
    readmitted: int = 0
    busy_s: float = 0.0


@dataclass(eq=False)
class _Member:
    """A handle and what it is doing."""

    handle: Handle
    calls: list[_Call] = field(default_factory=list)
    progress: float = 0.0  # when it last answered, or was given something while idle
    alive: float = 0.0  # when it last finished something of another caller, as far as it said
    asked: float = 0.0  # when it was last asked that
    is_out: bool = False
    probe: Future[Any] | None = None
    next_probe: float = 0.0
    reason: str = ""
    busy_s: float = 0.0  # what its handle said last

    @property
    def tokens(self) -> int:
        return sum([call.piece.tokens for call in self.calls])

    @property
    def load(self) -> int:
        """Tokens that it has before it, of this caller and of others."""
        return self.tokens + self.handle.load


@dataclass(eq=False)
class _Call:
    piece: Piece
    started: float


class Pool:
    """Scores of answers from several handles.

    Args:
        handles: at least one.
        options: how.
        first: which handle is preferred of those equally loaded, by what this caller and others
            have sent them; ranks differ in it.
        on_evict: told, in the pool's thread, of a handle that was taken out and why; a hung one is
            to be killed by whoever can.
    """

    def __init__(
        self,
        handles: Sequence[Handle],
        options: PoolOptions,
        first: int = 0,
        on_evict: Callable[[Handle, Reason], None] = lambda handle, reason: None,
    ) -> None:
        if not handles:
            raise ValueError("a pool needs a handle")
        turn = first % len(handles)
        self._members = [_Member(handle) for handle in (*handles[turn:], *handles[:turn])]
        self._options = options
        self._on_evict = on_evict
        self._waiting = Queue()
        self._counts = PoolCounts()
        self._gone_since: float | None = None  # all were, and none has answered since
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> PoolCounts:
        """What has happened so far."""
        return self._counts

    @property
    def num_handles(self) -> int:
        """How many there are, those that are out too."""
        return len(self._members)

    def submit(self, answers: Sequence[Answer]) -> Future[PoolScores]:
        """Ask for the scores of `answers`; the future has them in order, NaN where masked.

        It fails with a `RewardError` where an answer has no score and `on_error` is fail, and where
        all handles were gone for too long.
        """
        future: Future[PoolScores] = Future()
        if not answers:
            future.set_result(PoolScores([]))
            return future
        submission = Submission(PoolScores([math.nan] * len(answers)), len(answers), future)
        places = [(submission, place) for place in range(len(answers))]
        whole = Piece(list(answers), places)
        self._events.put(lambda: self._waiting.put(self._pieces(whole)))
        return future

    def close(self) -> None:
        """End the pool; what is still waiting fails."""
        self._events.put(None)
        self._thread.join()

    # everything below runs in the pool's thread

    def _run(self) -> None:
        while True:
            self._dispatch()
            with suppress(Empty):
                event = self._events.get(timeout=self._pause())
                while event is not None:
                    event()
                    event = self._events.get_nowait()
                break
            self._look_at_clock()
        self._fail_all(RewardError("the pool of reward models was closed"))

    def _pieces(self, whole: Piece) -> list[Piece]:
        """What is queued of a submission: single answers, or batches that stay as they are."""
        size = len(whole.answers)
        if self._options.batching == "arrival":
            return [whole.part(slice(i, i + 1)) for i in range(size)]
        slots = len(self._members) * self._options.slots
        budget = min(self._options.batch_tokens, math.ceil(whole.tokens / slots))
        pieces, start = [], 0
        while start < size:
            stop = fill([answer.num_tokens for answer in whole.answers[start:]], budget) + start
            pieces.append(whole.part(slice(start, stop)))
            start = stop
        return pieces

    def _dispatch(self) -> None:
        while self._waiting.pieces:
            first = self._waiting.pieces[0]
            free = [m for m in self._members if self._slots(m) and self._may_get(m, first)]
            if not free:
                return
            others = [m for m in free if m.handle is not first.avoided] or free
            member = min(others, key=lambda m: m.load)
            budget = self._budget(member)
            if budget is None:
                return  # what waits is the share of those who are about to be free
            self._send(self._next_piece(budget), member)

    def _budget(self, member: _Member) -> int | None:
        """Tokens that bring a member to its share of all that is waiting or under way.

        By its free slots: what waits for another batch of the same member may yet go elsewhere.
        None where it has next to all of its share; one that has nothing to do always gets some.
        """
        there = [m for m in self._members if not m.is_out]
        slots, waiting = self._options.slots, self._waiting.tokens
        share = (waiting + sum([m.load for m in there])) / len(there)
        missing = (share - member.load) / self._slots(member)
        least = waiting / (len(there) * slots)
        if missing < least and member.calls:
            return None
        return min(self._options.batch_tokens, math.ceil(max(missing, least)))

    def _slots(self, member: _Member) -> int:
        return 0 if member.is_out else self._options.slots - len(member.calls)

    def _may_get(self, member: _Member, piece: Piece) -> bool:
        """Whether a suspect would be alone with it, and no other is there."""
        return not any(piece.is_suspect or call.piece.is_suspect for call in member.calls)

    def _next_piece(self, budget: int) -> Piece:
        """The piece at the head; where batches follow arrival, with those behind it."""
        piece = self._waiting.pop()
        if self._options.batching == "fixed" or piece.has_past:
            return piece
        tokens, pieces = piece.tokens, self._waiting.pieces
        answers, places = list(piece.answers), list(piece.places)
        most = self._options.batch_tokens
        # to the nearest: were each batch a little short, one member would get all that is left
        while (
            pieces
            and not pieces[0].has_past
            and tokens + pieces[0].tokens / 2 <= budget
            and tokens + pieces[0].tokens <= most
        ):
            following = self._waiting.pop()
            tokens += following.tokens
            answers += following.answers
            places += following.places
        return Piece(answers, places)

    def _send(self, piece: Piece, member: _Member) -> None:
        now = time.monotonic()
        if not member.calls:
            member.progress = now
        call = _Call(piece, now)
        member.calls.append(call)
        try:
            future = member.handle.call("score", list(piece.answers))
        except Exception as error:  # a boundary: whatever a handle raises is its failure
            future = Future()
            future.set_exception(HandleLost(f"{member.handle.name}: {error}"))
        future.add_done_callback(
            lambda done: self._events.put(lambda: self._answered(member, call, done))
        )

    def _answered(self, member: _Member, call: _Call, done: Future[Any]) -> None:
        if call not in member.calls:
            return  # given up before
        now = time.monotonic()
        member.calls.remove(call)
        said = member.handle.busy_s
        if said is None:
            self._count(busy_s=now - max(call.started, member.progress))
        else:
            self._count(busy_s=said - member.busy_s)
            member.busy_s = said
        member.progress = now
        error = done.exception() if not done.cancelled() else HandleLost("its call was cancelled")
        if isinstance(error, HandleLost):
            self._lost(member, call.piece, error)
            return
        self._gone_since = None  # it serves, whatever it says
        if error is not None:
            self._split(member, call.piece, error)
        else:
            self._take(member, call.piece, done.result())

    def _take(self, member: _Member, piece: Piece, scores: Any) -> None:
        problem = why_not_scores(scores, len(piece.answers))
        if problem is not None:
            self._split(member, piece, RewardError(f"{member.handle.name} {problem}"))
            return
        self._count(scored=sum(map(math.isfinite, scores)))
        for i, score in enumerate(scores):
            if math.isfinite(score):
                self._settle(*piece.places[i], float(score))
            else:
                told = RewardError(f"{member.handle.name} gave the score {score}")
                self._retry(member, piece.part(slice(i, i + 1)), told)

    def _split(self, member: _Member, piece: Piece, error: BaseException) -> None:
        """After a failure that is the request's own: halves, until the answer at fault is alone."""
        if len(piece.answers) == 1:
            self._retry(member, piece, error)
        else:
            self._halve(piece)

    def _halve(self, piece: Piece) -> None:
        size = len(piece.answers)
        # one attempt in number, so that neither half is mixed with others
        halves = (slice(0, size // 2), slice(size // 2, size))
        parts = [replace(piece.part(half), attempts=max(1, piece.attempts)) for half in halves]
        self._waiting.put_first(parts)

    def _lost(self, member: _Member, piece: Piece, error: HandleLost) -> None:
        """Take a member out; what it was asked first of what it loses may be the cause.

        What else it has comes back by itself, with a score or lost too. Where it is away its
        request is at fault only if it finds it away for as long as all may be gone.
        """
        was_out = member.is_out
        self._evict(member, "lost", str(error))
        if was_out:
            self._again(member, piece)
            return
        if isinstance(error, HandleAway):
            now = time.monotonic()
            since = now if piece.away_since is None else piece.away_since
            piece = replace(piece, away_since=since)
            if now - since < self._options.timeout_s:
                self._again(member, piece)
                return
        self._retry(member, replace(piece, is_suspect=True), error)

    def _hung(self, member: _Member) -> None:
        """Give up what a member has; it is over the oldest that it hangs."""
        limit = f"{self._options.request_timeout_s:g} s"
        told = f"no answer for {limit}; reward_request_timeout_s gives it more"
        calls, member.calls = member.calls, []
        self._evict(member, "hung", told)
        for call in reversed(calls[1:]):
            self._again(member, call.piece)
        self._retry(member, replace(calls[0].piece, is_suspect=True), HandleLost(told))

    def _again(self, member: _Member, piece: Piece) -> None:
        """Send what had no fault in a failure once more."""
        self._count(retried=len(piece.answers))
        self._waiting.put_first([replace(piece, avoided=member.handle)])

    def _retry(self, member: _Member, piece: Piece, error: BaseException) -> None:
        """Send once more what may be at fault: at last in halves, and no more where it is one."""
        attempts = piece.attempts + 1
        if attempts < self._options.max_attempts:
            self._again(member, replace(piece, attempts=attempts))
        elif len(piece.answers) > 1:
            self._count(retried=len(piece.answers))
            self._halve(replace(piece, avoided=member.handle))
        else:
            self._give_up(piece.answers[0], piece.places[0], error)

    def _give_up(self, answer: Answer, place: tuple[Submission, int], error: BaseException) -> None:
        options = self._options
        if options.on_error == "fail":
            failure = RewardError(
                f"answer {answer.id} got no score in {options.max_attempts} attempts: {error}. A "
                "finite number is required. Mend what scores, or set reward_error: mask, which "
                f"leaves such answers out. Its prompt ends with {answer.prompt[-80:]!r}, the "
                f"response begins with {answer.response[:80]!r}."
            )
            failure.__cause__ = error
            self._fail(place[0], failure)
            return
        if not place[0].future.done():
            log.warning("answer %s got no score: %s", answer.id, error)
            self._count(failed=1)
        if options.on_error == "value":
            place[0].scores.given.add(place[1])
        self._settle(*place, options.error_value if options.on_error == "value" else math.nan)

    def _settle(self, submission: Submission, place: int, score: float) -> None:
        submission.scores[place] = score
        submission.left -= 1
        if not submission.left and not submission.future.done():
            submission.future.set_result(submission.scores)

    def _fail(self, submission: Submission, error: RewardError) -> None:
        if not submission.future.done():
            submission.future.set_exception(error)
        self._waiting.drop(submission)

    def _fail_all(self, error: RewardError) -> None:
        pieces = [*self._waiting.pieces, *(call.piece for m in self._members for call in m.calls)]
        for submission, _ in [place for piece in pieces for place in piece.places]:
            self._fail(submission, error)
        for member in self._members:
            member.calls.clear()

    def _evict(self, member: _Member, reason: Reason, told: str) -> None:
        if member.is_out:
            return
        log.warning("reward model %s is %s and taken out: %s", member.handle.name, reason, told)
        self._count(evicted=1)
        member.is_out, member.reason = True, told
        member.next_probe = time.monotonic() + self._options.probe_every_s
        with suppress(Exception):  # a boundary: what cannot be killed stays out
            self._on_evict(member.handle, reason)

    def _probe(self, member: _Member, now: float) -> None:
        member.next_probe = now + self._options.probe_every_s
        if member.probe is not None and member.probe.cancel():
            member.probe = None
        try:
            probe = member.handle.call("ping")
        except Exception:  # a boundary, as in `_send`
            return
        member.probe = probe
        probe.add_done_callback(lambda done: self._events.put(lambda: self._back(member, done)))

    def _back(self, member: _Member, done: Future[Any]) -> None:
        if not member.is_out or done.cancelled() or done.exception() is not None:
            return
        log.info("reward model %s answers again", member.handle.name)
        member.is_out, member.probe, member.progress = False, None, time.monotonic()
        self._count(readmitted=1)

    def _ask(self, member: _Member, now: float) -> None:
        """Ask one that works for several callers whether it does, though none of it is for us."""
        member.asked = now
        with suppress(Exception):  # a boundary, as in `_send`
            asked = member.handle.call("ping")
            asked.add_done_callback(lambda done: self._events.put(lambda: self._told(member, done)))

    def _told(self, member: _Member, done: Future[Any]) -> None:
        quiet_s = None if done.cancelled() or done.exception() is not None else done.result()
        if quiet_s is not None:
            member.alive = max(member.alive, time.monotonic() - quiet_s)

    def _look_at_clock(self) -> None:
        """Do what is due: take out who hangs, ask who is out, give up where all are gone."""
        now, options = time.monotonic(), self._options
        for member in self._members:
            if member.calls and now >= self._deadline(member):
                self._hung(member)
            elif now >= self._ask_due(member):
                self._ask(member, now)
            if member.is_out and now >= member.next_probe:
                self._probe(member, now)
        if not self._waiting.pieces and not any(member.calls for member in self._members):
            self._gone_since = None  # nobody waits for them
        elif self._are_all_out():
            if self._gone_since is None:
                self._gone_since = now
            elif now - self._gone_since >= options.timeout_s:
                self._gone_since = None
                self._fail_all(self._all_gone())

    def _are_all_out(self) -> bool:
        return bool(self._waiting.pieces) and all(member.is_out for member in self._members)

    def _all_gone(self) -> RewardError:
        reasons = "; ".join(f"{m.handle.name}: {m.reason}" for m in self._members[:3])
        return RewardError(
            f"all {len(self._members)} reward models have been gone for "
            f"{self._options.timeout_s:g} s ({reasons}). One that answers is required. Mend them, "
            "or give them more time to come back with reward_timeout_s."
        )

    def _deadline(self, member: _Member) -> float:
        """When a member counts as hung: without any answer, or one call long behind the others."""
        limit = self._options.request_timeout_s
        oldest = member.calls[0].started  # the others were sent later
        without_word = min(member.progress + limit, oldest + limit * self._options.slots)
        return max(without_word, member.alive + limit)

    def _ask_due(self, member: _Member) -> float:
        """When to ask a member that has not answered whether it gets on: well before it is late."""
        limit = self._options.request_timeout_s
        if not member.calls or member.is_out or math.isinf(limit):
            return math.inf
        return max(self._deadline(member) - limit / 2, member.asked + limit / 4)

    def _pause(self) -> float | None:
        """Seconds until something is due, None where nothing is."""
        due = [min(self._deadline(m), self._ask_due(m)) for m in self._members if m.calls]
        due += [m.next_probe for m in self._members if m.is_out]
        if self._gone_since is not None and self._are_all_out():
            due.append(self._gone_since + self._options.timeout_s)
        first = min(due, default=math.inf)
        return None if math.isinf(first) else max(0.0, first - time.monotonic())

    def _count(self, **more: float) -> None:
        added = {name: value + getattr(self._counts, name) for name, value in more.items()}
        self._counts = replace(self._counts, **added)
