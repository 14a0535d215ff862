"""Arguments of a run read and checked: all that is wrong with them is said at once.

`load` reads a YAML or JSON file or a mapping and lays command-line words over it; `replace` changes
a run's keys. What a key means stands in its group; what contradicts in `rules`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmray.arguments import capabilities, environment, names, reading, rules, tune_rules
from llmray.arguments.group import Group
from llmray.arguments.problems import Problem, plain_types, raise_all, unknown_key, wrong_value
from llmray.arguments.run import DEFAULTS, FIELDS, GROUPS, RunArguments

log = getLogger("llmray")

# keys of these types may stand alone on the command line, and then are true
FLAGS = (frozenset({bool}), frozenset({bool, tuple[str, ...]}))


def load(
    source: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> RunArguments:
    """The arguments of a run.

    Args:
        source: a YAML or JSON file, a mapping of keys to values, or nothing.
        overrides: words that go before the file: `key=value`, `--key value` or `--flag`.
        changes: keys to values that go before both.
        environ: the environment; USE_RAY and ALLOW_EXTRA_ARGS are read.

    Raises:
        ArgumentsError: saying all problems at once.
    """
    name = str(source) if isinstance(source, str | Path) else "arguments"
    flat, problems = reading.read(source)
    flat, renamed = names.resolve(flat)
    words, misread = reading.read_words(overrides, is_flag)
    words, renamed_words = names.resolve(words)
    flat |= words | dict(changes or {})
    if flat.get("use_ray") is None:
        flat["use_ray"] = environment.use_ray(environ)
    if environment.allow_extra_args(environ):
        flat = _without_unknown(flat)
    problems += [*renamed, *misread, *renamed_words, *reading.references(flat)]
    arguments = _build(flat, problems, name)
    for remark in rules.remarks(arguments):
        log.warning(remark)
    return arguments


def replace(arguments: RunArguments, **keys: Any) -> RunArguments:
    """A copy in which these keys have other values, checked as a run file is.

    Raises:
        ArgumentsError: if the values are wrong or do not go together.
    """
    return _build(arguments.values() | keys, [], "run arguments")


def with_problems(
    arguments: RunArguments, keys: Mapping[str, Any]
) -> tuple[RunArguments, list[Problem]]:
    """As `replace`, of keys as a run file names them, with what is wrong instead of an error.

    In place of wrong values stand defaults.
    """
    resolved, renamed = names.resolve(keys)
    return _checked(arguments.values() | resolved, renamed)


def _build(flat: Mapping[str, Any], problems: Sequence[Problem], source: str) -> RunArguments:
    arguments, found = _checked(flat, problems)
    raise_all(found, source)
    return arguments


def _checked(
    flat: Mapping[str, Any], problems: Sequence[Problem]
) -> tuple[RunArguments, list[Problem]]:
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
    values = arguments.values()
    checked = [*capabilities.gaps(values, DEFAULTS), *rules.broken(arguments)]
    checked += tune_rules.broken(arguments, partial(with_problems, arguments))
    found += [problem for problem in checked if not doubtful.intersection(problem.keys)]
    return arguments, found


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
