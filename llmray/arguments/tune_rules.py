"""What the section `tune` means for the run's keys: whatever is wrong before any trial starts.

Every end of every range and every choice is laid over the run and checked as a run file is; what
the run alone has wrong is not said again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

from llmray.arguments import best, names, reward_sets, tune
from llmray.arguments.problems import Problem, given, plain_types, requirement, shown
from llmray.arguments.run import FIELDS, RunArguments
from llmray.arguments.space import Distribution, Space, Values

# lays keys over the run: the arguments, and what is wrong with them
LayOver = Callable[[Mapping[str, Any]], tuple[RunArguments, list[Problem]]]

# keys that no trial may change, and why
OF_A_TRIAL = "every trial has its own, which llmray chooses"
OF_THE_SWEEP = "it is the same for all trials"
NOT_SEARCHED: dict[str, str] = {
    "output_dir": OF_A_TRIAL,
    "ray_run_name": OF_A_TRIAL,
    "run_name": OF_A_TRIAL,
    "swanlab_run_name": OF_A_TRIAL,
    "logging_dir": OF_A_TRIAL,
    "overwrite_output_dir": OF_A_TRIAL,
    "resume_from_checkpoint": OF_A_TRIAL,
    "tune": OF_THE_SWEEP,
    "use_ray": OF_THE_SWEEP,
    "ray_storage_path": OF_THE_SWEEP,
    "ray_init_kwargs": OF_THE_SWEEP,
    "do_train": "every trial trains",
    "eval_strategy": OF_THE_SWEEP,
    "metric_for_best_model": OF_THE_SWEEP,
    "greater_is_better": OF_THE_SWEEP,
}
# keys that change what a preference loss is, so that two of its values say nothing of two trials
OF_THE_LOSS = (
    "pref_beta",
    "pref_loss",
    "pref_ftx",
    "pref_bco_weight",
    "dpo_label_smoothing",
    "ld_alpha",
    "simpo_gamma",
    "kto_chosen_weight",
    "kto_rejected_weight",
)
# metrics that contain pref_beta as a factor
SCALED = ("rewards/chosen", "rewards/rejected", "rewards/margins")
# keys that change which rows and tokens an evaluation is over
OF_THE_EVALUATION = (
    "stage",
    "template",
    "cutoff_len",
    "train_on_prompt",
    "mask_history",
    "default_system",
    "dataset",
    "eval_dataset",
    "max_samples",
    "val_size",
)
MANY_SETS = 32  # choices of what reward models are, one for each group of actors
CHECKED_TRIALS = 200  # points of a grid whose combination is checked, beside all ends


def broken(arguments: RunArguments, lay_over: LayOver) -> list[Problem]:
    """All that is wrong with the sweep of a run, where it has one."""
    if arguments.tune.tune is None:
        return []
    return [
        *search_is_well_formed(arguments),
        *trials_train(arguments),
        *searched_keys_exist(arguments),
        *ranges_fit_the_key(arguments),
        *searched_values_are_right(arguments, lay_over),
        *hyperband_compares_trials(arguments),
        *loss_compares_trials(arguments),
        *grids_are_whole(arguments),
        *draws_differ(arguments),
        *reward_models_are_known(arguments),
    ]


def search_is_well_formed(arguments: RunArguments) -> Iterator[Problem]:
    """The section says what may be read."""
    yield from tune.resolve(arguments)[1]


def trials_train(arguments: RunArguments) -> Iterator[Problem]:
    """What does not train has nothing to compare."""
    if not arguments.training.do_train:
        yield Problem(
            ("tune", "do_train"),
            "tune: do_train=false, but every trial trains. Write do_train: true.",
        )


def searched_keys_exist(arguments: RunArguments) -> Iterator[Problem]:
    """Only keys of a run are searched, and not those that a sweep sets itself."""
    known = _known()
    for key in _sweep(arguments).space.keys:
        if key in NOT_SEARCHED:
            yield _problem(f"{key} cannot be searched: {NOT_SEARCHED[key]}. Remove it.")
        elif key not in known:
            close = get_close_matches(key, known, n=1, cutoff=0.6)
            advice = f"Did you mean {close[0]}?" if close else "`llmray args` lists all keys."
            yield _problem(f"{key} is no key of llmray. {advice} Otherwise remove it.")


def ranges_fit_the_key(arguments: RunArguments) -> Iterator[Problem]:
    """A range is for numbers, and one that draws fractions not for whole numbers."""
    for dimension in _sweep(arguments).space.dimensions:
        key, found = names.ALIASES.get(dimension.key, dimension.key), dimension.distribution
        if key not in FIELDS or found.is_list:
            continue
        types = plain_types(FIELDS[key])
        if _is_no_number(key):
            yield _problem(
                f"{key} has no range: it requires {requirement(FIELDS[key])}. Write choice with "
                "a list of values."
            )
        elif _draws_fractions(found) and (float not in types or (int in types and found.high > 1)):
            yield _problem(
                f"{key}: {found.kind} draws fractions, but a whole number is required. Write "
                "randint, or quniform with whole numbers."
            )


def searched_values_are_right(arguments: RunArguments, lay_over: LayOver) -> Iterator[Problem]:
    """Every end of a range, every choice and every point of a grid makes a run that can be."""
    sweep = _sweep(arguments)
    known = set(_known()) - set(NOT_SEARCHED)
    known -= {
        d.key for d in sweep.space.dimensions if not d.distribution.is_list and _is_no_number(d.key)
    }
    space = sweep.space.restricted(known)
    trials = [values for _, values in space.probes()] or [{}]
    grid = islice(space.grid(), CHECKED_TRIALS)
    trials += [_values_at(space, chosen) for chosen in grid]
    alone, wrong = lay_over({"tune": None})
    said = {problem.text for problem in wrong}
    of_all = {problem.text for problem in _without_metric(alone, sweep)}
    for values in trials:
        wrong = of_trial(sweep, values, lay_over)
        new = [problem for problem in wrong if problem.text not in said]
        said |= {problem.text for problem in new}
        for problem in new:
            where = "" if problem.text in of_all else _where(values, problem)
            yield Problem(("tune", *problem.keys), f"tune: {where}{problem.text}")


def of_trial(sweep: tune.Sweep, values: Mapping[str, Any], lay_over: LayOver) -> list[Problem]:
    """What is wrong with one trial of a sweep."""
    found, wrong = lay_over({"tune": None, **values})
    return [*wrong, *_without_metric(found, sweep)]


def hyperband_compares_trials(arguments: RunArguments) -> Iterator[Problem]:
    """Hyperband has a border before the end only where this is `reduction_factor` or later."""
    sweep, options = _sweep(arguments), arguments.training
    if sweep.scheduler.kind != "hyperband":
        return
    found = sweep.scheduler.settings
    end, said = found.get("max_t"), "max_t"
    if end is None and found["time_attr"] == "current_steps" and options.max_steps > 0:
        end, said = options.max_steps, "max_steps"
    elif end is None and found["time_attr"] == "epoch" and options.max_steps <= 0:
        end, said = round(options.num_train_epochs), "num_train_epochs"
    if end is None or said in sweep.space.keys or end >= found["reduction_factor"]:
        return
    other = " Or write time_attr: current_steps." if found["time_attr"] == "epoch" else ""
    yield _problem(
        f"scheduler hyperband: with {said}={end:g} and reduction_factor="
        f"{found['reduction_factor']:g} there is nothing before the end where trials are compared. "
        f"{said} must be reduction_factor at least: raise it, or lower reduction_factor.{other}"
    )


def loss_compares_trials(arguments: RunArguments) -> Iterator[Problem]:
    """Trials with different losses are not compared by their loss."""
    sweep = _sweep(arguments)
    if arguments.finetuning.stage not in ("dpo", "kto"):
        return
    kind = sweep.metric.removeprefix("eval_")
    searched = [key for key in sweep.space.keys if key in OF_THE_LOSS]
    if kind.endswith("loss") and searched:
        changed, why = searched, f"each value of {searched[0]} is another loss"
    elif "pref_beta" in searched and kind.endswith(SCALED):
        changed, why = ["pref_beta"], f"{kind} is a multiple of pref_beta itself"
    else:
        return
    advice = "Write metric: eval_rewards/accuracies, mode: max."
    if arguments.finetuning.stage == "kto":
        advice = (
            f"Stage kto logs nothing that compares them: search without {', '.join(changed)}, or "
            "train the trials with `llmray train` and compare what they answer."
        )
    yield _problem(
        f"metric={sweep.metric} says nothing of trials that differ in {', '.join(changed)}: {why}. "
        f"{advice}"
    )


def grids_are_whole(arguments: RunArguments) -> Iterator[Problem]:
    """A grid beside drawn values is known before these are: no draw decides whether it counts."""
    sweep = _sweep(arguments)
    if sweep.searcher != "random":
        return
    drawn = {d.key for d in sweep.space.dimensions if d.distribution.kind != "grid"}
    for dimension in sweep.space.dimensions:
        above = sorted(drawn & set(dimension.when))
        if dimension.distribution.kind == "grid" and above:
            names_them = ", ".join(above)
            yield _problem(
                f"{dimension.key}: grid counts when {names_them} is as it says, which is drawn, so "
                f"that not all of its values would be tried beside each. Write grid for "
                f"{names_them}, or choice for {dimension.key}."
            )


def draws_differ(arguments: RunArguments) -> Iterator[Problem]:
    """No more trials are asked for than there are different ones."""
    sweep = _sweep(arguments)
    if sweep.searcher == "grid" or any(search_is_well_formed(arguments)):
        return
    space = sweep.space
    if any(dimension.distribution.points() is None for dimension in space.dimensions):
        return
    fixed = [d.key for d in space.choices if d.distribution.kind == "grid"]
    points = 1
    if fixed and sweep.searcher == "random":
        points = sum(1 for _ in space.grid(only=fixed))
    wanted = sweep.num_samples * points
    there = sum(1 for _ in islice(space.grid(), wanted))
    if wanted > there:
        yield _problem(
            f"num_samples={sweep.num_samples} asks for {wanted} trials, but there are {there} "
            f"different ones. Write num_samples: {max(1, there // points)}, or searcher: grid "
            "without num_samples."
        )


def reward_models_are_known(arguments: RunArguments) -> Iterator[Problem]:
    """Reward models are loaded before the first trial, so their keys have values that are known."""
    sweep = _sweep(arguments)
    if sweep.searcher != "optuna" or not reward_sets.may_ask(arguments, sweep.space):
        return
    space = reward_sets.space_of(sweep.space)
    endless = [d.key for d in space.dimensions if d.distribution.points() is None]
    if endless or sum(1 for _ in islice(space.grid(), MANY_SETS + 1)) > MANY_SETS:
        keys = ", ".join(endless or [d.key for d in space.choices])
        yield _problem(
            f"searcher=optuna with {keys}, each value of which makes reward models of its own: "
            f"all are loaded before the first trial, so at most {MANY_SETS} values that are known "
            "by then are required. Write choice with a list, or searcher: random."
        )


def tune_remarks(arguments: RunArguments) -> list[str]:
    """What a sweep may do and still not mean."""
    sweep = _sweep(arguments)
    changed = [key for key in sweep.space.keys if key in OF_THE_EVALUATION]
    if arguments.tune.tune is None or not changed:
        return []
    return [
        f"tune: {', '.join(changed)} also changes what is evaluated, so that {sweep.metric} of two "
        "trials is over different rows or tokens"
    ]


def _sweep(arguments: RunArguments) -> tune.Sweep:
    """The sweep, without what is wrong in it."""
    return tune.resolve(arguments)[0]


def _is_no_number(key: str) -> bool:
    name = names.ALIASES.get(key, key)
    return name in FIELDS and not plain_types(FIELDS[name]) & {int, float}


def _known() -> list[str]:
    return [*FIELDS, *names.all_names()]


def _draws_fractions(found: Distribution) -> bool:
    if found.kind == "randint":
        return False
    parts: Sequence[Any] = (found.low, found.step) if found.kind == "quniform" else (0.5,)
    return not all(float(part).is_integer() for part in parts)


def _values_at(space: Space, chosen: Mapping[str, Any]) -> Values:
    """The values at a point of a grid; keys that cannot be counted at their first end."""
    return space.assemble(lambda key, d: chosen[key] if key in chosen else d.ends()[0])


def _where(values: Mapping[str, Any], problem: Problem) -> str:
    """The trial that has a problem, unless the problem's own text names what is wrong in it."""
    named = [given(name, value) for name, value in values.items() if name in problem.keys]
    if any(text in problem.text for text in named):
        return ""
    shown_values = ", ".join(given(name, value) for name, value in values.items())
    return f"a trial with {shown_values}: "


def _without_metric(arguments: RunArguments, sweep: tune.Sweep) -> Iterator[Problem]:
    """What keeps a trial from reporting the metric."""
    if arguments.training.eval_strategy == "no":
        yield Problem(
            ("eval_strategy",),
            f"trials are compared by {sweep.metric}, but eval_strategy=no: nothing is evaluated. "
            "Write eval_strategy: steps, eval_steps and eval_dataset or val_size.",
        )
        return
    logged = best.evaluation_metrics(arguments)
    if sweep.metric in logged:
        return
    close = get_close_matches(sweep.metric, logged, n=1, cutoff=0.7)
    advice = f"Write {close[0]}." if close else "Write one of these."
    if sweep.metric == "eval_accuracy":
        advice = "Write compute_accuracy: true to have it."
    yield Problem(
        ("tune", "metric"),
        f"metric={shown(sweep.metric)} is never logged: evaluations log {', '.join(logged)}. "
        f"{advice}",
    )


def _problem(text: str) -> Problem:
    return Problem(("tune",), f"tune: {text}")
