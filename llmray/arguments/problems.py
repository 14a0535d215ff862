"""What is wrong with a run file, and what a key requires, in the words of errors and documents."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llmray.errors import ArgumentsError

LONGEST_VALUE = 60
# Unicode's categories of control characters, line ends, halves of pairs, and what is no character
NO_TEXT = ("Cc", "Zl", "Zp", "Cs", "Cn")

KINDS: dict[frozenset[Any], str] = {
    frozenset({bool}): "true or false",
    frozenset({int}): "a whole number",
    frozenset({float}): "a number",
    frozenset({int, float}): "a share below 1 or a whole number",
    frozenset({str}): "text",
    frozenset({SecretStr}): "text",
    frozenset({tuple[str, ...]}): "a list of names, or one text with commas",
    frozenset({tuple[float, ...]}): "a list of numbers, or one text with commas",
    frozenset({dict[str, Any]}): "a mapping or a JSON object",
    frozenset({str, dict[str, Any]}): "text, a mapping or a JSON object",
    frozenset({bool, tuple[str, ...]}): "true, false or a list of names",
    frozenset({bool, str}): "true, false or text",
    frozenset({tuple[dict[str, Any], ...]}): "a list of mappings",
}
BOUNDS: dict[type, tuple[str, str]] = {
    Ge: ("ge", "at least"),
    Gt: ("gt", "above"),
    Le: ("le", "at most"),
    Lt: ("lt", "below"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the keys that it concerns, and the sentences that say it."""

    keys: tuple[str, ...]
    text: str


def raise_all(problems: Sequence[Problem], source: str) -> None:
    """Raise one error that says all problems; nothing where there are none.

    Raises:
        ArgumentsError: if there is a problem.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise ArgumentsError(f"{source}: {problems[0].text}")
    lines = "\n".join(f"  - {problem.text}" for problem in problems)
    raise ArgumentsError(f"{source}: {len(problems)} problems\n{lines}")


def shown(value: Any) -> str:
    """A value as a run file would write it, in one line, shortened."""
    if isinstance(value, SecretStr):
        return "(hidden)"
    if isinstance(value, str):
        text = value if value and value.strip() == value else json.dumps(value)
    else:
        plain = list(value) if isinstance(value, tuple) else value
        text = json.dumps(plain, default=str, ensure_ascii=False)
    text = one_line(text)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def one_line(text: str) -> str:
    """The text with line ends, and what else no file of text may hold, escaped as JSON does."""
    return "".join(
        json.dumps(sign)[1:-1] if unicodedata.category(sign) in NO_TEXT else sign for sign in text
    )


def given(key: str, value: Any, field: FieldInfo | None = None) -> str:
    """`key=value`, with a secret's value left out."""
    hidden = field is not None and SecretStr in plain_types(field)
    return f"{key}={'(hidden)' if hidden else shown(value)}"


def plain_types(field: FieldInfo) -> frozenset[Any]:
    """The types that a field takes, without what only describes them and without None."""
    return frozenset(_members(field.annotation)) - {NoneType}


def is_optional(field: FieldInfo) -> bool:
    """Whether a field may be empty: not given."""
    return NoneType in _members(field.annotation)


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """The values that a field with fixed choices takes, else nothing."""
    return tuple(
        choice
        for member in plain_types(field)
        if get_origin(member) is Literal
        for choice in get_args(member)
    )


def bounds(field: FieldInfo) -> dict[str, Any]:
    """The limits of a number, by pydantic's names ge, gt, le, lt."""
    limits = {}
    for item in field.metadata:
        if type(item) in BOUNDS:
            name, _ = BOUNDS[type(item)]
            limits[name] = getattr(item, name)
    return limits


def requirement(field: FieldInfo) -> str:
    """What a value of the field must be, as the end of `… is required`."""
    if choices(field):
        return "one of " + ", ".join(shown(choice) for choice in choices(field))
    kind = KINDS[plain_types(field)]
    if any(isinstance(item, MinLen) for item in field.metadata):
        kind = f"{kind}, not empty"
    words = [
        f"{words} {bounds(field)[name]:g}"
        for name, words in BOUNDS.values()
        if name in bounds(field)
    ]
    return f"{kind}, {' and '.join(words)}" if words else kind


def wrong_value(
    key: str, value: Any, field: FieldInfo, details: Sequence[ErrorDetails], hint: str | None = None
) -> Problem:
    """The problem of a value that its field does not take; `hint` is what to do, where known."""
    advice = hint or _advice(value, field)
    if value is None:
        return Problem((key,), f"{key} has no value; it requires {requirement(field)}. {advice}")
    why = "".join(
        f" ({error['ctx']['error']})" for error in details if error["type"] == "value_error"
    )
    return Problem(
        (key,),
        f"{given(key, value, field)} is wrong{why}: it requires {requirement(field)}. {advice}",
    )


def unknown_key(key: str, known: Iterable[str]) -> Problem:
    """The problem of a key that nothing declares, with the nearest that is declared."""
    close = get_close_matches(key, list(known), n=1, cutoff=0.6)
    advice = f"Did you mean {close[0]}?" if close else "`llmray args` lists all keys."
    return Problem((key,), f"{key} is no key of llmray. {advice} Otherwise remove it.")


def _advice(value: Any, field: FieldInfo) -> str:
    close = get_close_matches(str(value), [str(choice) for choice in choices(field)], n=1)
    if close:
        return f"Did you mean {close[0]}?"
    default = field.get_default()
    if default is None or default == ():
        return "Set such a value, or remove the key."
    return f"Set such a value, or remove the key for the default, {shown(default)}."


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def as_plain(value: Any) -> Any:
    """A value in the types of JSON: tuples as lists, mappings copied."""
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, tuple | list) else value
