"""`llmray tune --dry-run`: the trials of a sweep, what each needs, and what all are to cost.

Nothing is trained, prepared or started; of a model on a hub only the small files are fetched.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from llmray import hub, store
from llmray.arguments import derived, environment, reward_sets
from llmray.arguments.problems import shown
from llmray.arguments.reward_sets import RewardSet
from llmray.arguments.run import RunArguments
from llmray.arguments.space import Dimension, Values
from llmray.arguments.tune import Sweep, sweep_of
from llmray.model.architecture import UnknownSizesError
from llmray.model.memory import Estimate, estimate_for, gigabytes
from llmray.sweep.lengths import lengths_at_ends
from llmray.sweep.report import aligned
from llmray.sweep.results import TABLE
from llmray.sweep.scheduling import Length, expected_steps, length_by_rows, rungs, settings
from llmray.sweep.trials import (
    Trial,
    by_data,
    data_key,
    run_of,
    runs_by_rewards,
    sweep_directory,
    trials_of,
)

MOST_SHOWN = 40  # trials
PRECISION_OF = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Plan:
    """What a sweep will be: its trials as far as they are known, and what they need.

    `trials` are those that are listed, or one for each end of each range where a searcher chooses.
    `rows` has the rows to train on by the key of each prepared data set, None where it is yet to be
    prepared; `lengths` the length of each trial, as far as its rows are known, and `chosen` those
    that a searcher may come to. `rewards` are the reward models that stay for the whole sweep.
    """

    num_trials: int
    trials: Sequence[Trial]
    rows: Mapping[str, int | None]
    lengths: Mapping[str, Length]
    chosen: Sequence[Length]
    memory: Mapping[str, Estimate]
    rewards: Sequence[RewardSet]


def show(base: RunArguments) -> int:
    """Print what the sweep of a run file would do; returns the exit code.

    Raises:
        LlmrayError: a model or a data set is missing.
    """
    sweep = sweep_of(base)
    print(text(base, sweep, plan(base, sweep, root=environment.prepared_directory(os.environ))))
    return 0


def plan(base: RunArguments, sweep: Sweep, *, root: Path) -> Plan:
    """Look at a sweep.

    Args:
        base: the run file, its paths absolute.
        sweep: its section.
        root: where prepared data lies on this machine.

    Raises:
        LlmrayError: a model or a data set is missing.
    """
    asks = sweep.searcher == "optuna"
    trials = _ends(sweep) if asks else trials_of(sweep)
    runs = {trial.name: run_of(base, trial) for trial in trials}
    places = by_data(runs, lambda run: data_key(run, root))
    rows = {key: _rows(key, root) for key in places}
    lengths = {
        name: length
        for key, names in places.items()
        for name in names
        if (length := length_by_rows(runs[name], rows[key])) is not None
    }
    most = max((number for number in rows.values() if number is not None), default=None)
    chosen = lengths_at_ends(base, sweep, most) if asks else []
    memory = {name: found for name, run in runs.items() if (found := _memory(run)) is not None}
    number = sweep.num_samples if asks else len(trials)
    rewards = reward_sets.of_runs(runs_by_rewards(base, sweep))
    return Plan(number, trials, rows, lengths, chosen, memory, rewards)


def text(base: RunArguments, sweep: Sweep, found: Plan) -> str:
    """The plan for a reader: facts, one a line, then the trials."""
    facts = {
        "sweep": f"{sweep_directory(base)}: {_counted(found.num_trials, 'trial')}, searcher "
        f"{sweep.searcher}, seed {sweep.seed}",
        "metric": f"{sweep.metric}, {'less' if sweep.mode == 'min' else 'more'} is better",
        "scheduler": _scheduler(sweep, found),
        "workers": _workers(base, sweep),
        "rewards": _rewards(base, found),
        "data": _data(found),
        "steps": _steps(sweep, found),
        "memory": _most_memory(found),
        "time": _time(base, sweep, found),
    }
    facts = {name: value for name, value in facts.items() if value}
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", _table(sweep, found)])


def _ends(sweep: Sweep) -> list[Trial]:
    different: list[Values] = []
    for _, values in sweep.space.probes():
        if values not in different:
            different.append(values)
    return [Trial(number, values) for number, values in enumerate(different, 1)]


def _rows(key: str, root: Path) -> int | None:
    """The rows of prepared data, which is at a place of its own or in the store; None: not yet."""
    place = key if "/" in key else str(root / key)
    if not store.is_committed(place):
        return None
    return int(store.read_manifest(place).metadata["counts"]["train_rows"])


def _memory(run: RunArguments) -> Estimate | None:
    """What a worker holds at most, its rows as long as they may be; None: sizes are not known."""
    on_gpu = "GPU" in run.cluster.resources and not run.training.use_cpu
    usual = "bf16" if on_gpu else "fp32"
    asked = derived.compute_dtype(run)
    precision = "pure_bf16" if run.finetuning.pure_bf16 else PRECISION_OF.get(asked or "", usual)
    lengths = [run.data.cutoff_len] * run.training.per_device_train_batch_size
    try:
        return estimate_for(
            run,
            hub.resolve(run.model.model_name_or_path, run.model, weights=False),
            lengths,
            precision,
            recomputes=run.model.disable_gradient_checkpointing is False,
            device="cuda" if on_gpu else "cpu",
            num_workers=run.cluster.num_workers,
        )
    except UnknownSizesError:
        return None


def _scheduler(sweep: Sweep, found: Plan) -> str:
    kind = sweep.scheduler.kind
    if kind == "none":
        return "none: every trial is trained to its end"
    if not found.lengths:
        return f"{kind}: its settings follow from the steps of a trial"
    set_to = settings(sweep.scheduler, *found.lengths.values(), *found.chosen)
    said = ", ".join(f"{key} {shown(value)}" for key, value in set_to.items())
    where = (
        f"; compares at {', '.join(f'{at:g}' for at in rungs(set_to))}" if kind == "asha" else ""
    )
    return f"{kind}: {said}{where}"


def _workers(base: RunArguments, sweep: Sweep) -> str:
    given = base.cluster.resources_per_worker
    each = (
        json.dumps(given)
        if given is not None
        else "a GPU where the cluster has one, else a share of its cores"
    )
    at_once = (
        f"{_counted(sweep.max_concurrent, 'trial')} at a time"
        if sweep.max_concurrent
        else "as many trials at a time as the cluster holds"
    )
    budget = f", none after {timedelta(seconds=sweep.time_budget_s)}" if sweep.time_budget_s else ""
    return f"{base.cluster.num_workers} a trial with {each}; {at_once}{budget}"


def _rewards(base: RunArguments, found: Plan) -> str:
    """The actors of reward models, and what the cluster needs at least; empty without any."""
    if not found.rewards:
        return ""
    said, needed = [], _times(base.cluster.resources_per_worker, base.cluster.num_workers)
    for one in found.rewards:
        number, each = one.run.rlhf.reward_num_actors or 1, one.run.rlhf.reward_resources_per_actor
        what = "a GPU, or a core where there is none" if each is None else json.dumps(each)
        said.append(f"{_counted(number, 'actor')} of {one.short}{one.apart} with {what}")
        taken = _times(each, number)
        if needed is None or taken is None:
            needed = None
        else:
            needed = {k: needed.get(k, 0) + taken.get(k, 0) for k in {**needed, **taken}}
    least = f", {json.dumps(needed)} with one trial" if needed is not None else ""
    return f"{'; '.join(said)}: for the whole sweep{least}"


def _times(resources: Mapping[str, Any] | None, number: int) -> dict[str, float] | None:
    return None if resources is None else {key: v * number for key, v in resources.items()}


def _data(found: Plan) -> str:
    shared = f"{_counted(len(found.rows), 'prepared set')} for all trials"
    known = [rows for rows in found.rows.values() if rows is not None]
    if not known:
        return f"{shared}, to be prepared (`llmray prepare` says how many rows)"
    missing = len(found.rows) - len(known)
    more = f"; {missing} to be prepared" if missing else ", prepared"
    return f"{shared}: {', '.join(map(str, known))} rows to train on{more}"


def _steps(sweep: Sweep, found: Plan) -> str:
    if len(found.lengths) < len(found.trials):
        return "known once the data is prepared, or max_steps given"
    whole, expected = _all_steps(sweep, found)
    if expected == whole:
        return f"{whole:g} of all trials together"
    return (
        f"{whole:g} of all trials together, of which {sweep.scheduler.kind} leaves {expected:.0f}"
    )


def _all_steps(sweep: Sweep, found: Plan) -> tuple[float, float]:
    """The updates of all trials, and those that the scheduler leaves."""
    lengths = list(found.lengths.values())
    share = found.num_trials / len(lengths)
    whole = share * sum(length.total_steps for length in lengths)
    return whole, share * expected_steps(sweep.scheduler, lengths)


def _most_memory(found: Plan) -> str:
    if not found.memory:
        return "not known for this architecture"
    name = max(found.memory, key=lambda each: found.memory[each].peak)
    most = found.memory[name]
    return (
        f"at most {gigabytes(most.peak)} a worker ({name}), rows of cutoff_len and no recomputation"
    )


def _time(base: RunArguments, sweep: Sweep, found: Plan) -> str:
    measured = _seconds_per_step(Path(sweep_directory(base), TABLE))
    if measured is None:
        return "not known before a trial ran here; the line of progress tells it"
    if len(found.lengths) < len(found.trials):
        return f"{measured:.2f} s a step, as trials here took"
    at_once = sweep.max_concurrent or 1
    left = timedelta(seconds=round(_all_steps(sweep, found)[1] * measured / at_once))
    return f"{left} at {measured:.2f} s a step, as trials here took, {at_once} at a time"


def _seconds_per_step(path: Path) -> float | None:
    """What trials of an earlier sweep took."""
    if not path.is_file():
        return None
    rows = list(csv.DictReader(path.read_text().splitlines()))
    steps = sum(float(row["steps"] or 0) for row in rows)
    return sum(float(row["seconds"] or 0) for row in rows) / steps if steps else None


def _table(sweep: Sweep, found: Plan) -> str:
    keys = sweep.space.keys
    if sweep.searcher == "optuna":
        rows = [["key", "drawn from", "when"]]
        rows += [
            [d.key, _range(d), ", ".join(f"{k} in {shown(v)}" for k, v in d.when.items())]
            for d in sweep.space.dimensions
        ]
        rows += [[f"variant {n}", shown(v), ""] for n, v in enumerate(sweep.space.variants, 1)]
        return aligned(rows)
    rows = [["trial", *keys]]
    for trial in found.trials[:MOST_SHOWN]:
        cells = [shown(trial.values[key]) if key in trial.values else "" for key in keys]
        rows.append([trial.name, *cells])
    rest = len(found.trials) - MOST_SHOWN
    return aligned(rows) + (f"\n… and {rest} more" if rest > 0 else "")


def _range(dimension: Dimension) -> str:
    found = dimension.distribution
    ends = found.values if found.is_list else (found.low, found.high)
    return f"{found.kind} {shown(list(ends))}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
