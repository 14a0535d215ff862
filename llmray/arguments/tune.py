"""Arguments of sweeps: the section `tune`, and what it says once it is read.

`resolve` reads the section of a run and says all that is wrong with its form; what it means for the
run's keys is checked in `tune_rules`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from llmray.arguments import best
from llmray.arguments.group import Field, Float, Group, Int, Object, TextOrObject
from llmray.arguments.problems import Problem, raise_all, shown, wrong_value
from llmray.arguments.space import Space, parse

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

Searcher = Literal["random", "grid", "optuna"]
Mode = Literal["min", "max"]
DRAWS = 8  # where num_samples is not given


class TuneArguments(Group):
    """What `llmray tune` varies."""

    tune: Object | None = Field(
        None,
        description="What `llmray tune` searches and how it compares: search, variants, searcher, "
        "num_samples, metric, mode, scheduler, max_concurrent, time_budget_s, seed (docs/tune.md).",
    )


class TuneSection(Group):
    """What the section `tune` of a run file may hold."""

    search: Object | None = Field(
        None,
        description="Keys to search, each with a distribution: choice, grid, uniform, loguniform, "
        "quniform or randint; `when` makes it count beside certain values of others alone.",
    )
    variants: tuple[dict[str, Any], ...] = Field(
        (), description="Mappings of keys to values, of which each trial takes one as a whole."
    )
    num_samples: Int | None = Field(
        None,
        ge=1,
        description="Trials that are drawn; beside `grid` so many at each of its points. Not "
        f"given: {DRAWS}, and 1 with searcher grid.",
    )
    metric: str | None = Field(
        None,
        min_length=1,
        description="Metric by which trials are compared, as evaluations log it; `eval_` may be "
        "left out. Not given: metric_for_best_model, else the stage's own.",
    )
    mode: Mode | None = Field(
        None, description="Whether less or more is better. Not given: as the metric is meant."
    )
    scheduler: TextOrObject = Field(
        "none",
        description="What stops trials early: none, asha, hyperband or median; its own settings as "
        "in {asha: {grace_period: 10}}.",
    )
    searcher: Searcher | None = Field(
        None,
        description="What chooses the values: random, grid or optuna. Not given: grid where all "
        "values are listed and num_samples is not given, else random.",
    )
    max_concurrent: Int | None = Field(
        None, ge=1, description="Trials at a time. Not given: as many as the cluster holds."
    )
    time_budget_s: Float | None = Field(
        None, gt=0, description="Seconds after which no trial goes on. Not given: no limit."
    )
    seed: Int | None = Field(
        None, ge=0, le=2**32 - 1, description="Seed of what is drawn. Not given: the run's seed."
    )


class NoSettings(Group):
    """Nothing stops a trial."""


class Timed(Group):
    """What all schedulers share."""

    time_attr: Literal["current_steps", "epoch", "time_total_s"] = Field(
        "current_steps", description="What the other settings are counted in."
    )


class AshaSettings(Timed):
    """Asynchronous successive halving, https://arxiv.org/abs/1810.05934."""

    max_t: Float | None = Field(
        None, gt=0, description="Where a trial is at its end. Not given: the steps of the run."
    )
    grace_period: Float | None = Field(
        None, gt=0, description="Where the first are stopped. Not given: the first evaluation."
    )
    reduction_factor: Float = Field(
        4, gt=1, description="One of so many trials goes on at each halving."
    )
    brackets: Int = Field(1, ge=1, description="Groups of trials with later and later halvings.")


class HyperbandSettings(Timed):
    """Hyperband, https://arxiv.org/abs/1603.06560."""

    max_t: Int | None = Field(
        None,
        ge=1,
        description="Where a trial is at its end, no less than reduction_factor. Not given: the "
        "length of the run; required with time_total_s.",
    )
    reduction_factor: Float = Field(3, gt=1, description="One of so many trials goes on.")
    stop_last_trials: bool | None = Field(
        None,
        description="Whether the last ones of a bracket end where it compares for the last time, "
        "at max_t or a little before. Not given: where max_t is less than the run; else they are "
        "trained to their end.",
    )


class MedianSettings(Timed):
    """The median rule of Vizier, https://research.google/pubs/pub46180/."""

    grace_period: Float | None = Field(
        None, ge=0, description="Where the first may be stopped. Not given: the first evaluation."
    )
    min_samples_required: Int = Field(
        3, ge=1, description="Trials with which one is compared at least."
    )
    min_time_slice: Float = Field(0, ge=0, description="How long a trial runs at least.")
    hard_stop: bool = Field(True, description="Whether a trial ends instead of being put aside.")


SCHEDULERS: dict[str, type[Group]] = {
    "none": NoSettings,
    "asha": AshaSettings,
    "hyperband": HyperbandSettings,
    "median": MedianSettings,
}
PBT = (
    "population based training is not possible: it changes the values of a trial that runs and "
    "goes on from another's checkpoint, which the training inside a trial never sees. Write asha, "
    "hyperband, median or none."
)
# of what evaluations log, where less is better; all losses beside
LESS_IS_BETTER = ("kl", "chosen_falls", "reward_rejected", "rewards/rejected", "logps/rejected")
# where the loss does not compare trials
METRIC_OF_STAGE = {"dpo": "eval_rewards/accuracies", "ppo": "eval_score"}


@dataclass(frozen=True)
class Scheduler:
    """What stops trials early, with its settings by Ray Tune's names; those not given left out."""

    kind: str
    settings: Mapping[str, Any]


NONE = Scheduler("none", {})


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for; everything that has a default has it.

    `num_samples` is the number of draws, at each point of the grid over keys that say `grid`; the
    searcher optuna draws so many in all. `metric` is a key of trainer_log.jsonl.
    """

    space: Space
    searcher: Searcher
    num_samples: int
    metric: str
    mode: Mode
    scheduler: Scheduler
    max_concurrent: int | None
    time_budget_s: float | None
    seed: int

    def is_better(self, value: float, than: float) -> bool:
        """Whether a trial with the metric `value` is better than one with `than`."""
        return value < than if self.mode == "min" else value > than


def sweep_of(arguments: RunArguments) -> Sweep:
    """The sweep of a run file.

    Raises:
        ArgumentsError: there is none, or its section is wrong; all problems in one.
    """
    sweep, problems = resolve(arguments)
    raise_all(problems, "tune")
    return sweep


def resolve(arguments: RunArguments) -> tuple[Sweep, list[Problem]]:
    """The sweep of a run, without what is wrong in it, and what is wrong with its form."""
    section, problems = _section(arguments.tune.tune or {})
    space, wrong = parse(section.search or {}, section.variants)
    problems += wrong
    if not (section.search or section.variants or problems):
        problems.append(
            _problem(
                "there is neither search nor variants, so nothing to try. Write such as search: "
                "{learning_rate: {loguniform: [1e-5, 1e-3]}}."
            )
        )
    scheduler, wrong = _scheduler(section.scheduler)
    problems += wrong
    searcher = section.searcher or _searcher(section, space)
    problems += _counts(section, space, searcher)
    metric, mode = _metric(section, arguments)
    sweep = Sweep(
        space=space,
        searcher=searcher,
        num_samples=section.num_samples or (1 if searcher == "grid" else DRAWS),
        metric=metric,
        mode=mode,
        scheduler=scheduler,
        max_concurrent=section.max_concurrent,
        time_budget_s=section.time_budget_s,
        seed=arguments.training.seed if section.seed is None else section.seed,
    )
    return sweep, problems


def _section(given: Mapping[str, Any]) -> tuple[TuneSection, list[Problem]]:
    """The section, with defaults in place of what is wrong."""
    fields = TuneSection.model_fields
    problems = []
    for key in [str(key) for key in given if key not in fields]:
        close = get_close_matches(key, fields, n=1, cutoff=0.6)
        advice = f"Did you mean {close[0]}?" if close else f"It takes {', '.join(fields)}."
        problems.append(
            _problem(
                f"{key} is no key of tune. {advice} Otherwise remove it; a key to search stands "
                "under search."
            )
        )
    known = {key: value for key, value in given.items() if key in fields and value is not None}
    try:
        return TuneSection.model_validate(known), problems
    except ValidationError as error:
        details: dict[str, list[Any]] = {}
        for detail in error.errors(include_url=False):
            details.setdefault(str(detail["loc"][0]), []).append(detail)
    for key, found in details.items():
        wrong = wrong_value(key, known[key], fields[key], found)
        problems.append(Problem(("tune", key), f"tune: {wrong.text}"))
    rest = {key: value for key, value in known.items() if key not in details}
    return TuneSection.model_validate(rest), problems


def _scheduler(given: str | Mapping[str, Any]) -> tuple[Scheduler, list[Problem]]:
    if isinstance(given, Mapping) and len(given) != 1:
        return NONE, [
            _problem(
                f"scheduler={shown(given)}: one name with its settings is required. Write such as "
                "{asha: {grace_period: 10}}."
            )
        ]
    name, settings = (given, {}) if isinstance(given, str) else next(iter(given.items()))
    if name == "pbt":
        return NONE, [_problem(f"scheduler=pbt: {PBT}")]
    if name not in SCHEDULERS:
        close = get_close_matches(str(name), SCHEDULERS, n=1, cutoff=0.5)
        advice = f"Did you mean {close[0]}?" if close else f"Write {', '.join(SCHEDULERS)}."
        return NONE, [_problem(f"scheduler={shown(name)} is no scheduler. {advice}")]
    if not isinstance(settings, Mapping):
        return NONE, [
            _problem(
                f"scheduler {name} has {shown(settings)}: a mapping of its settings is required. "
                "Write such as {asha: {grace_period: 10}}."
            )
        ]
    problems = list(_wrong_settings(name, settings))
    if problems:
        return NONE, problems
    read = SCHEDULERS[name].model_validate(settings)
    found = Scheduler(name, read.model_dump(exclude_none=True))
    problems = list(_contradictions(found))
    return (NONE, problems) if problems else (found, [])


def _wrong_settings(name: str, settings: Mapping[str, Any]) -> Iterator[Problem]:
    fields = SCHEDULERS[name].model_fields
    for unknown in [str(key) for key in settings if key not in fields]:
        if unknown in ("metric", "mode"):
            advice = f"Write {unknown} beside scheduler: both compare by the same."
        else:
            close = get_close_matches(unknown, fields, n=1, cutoff=0.5)
            takes = f"It takes {', '.join(fields)}." if fields else "It takes none."
            advice = f"Did you mean {close[0]}?" if close else takes
        yield _problem(f"{unknown} is no setting of scheduler {name}. {advice}")
    known = {key: value for key, value in settings.items() if key in fields}
    try:
        SCHEDULERS[name].model_validate(known)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0])
            wrong = wrong_value(key, known[key], fields[key], [detail])
            yield _problem(f"scheduler {name}: {wrong.text}")


def _contradictions(scheduler: Scheduler) -> Iterator[Problem]:
    """Settings that are right alone, and leave nothing to compare together."""
    kind, found = scheduler.kind, scheduler.settings
    end, first = found.get("max_t"), found.get("grace_period")
    if kind == "asha" and end is not None and first is not None and first > end:
        yield _problem(
            f"scheduler asha: grace_period={first:g} is behind max_t={end:g}, where trials are at "
            "their end: none would be compared. Write a grace_period below max_t."
        )
    if kind == "hyperband" and end is None and found["time_attr"] == "time_total_s":
        yield _problem(
            "scheduler hyperband: time_attr=time_total_s without max_t, but how many seconds a "
            "trial takes is not known. Write max_t: the seconds after which a trial is at its end."
        )


def _searcher(section: TuneSection, space: Space) -> Searcher:
    listed = all(dimension.distribution.is_list for dimension in space.choices)
    return "grid" if listed and section.num_samples is None else "random"


def _counts(section: TuneSection, space: Space, searcher: Searcher) -> Iterator[Problem]:
    """What asks for a number of trials that the space has not."""
    endless = [d.key for d in space.dimensions if d.distribution.points() is None]
    number = section.num_samples
    if searcher == "grid" and endless:
        yield _problem(
            f"searcher=grid with {', '.join(endless)}: a grid needs values that can be counted. "
            "Write grid, or quniform with a step; or searcher: random."
        )
    elif searcher == "grid" and number is not None and number > 1:
        yield _problem(
            f"num_samples={number} with searcher=grid: each trial would run {number} times alike. "
            "Remove num_samples, or write searcher: random."
        )


def _metric(section: TuneSection, arguments: RunArguments) -> tuple[str, Mode]:
    """The metric's whole name, and which is better."""
    stage = arguments.finetuning.stage
    own_name, own_greater = best.best_metric(arguments)
    if section.metric is not None:
        found = section.metric
        name = found if found.startswith("eval_") else f"eval_{found}"
    elif arguments.training.metric_for_best_model is not None:
        name = own_name
    else:
        name = METRIC_OF_STAGE.get(stage, "eval_loss")
    if section.mode is not None:
        return name, section.mode
    is_own = arguments.training.metric_for_best_model is not None and name == own_name
    if is_own and arguments.training.greater_is_better is not None:
        return name, "max" if own_greater else "min"
    return name, "min" if name.endswith(("loss", *LESS_IS_BETTER)) else "max"


def _problem(text: str) -> Problem:
    return Problem(("tune",), f"tune: {text}")
