"""A sweep on Ray, the driver's side: `llmray tune x.yaml`.

Connects, makes data ready once for all trials that share it, lets warm groups of workers train one
trial after another, and leaves table, best run file and plot. Trials are train jobs; the loop is
`sweeping`.

Ray Tune's schedulers judge, but its Tuner does not drive: a trial of a Tuner would start an actor,
Ray Train's controller and its workers anew, each of which imports torch for as long as a short
trial takes.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from logging import getLevelName, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from llmray import store
from llmray.arguments import reward_sets
from llmray.arguments.cluster import ClusterArguments
from llmray.arguments.tune import Sweep, sweep_of
from llmray.data.prepared import PreparedRef
from llmray.errors import ClusterError
from llmray.orchestration import actors, cluster, ledger, prepare_job, train_job
from llmray.orchestration import board as boards
from llmray.orchestration.board import Job, Message
from llmray.orchestration.ledger import OUT_OF_TIME, Entry
from llmray.orchestration.plan import (
    Inventory,
    Placement,
    Role,
    capacity,
    groups_at_once,
    left_beside,
    place,
)
from llmray.orchestration.searching import Asked, Listed, Searcher, Values
from llmray.orchestration.slots import Slot
from llmray.orchestration.sweeping import (
    ALIKE,
    Plan,
    Shape,
    Sweeping,
    exit_code,
    is_warning,
)
from llmray.orchestration.train_job import DriverSignals, Stopped
from llmray.stop_signals import EXIT_CODES
from llmray.sweep import report, results, scheduling
from llmray.sweep.lengths import lengths_at_ends, lengths_of
from llmray.sweep.trials import (
    Trial,
    is_possible,
    run_of,
    runs_at_ends,
    runs_by_rewards,
    sweep_directory,
    sweep_name,
    trials_of,
)
from llmray.train.observers import describe

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = getLogger("llmray")

SLOTS = ".slots"  # in the sweep's run directory: Ray Train's own files
TRIAL_LOG = "trial.log"
# keys that change a process for good: trials that differ in one get processes of their own
OF_PROCESS = ("enable_liger_kernel", "full_determinism", "ddp_timeout", "master_addr")


def tune(
    arguments: RunArguments, *, resumes: bool = False, core: Callable[..., Any] | None = None
) -> int:
    """Run a sweep; returns the exit code: 0, or that of the signal that stopped it.

    Args:
        arguments: the run with its section `tune`, paths absolute.
        resumes: go on with what an earlier driver left, and repeat nothing that ended.
        core: what each worker calls with (arguments, context) in place of `run.run`.

    Raises:
        LlmrayError: with one message for the user.
    """
    sweep = sweep_of(arguments)
    joined = cluster.connect(arguments.cluster)
    try:
        with DriverSignals() as signals:
            log.info("%s", joined)
            if joined.is_ours:
                os.environ.setdefault(train_job.PREEMPTION_ENV, "0")
            driver = _Driver(arguments, sweep, signals, joined.is_ours, core)
            return driver.run(resumes=resumes)
    except Stopped as stop:
        log.info("stopped by %s", stop.reason)
        return EXIT_CODES[stop.reason]
    finally:
        ray.shutdown()


@dataclass
class _Driver:
    arguments: RunArguments
    sweep: Sweep
    signals: DriverSignals
    is_ours: bool
    core: Callable[..., Any] | None
    entries: dict[str, Entry] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)  # by the arguments that decide them
    said: set[str] = field(default_factory=set)  # warnings of trials
    began: float = field(default_factory=time.monotonic)
    steps_before: int = 0
    roles: Sequence[Role] = ()  # of reward models that stay for the whole sweep
    rewards: actors.Actors = field(default_factory=actors.Actors)
    board: ActorHandle | None = None  # of reward models
    room: Inventory | None = None  # what they leave of the cluster, once they are there

    @cached_property
    def run_dir(self) -> str:
        """The sweep's directory on shared storage, in which those of trials lie."""
        return store.join(self.arguments.cluster.storage_path, sweep_name(self.arguments))

    @cached_property
    def inventory(self) -> Inventory:
        """What the cluster has."""
        return cluster.inventory()

    @cached_property
    def environment(self) -> prepare_job.Environment:
        """What tasks and workers get of this process's."""
        return train_job.tasks_environment(self.is_ours)

    def run(self, *, resumes: bool) -> int:
        self._check()
        self._open_ledger(resumes=resumes)
        asks = self.sweep.searcher == "optuna"
        searcher = self._asked() if asks else Listed()
        waiting = [_trial(entry) for entry in self.entries.values() if not entry.is_over]
        runs = [run_of(self.arguments, trial) for trial in waiting]
        for run in runs:  # all data before the first trial
            self._data(run)
        self._start_rewards([*runs, *(runs_by_rewards(self.arguments, self.sweep) if asks else ())])
        with closing(self.rewards):
            loop = self._loop(searcher)
            try:
                stopped = loop.run()
            finally:
                self._leave_outputs()
        ran = sum(1 for entry in self.entries.values() if entry.attempts)
        for line in loop.spent.lines(ran, self.prepared.values()):
            log.info("%s", line)
        if stopped not in EXIT_CODES:
            results.refuse_failure(self._failures(stopped))
        return exit_code(stopped)

    def _asked(self) -> Asked:
        can_be = partial(is_possible, self.arguments, self.sweep)
        return Asked(self.sweep, self.entries.values(), can_be)

    def _check(self) -> None:
        """Compare needs with what is there, before anything is written or loaded."""
        arguments = self.arguments
        runs = runs_by_rewards(arguments, self.sweep)
        sets = reward_sets.of_runs(runs)
        self.roles = actors.roles_of(sets)
        try:
            placement = self._placement(arguments)
            asks = self.sweep.searcher == "optuna"
            ends = runs_at_ends(arguments, self.sweep) if asks else ()
            for run in (*runs, *ends):  # which may differ in what they need
                self._placement(run)
        except ClusterError as error:
            if not (keys := reward_sets.differing(sets)):
                raise
            raise ClusterError(
                f"{error} Trials differ in {', '.join(keys)}, so that each value has reward models "
                "of its own, which stay for the whole sweep: search it without the others, or not."
            ) from error
        for note in placement.notes:
            log.info("%s", note)
        here = ray.get_runtime_context().get_node_id()
        others = [node for node in self._nodes(placement) if node.node_id != here]
        train_job.check_nodes(arguments, self.run_dir, others, self.environment.open_vars)
        actors.check(runs, sets, placement, self.inventory, os.getcwd())

    def _start_rewards(self, runs: Sequence[RunArguments]) -> None:
        """Make the actors of all reward models that these runs ask, and note what room they leave.

        Raises:
            LlmrayError: a reward model is not there, or does not fit.
        """
        sets = reward_sets.of_runs(runs)
        self.roles = actors.roles_of(sets)
        placement = self._placement(self.arguments)
        if sets:
            log.info("for all trials: %s", "; ".join(map(str, placement.roles)))
            name = f"llmray-board-{uuid.uuid4().hex}"
            self.board = boards.create(name)
            with self.signals.interrupting():
                words = sets, placement, self.inventory, name, self.environment
                self.rewards = actors.start(*words)
        self.room = left_beside(placement.roles, self.inventory, self.rewards.node_ids)

    def _loop(self, searcher: Searcher) -> Sweeping:
        placement = self._placement(self.arguments)
        at_once = self._at_once(placement)
        log.info("trials at a time: %d, of %s", at_once, placement)
        return Sweeping(
            sweep=self.sweep,
            entries=self.entries,
            searcher=searcher,
            plan_of=self._plan,
            new_entry=self._new_entry,
            settings_of=self._settings,
            open_slot=self._open_slot,
            at_once=at_once,
            max_failures=self.arguments.cluster.ray_max_failures,
            signals=self.signals,
            say=self._say,
            settled=self._settled,
            heard=self._heard,
        )

    def _open_ledger(self, *, resumes: bool) -> None:
        """The trials that are known now, those of an earlier driver as it left them."""
        if resumes:
            self.entries |= ledger.resume(self.run_dir, self.arguments, self.sweep.metric)
        else:
            ledger.begin(self.run_dir, self.arguments)
        asks = self.sweep.searcher == "optuna"
        listed = [] if asks else trials_of(self.sweep)
        # of optuna's each is told of all before it
        begun = [entry.number for entry in self.entries.values() if asks and entry.has_begun]
        ledger.leave_out(
            self.entries, max([self.sweep.num_samples if asks else len(listed), *begun])
        )
        for trial in listed:
            if trial.name not in self.entries:
                self.entries[trial.name] = self._entry(trial)
        for entry in self.entries.values():
            entry.write()
        self.steps_before = sum(entry.step for entry in self.entries.values())

    def _entry(self, trial: Trial) -> Entry:
        run = run_of(self.arguments, trial)
        return Entry(trial.number, trial.name, dict(trial.values), train_job.run_directory(run))

    def _new_entry(self, values: Values) -> Entry:
        return self._entry(Trial(len(self.entries) + 1, values))

    def _placement(self, run: RunArguments) -> Placement:
        """The placement of a trial's workers; on cores, max_concurrent trials share them."""
        arguments, use_cpu = run.cluster, run.training.use_cpu
        placement = self._placed(arguments, use_cpu)
        wished = self.sweep.max_concurrent or 1
        if placement.uses_gpu or arguments.resources_per_worker is not None or wished == 1:
            return placement
        number = placement.num_workers * wished
        try:
            wide = arguments.model_copy(update={"ray_num_workers": number})
            resources = self._placed(wide, use_cpu).resources
        except ClusterError:
            resources = {"CPU": 1.0}
        narrow = arguments.model_copy(update={"resources_per_worker": resources})
        return self._placed(narrow, use_cpu)

    def _placed(self, arguments: ClusterArguments, use_cpu: bool) -> Placement:
        """Workers beside the reward models, which hold their places or are yet to come."""
        # a number that is asked for: what one trial leaves of the cluster, others take
        arguments = arguments.model_copy(update={"ray_num_workers": arguments.num_workers})
        if self.room is not None:
            return place(arguments, self.room, use_cpu=use_cpu)
        return place(arguments, self.inventory, use_cpu=use_cpu, roles=self.roles)

    def _at_once(self, placement: Placement) -> int:
        """How many trials train at a time."""
        room = self.room or self.inventory
        fit, wished = groups_at_once(placement, room), self.sweep.max_concurrent
        if wished is not None and wished > fit:
            log.info("max_concurrent=%d: the cluster holds %d trials at a time", wished, fit)
        elif wished is None and fit == 1:
            log.info(
                "one trial at a time: each takes what the cluster has; smaller "
                "resources_per_worker, or max_concurrent, let several run"
            )
        return max(1, min(fit, wished or fit))

    def _nodes(self, placement: Placement) -> list[Any]:
        """The nodes that can hold a worker."""
        nodes = self.inventory.nodes
        return [n for n in nodes if capacity(n, placement.resources)] or list(nodes)

    def _data(self, run: RunArguments) -> Any:
        """The run's prepared data, made by the first trial that asks for such."""
        decides = {**run.data.model_dump(), **run.model.model_dump(), **run.rlhf.model_dump()}
        words = [run.finetuning.stage, run.training.seed]
        key = json.dumps([decides, words], sort_keys=True, default=str)
        if key not in self.prepared:
            here = ray.get_runtime_context().get_node_id()
            nodes = self._nodes(self._placement(run))
            with self.signals.interrupting():
                found = prepare_job.prepare(run, nodes, here, self.environment)
            self.prepared[key] = found
        return self.prepared[key]

    def _plan(self, entry: Entry) -> Plan:
        run = run_of(self.arguments, _trial(entry))
        placement = self._placement(run)
        placement = Placement(placement.num_workers, placement.resources, placement.strategy)
        flat = run.flat()
        job = Job(
            arguments=run,
            run_dir=entry.run_dir,
            prepared=self._data(run),
            threads=placement.resources.get("CPU"),
            uses_gpu=placement.uses_gpu,
            secrets=dict(self.environment.secrets),
            core=self.core,
            log_level=log.getEffectiveLevel(),
            holds=placement.resources,
            folder=os.getcwd(),
            metric=self.sweep.metric,
            group=sweep_name(self.arguments),
            num_trials=max(len(self.entries), self.sweep.num_samples),
            seats=self.rewards.seats_of(run),
        )
        return Plan(run, Shape(placement, tuple(flat[key] for key in OF_PROCESS)), job)

    def _settings(self) -> dict[str, Any]:
        """The scheduler's settings, within which all trials lie."""
        if self.sweep.scheduler.kind == "none":
            return {}
        runs = [run_of(self.arguments, _trial(entry)) for entry in self.entries.values()]
        refs = [self._data(run) for run in runs]
        rows = [ref.num_train if isinstance(ref, PreparedRef) else None for ref in refs]
        known = lengths_of(zip(runs, rows, strict=True))
        if self.sweep.searcher == "optuna":
            most = max((number for number in rows if number is not None), default=None)
            known += lengths_at_ends(self.arguments, self.sweep, most)
        return scheduling.settings(self.sweep.scheduler, *known)

    def _open_slot(self, number: int, plan: Plan) -> Slot:
        slot = Slot(
            number,
            plan.run,
            store.join(self.run_dir, SLOTS, f"slot_{number}"),
            plan.shape.placement,
            dict(self.environment.open_vars),
        )
        slot.start()
        return slot

    def _heard(self, entry: Entry, message: Message) -> None:
        """Keep a trial's lines in its folder; its warnings are shown, each once."""
        if message.kind == "hung":
            self.rewards.kill_hung(*message.content)
            return
        if message.kind == "log":
            level, text = message.content
            line = text if level <= 20 else f"{getLevelName(level).lower()}: {text}"
            if is_warning(message) and text not in self.said:
                self.said.add(text)
                log.log(level, "%s: %s", entry.name, text)
        elif message.kind == "record":
            line = describe(message.content[0])
        else:
            return
        path = Path(sweep_directory(self.arguments), entry.name, TRIAL_LOG)
        with store.explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(line + "\n")

    def _settled(self, entry: Entry) -> None:
        """A trial is over: its files, and a line."""
        output_dir = store.join(sweep_directory(self.arguments), entry.name)
        if entry.state != "failed":
            train_job.leave_files(entry.run_dir, output_dir)
        if entry.metric is not None and entry.state != "failed":
            said = f"{self.sweep.metric} {entry.metric:.6g}"
            why = f" ({entry.cause})" if entry.cause else ""
            log.info("%s %s: %s after step %d%s", entry.name, entry.state, said, entry.step, why)

    def _say(self) -> None:
        is_open = self.sweep.searcher == "optuna"
        line = report.progress(
            self.sweep,
            self._results(),
            elapsed_s=time.monotonic() - self.began,
            num_trials=self.sweep.num_samples if is_open else None,
            steps_before=self.steps_before,
        )
        log.info("%s", line)

    def _results(self) -> list[results.TrialResult]:
        return [_result(entry) for entry in self.entries.values()]

    def _leave_outputs(self) -> None:
        """The files and the table of the sweep, as far as it has come."""
        slots = store.join(self.run_dir, SLOTS)
        if store.exists(slots):
            store.remove(slots)
        found = self._results()
        folder = results.write(self.arguments, self.sweep, found)
        print(report.table(self.sweep, found), flush=True)
        if told := report.ties(self.sweep, found):
            log.info("%s", told)
        if results.best_of(self.sweep, found) is not None:
            log.info("results are in %s; train the best again: %s", folder, folder / results.BEST)

    def _failures(self, stopped: str | None) -> list[results.TrialResult]:
        """All trials; where the rest was given up, those alone that failed before."""
        found = self._results()
        return [one for one in found if one.state == "failed"] if stopped == ALIKE else found


def _trial(entry: Entry) -> Trial:
    return Trial(entry.number, entry.values)


STATES: dict[ledger.State, results.State] = {
    "pending": "waiting",
    "paused": "waiting",
    "running": "running",
    "done": "finished",
    "stopped": "stopped early",
    "failed": "failed",
}


def _result(entry: Entry) -> results.TrialResult:
    """The entry as the outputs of a sweep show it."""
    curve = [(report.step, report.value) for report in entry.reports]
    last = entry.metric if entry.state == "done" else None
    if last is not None and (not curve or curve[-1][1] != last):
        # of an evaluation at the end, or of the best weights
        curve = [*(point for point in curve if point[0] < entry.step), (entry.step, last)]
    return results.TrialResult(
        _trial(entry),
        "out of time" if entry.cause == OUT_OF_TIME else STATES[entry.state],
        tuple(curve),
        steps=entry.step,
        total_steps=entry.total_steps or None,
        seconds=entry.seconds,
        error=entry.cause if entry.state == "failed" else None,
    )
