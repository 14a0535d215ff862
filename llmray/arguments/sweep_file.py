"""The command line of a sweep: a run file, a second file with the section `tune`, and words.

llmray tune run.yaml [sweep.yaml] [key=value ...] [tune.num_samples=4 ...] [resume=true]
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmray.arguments import reading
from llmray.arguments.loading import load
from llmray.arguments.problems import raise_all
from llmray.arguments.run import RunArguments
from llmray.errors import ArgumentsError

PREFIX = "tune."


@dataclass(frozen=True)
class SweepFile:
    """A sweep as the command line names it: its run, and whether an earlier one goes on."""

    arguments: RunArguments
    resumes: bool = False
    is_dry: bool = False


def load_sweep(words: Sequence[str], *, environ: Mapping[str, str] = os.environ) -> SweepFile:
    """Read the words behind `llmray tune`.

    Args:
        words: files first; `tune.KEY=value` changes a key of the section, `resume=true` goes on
            with an earlier sweep, `--dry-run` only tells what would be done.
        environ: the environment, as for a run.

    Raises:
        ArgumentsError: saying all problems at once; there is no section `tune`.
    """
    files = _leading_files(words)
    if len(files) > 2:
        raise ArgumentsError(
            f"{files[2]!r} is a third file. A sweep has a run file and, if it has no section tune, "
            "one with that. Remove the others."
        )
    rest, resumes, is_dry, changes = _own_words(words[len(files) :])
    run_file = files[0] if files else None
    section = _section(run_file, files[1] if len(files) > 1 else None)
    for path, value in changes.items():
        _put(section, path, value)
    if not section:
        raise ArgumentsError(
            f"{run_file or 'the command line'} has no section tune: nothing is searched. Write "
            "such as `tune: {search: {learning_rate: {loguniform: [1e-5, 1e-3]}}}`, or name a "
            "second file with it."
        )
    arguments = load(run_file, rest, changes={"tune": section}, environ=environ)
    return SweepFile(arguments, resumes, is_dry)


def refuse_section(arguments: RunArguments) -> None:
    """Raise where a run that is to be trained once has a section `tune`.

    Raises:
        ArgumentsError: it has.
    """
    if arguments.tune.tune is not None:
        raise ArgumentsError(
            "the run file has a section tune, and `llmray train` trains once. Sweep with `llmray "
            "tune`, or write tune=null behind the file."
        )


def _leading_files(words: Sequence[str]) -> list[str]:
    found = []
    for word in words:
        is_word = word.startswith("--") or ("=" in word and not os.path.isfile(word))
        if is_word:
            break
        found.append(word)
    return found


def _own_words(words: Sequence[str]) -> tuple[list[str], bool, bool, dict[str, Any]]:
    """The words of the run; whether to resume, to run dry; what of the section is changed."""
    rest: list[str] = []
    changes: dict[str, Any] = {}
    resumes = is_dry = False
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if word == "--dry-run":
            is_dry = True
        elif name == "resume":
            resumes = _flag(text if equals else "true")
        elif name.startswith(PREFIX) and equals:
            changes[name.removeprefix(PREFIX)] = reading.value_of(text)
        else:
            rest.append(word)
    return rest, resumes, is_dry, changes


def _flag(text: str) -> bool:
    value = reading.value_of(text)
    if not isinstance(value, bool):
        raise ArgumentsError(
            f"resume={text} is wrong: true or false is required. Write resume=true to go on with "
            "an earlier sweep."
        )
    return value


def _section(run_file: str | None, second: str | None) -> dict[str, Any]:
    """The section of the one file that has it."""
    own = reading.read(run_file)[0].get("tune")
    if second is None:
        return _mapping(own, run_file or "tune") if own is not None else {}
    content, problems = reading.read(second)
    raise_all(problems, second)
    if own is not None:
        raise ArgumentsError(
            f"{run_file} has a section tune, and {second} is another. Keep one of them."
        )
    if "tune" not in content:
        return content
    if len(content) > 1:
        others = ", ".join(key for key in content if key != "tune")
        raise ArgumentsError(
            f"{second} has {others} beside tune: keys of the run belong into {run_file}. Move them "
            "there."
        )
    return _mapping(content["tune"], second)


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArgumentsError(
            f"{Path(source).name}: tune={value!r} is wrong: a mapping is required, such as "
            "{search: {learning_rate: {loguniform: [1e-5, 1e-3]}}}. Mend it."
        )
    return dict(value)


def _put(section: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a path with dots."""
    *above, last = path.split(".")
    for name in above:
        inner = section.get(name)
        section[name] = dict(inner) if isinstance(inner, dict) else {}
        section = section[name]
    section[last] = value
