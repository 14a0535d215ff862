"""The arguments of a run: all groups together, read, checked and written.

`load` reads a YAML or JSON file or a mapping, lays command-line words over it and says every
problem at once. What a key means stands in its group; what contradicts in `rules`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from llmray.arguments import capabilities, environment, names, reading, rules
from llmray.arguments.cluster import ClusterArguments
from llmray.arguments.data import DataArguments
from llmray.arguments.evaluation import EvaluationArguments
from llmray.arguments.export import ExportArguments
from llmray.arguments.finetuning import FinetuningArguments
from llmray.arguments.generating import GeneratingArguments
from llmray.arguments.group import Group
from llmray.arguments.model import ModelArguments
from llmray.arguments.optimizer import OptimizerArguments
from llmray.arguments.problems import (
    Problem,
    as_plain,
    plain_types,
    raise_all,
    unknown_key,
    wrong_value,
)
from llmray.arguments.rlhf import RlhfArguments
from llmray.arguments.tracking import TrackingArguments
from llmray.arguments.training import TrainingArguments
from llmray.arguments.tune import TuneArguments

log = getLogger("llmray")

GROUPS: dict[str, type[Group]] = {
    "model": ModelArguments,
    "data": DataArguments,
    "finetuning": FinetuningArguments,
    "rlhf": RlhfArguments,
    "optimizer": OptimizerArguments,
    "training": TrainingArguments,
    "cluster": ClusterArguments,
    "generating": GeneratingArguments,
    "tracking": TrackingArguments,
    "export": ExportArguments,
    "evaluation": EvaluationArguments,
    "tune": TuneArguments,
}
FIELDS: dict[str, FieldInfo] = {
    key: field for group in GROUPS.values() for key, field in group.model_fields.items()
}
GROUP_OF: dict[str, str] = {
    key: name for name, group in GROUPS.items() for key in group.model_fields
}
# keys of these types may stand alone on the command line, and then are true
FLAGS = (frozenset({bool}), frozenset({bool, tuple[str, ...]}))
DEFAULTS: dict[str, Any] = {key: field.get_default() for key, field in FIELDS.items()}


class RunArguments(BaseModel):
    """Everything that a run file says, by group. Frozen; `replace` gives a changed copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelArguments = ModelArguments()
    data: DataArguments = DataArguments()
    finetuning: FinetuningArguments = FinetuningArguments()
    rlhf: RlhfArguments = RlhfArguments()
    optimizer: OptimizerArguments = OptimizerArguments()
    training: TrainingArguments = TrainingArguments()
    cluster: ClusterArguments = ClusterArguments()
    generating: GeneratingArguments = GeneratingArguments()
    tracking: TrackingArguments = TrackingArguments()
    export: ExportArguments = ExportArguments()
    evaluation: EvaluationArguments = EvaluationArguments()
    tune: TuneArguments = TuneArguments()

    @property
    def ray_enabled(self) -> bool:
        """Whether Ray starts the workers: `use_ray` where given, else whether a Ray key is."""
        return self.cluster.ray_enabled

    def flat(self) -> dict[str, Any]:
        """Every key and its value, in types that JSON has; secrets are left out."""
        return {
            key: as_plain(value)
            for key, value in self._values().items()
            if SecretStr not in plain_types(FIELDS[key])
        }

    def value(self, key: str) -> Any:
        """The value of one key."""
        return getattr(getattr(self, GROUP_OF[key]), key)

    def replace(self, **keys: Any) -> RunArguments:
        """A copy in which these keys have other values, checked as a run file is.

        Raises:
            ArgumentsError: if the values are wrong or do not go together.
        """
        return _build(self._values() | keys, [], "run arguments")

    def yaml(self) -> str:
        """A run file that loads to an equal object; keys that are not given are left out."""
        flat = self.flat()
        parts = []
        for name, group in GROUPS.items():
            lines = {key: flat[key] for key in group.model_fields if flat.get(key) is not None}
            if lines:
                text = yaml.safe_dump(lines, sort_keys=False, allow_unicode=True, width=100)
                parts.append(f"# {name}\n{text}")
        return "\n".join(parts)

    def save(self, path: str | Path) -> None:
        """Write `yaml()` to a file."""
        Path(path).write_text(self.yaml(), encoding="utf-8")

    def _values(self) -> dict[str, Any]:
        return {key: self.value(key) for key in GROUP_OF}


def load(
    source: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    environ: Mapping[str, str] = os.environ,
) -> RunArguments:
    """The arguments of a run.

    Args:
        source: a YAML or JSON file, a mapping of keys to values, or nothing.
        overrides: words that go before the file: `key=value`, `--key value` or `--flag`.
        environ: the environment; USE_RAY and ALLOW_EXTRA_ARGS are read.

    Raises:
        ArgumentsError: saying all problems at once.
    """
    name = str(source) if isinstance(source, str | Path) else "arguments"
    flat, problems = reading.read(source)
    flat, renamed = names.resolve(flat)
    words, misread = reading.read_words(overrides, is_flag)
    words, renamed_words = names.resolve(words)
    flat |= words
    if flat.get("use_ray") is None:
        flat["use_ray"] = environment.use_ray(environ)
    if environment.allow_extra_args(environ):
        flat = _without_unknown(flat)
    problems += [*renamed, *misread, *renamed_words, *reading.references(flat)]
    arguments = _build(flat, problems, name)
    for remark in rules.remarks(arguments):
        log.warning(remark)
    return arguments


def _build(flat: Mapping[str, Any], problems: Sequence[Problem], source: str) -> RunArguments:
    found = list(problems)
    known = [*FIELDS, *names.all_names()]
    found += [unknown_key(key, known) for key in flat if key not in FIELDS]
    groups = {}
    for name, group in GROUPS.items():
        part = {key: flat[key] for key in group.model_fields if key in flat}
        groups[name], wrong = _validate(group, part)
        found += wrong
    arguments = RunArguments.model_validate(groups)
    doubtful = {key for problem in found for key in problem.keys}
    values = arguments._values()
    checked = [*capabilities.gaps(values, DEFAULTS), *rules.broken(arguments)]
    found += [problem for problem in checked if not doubtful.intersection(problem.keys)]
    raise_all(found, source)
    return arguments


def _validate(group: type[Group], part: dict[str, Any]) -> tuple[Group, list[Problem]]:
    """The group, and what is wrong with it; in place of a wrong value stands the default."""
    try:
        return group.model_validate(part), []
    except ValidationError as error:
        details: dict[str, list[Any]] = {}
        for detail in error.errors(include_url=False):
            details.setdefault(str(detail["loc"][0]), []).append(detail)
    problems = [
        wrong_value(
            key, part[key], FIELDS[key], found, names.VALUE_HINTS.get((key, str(part[key])))
        )
        for key, found in details.items()
    ]
    rest = {key: value for key, value in part.items() if key not in details}
    return group.model_validate(rest), problems


def _without_unknown(flat: dict[str, Any]) -> dict[str, Any]:
    unknown = [key for key in flat if key not in FIELDS]
    if unknown:
        log.warning("ALLOW_EXTRA_ARGS: these keys do nothing: %s", ", ".join(unknown))
    return {key: value for key, value in flat.items() if key in FIELDS}


def is_flag(name: str) -> bool:
    """Whether a name stands for true or false, so that `--name` may stand alone."""
    key = names.ALIASES.get(name, name)
    return name in names.CONVERTED or (key in FIELDS and plain_types(FIELDS[key]) in FLAGS)
