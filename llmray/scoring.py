"""Rewards as JSON lines: `llmray score run.yaml`, of the run's data or of the standard input.

    llmray score run.yaml adapter_name_or_path=out > scores.jsonl
    echo '{"prompt": "2 + 2?", "response": "4"}' | llmray score run.yaml --input -

They are those of the reward server and of training: the same `Scorer` gives them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import Any, TextIO

from llmray.arguments import environment
from llmray.arguments.run import RunArguments
from llmray.data import files, sources
from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.formattings import to_conversation
from llmray.data.pieces import CHUNK_BYTES
from llmray.data.row_format import RowFormat
from llmray.errors import DataError, RewardError
from llmray.train.score import Encoded, Scorer

log = getLogger("llmray")

CHUNK_ROWS = 256  # scored together, in forward passes of texts of all of them
INPUT = "the standard input"
OPENAI = RowFormat("openai")


@dataclass(frozen=True)
class Options:
    """What is scored: the rows to train or to evaluate on, or lines of a file (`-`: the input)."""

    table: str = "train"
    lines: str | None = None


@dataclass(frozen=True)
class Item:
    """A row: where it stands, and what is to be scored by the names of its results."""

    source: str
    asked: dict[str, Conversation | str]  # a str is a whole text
    error: RowError | None = None


def score(
    arguments: RunArguments,
    options: Options,
    *,
    source: TextIO | None = None,
    target: TextIO | None = None,
) -> int:
    """Write an object a row: `source`, and `score`, or `chosen` and `rejected` of a pair.

    Args:
        arguments: of the run whose reward model scores.
        options: what is scored.
        source: the standard input if None.
        target: where to; the standard output if None.

    Returns: the exit code.

    Raises:
        LlmrayError: the model or the data is missing or wrong; with bad_rows: skip wrong rows are
            left out. A score that is no number ends it too; the row is named.
    """
    items = _items(arguments, options, source or sys.stdin)
    scorer = Scorer.load(arguments)
    counts = _Counts()
    skips = arguments.data.bad_rows != "error"
    for chunk in _chunks(items):
        for line in _scored(chunk, scorer, counts, skips):
            print(json.dumps(line, ensure_ascii=False), file=target or sys.stdout)
    (target or sys.stdout).flush()
    counts.say()
    return 0


@dataclass
class _Counts:
    """What came of the rows so far; `seconds` are those of scoring, without loading."""

    texts: int = 0
    tokens: int = 0
    cut: int = 0
    bad: int = 0
    first_bad: str = ""
    seconds: float = 0.0

    def say(self) -> None:
        rate = self.texts / max(self.seconds, 1e-9)
        log.info(
            "scored %d texts, %d tokens, in %.1f s: %.1f texts a second",
            self.texts,
            self.tokens,
            self.seconds,
            rate,
        )
        if self.cut:
            log.info("%d texts were cut to what fits", self.cut)
        if self.bad:
            log.warning("%d rows are wrong and left out, first %s", self.bad, self.first_bad)


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, CHUNK_ROWS)):
        yield chunk


def _scored(
    chunk: Sequence[Item], scorer: Scorer, counts: _Counts, skips: bool
) -> Iterator[dict[str, Any]]:
    """The lines of some rows."""
    started = time.perf_counter()
    kept: list[tuple[Item, list[Encoded]]] = []
    for item, encoded in zip(chunk, _encoded(chunk, scorer), strict=True):
        error = item.error or next((e for e in encoded if isinstance(e, RowError)), None)
        if error is None:
            kept.append((item, [e for e in encoded if isinstance(e, Encoded)]))
        elif not skips:
            raise DataError(f"{item.source}: {error} With bad_rows: skip such rows are left out.")
        else:
            counts.first_bad = counts.first_bad or f"{item.source}: {error}"
            counts.bad += 1
    texts = [text for _, encoded in kept for text in encoded]
    scores = iter(scorer.run([text.ids for text in texts]))
    counts.texts += len(texts)
    counts.tokens += sum(len(text.ids) for text in texts)
    counts.cut += sum(text.is_cut for text in texts)
    counts.seconds += time.perf_counter() - started
    for item, _ in kept:
        found = {name: next(scores) for name in item.asked}
        wrong = next((name for name, value in found.items() if not math.isfinite(value)), None)
        if wrong is not None:
            raise RewardError(
                f"{item.source}: the reward ({wrong}) is {found[wrong]}. A finite number is "
                "required: score with infer_dtype: float32, or take an earlier checkpoint."
            )
        yield {"source": item.source, **found}


def _encoded(chunk: Sequence[Item], scorer: Scorer) -> list[list[Encoded | RowError]]:
    """The tokens of all that is asked for, row by row."""
    asked = [what for item in chunk for what in item.asked.values()]
    texts = iter(scorer.encode([what for what in asked if isinstance(what, str)]))
    talks = [what for what in asked if isinstance(what, Conversation)]
    conversations = iter(scorer.encode_conversations(talks))
    rows: list[list[Encoded | RowError]] = []
    for item in chunk:
        row: list[Encoded | RowError] = []
        for what in item.asked.values():
            found = next(texts) if isinstance(what, str) else next(conversations)
            if isinstance(found, Encoded) and not len(found.ids):
                found = RowError("the text has no token. Required: text to score.")
            row.append(found)
        rows.append(row)
    return rows


def _items(arguments: RunArguments, options: Options, source: TextIO) -> Iterator[Item]:
    if options.lines is None:
        return _of_sets(arguments, options.table)
    return _of_lines(options.lines, source)


# ---- the run's data ------------------------------------------------------------------------------


def _of_sets(arguments: RunArguments, table: str) -> Iterator[Item]:
    """The rows of the run's sets in the order of their files, the first max_samples of each."""
    data = arguments.data
    key = "dataset" if table == "train" else "eval_dataset"
    names = data.dataset if table == "train" else data.eval_dataset
    if not names:
        raise DataError(
            f"The run has no {key}, so there is nothing to score. Write {key}, or name a file of "
            "lines by --input (- is the standard input)."
        )
    cache = environment.prepared_directory(os.environ) / "fetched"
    opened = [
        dataset
        for name in names
        for dataset in sources.open_sets(
            [name], data.dataset_dir, cache=cache, kind=sources.kind_of(name, data.dataset_dir)
        )
    ]
    return _of_opened(sources.fetched(opened), arguments)


def _of_opened(opened: Iterable[sources.DataSet], arguments: RunArguments) -> Iterator[Item]:
    data = arguments.data
    for dataset in opened:
        kind = sources.kind_of(dataset.name, data.dataset_dir)
        sources.check_columns(dataset)
        limit = data.max_samples
        for file in dataset.files:
            for piece in files.pieces(file, CHUNK_BYTES, limit):
                for index, row in enumerate(files.read(piece)):
                    where = files.place(piece, index)
                    try:
                        if isinstance(row, RowError):
                            raise row
                        found = to_conversation(row, dataset.layout, kind)
                    except RowError as error:
                        yield Item(where, {}, error)
                    else:
                        yield Item(where, _asked(found))
                limit = None if limit is None else limit - piece.num_rows


def _asked(conversation: Conversation) -> dict[str, Conversation | str]:
    """What of a row is scored: its last response, or those that are compared."""
    if conversation.chosen is None:
        return {"score": conversation}
    several = len(conversation.rejected) > 1
    answers = {"chosen": conversation.chosen}
    for number, answer in enumerate(conversation.rejected, start=1):
        answers[f"rejected_{number}" if several else "rejected"] = answer
    return {name: _ending(conversation, answer) for name, answer in answers.items()}


def _ending(conversation: Conversation, answer: Message) -> Conversation:
    messages = (*conversation.messages, answer)
    return replace(conversation, messages=messages, chosen=None, rejected=())


# ---- lines of JSON -------------------------------------------------------------------------------


def _of_lines(name: str, source: TextIO) -> Iterator[Item]:
    with ExitStack() as stack:
        where = INPUT if name == "-" else name
        try:
            lines = source if name == "-" else stack.enter_context(Path(name).open())
        except OSError as error:
            raise DataError(
                f"--input {name}: {error.strerror}. A file of JSON lines is required, or - for the "
                "standard input."
            ) from error
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _of_line(f"{where}, line {number}", line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not in UTF-8 ({error}). Text in UTF-8 is required.") from (
                error
            )


def _of_line(where: str, line: str) -> Item:
    try:
        row = json.loads(line)
        line.encode()
        return Item(where, {"score": _of_row(row)})
    except (ValueError, RecursionError) as error:
        return Item(where, {}, RowError(f"it is no JSON ({error}). Required: {FORMS}"))
    except RowError as error:
        return Item(where, {}, error)


FORMS = (
    'a text, {"text": ...}, {"prompt": ..., "response": ...}, or {"messages": [...]} with role '
    "and content, the last from assistant."
)


def _of_row(row: Any) -> Conversation | str:
    if isinstance(row, str):
        return _unicode(row)
    if isinstance(row, dict) and "messages" in row:
        return to_conversation(row, OPENAI, "responses")
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return _unicode(row["text"])
    parts = [row.get(key) for key in ("prompt", "response")] if isinstance(row, dict) else [None]
    if not all(isinstance(part, str) for part in parts):
        raise RowError(f"it is none of the forms of a line. Required: {FORMS}")
    prompt, response = (_unicode(str(part)) for part in parts)
    return Conversation((Message("user", prompt), Message("assistant", response)))


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("it holds half a character. Required: text in Unicode.") from None
    return text
