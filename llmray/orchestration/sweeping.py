"""The loop of a sweep: slots that train trials, what they report, and what becomes of each.

It holds no training and no file but the ledger's: `slots` train, `verdicts` judge, `searching`
proposes; `tune_job` makes what is needed before and writes what is left after.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import WARNING, getLogger
from typing import TYPE_CHECKING, Any

from llmray.arguments.tune import Sweep
from llmray.errors import LlmrayError, TrainingError
from llmray.orchestration import ledger
from llmray.orchestration.board import Job, Message
from llmray.orchestration.ledger import OUT_OF_TIME, Entry
from llmray.orchestration.plan import Placement
from llmray.orchestration.searching import Searcher, Values
from llmray.orchestration.slots import Slot
from llmray.orchestration.spent import Spent
from llmray.orchestration.trial_board import Look
from llmray.orchestration.verdicts import Report, Verdict, Verdicts
from llmray.stop_signals import EXIT_CODES, StopSignals

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = getLogger("llmray")

POLL_S = 0.1
SAY_EVERY_S = 15.0
END_S = 15.0  # for workers that were let go
MANY_ALIKE = 3  # trials that fail for one reason before any succeeds: the rest would too
STOPPED, PAUSED = "stopped early", "paused"
ENDS: dict[Verdict, str] = {"stop": STOPPED, "pause": PAUSED}
# why a whole sweep ends, beside signals
ALIKE = "failures all alike"  # or OUT_OF_TIME


@dataclass(frozen=True)
class Shape:
    """What decides whether one group of workers can train two trials after each other."""

    placement: Placement
    process: tuple[Any, ...]  # values of keys that change a whole process


@dataclass(frozen=True)
class Plan:
    """What a trial needs before workers train it."""

    run: RunArguments
    shape: Shape
    job: Job


@dataclass
class Sweeping:
    """A sweep at work.

    Args:
        sweep: as it was asked for.
        entries: the trials that are known, by name.
        searcher: where more come from.
        plan_of: makes a trial ready; called once for each attempt of the sweep.
        new_entry: an entry for values that the searcher proposes.
        settings_of: the scheduler's settings, asked for once a trial's data is there.
        open_slot: starts a group of workers for a plan.
        at_once: how many groups at most.
        max_failures: of one trial; -1 for any number.
        signals: that end the sweep.
        say: shows how far it is.
        settled: called when a trial is over.
        heard: called with everything that a trial's rank 0 tells.
    """

    sweep: Sweep
    entries: dict[str, Entry]
    searcher: Searcher
    plan_of: Callable[[Entry], Plan]
    new_entry: Callable[[Values], Entry]
    settings_of: Callable[[], Mapping[str, Any]]
    open_slot: Callable[[int, Plan], Slot]
    at_once: int
    max_failures: int
    signals: StopSignals
    say: Callable[[], None]
    settled: Callable[[Entry], None]
    heard: Callable[[Entry, Message], None]
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self._slots: list[Slot] = []
        self._shapes: dict[int, Shape] = {}
        self._verdicts: Verdicts | None = None
        self._plans: dict[str, Plan] = {}
        self._since: dict[str, float] = {}  # when a trial was given to its slot
        self._opened = 0
        self._order = 1 + max((o for e in self.entries.values() for o in e.orders), default=0)
        self._began = self._said = time.monotonic()
        self._stop: str | None = None  # why no trial goes on
        self._causes: list[str] = []  # of trials that failed, numbers and names left out
        self._alike = False

    def run(self) -> str | None:
        """Train until all trials are over; returns what ended the sweep before that, or None.

        Raises:
            LlmrayError: a trial cannot be made ready, or no workers can be had.
        """
        try:
            self._recall()
            while not self._is_over():
                self._heed()
                for slot in list(self._slots):
                    self._attend(slot)
                self._open()
                self._speak()
                time.sleep(POLL_S)
        finally:
            self._end()
        return self._stop

    def _is_over(self) -> bool:
        if any(slot.trial for slot in self._slots):
            return False
        if self._stop is not None:
            return True
        self._ask_for(1)
        return not self._startable()

    def _startable(self) -> list[Entry]:
        """The trials that wait, paused ones among them."""
        busy = {slot.trial for slot in self._slots}
        return [
            entry
            for entry in self.entries.values()
            if entry.state in ("pending", "paused") and entry.name not in busy
        ]

    def _ask_for(self, count: int) -> None:
        """Let so many trials wait for their first step, if the searcher has more."""
        waiting = sum(1 for entry in self._startable() if entry.state == "pending")
        while waiting < count and (values := self.searcher.next()) is not None:
            entry = self.new_entry(values)
            self.entries[entry.name] = entry
            entry.write()
            if self._verdicts is not None:
                self._verdicts.add(entry.name)
            waiting += 1

    def _heed(self) -> None:
        """Stop everything once: a signal, the time budget, or failures all alike."""
        if self._stop is not None:
            return
        budget = self.sweep.time_budget_s
        if self.signals.seen:
            self._stop = self.signals.seen[0]
            log.info("%s: trials are saved at their next step border", self._stop)
        elif budget is not None and time.monotonic() - self._began > budget:
            self._stop = OUT_OF_TIME
            log.info("time_budget_s=%g is spent: no trial goes on", budget)
        elif self._alike:
            self._stop = ALIKE
            log.warning("the trials fail for one reason: no other is started")
        for slot in self._slots if self._stop is not None else ():
            if slot.trial:
                slot.stop(self._stop or "")
            else:
                slot.end()

    def _attend(self, slot: Slot) -> None:
        """Hear what a slot has to say, and give it what it waits for."""
        has_ended = slot.has_ended  # asked first: what it told before is then in the look
        look = slot.look()
        entry = self.entries[slot.trial] if slot.trial else None
        for message in look.messages:
            if entry is not None:
                self._hear(slot, entry, message)
        if entry is not None and look.is_idle:
            self._settle(slot, entry, look)
        elif has_ended:
            self._lose(slot, entry, look)
            return
        if look.is_idle and not slot.is_closed and slot.trial is None:
            self._feed(slot)

    def _hear(self, slot: Slot, entry: Entry, message: Message) -> None:
        self.heard(entry, message)
        if message.kind == "start":
            step, entry.total_steps = message.content
            entry.forget_after(step)
            if step:
                self._catch_up(slot, entry, step)
        elif message.kind == "record":
            [record] = message.content
            entry.step = record["current_steps"]
            if self.sweep.metric in record:
                self._report(slot, entry, record)
        elif message.kind == "end":
            [metrics] = message.content
            entry.metric = metrics.get(self.sweep.metric, entry.metric)

    def _catch_up(self, slot: Slot, entry: Entry, step: int) -> None:
        """Take in what the workers before did not come to tell, and let the scheduler judge it."""
        known = len(entry.reports)
        self._order += ledger.recover(entry, self.sweep.metric, step, self._order)
        for report in entry.reports[known:]:
            said = self._require_verdicts().judge(entry.name, report)
            if said != "go on" and report.step < entry.total_steps:
                slot.stop(ENDS[said])
                break
        self._put_out()

    def _require_verdicts(self) -> Verdicts:
        """The scheduler, made at the first report."""
        if self._verdicts is not None:
            return self._verdicts
        sweep = self.sweep
        found = self._verdicts = Verdicts(
            sweep.scheduler.kind,
            self.settings_of(),
            metric=sweep.metric,
            mode=sweep.mode,
            seed=sweep.seed,
        )
        for name in self.entries:
            found.add(name)
        for entry in self.entries.values():
            if entry.is_over and not any(told.step for told in entry.reports):
                found.ended(entry.name, failed=entry.state == "failed")
            elif entry.name in self._since:
                found.started(entry.name)
        return found

    def _recall(self) -> None:
        """Go on where an earlier driver ended.

        Files that it did not come to copy are; what trials reported is judged again, so that each
        waits as it did.
        """
        for entry in self.entries.values():
            if entry.is_over and not entry.is_left:
                self._leave_behind(entry)
        past = ledger.told(self.entries.values())
        if not past:
            return
        found = self._require_verdicts()
        found.replay((entry.name, report) for entry, report in past)
        for entry in self.entries.values():
            if entry.is_over:
                found.ended(entry.name, failed=entry.state == "failed")
        for entry in self.entries.values():
            if not entry.is_over:
                self._let_wait(entry)
        self._put_out()

    def _let_wait(self, entry: Entry) -> None:
        """Put a trial back in the line; one that was told to stop on its way is over."""
        found = self._verdicts
        is_stopped = found is not None and found.is_stopped(entry.name)
        if is_stopped and not entry.is_at_end:
            self._close_entry(entry, "stopped", self._why_stopped(entry))
            return
        is_aside = found is not None and found.waits(entry.name) and not entry.is_at_end
        entry.state = "paused" if is_aside else "pending"
        entry.write()

    def _report(self, slot: Slot, entry: Entry, record: Mapping[str, Any]) -> None:
        value = float(record[self.sweep.metric])
        seconds = entry.seconds + time.monotonic() - self._since[entry.name]
        report = Report(entry.step, float(record["epoch"]), seconds, value)
        entry.reports.append(report)
        entry.orders.append(self._order)
        self._order += 1
        entry.metric = value
        entry.write()
        if entry.step == 0:  # before anything was learned
            slot.judge(None)
            return
        said = self._require_verdicts().judge(entry.name, report)
        is_last = entry.step >= entry.total_steps
        reason = None if said == "go on" else ENDS[said]
        slot.judge(None if is_last else reason)
        self._put_out()

    def _put_out(self) -> None:
        """End the paused trials that the scheduler gave up."""
        busy = {slot.trial for slot in self._slots}
        for name in self._verdicts.put_out() if self._verdicts is not None else ():
            entry = self.entries[name]
            if name not in busy and not entry.is_over:
                self._close_entry(entry, "stopped", self._why_stopped(entry))

    def _why_stopped(self, entry: Entry) -> str:
        metric = "none" if entry.metric is None else f"{entry.metric:.6g}"
        kind = self.sweep.scheduler.kind
        return f"{kind}: {self.sweep.metric} {metric} after step {entry.step}"

    def _settle(self, slot: Slot, entry: Entry, look: Look) -> None:
        """A trial's workers have told all of it."""
        self._leave(slot, entry, look)
        if look.failures:
            error = look.failures[0][1]
            self._fail(entry, str(error), error)
        elif look.stopped == PAUSED:
            entry.state = "paused"
            entry.write()
            self._give_up_if_put_out(entry)
        elif look.stopped == STOPPED:
            self._close_entry(entry, "stopped", self._why_stopped(entry))
        elif look.stopped == OUT_OF_TIME:
            self._close_entry(entry, "stopped", OUT_OF_TIME)
        elif look.stopped is not None:
            entry.state = "pending"  # to go on with resume=true
            entry.write()
        elif entry.metric is None or not math.isfinite(entry.metric):
            self._fail(entry, f"{self.sweep.metric} is {entry.metric} at its end.")
        else:
            self._close_entry(entry, "done", None)

    def _give_up_if_put_out(self, entry: Entry) -> None:
        """A trial may be given up between the word to pause and its last line."""
        assert self._verdicts is not None
        if not self._verdicts.is_alive(entry.name):
            self._close_entry(entry, "stopped", self._why_stopped(entry))

    def _leave(self, slot: Slot, entry: Entry, look: Look) -> None:
        slot.trial = None
        entry.attempts = look.attempts
        entry.seconds += time.monotonic() - self._since.pop(entry.name)

    def _fail(self, entry: Entry, cause: str, error: Exception | None = None) -> None:
        log.warning("%s failed: %s", entry.name, cause)
        self._close_entry(entry, "failed", cause)
        if isinstance(error, LlmrayError) and not isinstance(error, TrainingError):
            # of a loss that is no number the trial's own values may be the cause
            self._causes.append(re.sub(r"[0-9a-f]{6,}|\d+", "#", cause))
        came = any(e.state in ("done", "stopped") for e in self.entries.values())
        if len(self._causes) >= MANY_ALIKE and len(set(self._causes)) == 1 and not came:
            self._alike = True

    def _close_entry(self, entry: Entry, state: Any, cause: str | None) -> None:
        entry.state, entry.cause, entry.is_left = state, cause, False
        if self._verdicts is not None and cause != OUT_OF_TIME:  # others are compared with it yet
            self._verdicts.ended(entry.name, failed=state == "failed")
        self.searcher.tell(entry)
        entry.write()
        self._leave_behind(entry)
        self._put_out()
        self._said = -math.inf

    def _leave_behind(self, entry: Entry) -> None:
        """Have the files of a trial that is over copied, and note that they are."""
        self.settled(entry)
        entry.is_left = True
        entry.write()

    def _lose(self, slot: Slot, entry: Entry | None, look: Look) -> None:
        """A group of workers is gone."""
        self._slots.remove(slot)
        self.spent.note(look)
        if slot.is_closed and entry is None:
            return
        loss = slot.loss(look)
        if entry is None:
            if look.asked_after_s is None and self._stop is None:
                raise loss.as_error()
            return
        self._leave(slot, entry, look)
        entry.failures += 1
        is_again = entry.cause == loss.text
        entry.cause = loss.text
        allowed = self.max_failures
        if loss.error is not None or (is_again and not loss.may_mend):
            self._fail(entry, loss.text, loss.error)
        elif 0 <= allowed < entry.failures:
            self._fail(entry, f"{loss.text}, more than ray_max_failures={allowed} times.")
        else:
            self._let_wait(entry)
            if self._stop is None and not entry.is_over:
                log.warning("%s: %s. It goes on from its newest checkpoint", entry.name, loss.text)

    def _feed(self, slot: Slot) -> None:
        """Give an idle slot a trial of its shape, or let it go."""
        if self._stop is not None:
            slot.close()
            return
        self._ask_for(1)
        entry = self._choose(self._shapes[slot.number])
        if entry is None:
            waits = any(entry.state == "paused" for entry in self._startable())
            if not (waits and any(other.trial for other in self._slots)):
                slot.close()
            return
        entry.state = "running"
        entry.write()
        self._since[entry.name] = time.monotonic()
        if self._verdicts is not None and not entry.is_at_end:
            self._verdicts.started(entry.name)
        slot.give(entry.name, self._plan(entry).job, entry.attempts)

    def _choose(self, shape: Shape | None = None) -> Entry | None:
        """The trial whose turn it is, of those with a shape where one is given."""
        names = [entry.name for entry in self._startable()]
        while names:
            name = self._first(names)
            if name is None:
                return None
            entry = self.entries[name]
            if shape is None or self._plan(entry).shape == shape:
                return entry
            names.remove(name)
        return None

    def _first(self, names: list[str]) -> str | None:
        """The trial whose turn it is: one with nothing left to judge, else the scheduler's."""
        at_end = [name for name in names if self.entries[name].is_at_end]
        if at_end or self._verdicts is None:
            return (at_end or names)[0]
        return self._verdicts.next(names)

    def _give_up_paused(self) -> None:
        """Stop what is paused when nothing runs that could let it go on."""
        for entry in self._startable():
            if entry.state == "paused":
                self._close_entry(entry, "stopped", self._why_stopped(entry))

    def _plan(self, entry: Entry) -> Plan:
        if entry.name not in self._plans:
            self._plans[entry.name] = self.plan_of(entry)
        return self._plans[entry.name]

    def _open(self) -> None:
        """Start groups of workers for trials that no group is free for."""
        if self._stop is not None:
            return
        free = sum(1 for slot in self._slots if slot.trial is None and not slot.is_closed)
        while len(self._slots) < self.at_once:
            self._ask_for(free + 1)
            startable, turn = self._startable(), self._choose()
            if turn is None and startable and not any(slot.trial for slot in self._slots):
                self._give_up_paused()
            if turn is None or len(startable) <= free:
                return
            plan = self._plan(startable[free] if free else turn)
            self._opened += 1
            self._shapes[self._opened] = plan.shape
            self._slots.append(self.open_slot(self._opened, plan))
            free += 1

    def _speak(self) -> None:
        if time.monotonic() - self._said > SAY_EVERY_S:
            self._said = time.monotonic()
            self.say()

    def _end(self) -> None:
        """Let all workers go, and end those that do not."""
        for slot in self._slots:
            if not slot.is_closed:
                slot.close()
        deadline = time.monotonic() + END_S
        for slot in self._slots:
            if slot.trial or not slot.wait(max(0.0, deadline - time.monotonic())):
                slot.end()
            self.spent.note(slot.look())
        self._slots.clear()


def exit_code(stopped: str | None) -> int:
    """The exit code of a sweep that was ended by what `Sweeping.run` returned."""
    return EXIT_CODES.get(stopped or "", 0)


def is_warning(message: Message) -> bool:
    """Whether a message is a log line of weight."""
    return message.kind == "log" and message.content[0] >= WARNING
