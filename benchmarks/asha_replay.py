"""ASHA on the recorded curves of a grid: what it would have chosen, and how many steps it saves.

    python benchmarks/asha_replay.py --record MODEL --curves curves.json   # trains the grid, once
    python benchmarks/asha_replay.py --sweep saves/tune-sft --curves curves.json   # or reads it
    python benchmarks/asha_replay.py --curves curves.json --json asha_replay.json

A replay trains nothing: the trials come in the order that a seed draws, two at a time, and at each
evaluation Ray Tune's own scheduler says what becomes of the trial, as in a sweep. Exits with 1
unless in at least 8 of 10 seeds the choice is within 1 % of the grid's best metric with at most
half of the grid's steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import Report

from llmray.arguments.loading import load, replace
from llmray.arguments.space import Space
from llmray.arguments.tune import Mode, Scheduler, Sweep, sweep_of
from llmray.orchestration import verdicts
from llmray.sweep.results import State, TrialResult, best_of, read_curve
from llmray.sweep.scheduling import Length, settings
from llmray.sweep.trials import Trial, run_of, trials_of
from llmray.train.plots import Points

ROOT = Path(__file__).parents[1]
SEEDS, ENOUGH = 10, 8
TOLERANCE, MOST_STEPS = 0.01, 0.5
GRID = {
    "learning_rate": {"grid": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]},
    "lora_rank": {"grid": [4, 8, 16]},
}


@dataclass(frozen=True)
class Grid:
    """A recorded grid: the values of each trial, and its (step, metric) points."""

    metric: str
    mode: Mode
    eval_steps: int
    total_steps: int
    values: list[dict[str, Any]]
    curves: list[Points]

    @property
    def best(self) -> float:
        """The best metric of a trial at its end."""
        ends = [curve[-1][1] for curve in self.curves]
        return min(ends) if self.mode == "min" else max(ends)


def main() -> None:
    """Record where asked for, then replay."""
    options = _options()
    if options.record:
        recorded = record(options.record, options.steps, options.every, options.work)
        options.curves.write_text(json.dumps(asdict(recorded)) + "\n")
    elif options.sweep:
        options.curves.write_text(json.dumps(asdict(read(options.sweep))) + "\n")
    told = json.loads(options.curves.read_text())
    told["curves"] = [[(step, value) for step, value in curve] for curve in told["curves"]]
    grid = Grid(**told)
    report = Report(
        f"ASHA on {len(grid.curves)} recorded trials of {grid.total_steps} steps",
        ["seed", "choice", grid.metric, "from the grid's best", "steps of the grid's", "holds"],
    )
    factor = {"reduction_factor": options.reduction_factor}
    scheduler = Scheduler("asha", {"time_attr": "current_steps", "brackets": 1, **factor})
    held = 0
    for seed in range(SEEDS):
        chosen, steps = replay(grid, scheduler, seed, options.at_once)
        value = grid.curves[chosen][-1][1]
        apart = abs(value - grid.best) / abs(grid.best)
        share = steps / (len(grid.curves) * grid.total_steps)
        holds = apart <= TOLERANCE and share <= MOST_STEPS
        held += holds
        named = ", ".join(f"{key} {value:g}" for key, value in grid.values[chosen].items())
        report.rows.append(
            [seed, named, f"{value:.4f}", f"{apart:.2%}", f"{share:.0%}", "yes" if holds else "no"]
        )
    report.facts.append(f"{held} of {SEEDS} seeds hold; {ENOUGH} are required")
    report.facts.append(f"the grid's best {grid.metric} is {grid.best:.4f}")
    if held < ENOUGH:
        report.failures.append(f"{held} of {SEEDS} seeds")
    report.publish(options.json)


def record(model: str, steps: int, every: int, work: Path) -> Grid:
    """Train the grid in this process, one trial after another; nothing stops one early."""
    from llmray import local

    base = load(
        {
            "model_name_or_path": model,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "dataset": "demo_persona,demo_dialogues",
            "dataset_dir": str(ROOT / "data"),
            "cutoff_len": 128,
            "val_size": 8,
            "output_dir": str(work),
            "overwrite_output_dir": True,
            "per_device_train_batch_size": 2,
            "max_steps": steps,
            "eval_strategy": "steps",
            "eval_steps": every,
            "logging_steps": every,
            "save_strategy": "no",
            "tune": {"search": GRID},
        },
        environ={},
    )
    sweep = sweep_of(base)
    for trial in trials_of(sweep):
        code = local.train(replace(run_of(base, trial), use_ray=False, overwrite_output_dir=True))
        if code:
            raise SystemExit(code)  # a signal ended it
    trials = trials_of(sweep)
    curves = [read_curve(str(work / trial.name), sweep.metric) for trial in trials]
    return _grid(sweep.metric, sweep.mode, [dict(trial.values) for trial in trials], curves)


def read(directory: Path) -> Grid:
    """The grid of a sweep whose trials were all trained to their end, from its folder."""
    with (directory / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0])
    metric, keys = columns[columns.index("step") - 1], columns[2 : columns.index("step") - 1]
    curves = [read_curve(str(directory / row["trial"]), metric) for row in rows]
    values = [{key: float(row[key]) for key in keys} for row in rows]
    mode = "min" if metric.endswith("loss") else "max"
    return _grid(metric, mode, values, curves)


def _grid(metric: str, mode: Mode, values: list[dict[str, Any]], curves: list[Points]) -> Grid:
    steps = [[step for step, _ in curve] for curve in curves]
    if not steps[0] or any(other != steps[0] for other in steps):
        raise SystemExit(f"not all trials were evaluated at the same steps: {steps}")
    return Grid(metric, mode, steps[0][0], steps[0][-1], values, curves)


def replay(grid: Grid, scheduler: Scheduler, seed: int, at_once: int) -> tuple[int, int]:
    """The number of the trial that a sweep would have chosen, and the steps of all its trials."""
    length = Length(grid.total_steps, grid.total_steps, grid.eval_steps)
    judge = verdicts.Verdicts(
        scheduler.kind,
        settings(scheduler, length),
        metric=grid.metric,
        mode=grid.mode,
        seed=seed,
    )
    order = list(range(len(grid.curves)))
    random.Random(seed).shuffle(order)
    for number in order:
        judge.add(str(number))
    at: dict[int, int] = {}  # how many evaluations of a trial were seen
    running: list[int] = []
    ended: dict[int, State] = {}
    while len(ended) < len(order):
        waiting = [str(number) for number in order if number not in at]
        while len(running) < at_once and (name := judge.next(waiting)) is not None:
            waiting.remove(name)
            running.append(int(name))
            at[int(name)] = 0
            judge.started(name)
        for number in list(running):
            step, value = grid.curves[number][at[number]]
            at[number] += 1
            is_last = at[number] == len(grid.curves[number])
            said = judge.judge(str(number), verdicts.Report(step, 1.0, float(step), value))
            if is_last or said == "stop":
                ended[number] = "finished" if is_last else "stopped early"
                judge.ended(str(number))
                running.remove(number)
    return _chosen(grid, at, ended), sum(grid.curves[n][at[n] - 1][0] for n in at)


def _chosen(grid: Grid, at: Mapping[int, int], ended: Mapping[int, State]) -> int:
    """The best trial as a sweep picks it."""
    none = Scheduler("none", {})
    sweep = Sweep(Space(), "grid", 1, grid.metric, grid.mode, none, None, None, 0)
    results = [
        TrialResult(Trial(number, {}), ended[number], tuple(grid.curves[number][: at[number]]))
        for number in at
    ]
    best = best_of(sweep, results)
    assert best is not None, "every trial was evaluated"
    return best.trial.number


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", type=Path, required=True, help="where curves are kept")
    parser.add_argument("--record", metavar="MODEL", help="train the grid with this model first")
    parser.add_argument("--sweep", type=Path, help="or read it from the folder of a sweep")
    parser.add_argument("--work", type=Path, default=Path("saves/asha-replay"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=3, help="steps between two evaluations")
    parser.add_argument("--at-once", type=int, default=2, help="trials at a time")
    parser.add_argument("--reduction-factor", type=float, default=4)
    parser.add_argument("--json", type=Path, help="JSON of the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
