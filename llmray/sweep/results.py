"""What trials came to, and the files of a sweep: results.csv, best.yaml, tune.png.

Each file is written whole at any time, of a sweep that goes on too; `report` says the same on a
terminal.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Literal

from llmray import store
from llmray.arguments.loading import replace
from llmray.arguments.problems import one_line
from llmray.arguments.run import RunArguments
from llmray.arguments.tune import Sweep
from llmray.errors import TrainingError
from llmray.sweep import picture
from llmray.sweep.trials import Trial, run_of, sweep_directory, sweep_name
from llmray.train.observers import LOG_NAME, records_of
from llmray.train.plots import Points, curve

log = getLogger("llmray")

State = Literal["waiting", "running", "finished", "stopped early", "out of time", "failed"]
# states in which a trial does nothing more
ENDED: tuple[State, ...] = ("finished", "stopped early", "out of time", "failed")

TABLE, BEST, PICTURE = "results.csv", "best.yaml", "tune.png"


@dataclass(frozen=True)
class TrialResult:
    """How far a trial has come.

    `curve` has the (step, metric) points of its evaluations, `steps` the steps that it has done of
    `total_steps`, where these are known; `seconds` are those that its workers had, over all its
    attempts. `ends_with_best` says whether its weights are those of its best evaluation
    (load_best_model_at_end) instead of the last one.
    """

    trial: Trial
    state: State = "waiting"
    curve: tuple[tuple[int, float], ...] = ()
    steps: int = 0
    total_steps: int | None = None
    seconds: float = 0.0
    error: str | None = None
    ends_with_best: bool = False

    def point(self, sweep: Sweep) -> tuple[int, float] | None:
        """The step and the metric of the trial's weights; None before its first evaluation."""
        found = [(step, value) for step, value in self.curve if not math.isnan(value)]
        if not found or not self.ends_with_best:
            return found[-1] if found and found[-1] == self.curve[-1] else None
        choose = min if sweep.mode == "min" else max
        return choose(found, key=lambda point: point[1])

    def value(self, sweep: Sweep) -> float | None:
        """The metric by which the trial is compared."""
        point = self.point(sweep)
        return None if point is None else point[1]


def read_curve(directory: str, metric: str) -> Points:
    """The (step, metric) points in the log of a run's directory; none where there is no log."""
    try:
        text = store.read_bytes(store.join(directory, LOG_NAME)).decode()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return curve(records_of(text), metric)


def ranked(sweep: Sweep, results: Sequence[TrialResult]) -> list[TrialResult]:
    """The trials from best to worst: those that were trained to their end, others, failed ones.

    A trial that was stopped early is never better than one that was not: its run file trains to
    the end, and to another metric.
    """
    sign = 1 if sweep.mode == "min" else -1

    def place(result: TrialResult) -> tuple[bool, bool, bool, float, int]:
        value = result.value(sweep)
        return (
            result.state == "failed",
            value is None,
            result.state != "finished",
            0.0 if value is None else sign * value,
            result.trial.number,
        )

    return sorted(results, key=place)


def best_of(sweep: Sweep, results: Sequence[TrialResult]) -> TrialResult | None:
    """The best trial, None where none has a metric."""
    first = ranked(sweep, results)[:1]
    is_one = first and first[0].state != "failed" and first[0].value(sweep) is not None
    return first[0] if is_one else None


def refuse_failure(results: Sequence[TrialResult]) -> None:
    """Raise where no trial came to anything, with the first one's cause.

    Raises:
        TrainingError: all trials failed.
    """
    failed = [result for result in results if result.state == "failed"]
    if not failed or len(failed) < len(results):
        return
    first = min(failed, key=lambda result: result.trial.number)
    others = {result.error for result in failed} - {first.error}
    more = f" {len(others)} other causes stand in {TABLE}." if others else ""
    raise TrainingError(
        f"all {len(failed)} trials failed. {first.trial.name}: {first.error or 'no cause is known'}"
        f"{more} Mend that, and run the sweep again."
    )


def write(base: RunArguments, sweep: Sweep, results: Sequence[TrialResult]) -> Path:
    """Write the files of a sweep into its folder, which is returned.

    Args:
        base: the run file of the sweep.
        sweep: what it searches.
        results: of all trials so far.

    Raises:
        StoreError: they cannot be written, since the disk is full or the folder read-only.
    """
    folder = Path(sweep_directory(base))
    with store.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    store.write_atomic(folder / TABLE, table_of(sweep, results))
    best = best_of(sweep, results)
    if best is not None:
        store.write_atomic(folder / BEST, best_file(base, sweep, best, len(results)))
        _draw(sweep, results, folder / PICTURE)
    return folder


def _draw(sweep: Sweep, results: Sequence[TrialResult], path: Path) -> None:
    try:
        picture.draw(sweep, ranked_columns(sweep, results), path)
    except OSError:  # as of the other files
        raise
    except Exception as error:  # a boundary: what trials came to is not lost for its picture
        log.warning("%s is not drawn: %s: %s", path, type(error).__name__, error)


def table_of(sweep: Sweep, results: Sequence[TrialResult]) -> str:
    """results.csv: one line a trial, in their order."""
    keys = sweep.space.keys
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", *keys, sweep.metric, "step", "steps", "seconds", "error"])
    for result in sorted(results, key=lambda found: found.trial.number):
        step, value = result.point(sweep) or ("", "")
        writer.writerow(
            [
                result.trial.name,
                result.state,
                *(_cell(result.trial.values, key) for key in keys),
                value,
                step,
                result.steps,
                round(result.seconds, 1),
                (result.error or "").splitlines()[0] if result.error else "",
            ]
        )
    return text.getvalue()


def _cell(values: Mapping[str, Any], key: str) -> Any:
    """A value in a table; nothing where the trial has the run file's own."""
    value = values.get(key, "")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else value


def best_file(base: RunArguments, sweep: Sweep, best: TrialResult, num_trials: int) -> str:
    """best.yaml: a run file that trains the best trial again, beside the sweep's trials."""
    step, value = best.point(sweep) or (0, math.nan)
    run = run_of(base, best.trial)
    name = f"{sweep_name(base)}_best"
    keys: dict[str, Any] = {
        "output_dir": store.join(sweep_directory(base), "best"),
        "ray_storage_path": base.cluster.storage_path,
        "ray_run_name": name,
    }
    if run.tracking.run_name is not None:
        keys["run_name"] = name
    if base.tracking.logging_dir is not None:
        keys["logging_dir"] = store.join(base.tracking.logging_dir, "best")
    told = {key: _cell(best.trial.values, key) for key in best.trial.values}
    values = one_line(", ".join(f"{key}={value}" for key, value in told.items()))
    remark = "" if best.state == "finished" else f" It was {best.state}: trained on, it differs."
    return (
        f"# The best of {num_trials} trials is {best.trial.name}: {values}\n"
        f"# {sweep.metric} {value:.6g} after step {step}.{remark}\n"
        f"#   llmray train {store.join(sweep_directory(base), BEST)}\n\n"
        f"{replace(run, **keys).yaml(leave_out_defaults=True)}"
    )


def ranked_columns(sweep: Sweep, results: Sequence[TrialResult]) -> list[picture.Line]:
    """What the picture shows of each trial that was evaluated, best first."""
    return [
        picture.Line(result.trial.name, result.trial.values, result.curve, value)
        for result in ranked(sweep, results)
        if (value := result.value(sweep)) is not None
    ]
