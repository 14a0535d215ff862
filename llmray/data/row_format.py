"""How rows of a data set are laid out, and what stands in their columns.

What `dataset_info.json` says about a set is a `RowFormat`; `sources` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from llmray.data.conversation import Message, RowError

Row = Mapping[str, Any]
# What a stage reads of a row: a text; a conversation with its responses; a prompt with a response
# to prefer and one to reject; a conversation whose last response is wanted or not; what comes
# before the last response, which may be missing.
Kind = Literal["text", "responses", "pair", "judged", "prompt"]

# Columns of a row by what they hold; None: not read unless dataset_info.json names it.
COLUMNS: dict[str, str | None] = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": None,
    "messages": "conversations",
    "system": None,
    "tools": None,
    "images": None,
    "videos": None,
    "audios": None,
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
    "id": None,
}
TAGS: dict[str, str] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# Where formatting openai differs.
OPENAI_COLUMNS: dict[str, str | None] = {"messages": "messages", "tools": "tools"}
OPENAI_TAGS: dict[str, str] = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
}


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a set are laid out.

    `columns` are the names that dataset_info.json gives, by what they hold; others keep their
    default names where a row has them.
    """

    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def column(self, use: str) -> str | None:
        """The name of the column for a use of `COLUMNS`, None where none is read."""
        own = OPENAI_COLUMNS if self.formatting == "openai" else {}
        return self.columns.get(use, own.get(use, COLUMNS[use]))

    def tag(self, name: str) -> str:
        """The word for a name of `TAGS`."""
        own = OPENAI_TAGS if self.formatting == "openai" else {}
        return self.tags.get(name, own.get(name, TAGS[name]))


def tools_of(row: Row, layout: RowFormat) -> str | None:
    """The tools of a row as JSON text, None where there is none."""
    name = layout.column("tools")
    tools = row.get(name) if name is not None else None
    if isinstance(tools, list | tuple | Mapping):
        tools = json.dumps(tools, ensure_ascii=False)
    if tools is not None and not isinstance(tools, str):
        raise RowError(f"{name!r} is {shown(tools)}. Required: a list of tools, or its JSON text.")
    return tools if tools and tools.strip() not in ("", "[]", "{}", "null") else None


def value_of(row: Row, layout: RowFormat, use: str, optional: bool = False) -> Any:
    """What the column for a use holds; None where no column is read, or an optional one is missing.

    Raises:
        RowError: the row has no such column.
    """
    name = layout.column(use)
    if name is not None and name in row:
        return row[name]
    if name is None or optional:
        return None
    raise RowError(
        f"column {name!r} is missing; the row has {names_of(row)}.{nearest(name, row)} Required: "
        f"the {use}. Mend the row, or name its column as {use} among the set's columns."
    )


def text_of(row: Row, layout: RowFormat, use: str, optional: bool = False) -> str | None:
    """The text in the column for a use; None where it is optional and missing.

    Raises:
        RowError: there is no such column, or it holds no text.
    """
    value = value_of(row, layout, use, optional)
    if isinstance(value, str) or (value is None and optional):
        return value
    raise RowError(f"{layout.column(use)!r} is {shown(value)}. Required: text, the {use}.")


def shown(value: Any) -> str:
    """A value and its type for a message, cut to 40 characters."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def names_of(row: Mapping[str, Any]) -> str:
    """The columns that a row has, for a message."""
    return ", ".join(map(str, row)) or "nothing"


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """A sentence that asks whether the known name nearest to `name` was meant; empty without."""
    close = get_close_matches(name, list(map(str, known)), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def rejected_of(row: Row, layout: RowFormat, read: Callable[[Any], Message]) -> tuple[Message, ...]:
    """The answers to reject of a row: one, or a list of them."""
    value = value_of(row, layout, "rejected")
    if not isinstance(value, list | tuple):
        return (read(value),)
    if not value:
        raise RowError(f"{layout.column('rejected')!r} is empty. Required: one answer or more.")
    return tuple(map(read, value))
