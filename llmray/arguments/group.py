"""What all groups of arguments share: the frozen base class and the forms in which values may come.

A value may come from YAML, JSON, Python or the command line, so numbers and JSON objects are also
read from text, and lists of names also from one text with commas.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Group(BaseModel):
    """A frozen group of arguments; a key that it does not declare is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )


def as_number(value: Any) -> Any:
    """Text that holds a number as that number; true and false are no numbers.

    Raises:
        ValueError: for a boolean, which Python would take for 1 or 0.
    """
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "." not in value else number


def as_share(value: Any) -> Any:
    """A share below 1 as it is, anything from 1 on as the whole number that it must be.

    Raises:
        ValueError: for a number above 1 that is not whole.
    """
    number = as_number(value)
    if isinstance(number, float) and number >= 1:
        if not number.is_integer():
            raise ValueError("from 1 on it must be whole")
        return int(number)
    return number


def as_rows_or_share(value: Any) -> Any:
    """As `as_share`, where 1 is one row.

    Raises:
        ValueError: for 1.0, a share that is all rows; for what is above 1 and not whole.
    """
    number = as_number(value)
    if isinstance(number, float) and number == 1:
        raise ValueError("1.0 is a share, of all rows; one row is written 1")
    return as_share(number)


def as_names(value: Any) -> Any:
    """One text with commas, or a list, as a tuple of names without blanks around them."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return tuple(value) if isinstance(value, list) else value


def as_names_or_flag(value: Any) -> Any:
    """The words true and false as booleans; other text, or a list, as a tuple of names.

    Raises:
        ValueError: for a number, which is neither.
    """
    flag = as_path_or_flag(value)
    if isinstance(flag, int | float) and not isinstance(flag, bool):
        raise ValueError("a number is no name")
    return flag if isinstance(flag, bool) else as_names(value)


def as_numbers(value: Any) -> Any:
    """One text with commas, a list or a single number, as a tuple of numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    names = as_names(value)
    return tuple(as_number(name) for name in names) if isinstance(names, tuple) else names


def as_object(value: Any) -> Any:
    """Text that holds a JSON object as a dict.

    Raises:
        ValueError: if the text starts like a JSON object and is none.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return json.loads(value)
    return value


def as_path_or_flag(value: Any) -> Any:
    """The words true and false as booleans, any other text as it is."""
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def as_part(value: str) -> str:
    """One part of a path.

    Raises:
        ValueError: if the value has several parts, or stands for a folder above.
    """
    if "/" in value or value in (".", ".."):
        raise ValueError("it is one part of a path")
    return value


def as_interval(value: Any) -> Any:
    """`no`, which YAML reads as false, as the word that was meant."""
    return "no" if value is False else value


Int = Annotated[int, BeforeValidator(as_number)]
Float = Annotated[float, BeforeValidator(as_number)]
Share = Annotated[int | float, BeforeValidator(as_share)]
RowsOrShare = Annotated[int | float, BeforeValidator(as_rows_or_share)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]
NamesOrFlag = Annotated[bool | tuple[str, ...], BeforeValidator(as_names_or_flag)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(as_numbers)]
Object = Annotated[dict[str, Any], BeforeValidator(as_object)]
TextOrObject = Annotated[str | dict[str, Any], BeforeValidator(as_object)]
PathPart = Annotated[str, AfterValidator(as_part)]
PathOrFlag = Annotated[bool | str, BeforeValidator(as_path_or_flag)]

__all__ = [
    "Field",
    "Float",
    "Group",
    "Int",
    "Names",
    "NamesOrFlag",
    "Numbers",
    "Object",
    "PathOrFlag",
    "PathPart",
    "RowsOrShare",
    "Share",
    "TextOrObject",
    "as_interval",
]
