"""Rows of a run's data as the model will see them: `llmray render run.yaml --rows 3`.

Text with its targets marked, tokens one a line (`--ids`), or one JSON object a row (`--json`). The
tokenizer and the data are read, no weights.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from logging import getLogger
from typing import Any, TextIO

from tokenizers import Tokenizer

from llmray import hub
from llmray.arguments import environment
from llmray.arguments.run import RunArguments
from llmray.data.preview import Preview, PreviewRow, preview
from llmray.errors import DataError

log = getLogger("llmray")

IGNORED = -100  # the label of a token that is not learned, as in transformers
MOST_SOURCES = 3  # places of a row that are written out


@dataclass(frozen=True)
class Marks:
    """What stands before and after targets, and before and after remarks."""

    target: tuple[str, str]
    remark: tuple[str, str]


BRACKETS = Marks(("[", "]"), ("<<", ">>"))
COLOURS = Marks(("\x1b[32m", "\x1b[0m"), ("\x1b[2;35m", "\x1b[0m"))


@dataclass(frozen=True)
class Options:
    """What is shown: how many rows of which table (`train` or `eval`), and in which form."""

    num_rows: int = 3
    table: str = "train"
    ids: bool = False
    as_json: bool = False


def render(arguments: RunArguments, options: Options, *, target: TextIO | None = None) -> int:
    """Write rows; returns the exit code.

    Args:
        arguments: of the run whose data is shown.
        options: what of it.
        target: where to; the standard output if None.

    Raises:
        LlmrayError: the tokenizer or the data is missing or wrong, or the table has no rows.
    """
    target = target or sys.stdout
    model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model, weights=False)
    root = environment.cache_directory(os.environ) / "prepared"
    found = preview(arguments, model_dir, root=root, table=options.table, num_rows=options.num_rows)
    if found.left_out:
        shown = "; ".join(found.left_out[:MOST_SOURCES])
        log.warning(
            "%d rows before these are left out, since within cutoff_len no target is left of "
            "them: %s",
            len(found.left_out),
            shown + (", …" if len(found.left_out) > MOST_SOURCES else ""),
        )
    if not found.rows:
        raise DataError(_nothing(arguments, options.table, len(found.left_out)))
    has_colour = target.isatty() and not environment.no_colour(os.environ)
    marks = COLOURS if has_colour else BRACKETS
    for number, row in enumerate(found.rows, start=1):
        for line in _lines(number, row, found, options, marks):
            print(line, file=target)
    return 0


def as_object(row: PreviewRow, tokenizer: Tokenizer) -> dict[str, Any]:
    """A row in types of JSON.

    Returns: `text`, `input_ids`, `labels` (the id where a token is learned, else -100; not
        shifted), `source`, and `cuts`: objects with the place of a token and how many tokens
        `cutoff_len` took out before it.
    """
    ids = row.sample.input_ids.tolist()
    learned = row.sample.target_mask.tolist()
    return {
        "text": tokenizer.decode(ids, skip_special_tokens=False),
        "input_ids": ids,
        "labels": [i if is_target else IGNORED for i, is_target in zip(ids, learned, strict=True)],
        "source": "; ".join(row.sources),
        "cuts": [{"before": place, "tokens": count} for place, count in _pairs(row.cuts)],
    }


def _nothing(arguments: RunArguments, table: str, num_left_out: int) -> str:
    if table == "eval":
        return (
            "The run has no rows to evaluate on. Required for --eval: val_size or eval_dataset. "
            "Write one of them, or leave --eval out."
        )
    if not arguments.data.dataset:
        return (
            "The run has no rows to train on. Required: dataset. Write it, or --eval for the rows "
            "to evaluate on."
        )
    return (
        f"No row is left to train on ({num_left_out} have no target within cutoff_len). Take more "
        "data, or raise cutoff_len."
    )


def _lines(
    number: int, row: PreviewRow, found: Preview, options: Options, marks: Marks
) -> Iterator[str]:
    if options.as_json:
        yield json.dumps(as_object(row, found.tokenizer), ensure_ascii=False)
        return
    num_targets = int(row.sample.target_mask.sum())
    num_tokens = len(row.sample.input_ids)
    yield (
        f"--- row {number} of {options.table}: {num_tokens} tokens, {num_targets} of them targets"
    )
    yield f"    {_sources(row.sources)}"
    if row.cuts:
        num_cut = sum(count for _, count in _pairs(row.cuts))
        yield f"    cutoff_len took {num_cut} of {num_tokens + num_cut} tokens out"
    show = _tokens if options.ids else _text
    yield from show(row, found.tokenizer, marks)
    yield ""


def _sources(sources: tuple[str, ...]) -> str:
    if len(sources) <= MOST_SOURCES:
        return "; ".join(sources)
    return f"{sources[0]} to {sources[-1]} ({len(sources)} rows)"


def _text(row: PreviewRow, tokenizer: Tokenizer, marks: Marks) -> Iterator[str]:
    """The text in one piece, targets and cuts marked."""
    cuts = dict(_pairs(row.cuts))
    learned = row.sample.target_mask.tolist()
    borders = sorted({0, len(learned), *cuts, *_changes(learned)})
    ids = row.sample.input_ids.tolist()
    parts, before = [], ""
    for start, stop in pairwise(borders):
        parts.append(_remark(cuts, start, marks))
        # the text up to here minus that before: a token's text may depend on what precedes it
        whole = tokenizer.decode(ids[:stop], skip_special_tokens=False)
        if whole.startswith(before):
            piece = whole[len(before) :]
        else:
            piece = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        parts.append(_marked(piece, learned[start], marks))
        before = whole
    yield "".join([*parts, _remark(cuts, len(ids), marks)])


def _tokens(row: PreviewRow, tokenizer: Tokenizer, marks: Marks) -> Iterator[str]:
    """One line a token: its place, its id, its text."""
    cuts = dict(_pairs(row.cuts))
    pairs = zip(row.sample.input_ids.tolist(), row.sample.target_mask.tolist(), strict=True)
    for place, (token, is_target) in enumerate(pairs):
        if place in cuts:
            yield _remark(cuts, place, marks)
        text = json.dumps(tokenizer.decode([token], skip_special_tokens=False), ensure_ascii=False)
        yield f"{place:>6} {token:>7}  {_marked(text, is_target, marks)}"
    if len(row.sample.input_ids) in cuts:
        yield _remark(cuts, len(row.sample.input_ids), marks)


def _marked(text: str, is_target: bool, marks: Marks) -> str:
    before, after = marks.target
    return f"{before}{text}{after}" if is_target else text


def _remark(cuts: dict[int, int], place: int, marks: Marks) -> str:
    before, after = marks.remark
    return f"{before}{cuts[place]} tokens cut{after}" if place in cuts else ""


def _changes(learned: list[bool]) -> Iterator[int]:
    at = 0
    for _, group in groupby(learned):
        yield at
        at += sum(1 for _ in group)


def _pairs(cuts: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(cuts[::2], cuts[1::2], strict=True))
