"""Rows as conversations, by the `formatting` of their set, checked for types and order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.messages import openai, sharegpt
from llmray.data.row_format import (
    Kind,
    Row,
    RowFormat,
    rejected_of,
    shown,
    text_of,
    tools_of,
    value_of,
)

MEDIA = ("images", "videos", "audios")


def to_conversation(row: Any, layout: RowFormat, kind: Kind = "responses") -> Conversation:
    """The conversation that a row holds.

    Args:
        row: a row of the set, of whatever type the file had.
        layout: where in the row things stand.
        kind: what of it is read.

    Raises:
        RowError: the row is wrong.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {shown(row)}. Required: an object of columns.")
    for use in MEDIA:
        if use in layout.columns and row.get(layout.columns[use]):
            raise RowError(
                f"{layout.columns[use]!r} names {use}: training on media is not built yet. "
                "Take a set of text."
            )
    found = FORMATTINGS[layout.formatting](row, layout, kind)
    if kind == "pair":
        _require_words(layout, "chosen", [found.chosen])
        _require_words(layout, "rejected", found.rejected)
    if kind == "judged":
        _require_words(layout, "response", found.messages[-1:])
        return replace(found, is_wanted=_judgement(row, layout))
    return found


def _require_words(layout: RowFormat, use: str, answers: Sequence[Message | None]) -> None:
    """Fail if an answer that is to be compared or judged says nothing."""
    for answer in answers:
        if answer is not None and not (answer.content.strip() or answer.thought or answer.calls):
            what = "the last response" if use == "response" else repr(layout.column(use))
            raise RowError(f"{what} is empty. Required: an answer. Mend the row, or take it out.")


def _judgement(row: Row, layout: RowFormat) -> bool:
    value = value_of(row, layout, "kto_tag")
    if not isinstance(value, bool):
        raise RowError(
            f"{layout.column('kto_tag')!r} is {shown(value)}. Required: true for a wanted "
            "response, or false."
        )
    return value


def alpaca(row: Row, layout: RowFormat, kind: Kind) -> Conversation:
    """A row whose columns are prompt and response, with turns before them as its history."""
    messages = _history(row, layout)
    parts = [text_of(row, layout, "prompt"), text_of(row, layout, "query", optional=True)]
    messages.append(Message("user", "\n".join(part for part in parts if part)))

    def response(use: str) -> Message:
        text = text_of(row, layout, use)
        assert text is not None
        return Message("assistant", text)

    def said(value: Any) -> Message:
        if not isinstance(value, str):
            name = layout.column("rejected")
            raise RowError(f"{name!r} is {shown(value)}. Required: text, the rejected, or several.")
        return Message("assistant", value)

    if kind in ("responses", "judged"):
        messages.append(response("response"))
    return Conversation(
        tuple(messages),
        text_of(row, layout, "system", optional=True) or None,
        tools_of(row, layout),
        chosen=response("chosen") if kind == "pair" else None,
        rejected=rejected_of(row, layout, said) if kind == "pair" else (),
        label=_label(row, layout) if kind == "prompt" else None,
    )


def _label(row: Row, layout: RowFormat) -> Message | None:
    """The response that the data has, of a pair the chosen one; None where it has none."""
    texts = (text_of(row, layout, use, optional=True) for use in ("response", "chosen"))
    found = next((text for text in texts if text), None)
    return None if found is None else Message("assistant", found)


def _history(row: Row, layout: RowFormat) -> list[Message]:
    name = layout.column("history")
    pairs = value_of(row, layout, "history", optional=True)
    if pairs is None:
        return []
    messages = []
    if not isinstance(pairs, list | tuple):
        raise RowError(f"{name!r} is {shown(pairs)}. Required: a list of [prompt, response].")
    for number, pair in enumerate(pairs, start=1):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise RowError(f"entry {number} of {name!r} is {shown(pair)}. Required: two texts.")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


FORMATTINGS: dict[str, Callable[[Row, RowFormat, Kind], Conversation]] = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "openai": openai,
}
