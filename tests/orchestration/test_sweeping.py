"""The loop of a sweep over slots that train nothing: what starts, goes on, stops and is kept."""

import dataclasses
import json

import pytest
from sweeps import sweep as a_sweep

from llmray import store
from llmray.arguments.space import parse
from llmray.arguments.tune import Scheduler, Sweep
from llmray.errors import StoreError, TrainingError
from llmray.orchestration import ledger, sweeping
from llmray.orchestration.board import Message
from llmray.orchestration.ledger import Entry
from llmray.orchestration.plan import Placement
from llmray.orchestration.searching import Asked, Listed
from llmray.orchestration.slots import Loss
from llmray.orchestration.sweeping import Plan, Shape, Sweeping
from llmray.orchestration.trial_board import Look
from llmray.stop_signals import StopSignals

STEPS = 8
SPACE, _ = parse({"x": {"uniform": [0, 1]}}, ())
SWEEP = Sweep(SPACE, "grid", 1, "eval_loss", "min", Scheduler("none", {}), None, None, 7)


class FakeSlot:
    """Trains a step a look; `site.fails` and `site.dies` say which trial comes to harm, where."""

    def __init__(self, site, number):
        self.site, self.number = site, number
        self.trial, self.is_closed, self.has_ended = None, False, False
        self.step = None
        self.reason, self.waits, self.is_idle = None, False, True
        self.stopped, self.failures, self.attempts = None, [], 0

    def give(self, name, job, attempts):
        assert self.is_idle, "a slot has one trial at a time"
        self.trial, self.is_idle, self.step = name, False, None
        self.reason, self.waits, self.stopped, self.failures = None, False, None, []
        self.attempts = attempts + 1
        self.site.given.append((name, self.number))

    def judge(self, reason):
        self.waits, self.reason = False, self.reason or reason

    def stop(self, reason):
        self.reason = self.reason or reason

    def close(self):
        self.is_closed = True

    def end(self):
        self.has_ended = True

    def wait(self, timeout_s):
        return self.is_closed

    def loss(self, look):
        return self.site.loss

    def look(self):
        if self.is_closed and self.is_idle:
            self.has_ended = True
        is_at_rest = self.trial is None or self.is_idle or self.has_ended
        messages = [] if is_at_rest else list(self._advance())
        return Look(messages, self.is_idle, self.stopped, self.failures, self.attempts, 1, 0, [], 1)

    def _advance(self):
        name, saved = self.trial, self.site.saved
        if self.step is None:
            self.step = saved.get(name, 0)
            yield Message("start", (self.step, STEPS))
        elif self._is_lost_at_an_end():
            self.has_ended = True
        elif self.reason is not None:
            saved[name] = self.step
            self.stopped = self.reason
            yield from self._finish()
        elif self.step == STEPS:
            yield from self._finish()
        elif self.site.fails.get(name) == self.step:
            self.failures, self.is_idle = [(0, self.site.why)], True
        elif self.site.dies.get(name) == self.step:
            if self.site.dies_once:
                del self.site.dies[name]
            self.has_ended = True
        elif not self.waits:
            self.step += 1
            self.site.trained.append((name, self.step))
            saved[name] = self.step - self.step % 2
            value = self.site.values[name] - self.step / 100
            self.waits = True
            record = {"current_steps": self.step, "epoch": self.step / 10, "eval_loss": value}
            yield Message("record", (record,))

    def _is_lost_at_an_end(self):
        """Once: after the last step, or told to stop or to pause."""
        if self.reason is None:
            is_lost = self.step == STEPS == self.site.dies.get(self.trial)
            return is_lost and bool(self.site.dies.pop(self.trial))
        is_lost = self.trial in self.site.dies_when_told
        self.site.dies_when_told.discard(self.trial)
        return is_lost

    def _finish(self):
        self.is_idle = True
        yield Message("end", ({},))


class Site:
    """A place for sweeps of fake slots."""

    def __init__(self, directory, values=(3.0, 1.0, 2.0, 4.0)):
        self.directory = directory
        self.given, self.trained, self.over = [], [], []
        self.saved, self.fails, self.dies, self.values = {}, {}, {}, {}
        self.dies_when_told = set()  # to stop, or to pause
        self.dies_once, self.why = True, TrainingError("loss=nan")
        self.loss = Loss("rank 0 died")
        self.entries, self.is_full = {}, False
        self.signals = StopSignals()
        self.num_slots = 0
        for value in values:
            self.add({"x": value / 10})

    def add(self, values):
        number = len(self.entries) + 1
        name = f"trial_{number:03d}"
        self.values[name] = values["x"] * 10
        self.entries[name] = Entry(number, name, values, str(self.directory / name))
        return self.entries[name]

    def shape(self, entry):
        return Shape(Placement(1, {"CPU": 1.0}, "PACK"), ())

    def settings_of(self):
        settings = dict(self.loop.sweep.scheduler.settings)
        end = {} if self.loop.sweep.scheduler.kind == "median" else {"max_t": STEPS}
        return {"time_attr": "current_steps", **end, **settings}

    def open_slot(self, number, plan):
        self.num_slots += 1
        return FakeSlot(self, number)

    def sweep(self, *, at_once=2, max_failures=1, searcher=None, heard=None, **changes):
        self.loop = Sweeping(
            sweep=dataclasses.replace(SWEEP, **changes),
            entries=self.entries,
            searcher=searcher or Listed(),
            plan_of=lambda entry: Plan(None, self.shape(entry), None),
            new_entry=self.add,
            settings_of=self.settings_of,
            open_slot=self.open_slot,
            at_once=at_once,
            max_failures=max_failures,
            signals=self.signals,
            say=lambda: None,
            settled=self.settled,
            heard=heard or (lambda entry, message: None),
        )
        return self.loop.run()

    def settled(self, entry):
        if self.is_full:
            self.is_full = False
            raise StoreError("no space left")
        self.over.append(entry.name)

    def states(self):
        return [entry.state for entry in self.entries.values()]


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """No sweep waits, also not for the disk, and none goes on for ever."""
    monkeypatch.setattr(store.os, "fsync", lambda number: None)
    polls = iter(range(10_000))

    def sleep(seconds):
        assert next(polls, None) is not None, "the sweep hangs"

    monkeypatch.setattr(sweeping.time, "sleep", sleep)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_every_trial_is_trained_once_and_workers_stay(site):
    assert site.sweep() is None
    assert site.states() == ["done"] * 4
    assert sorted(site.trained) == [(n, s) for n in sorted(site.values) for s in range(1, 9)]
    assert site.num_slots == 2
    assert {number for _, number in site.given} == {1, 2}
    assert [e.metric for e in site.entries.values()] == pytest.approx([2.92, 0.92, 1.92, 3.92])


def test_ledger_holds_what_is_over(site):
    site.sweep()
    for name, entry in site.entries.items():
        kept = ledger.read(str(site.directory / name))
        assert kept == entry
        assert [report.step for report in kept.reports] == list(range(1, 9))


def test_asha_stops_worse_trials_a_step_after_its_word(site):
    site.sweep(at_once=1, scheduler=Scheduler("asha", {"grace_period": 1, "reduction_factor": 2}))
    states = dict(zip(site.entries, site.states(), strict=True))
    assert states["trial_002"] == "done"
    assert states["trial_004"] == "stopped"
    assert site.entries["trial_004"].step == 1
    assert site.entries["trial_004"].cause == "asha: eval_loss 3.99 after step 1"


def test_hyperband_trains_paused_trials_on_from_where_they_were(tmp_path):
    site = Site(tmp_path, values=range(1, 9))
    site.sweep(scheduler=Scheduler("hyperband", {"max_t": 8, "reduction_factor": 3}))
    assert set(site.states()) <= {"done", "stopped"}
    assert site.entries["trial_001"].state == "done"
    again = [name for name in site.values if sum(n == name for n, _ in site.given) > 1]
    assert again, "nothing was paused and went on"
    for name in again:
        assert [step for n, step in site.trained if n == name] == sorted(
            {step for n, step in site.trained if n == name}
        )


HYPERBAND = Scheduler("hyperband", {"reduction_factor": 3, "stop_last_trials": False})


def of_ten(tmp_path, number=10):
    """Trials for three brackets of hyperband; the first has three, the second five."""
    return Site(tmp_path, values=range(1, number + 1))


@pytest.mark.parametrize(
    ("number", "dies"),
    [(10, {"trial_006": 1}), (10, {"trial_004": 5}), (3, {"trial_002": 5})],
)
def test_hyperband_goes_on_with_a_trial_whose_workers_were_lost(tmp_path, number, dies):
    site = of_ten(tmp_path, number)
    site.dies = dict(dies)
    assert site.sweep(scheduler=HYPERBAND) is None
    assert set(site.states()) <= {"done", "stopped"}
    [(name, step)] = dies.items()
    assert site.entries[name].failures == 1
    assert max(at for n, at in site.trained if n == name) > step
    assert site.states()[:3] == ["done"] * 3
    assert len(site.over) == number, "each is over once"


def test_hyperband_does_not_wait_for_a_trial_that_failed_before_the_first_report(tmp_path):
    site = of_ten(tmp_path)
    site.fails = {"trial_001": 0}
    assert site.sweep(at_once=1, scheduler=HYPERBAND) is None
    assert site.states()[0] == "failed"
    assert set(site.states()[1:]) == {"done", "stopped"}


@pytest.mark.parametrize("name", ["trial_004", "trial_006", "trial_008"])
def test_hyperband_keeps_its_word_to_a_trial_whose_workers_were_lost_on_it(tmp_path, name):
    """Told to be put aside, or to stop, and gone before that was told as done."""
    site = of_ten(tmp_path)
    site.dies_when_told = {name}
    assert site.sweep(scheduler=HYPERBAND) is None
    undisturbed = of_ten(tmp_path / "undisturbed")
    undisturbed.sweep(scheduler=HYPERBAND)
    assert site.states() == undisturbed.states()


def test_asha_keeps_its_word_to_a_trial_whose_workers_were_lost_on_it(site):
    site.dies_when_told = {"trial_004"}
    site.sweep(at_once=1, scheduler=Scheduler("asha", {"grace_period": 1, "reduction_factor": 2}))
    assert site.entries["trial_004"].state == "stopped"
    assert [step for name, step in site.trained if name == "trial_004"] == [1]


@pytest.mark.parametrize("kind", ["hyperband", "asha"])
def test_a_trial_that_was_lost_after_its_last_step_is_done(tmp_path, kind):
    """Its workers wrote its weights, and were gone before they said so."""
    site = of_ten(tmp_path)
    site.dies = {"trial_001": STEPS}
    scheduler = HYPERBAND if kind == "hyperband" else Scheduler("asha", {"grace_period": 2})
    assert site.sweep(scheduler=scheduler) is None
    assert site.entries["trial_001"].state == "done"
    assert site.entries["trial_001"].attempts == 2


@pytest.mark.parametrize("at", [1, 4, 13, 16, 20])
@pytest.mark.parametrize("kind", ["hyperband", "asha", "median"])
def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not(tmp_path, at, kind):
    """A signal at any record; the ledger alone is kept."""
    schedulers = {
        "hyperband": HYPERBAND,
        "asha": Scheduler("asha", {"grace_period": 2, "reduction_factor": 2}),
        "median": Scheduler("median", {"grace_period": 2}),
    }
    seen = []

    def heard(entry, message):
        seen.append(message.kind)
        if seen.count("record") == at:
            site.signals.seen.append("SIGTERM")

    site = of_ten(tmp_path)
    assert site.sweep(scheduler=schedulers[kind], heard=heard) == "SIGTERM"
    site.signals.seen.clear()
    site.entries |= {n: e for n in site.entries if (e := ledger.read(str(tmp_path / n)))}
    assert site.sweep(scheduler=schedulers[kind]) is None
    whole = of_ten(tmp_path / "whole")
    whole.sweep(scheduler=schedulers[kind])
    assert set(site.states()) <= {"done", "stopped"}
    assert site.entries["trial_001"].state == "done"
    assert len(site.over) == len(set(site.over)) == 10
    if kind == "hyperband":
        assert site.states() == whole.states()
        assert len(site.trained) == len(whole.trained)


def test_what_was_lost_on_its_way_to_the_driver_is_read_in_the_trials_own_log(site):
    """Workers of trial 1 died after the last save, and those of trial 3 after the one of step 4.

    Their logs go on to the last step; of trial 3 it is trained again.
    """
    for name, step, values in (("trial_001", 8, (2.5, 1.5)), ("trial_003", 4, (2.25, 1.25))):
        site.saved[name] = step
        records = [
            {"current_steps": at, "total_steps": 8, "epoch": at / 10, "eval_loss": value}
            for at, value in zip((4, 8), values, strict=True)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        site.directory.joinpath(name).mkdir()
        site.directory.joinpath(name, "trainer_log.jsonl").write_text(text)
    site.sweep()
    assert site.states() == ["done"] * 4
    whole, half = site.entries["trial_001"], site.entries["trial_003"]
    assert (whole.metric, [(r.step, r.value) for r in whole.reports]) == (1.5, [(4, 2.5), (8, 1.5)])
    assert [report.step for report in half.reports] == [4, 5, 6, 7, 8]
    assert (half.reports[0].value, half.metric) == (2.25, pytest.approx(1.92))
    orders = [order for entry in site.entries.values() for order in entry.orders]
    assert len(set(orders)) == len(orders)


def test_what_was_lost_on_its_way_is_judged_too(site):
    """The workers of trial 3 died as they had saved step 4 and not told that it was bad."""
    site.saved["trial_003"] = 4
    record = {"current_steps": 4, "total_steps": 8, "epoch": 0.4, "eval_loss": 3.5}
    site.directory.joinpath("trial_003").mkdir()
    site.directory.joinpath("trial_003", "trainer_log.jsonl").write_text(json.dumps(record) + "\n")
    site.sweep(at_once=1, scheduler=Scheduler("asha", {"grace_period": 4, "reduction_factor": 2}))
    assert site.states() == ["done", "done", "stopped", "stopped"]
    assert site.entries["trial_003"].cause == "asha: eval_loss 3.5 after step 4"
    assert not [step for name, step in site.trained if name == "trial_003"]


def test_median_puts_a_trial_aside_for_those_that_have_not_begun(site):
    settings = {"grace_period": 1, "min_time_slice": 1, "hard_stop": False}
    site.sweep(at_once=1, scheduler=Scheduler("median", settings))
    given = [name for name, _ in site.given]
    assert sorted(given[:4]) == sorted(site.entries), "each has its turn before one has a second"
    assert len(given) > 4
    assert site.states() == ["done"] * 4


def test_lost_workers_cost_a_save_interval_and_no_trial(site):
    site.dies = {"trial_002": 5}
    site.sweep()
    assert site.states() == ["done"] * 4
    entry = site.entries["trial_002"]
    assert (entry.failures, entry.attempts) == (1, 2)
    steps = [step for name, step in site.trained if name == "trial_002"]
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert [report.step for report in entry.reports] == list(range(1, 9))
    assert site.num_slots == 3


def test_a_trial_that_always_dies_fails_and_the_others_do_not(site):
    site.dies, site.dies_once = {"trial_002": 5}, False
    site.sweep(max_failures=2)
    assert site.states() == ["done", "failed", "done", "done"]
    assert site.entries["trial_002"].cause == "rank 0 died, more than ray_max_failures=2 times."
    assert site.entries["trial_002"].failures == 3


def test_the_same_defect_twice_is_enough(site):
    site.dies, site.dies_once = {"trial_002": 5}, False
    site.loss = Loss("rank 0 failed: KeyError: 'x'", may_mend=False)
    site.sweep(max_failures=-1)
    assert site.entries["trial_002"].state == "failed"
    assert site.entries["trial_002"].failures == 2


def test_an_error_of_one_trial_leaves_its_workers(site):
    site.fails = {"trial_001": 3}
    site.sweep(at_once=1)
    assert site.states() == ["failed", "done", "done", "done"]
    assert site.entries["trial_001"].cause == "loss=nan"
    assert site.num_slots == 1


def test_three_that_fail_alike_before_any_succeeds_end_the_sweep(tmp_path):
    site = Site(tmp_path, values=range(1, 9))
    site.fails, site.why = dict.fromkeys(site.values, 3), StoreError(f"{tmp_path}/a1b2c3d4 is full")
    assert site.sweep() == sweeping.ALIKE
    assert site.states().count("failed") in (3, 4)
    assert site.states().count("pending") >= 4


def test_losses_that_are_no_numbers_end_no_sweep(tmp_path):
    site = Site(tmp_path, values=range(1, 6))
    site.fails = dict.fromkeys(["trial_001", "trial_002", "trial_003"], 3)
    assert site.sweep() is None
    assert site.states() == ["failed"] * 3 + ["done"] * 2


def test_signal_saves_and_leaves_the_rest(site):
    def heard(entry, message):
        if message.kind == "record" and message.content[0]["current_steps"] == 3:
            site.signals.seen.append("SIGTERM")

    assert site.sweep(heard=heard) == "SIGTERM"
    assert site.states() == ["pending"] * 4
    assert site.over == []
    before = list(site.trained)
    site.signals.seen.clear()
    assert site.sweep() is None
    assert site.states() == ["done"] * 4
    again = [told for told in site.trained[len(before) :] if told in before]
    assert again == [], "what was saved is not repeated"


def test_time_budget_stops_what_runs(site):
    assert site.sweep(time_budget_s=1e-9) == ledger.OUT_OF_TIME
    assert set(site.states()) <= {"pending", "stopped"}


@pytest.mark.parametrize(("kind", "at"), [("none", 13), ("hyperband", 10), ("hyperband", 30)])
def test_more_time_lets_trials_go_on_from_where_they_were(tmp_path, monkeypatch, kind, at):
    """An hour is over at some record: what ran is kept, and nothing of it is repeated."""
    site, began = of_ten(tmp_path), sweeping.time.monotonic()
    run, _ = a_sweep(output_dir=str(tmp_path / "out"))
    ledger.begin(str(tmp_path), run)

    def heard(entry, message):
        if message.kind == "record" and len(site.trained) == at:
            monkeypatch.setattr(sweeping.time, "monotonic", lambda: began + 3700)

    scheduler = HYPERBAND if kind == "hyperband" else Scheduler("none", {})
    said = site.sweep(scheduler=scheduler, time_budget_s=3600, heard=heard)
    assert said == ledger.OUT_OF_TIME
    cut = [name for name, e in site.entries.items() if e.cause == ledger.OUT_OF_TIME]
    assert cut
    site.entries |= ledger.resume(str(tmp_path), run, "eval_loss")
    assert site.sweep(scheduler=scheduler, time_budget_s=3600) is None
    assert set(site.states()) <= {"done", "stopped"}
    for name in cut:
        steps = [step for n, step in site.trained if n == name]
        assert steps == list(range(1, max(steps) + 1))
        assert site.entries[name].cause != ledger.OUT_OF_TIME
    whole = of_ten(tmp_path / "whole")
    whole.sweep(scheduler=scheduler)
    assert site.states() == whole.states(), "the scheduler judged as if time had not been short"


def test_finished_trials_are_not_run_again(site):
    site.sweep()
    entries = {name: ledger.read(entry.run_dir) for name, entry in site.entries.items()}
    entries["trial_003"].state = "pending"
    site.entries.update(entries)
    site.given.clear()
    site.sweep()
    assert [name for name, _ in site.given] == ["trial_003"]


def test_files_that_could_not_be_copied_are_copied_when_the_sweep_goes_on(site):
    """A full disk, or the driver's end, after a trial was noted as over."""
    site.is_full = True
    with pytest.raises(StoreError, match="no space left"):
        site.sweep()
    kept = {name: ledger.read(str(site.directory / name)) for name in site.entries}
    [name] = [name for name, entry in kept.items() if entry and entry.is_over]
    assert (kept[name].state, kept[name].is_left) == ("done", False)
    site.entries |= {n: e for n, e in kept.items() if e}
    for entry in site.entries.values():
        entry.state = "pending" if entry.state == "running" else entry.state
    site.given.clear()
    site.sweep()
    assert name not in dict(site.given), "it is not trained again"
    assert sorted(site.over) == sorted(site.entries)
    assert ledger.read(str(site.directory / name)).is_left
    site.over.clear()
    site.sweep()
    assert site.over == [], "what is there is not copied again"


def test_trials_of_another_shape_get_workers_of_their_own(site):
    site.shape = lambda entry: Shape(Placement(entry.number % 2 + 1, {"CPU": 1.0}, "PACK"), ())
    site.sweep(at_once=1)
    assert site.states() == ["done"] * 4
    slots = dict(site.given)
    assert slots["trial_001"] == slots["trial_003"] != slots["trial_002"]


def test_optuna_proposes_as_many_as_were_asked_for(tmp_path):
    pytest.importorskip("optuna")
    site = Site(tmp_path, values=())
    sweep = dataclasses.replace(SWEEP, searcher="optuna", num_samples=5)
    site.sweep(searcher=Asked(sweep))
    assert site.states() == ["done"] * 5
    assert len({entry.values["x"] for entry in site.entries.values()}) == 5
