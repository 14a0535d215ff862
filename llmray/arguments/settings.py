"""Settings of schedules and optimizers: what `lr_scheduler_kwargs` and `optim_args` may hold.

Each schedule and each optimizer has a group of its own settings, by transformers' names; a setting
that it does not know is a problem before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from llmray.arguments.group import Field, Float, Group, Int
from llmray.arguments.problems import Problem, given, requirement, shown, wrong_value

if TYPE_CHECKING:
    from llmray.arguments.optimizer import OptimizerArguments
    from llmray.arguments.run import RunArguments

Shape = Literal["linear", "cosine", "1-sqrt"]


class NoSettings(Group):
    """A schedule or an optimizer without settings of its own."""


class CosineSettings(Group):
    """Half a cosine, or more of it."""

    num_cycles: Float = Field(0.5, gt=0, description="Waves of the cosine.")


class RestartSettings(Group):
    """Cosines that start anew."""

    num_cycles: Int = Field(1, ge=1, description="Descents, each from the full rate.")


class PolynomialSettings(Group):
    """A power of the remaining steps."""

    lr_end: Float = Field(1e-7, ge=0, description="Learning rate at the end.")
    power: Float = Field(1.0, gt=0, description="Power of the share of steps that remains.")


class InverseSqrtSettings(Group):
    """The inverse square root of the step."""

    timescale: Int | None = Field(
        None, ge=1, description="Steps in which it falls to 0.7. Not given: the warm-up, or 10000."
    )


class PlateauSettings(Group):
    """Reduced where evaluations no longer get better."""

    mode: Literal["min", "max"] | None = Field(
        None, description="Which metric is better. Not given: as greater_is_better says."
    )
    factor: Float = Field(0.1, gt=0, lt=1, description="Factor of each reduction.")
    patience: Int = Field(10, ge=0, description="Evaluations without a better one that it bears.")
    threshold: Float = Field(1e-4, ge=0, description="How much better counts.")
    threshold_mode: Literal["rel", "abs"] = Field(
        "rel", description="Whether threshold is a share of the best metric or a difference."
    )
    cooldown: Int = Field(0, ge=0, description="Evaluations after a reduction that do not count.")
    min_lr: Float = Field(0.0, ge=0, description="Least learning rate.")
    eps: Float = Field(1e-8, ge=0, description="A smaller reduction is not made.")


class MinLrSettings(CosineSettings):
    """A cosine that ends above 0; one of `min_lr` and `min_lr_rate` is required."""

    min_lr: Float | None = Field(None, ge=0, description="Learning rate at the end.")
    min_lr_rate: Float | None = Field(
        None, ge=0, le=1, description="Learning rate at the end as a share of learning_rate."
    )


class WarmMinLrSettings(MinLrSettings):
    """The same with a warm-up that does not begin at 0."""

    warmup_lr_rate: Float | None = Field(
        None, ge=0, le=1, description="Share of learning_rate at the first step."
    )


class StableSettings(Group):
    """A plateau between warm-up and decay."""

    num_stable_steps: Int | None = Field(
        None, ge=0, description="Steps at the full rate. Not given: what the decay leaves."
    )
    num_decay_steps: Int | None = Field(
        None, ge=0, description="Steps of the decay. Not given: two thirds after the warm-up."
    )
    warmup_type: Shape = Field("linear", description="Form of the warm-up.")
    decay_type: Shape = Field("cosine", description="Form of the decay.")
    min_lr_ratio: Float = Field(0.0, ge=0, le=1, description="Share of learning_rate at both ends.")
    num_cycles: Float = Field(0.5, gt=0, description="Waves of a decay of type cosine.")


class StepSettings(Group):
    """A staircase."""

    step_size: Int = Field(..., ge=1, description="Steps of the run between two reductions.")
    gamma: Float = Field(0.1, gt=0, le=1, description="Factor of each reduction.")


SCHEDULE_SETTINGS: dict[str, type[Group]] = {
    "linear": NoSettings,
    "cosine": CosineSettings,
    "cosine_with_restarts": RestartSettings,
    "polynomial": PolynomialSettings,
    "constant": NoSettings,
    "constant_with_warmup": NoSettings,
    "inverse_sqrt": InverseSqrtSettings,
    "reduce_lr_on_plateau": PlateauSettings,
    "cosine_with_min_lr": MinLrSettings,
    "cosine_warmup_with_min_lr": WarmMinLrSettings,
    "warmup_stable_decay": StableSettings,
    "step": StepSettings,
}


class AdafactorSettings(Group):
    """Adafactor, at the schedule's learning rate."""

    beta1: Float | None = Field(
        None, ge=0, lt=1, description="Decay of the first moment. Not given: there is none."
    )
    clip_threshold: Float = Field(1.0, gt=0, description="Largest root mean square of an update.")
    decay_rate: Float = Field(-0.8, le=0, description="Exponent of the second moment's decay.")
    scale_parameter: bool = Field(
        False, description="Scale the learning rate by the root mean square of the weights."
    )


class SgdSettings(Group):
    """Gradient descent."""

    momentum: Float = Field(0.0, ge=0, description="Share of the last update that is kept.")
    dampening: Float = Field(0.0, ge=0, description="Share of the gradient that is left out.")
    nesterov: bool = Field(False, description="Look ahead along the momentum.")


class AdagradSettings(Group):
    """Adagrad."""

    lr_decay: Float = Field(0.0, ge=0, description="Decay of the learning rate with the steps.")
    eps: Float = Field(1e-10, gt=0, description="Added to the root of the sum of squares.")


class RmspropSettings(Group):
    """RMSprop."""

    alpha: Float = Field(0.99, ge=0, le=1, description="Decay of the mean of squares.")
    eps: Float = Field(1e-8, gt=0, description="Added to the root of the mean of squares.")
    momentum: Float = Field(0.0, ge=0, description="Share of the last update that is kept.")
    centered: bool = Field(False, description="Divide by the deviation instead of the magnitude.")


OPTIMIZER_SETTINGS: dict[str, type[Group]] = {
    "adamw_torch": NoSettings,
    "adamw_torch_fused": NoSettings,
    "adafactor": AdafactorSettings,
    "sgd": SgdSettings,
    "adagrad": AdagradSettings,
    "rmsprop": RmspropSettings,
}


def schedule_settings(arguments: OptimizerArguments) -> Group:
    """The settings of the run's schedule; what was not given has its default."""
    group = SCHEDULE_SETTINGS[arguments.lr_scheduler_type]
    return group.model_validate(arguments.lr_scheduler_kwargs or {})


def optimizer_settings(arguments: OptimizerArguments) -> Group:
    """The settings of the run's optimizer; what was not given has its default."""
    return OPTIMIZER_SETTINGS[arguments.optim].model_validate(_pairs(arguments.optim_args or ""))


def settings_of_the_schedule(run: RunArguments) -> Iterator[Problem]:
    """A schedule takes its own settings."""
    arguments = run.optimizer
    name = arguments.lr_scheduler_type
    if name not in SCHEDULE_SETTINGS:
        return
    values = arguments.lr_scheduler_kwargs or {}
    found = list(_wrong("lr_scheduler_kwargs", "lr_scheduler_type", name, values))
    yield from found
    if not found:
        yield from _rates_in_order(arguments)


def settings_of_the_optimizer(run: RunArguments) -> Iterator[Problem]:
    """An optimizer takes its own settings."""
    arguments = run.optimizer
    text = arguments.optim_args
    if text is None or arguments.optim not in OPTIMIZER_SETTINGS:
        return
    try:
        values = _pairs(text)
    except ValueError:
        yield Problem(
            ("optim_args",),
            f"{given('optim_args', text)} is not of the form name=value,name=value. Write it so.",
        )
        return
    found = list(_wrong("optim_args", "optim", arguments.optim, values))
    yield from found
    if not found and arguments.optim == "sgd":
        sgd = optimizer_settings(arguments)
        assert isinstance(sgd, SgdSettings)
        if sgd.nesterov and (sgd.momentum == 0 or sgd.dampening != 0):
            yield Problem(
                ("optim_args",),
                f"{given('optim_args', text)}: nesterov requires a momentum above 0 and no "
                "dampening. Write such as momentum=0.9,nesterov=true.",
            )


SETTINGS_RULES = (settings_of_the_schedule, settings_of_the_optimizer)


def _pairs(text: str) -> dict[str, str]:
    """`name=value` with commas as a mapping; raises ValueError where it is not of this form."""
    pairs = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name and equals and value):
            raise ValueError(part)
        pairs[name] = value
    return pairs


def _wrong(key: str, owner: str, name: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the settings `key` of what `owner=name` chooses."""
    table = SCHEDULE_SETTINGS if owner == "lr_scheduler_type" else OPTIMIZER_SETTINGS
    group, keys = table[name], (key, owner)
    fields = group.model_fields
    for unknown in [setting for setting in values if setting not in fields]:
        close = get_close_matches(str(unknown), list(fields), n=1, cutoff=0.5)
        advice = f" Did you mean {close[0]}?" if close else ""
        takes = f"it takes {', '.join(fields)}" if fields else "it takes no settings"
        yield Problem(
            keys,
            f"{key}: {unknown} is no setting of {owner}={name}; {takes}.{advice} Otherwise remove "
            "it.",
        )
    known = {setting: value for setting, value in values.items() if setting in fields}
    try:
        group.model_validate(known)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            setting = str(detail["loc"][0])
            field = fields[setting]
            if setting in known:
                problem = wrong_value(setting, known[setting], field, [detail])
                yield Problem(keys, f"{key}: {problem.text}")
            else:
                yield Problem(
                    keys,
                    f"{key} lacks {setting}, which {owner}={name} requires: {requirement(field)}. "
                    "Write it.",
                )


def _rates_in_order(arguments: OptimizerArguments) -> Iterator[Problem]:
    """Learning rates that a schedule ends at are named once, and below the highest."""
    keys = ("lr_scheduler_kwargs", "lr_scheduler_type")
    settings, highest = schedule_settings(arguments), arguments.learning_rate
    if isinstance(settings, MinLrSettings):
        said = [n for n in ("min_lr", "min_lr_rate") if getattr(settings, n) is not None]
        if len(said) != 1:
            found = "both are given" if said else "neither is given"
            yield Problem(
                keys,
                f"lr_scheduler_type={arguments.lr_scheduler_type} requires one of min_lr and "
                f"min_lr_rate in lr_scheduler_kwargs, but {found}. Write such as "
                '{"min_lr_rate": 0.1}.',
            )
    for name in ("lr_end", "min_lr"):
        end = getattr(settings, name) if name in type(settings).model_fields else None
        if end and end >= highest:
            yield Problem(
                (*keys, "learning_rate"),
                f"{name}={shown(end)} of lr_scheduler_type={arguments.lr_scheduler_type} with "
                f"learning_rate={shown(highest)}: the schedule ends at it, so it must be below. "
                f"Lower {name} in lr_scheduler_kwargs, or raise learning_rate.",
            )
