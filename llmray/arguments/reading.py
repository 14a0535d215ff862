"""Reads run files and command-line words into one mapping; what keys mean is left to others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmray.arguments.problems import Problem, given
from llmray.errors import ArgumentsError

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
NOTHING = ("", "~", "null", "Null", "NULL")
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
REFERENCE = re.compile(r"\$\{[A-Za-z_.]+(?::[^}]*)?\}")


class _Loader(yaml.SafeLoader):
    """YAML with the numbers that people write: 1e-4 is one, 10:30 and 2024-01-01 are none."""


_REPLACED = {
    "tag:yaml.org,2002:int",
    "tag:yaml.org,2002:float",
    "tag:yaml.org,2002:timestamp",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in _REPLACED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), "-+0123456789"
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    "-+0123456789.",
)


def read(source: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], list[Problem]]:
    """The keys and values of a run file or mapping, and what is wrong with its form.

    Raises:
        ArgumentsError: if there is no such file, or it holds no keys and values.
    """
    if source is None:
        return {}, []
    if isinstance(source, Mapping):
        return {str(key): value for key, value in source.items()}, []
    path = Path(source)
    text = _text(path)
    twice: list[str] = []
    parse = _parse_json if path.suffix == ".json" else _parse_yaml
    content = parse(text, path, twice)
    if content is None:
        return {}, []
    if not isinstance(content, dict):
        raise ArgumentsError(
            f"{path} holds {_kind(content)}; a run file requires `key: value` lines. Mend the file."
        )
    problems = [
        Problem((key,), f"{key} stands in the file twice. Keep one of them.") for key in twice
    ]
    return {str(key): value for key, value in content.items()}, problems


def read_words(
    words: Sequence[str], is_flag: Callable[[str], bool]
) -> tuple[dict[str, Any], list[Problem]]:
    """The keys and values of command-line words; of a key given twice the last counts.

    Args:
        words: `key=value`, `--key=value`, `--key value`, `--flag` or `--no_flag`.
        is_flag: whether a key is true or false, so that it may stand alone.
    """
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        key = name.replace("-", "_")
        if not KEY.fullmatch(name) or not (equals or word.startswith("--")):
            problems.append(
                Problem((), f"The word {word!r} is no key. Write key=value or --key value.")
            )
        elif equals:
            found[key] = value_of(text)
        else:
            problems += _option(key, rest, is_flag, found)
    return found, problems


def references(flat: Mapping[str, Any]) -> list[Problem]:
    """The problems of values that refer to others as OmegaConf does: nothing expands them."""
    return [
        Problem(
            (key,),
            f"{given(key, value)}: {found[0]} is not expanded in run files. Write the value, or "
            f"{key}=… on the command line, where the shell expands it.",
        )
        for key, value in flat.items()
        if isinstance(value, str) and (found := REFERENCE.search(value))
    ]


def value_of(text: str) -> Any:
    """The value that a word on the command line stands for, read as YAML would read a scalar."""
    if text.strip() in NOTHING:
        return None
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    if value is None:  # a comment
        return text
    is_quoted = text.lstrip()[0] in "'\"{["
    return value if is_quoted or not isinstance(value, str | dict | list) else text


def _option(
    key: str, rest: list[str], is_flag: Callable[[str], bool], found: dict[str, Any]
) -> list[Problem]:
    """Take the value of `--key` from the words that follow it."""
    takes_next = bool(rest) and not rest[0].startswith("--")
    if is_flag(key):
        takes_next = takes_next and rest[0].lower() in TRUE + FALSE + NOTHING
        found[key] = value_of(rest.pop(0)) if takes_next else True
    elif takes_next:
        found[key] = value_of(rest.pop(0))
    elif key.startswith("no_") and is_flag(key[3:]):
        found[key[3:]] = False
    else:
        return [Problem((key,), f"--{key} has no value. Write --{key} VALUE.")]
    return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ArgumentsError(
            f"There is no run file {path}. Name a YAML or JSON file that exists."
        ) from None
    except IsADirectoryError:
        raise ArgumentsError(f"{path} is a folder. Name the run file in it.") from None
    except UnicodeDecodeError as error:
        raise ArgumentsError(
            f"{path} is no UTF-8 text (byte {error.start}). Save the run file as UTF-8."
        ) from None
    except OSError as error:
        raise ArgumentsError(f"{path} cannot be read: {error.strerror}. Mend that.") from None


def _parse_json(text: str, path: Path, twice: list[str]) -> Any:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise ArgumentsError(
            f"{path} line {error.lineno} is no JSON: {error.msg}. Mend that line."
        ) from None


def _parse_yaml(text: str, path: Path, twice: list[str]) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        twice.extend(_repeated(node))
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ArgumentsError(
            f"{path} line {line} is no YAML: {error.problem}. Mend that line."
        ) from None
    except yaml.YAMLError as error:
        raise ArgumentsError(f"{path} is no YAML: {error}. Mend the file.") from None
    finally:
        loader.dispose()


def _repeated(node: yaml.Node) -> list[str]:
    """The keys that stand more than once in a mapping or in a mapping inside it."""
    if not isinstance(node, yaml.MappingNode):
        return []
    names = [str(key.value) for key, _ in node.value]
    inner = [name for _, value in node.value for name in _repeated(value)]
    return sorted({name for name in names if names.count(name) > 1}) + inner


def _kind(content: Any) -> str:
    return "a list" if isinstance(content, list) else f"only the text {str(content)[:40]!r}"
