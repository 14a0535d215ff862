"""One key explained: its meaning, its value in a run, where that came from, what follows from it.

llmray check --explain lora_alpha run.yaml lora_rank=16
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from llmray.arguments import environment, names, reading, reference
from llmray.arguments.derivations import DERIVATIONS, DERIVED, Derivation
from llmray.arguments.loading import is_flag, load
from llmray.arguments.problems import given, plain_types, shown
from llmray.arguments.run import DEFAULTS, FIELDS, RunArguments
from llmray.errors import ArgumentsError


@dataclass(frozen=True)
class Explanation:
    """The text, and what is wrong with the run, if anything is."""

    text: str
    error: ArgumentsError | None = None


@dataclass(frozen=True)
class _Given:
    """Where a key stands: under which name, with which value, in what."""

    name: str
    value: Any
    where: str


def explain(
    key: str,
    source: str | Path | None = None,
    words: Sequence[str] = (),
    *,
    environ: Mapping[str, str] = os.environ,
) -> Explanation:
    """What a key means, and what it is in the run that a file and words describe, if any do.

    Args:
        key: a key, or another name of one.
        source: a run file.
        words: overrides.
        environ: the environment; USE_RAY may set a key.

    Raises:
        ArgumentsError: there is no such key, or the file cannot be read.
    """
    parts = [reference.describe([key])]
    key = names.ALIASES.get(key, key)
    if key not in FIELDS:
        return Explanation(parts[0])
    if source is None and not words:
        return Explanation("\n".join([*parts, *_follows(key, None)]))
    found = _given(key, source, words, environ)
    try:
        arguments = load(source, words, environ=environ)
    except ArgumentsError as error:
        return Explanation("\n".join([*parts, *_as_given(key, found)]), error)
    return Explanation(
        "\n".join([*parts, *_in_run(key, arguments, found), *_follows(key, arguments)])
    )


def _given(
    key: str, source: str | Path | None, words: Sequence[str], environ: Mapping[str, str]
) -> list[_Given]:
    """All that sets the key, the one that counts first."""
    from_words, _ = reading.read_words(words, is_flag)
    from_file, _ = reading.read(source)
    found = _names_of(key, from_words, "on the command line")
    found += _names_of(key, from_file, f"in {source}")
    if key == "use_ray" and not found and environment.use_ray(environ) is not None:
        found.append(_Given("USE_RAY", environment.use_ray(environ), "in the environment"))
    return found


def _names_of(key: str, raw: Mapping[str, Any], where: str) -> list[_Given]:
    return [
        _Given(name, value, where)
        for name, value in raw.items()
        if key in names.resolve({name: value})[0]
    ]


def _as_given(key: str, found: Sequence[_Given]) -> list[str]:
    if not found:
        return ["  in this run: not given"]
    first = found[0]
    return [f"  in this run: {_hidden(key, first)}, {first.where}"]


def _in_run(key: str, arguments: RunArguments, found: Sequence[_Given]) -> list[str]:
    """The line that says the value, and where it came from."""
    value = arguments.value(key)
    if value is None and key in DERIVED:
        return [f"  in this run: {_derived(DERIVED[key], arguments)}"]
    if not found:
        said = "not given" if value is None else f"{shown(value)}, the default"
        return [f"  in this run: {said}"]
    first, *others = found
    as_name = f", as {first.name}" if first.name != key else ""
    over = "".join(f", over {_hidden(key, other)} {other.where}" for other in others)
    default = DEFAULTS[key]
    same = ", which is the default" if value == default and not others else ""
    said = "not given" if value is None else shown(value)
    return [f"  in this run: {said}, {first.where}{as_name}{over}{same}"]


def _derived(row: Derivation, arguments: RunArguments) -> str:
    if row.value is None:
        return f"not given: {row.rule}"
    value = row.value(arguments)
    return f"not given: {row.rule}" if value is None else f"{shown(value)}, derived: {row.rule}"


def _follows(key: str, arguments: RunArguments | None) -> list[str]:
    """Lines about the keys that follow from this one."""
    lines = []
    for row in DERIVATIONS:
        if key not in row.sources:
            continue
        if arguments is None:
            lines.append(f"  derives: {row.key} where that is not given: {row.rule}")
        elif arguments.value(row.key) is None:
            lines.append(f"  derives: {row.key}: {_derived(row, arguments)}")
        else:
            lines.append(
                f"  derives: nothing for {row.key}, given as {shown(arguments.value(row.key))}"
            )
    return lines


def _hidden(key: str, found: _Given) -> str:
    if SecretStr in plain_types(FIELDS[key]):
        return "(hidden)"
    return shown(found.value) if found.name == key else given(found.name, found.value)
