"""The trials of a sweep: which values each has, and the run that each is.

Those of a grid and of a random search are known before any starts; a searcher that learns asks for
one after another, and `Trial.of` names them alike.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmray import hub, store
from llmray.arguments import reward_sets, tune_rules
from llmray.arguments.loading import with_problems
from llmray.arguments.problems import Problem, raise_all
from llmray.arguments.run import RunArguments
from llmray.arguments.space import Distribution, Space, Values
from llmray.arguments.tune import Sweep
from llmray.data import prepared
from llmray.errors import ArgumentsError

ATTEMPTS = 200  # draws for one that differs from all before it


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its number, from 1, and the values in which it differs."""

    number: int
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name, which is that of its folder too."""
        return f"trial_{self.number:03d}"


def trials_of(sweep: Sweep) -> list[Trial]:
    """All trials of a grid or a random search, the same for the same sweep; no two are alike.

    Raises:
        ValueError: the searcher chooses by results.
    """
    if sweep.searcher == "optuna":
        raise ValueError("trials of searcher optuna are known one by one")
    generator = random.Random(sweep.seed)
    space = sweep.space
    if sweep.searcher == "grid":
        points, repeats = list(space.grid()), 1
    else:
        fixed = [d.key for d in space.choices if d.distribution.kind == "grid"]
        points, repeats = list(space.grid(only=fixed)), sweep.num_samples
    found: list[Values] = []
    for _ in range(repeats):
        for point in points:
            values = _drawn(space, point, generator, found)
            if values is not None:
                found.append(values)
    return [Trial(number, values) for number, values in enumerate(found, 1)]


def _drawn(
    space: Space, point: Values, generator: random.Random, found: Sequence[Values]
) -> Values | None:
    """Values at a point of the grid that differ from all found; None where none seem to."""
    for _ in range(ATTEMPTS):
        values = space.assemble(lambda key, d: point[key] if key in point else d.draw(generator))
        if values not in found:
            return values
    return None


def run_of(base: RunArguments, trial: Trial) -> RunArguments:
    """The run that a trial is: the base's keys and the trial's own, with its own folder and names.

    Its folder lies in that of the sweep, with Ray as without; trackers get the sweep's name and the
    trial's.

    Raises:
        ArgumentsError: the trial's values are wrong.
    """
    arguments, problems = _laid_over(base, trial)
    raise_all(problems, trial.name)
    return arguments


def is_possible(base: RunArguments, sweep: Sweep, values: Mapping[str, Any]) -> bool:
    """Whether these values make a run that trains and logs the metric."""
    return not tune_rules.of_trial(sweep, values, partial(with_problems, base))


def runs_by_rewards(base: RunArguments, sweep: Sweep) -> list[RunArguments]:
    """Runs that ask all reward models that trials of a sweep may ask.

    Those of trials that are known; where a searcher chooses, one for each choice that it may make
    of what decides a reward model.
    """
    if sweep.searcher != "optuna":
        return [run_of(base, trial) for trial in trials_of(sweep)]
    space = reward_sets.space_of(sweep.space)
    return runs_with(base, [space.assemble(partial(_value_at, at)) for at in space.grid()])


def runs_at_ends(base: RunArguments, sweep: Sweep) -> list[RunArguments]:
    """Runs with each end of each range and each choice of a sweep, one at a time."""
    return runs_with(base, [values for _, values in sweep.space.probes()])


def runs_with(base: RunArguments, points: Iterable[Values]) -> list[RunArguments]:
    """Runs with these values each, whether or not all of them go together."""
    return [_laid_over(base, Trial(1, values))[0] for values in points]


def _value_at(chosen: Mapping[str, Any], key: str, found: Distribution) -> Any:
    """A value at a point of a grid; of a key that cannot be counted its first end."""
    return chosen[key] if key in chosen else found.ends()[0]


def _laid_over(base: RunArguments, trial: Trial) -> tuple[RunArguments, list[Problem]]:
    name = sweep_name(base)
    keys: dict[str, Any] = {
        "tune": None,
        "overwrite_output_dir": False,
        "resume_from_checkpoint": None,
        "output_dir": store.join(sweep_directory(base), trial.name),
        "ray_storage_path": store.join(base.cluster.storage_path, name),
        "ray_run_name": trial.name,
        "use_ray": True,
    }
    tracking = base.tracking
    if set(tracking.report_to) - {"none"} or tracking.use_swanlab:
        keys["run_name"] = f"{tracking.run_name or name}/{trial.name}"
    if tracking.swanlab_run_name is not None:
        keys["swanlab_run_name"] = f"{tracking.swanlab_run_name}/{trial.name}"
    if tracking.logging_dir is not None:
        keys["logging_dir"] = store.join(tracking.logging_dir, trial.name)
    return with_problems(base, keys | dict(trial.values))


def sweep_directory(base: RunArguments) -> str:
    """The folder of the sweep's results, in which those of its trials lie.

    Raises:
        ArgumentsError: there is none.
    """
    if base.training.output_dir is None:
        raise ArgumentsError("output_dir is missing. A sweep needs a folder for its results.")
    return base.training.output_dir.rstrip("/")


def sweep_name(base: RunArguments) -> str:
    """The sweep's name, which is also the group of its trials in trackers."""
    return base.cluster.ray_run_name or os.path.basename(sweep_directory(base))


KeyOf = Callable[[RunArguments], str]


def by_data(runs: Mapping[str, RunArguments], key_of: KeyOf) -> dict[str, list[str]]:
    """The names of runs that share one prepared data set, by its content key.

    Args:
        runs: name to arguments.
        key_of: the content key of a run's data, such as `data_key` with a folder.
    """
    groups: dict[str, list[str]] = {}
    for name, arguments in runs.items():
        groups.setdefault(key_of(arguments), []).append(name)
    return groups


def data_key(arguments: RunArguments, root: Path) -> str:
    """The content key of a run's prepared data.

    Args:
        arguments: of the run.
        root: where prepared data lies on this machine.

    Raises:
        LlmrayError: the model or a data set is missing.
    """
    model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
    place = arguments.data.tokenized_path
    return place or prepared.key_of(arguments, model_dir, root=root)
