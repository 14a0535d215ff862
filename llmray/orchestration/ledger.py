"""The ledger of a sweep: what each trial is and how far it came, in a file of its run directory.

Written at every change, whole or not at all: a sweep whose driver died goes on from these files and
repeats no trial that had ended. What the sweep itself is lies beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from logging import getLogger
from typing import TYPE_CHECKING, Any, Literal

from llmray import store
from llmray.arguments.tune import resolve
from llmray.errors import CheckpointError, StoreError
from llmray.orchestration.verdicts import Report
from llmray.sweep.results import BEST, PICTURE, TABLE
from llmray.sweep.trials import sweep_directory
from llmray.train import checkpoint
from llmray.train.observers import LOG_NAME, records_of

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = getLogger("llmray")

NAME = "trial.json"
SWEEP_NAME = "sweep.json"
TRIAL = re.compile(r"trial_\d+")
RESULTS = re.compile(rf"{TRIAL.pattern}|{'|'.join(map(re.escape, (TABLE, BEST, PICTURE)))}")
VERSION = 1
# what may be another when a sweep goes on
MAY_CHANGE = (
    "tune",
    "overwrite_output_dir",
    "ray_max_failures",
    "ray_init_kwargs",
    "disable_tqdm",
    "report_to",
)
MAY_CHANGE_IN_TUNE = ("num_samples", "max_concurrent", "time_budget_s")

OUT_OF_TIME = "time_budget_s"  # why trials ended whose sweep had no more time

State = Literal["pending", "running", "paused", "done", "stopped", "failed"]
OVER: tuple[State, ...] = ("done", "stopped", "failed")


@dataclass
class Entry:
    """A trial: its values, its state, and what it reported; the driver alone changes it."""

    number: int  # from 1
    name: str
    values: dict[str, Any]
    run_dir: str
    state: State = "pending"
    step: int = 0
    total_steps: int = 0
    reports: list[Report] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)  # of each report among those of all trials
    metric: float | None = None  # at its end, or as reported last
    seconds: float = 0.0  # in workers, over all attempts
    attempts: int = 0
    failures: int = 0  # how often its workers were lost
    cause: str | None = None  # why it stopped early or failed
    is_left: bool = False  # whether its files are where results lie

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be done for it."""
        return self.state in OVER

    @property
    def has_begun(self) -> bool:
        """Whether workers ever had it."""
        return self.state != "pending" or self.attempts > 0

    @property
    def is_at_end(self) -> bool:
        """Whether it came to its last step, and only its files may be missing."""
        return 0 < self.total_steps <= self.step

    def forget_after(self, step: int) -> None:
        """Drop the reports of updates after `step`, which will come again."""
        kept = [number for number, report in enumerate(self.reports) if report.step <= step]
        self.reports = [self.reports[number] for number in kept]
        self.orders = [self.orders[number] for number in kept]
        self.step = step

    def write(self) -> None:
        """Keep it in the trial's run directory.

        Raises:
            StoreError: it cannot be written.
        """
        content = {"version": VERSION, **asdict(self)}
        store.write_atomic(store.join(self.run_dir, NAME), json.dumps(content) + "\n")


def read(run_dir: str) -> Entry | None:
    """What is kept of the trial with that run directory; None where there is nothing.

    Raises:
        StoreError: it is damaged, or of another version.
    """
    path = store.join(run_dir, NAME)
    try:
        content = json.loads(store.read_bytes(path))
        if content.pop("version") != VERSION:
            raise ValueError("another version of llmray wrote it")
        reports = [Report(**report) for report in content.pop("reports")]
        return Entry(**content, reports=reports)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}). What a sweep left is required to go on with it. "
            "Write overwrite_output_dir: true to begin anew."
        ) from error


def begin(run_dir: str, arguments: RunArguments) -> None:
    """Note what a new sweep is; what an earlier one left is moved aside where the run says so.

    Raises:
        CheckpointError: an earlier sweep lies there.
    """
    earlier = list(_kept(run_dir))
    if earlier and not arguments.training.overwrite_output_dir:
        over = sum(1 for entry in earlier if entry.is_over)
        raise CheckpointError(
            f"{run_dir} holds a sweep of {len(earlier)} trials, of which {over} are over. Write "
            "resume=true behind the file to go on with it, overwrite_output_dir: true to begin "
            "anew, or another output_dir."
        )
    if arguments.training.overwrite_output_dir:
        _results_aside(sweep_directory(arguments))
    for entry in earlier:
        checkpoint.aside(entry.run_dir)
        store.remove_file(store.join(entry.run_dir, NAME))
    store.write_atomic(store.join(run_dir, SWEEP_NAME), json.dumps(_described(arguments)) + "\n")


def resume(run_dir: str, arguments: RunArguments, metric: str) -> dict[str, Entry]:
    """The trials that an earlier driver left, by name; those that failed or ran are to go on.

    So are those that the time budget ended, from their checkpoints.

    Raises:
        CheckpointError: the sweep that lies there is another one.
        StoreError: a file is damaged.
    """
    path = store.join(run_dir, SWEEP_NAME)
    if not store.exists(path):
        log.info("resume=true: %s holds no sweep, so that this is its beginning", run_dir)
        begin(run_dir, arguments)
        return {}
    wrong = list(_differences(json.loads(store.read_bytes(path)), _described(arguments)))
    if wrong:
        raise CheckpointError(
            f"{run_dir} holds another sweep: {'; '.join(wrong)}. To go on the same keys are "
            "required: write them as they were, or choose another output_dir."
        )
    found = {entry.name: entry for entry in _kept(run_dir)}
    for entry in found.values():
        if entry.state == "failed":
            entry.state, entry.cause, entry.failures = "pending", None, 0
        elif entry.cause == OUT_OF_TIME:
            entry.state, entry.cause = "pending", None
        elif entry.state == "running":
            entry.state = "pending"
            entry.attempts = max(1, entry.attempts)
            _adopt(entry, metric)
    over = sum(1 for entry in found.values() if entry.is_over)
    log.info("going on with the sweep in %s: %d trials are over", run_dir, over)
    return found


def leave_out(entries: dict[str, Entry], num_trials: int) -> None:
    """Drop the trials beyond so many that no worker ever had: fewer are asked for than before."""
    names = [name for name, e in entries.items() if e.number > num_trials and not e.has_begun]
    for name in names:
        store.remove_file(store.join(entries.pop(name).run_dir, NAME))
    if names:
        log.info("%d trials that had not begun are left out: %s", len(names), ", ".join(names))


def told(entries: Iterable[Entry]) -> list[tuple[Entry, Report]]:
    """What all trials reported after an update, in the order in which it came."""
    found = [
        (order, entry, report)
        for entry in entries
        for order, report in zip(entry.orders, entry.reports, strict=True)
        if report.step
    ]
    found.sort(key=lambda each: each[0])
    return [(entry, report) for _, entry, report in found]


def recover(entry: Entry, metric: str, step: int, order: int) -> int:
    """Take reports that were lost with their workers from the run's own log.

    A checkpoint may be of an update that rank 0 did not come to tell of.

    Args:
        entry: the trial.
        metric: a key of trainer_log.jsonl.
        step: the update from which it goes on.
        order: of the first of them among the reports of all trials.

    Returns: how many there were.
    """
    try:
        records = records_of(store.read_bytes(store.join(entry.run_dir, LOG_NAME)).decode())
    except (FileNotFoundError, ValueError):
        return 0
    known = max((report.step for report in entry.reports), default=0)
    lost = [r for r in records if known < r["current_steps"] <= step and metric in r]
    for number, record in enumerate(lost):
        value = float(record[metric])
        report = Report(record["current_steps"], float(record["epoch"]), entry.seconds, value)
        entry.reports.append(report)
        entry.orders.append(order + number)
        entry.metric = value
    return len(lost)


def _adopt(entry: Entry, metric: str) -> None:
    """Take note of an end that came after its driver's."""
    try:
        results = json.loads(store.read_bytes(store.join(entry.run_dir, "all_results.json")))
        records = records_of(store.read_bytes(store.join(entry.run_dir, LOG_NAME)).decode())
    except (FileNotFoundError, ValueError):
        return
    is_whole = bool(records) and records[-1]["current_steps"] >= records[-1]["total_steps"]
    if is_whole and metric in results:
        entry.state, entry.metric = "done", results[metric]
        entry.step = entry.total_steps = records[-1]["total_steps"]
        entry.write()


def _results_aside(output_dir: str) -> None:
    """Move what an earlier sweep left to `.replaced`; an older `.replaced` is removed."""
    names = [name for name in store.list_names(output_dir) if RESULTS.fullmatch(name)]
    if not names:
        return
    replaced = store.join(output_dir, checkpoint.REPLACED)
    store.remove(replaced)
    for name in names:
        store.move(store.join(output_dir, name), store.join(replaced, name))
    log.warning(
        "%s of an earlier sweep were moved to %s; the next such sweep removes them",
        ", ".join(names) if len(names) < 5 else f"{len(names)} files and folders",
        replaced,
    )


def _kept(run_dir: str) -> Iterator[Entry]:
    for name in store.list_names(run_dir):
        entry = read(store.join(run_dir, name)) if TRIAL.fullmatch(name) else None
        if entry is not None:
            yield entry


def _described(arguments: RunArguments) -> dict[str, Any]:
    """What a sweep is: what must be the same when it goes on."""
    flat = {key: value for key, value in arguments.flat().items() if key not in MAY_CHANGE}
    section = arguments.tune.tune or {}
    told = {key: value for key, value in section.items() if key not in MAY_CHANGE_IN_TUNE}
    told["searcher"] = resolve(arguments)[0].searcher  # not given, it hangs on num_samples
    described: dict[str, Any] = json.loads(json.dumps({**flat, "tune": told}, default=str))
    return described


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(set(there) | set(here)):
        if there.get(key) != here.get(key):
            yield f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
