"""A shard built by a plan, and what came of all of them together."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llmray import store
from llmray.data import files, shards, spoken
from llmray.data.conversation import Conversation, RowError
from llmray.data.encoding import Encoder
from llmray.data.features import FEATURES, Outcome, RowFeatures
from llmray.data.formattings import to_conversation
from llmray.data.pieces import Piece
from llmray.data.plain_text import PlainText
from llmray.data.planning import EVAL, REPEATED, TRAIN, UNUSED, Plan, Shard
from llmray.data.row_features import Equal
from llmray.data.row_format import RowFormat
from llmray.data.shards import SampleTable
from llmray.data.truncation import Dropped
from llmray.errors import DataError, StoreError
from llmray.store import FileSum

MOST_PROBLEMS = 10
COUNTS = ("read", "bad", "over_limit", "truncated", "empty", "without_target", "equal")
GO_ON = "With bad_rows: skip, or quarantine, such rows are left out."
BATCH_CHARS = 1 << 22  # tokenizing takes about 100 bytes of memory a character


@dataclass(frozen=True)
class ShardReport:
    """What came of a shard: sums of its files by name, counts by table, and wrong rows.

    `firsts` says of a count, by its name, where the first such row is. `problems` are wrong rows
    that must not be. `is_new` says that it was built for this report, not found finished.
    """

    files: dict[str, FileSum]
    counts: dict[str, int]
    firsts: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    is_new: bool = False


@dataclass
class SortedRows:
    """Rows of a shard by what came of them: those of each table, and what is wrong with others."""

    plan: Plan
    shard: Shard
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    firsts: dict[str, str] = field(default_factory=dict)
    kept: dict[str, list[RowFeatures]] = field(default_factory=lambda: defaultdict(list))
    numbers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: int, where: Where, outcome: Outcome) -> None:
        """Take what came of a row."""
        self.counts["read"] += 1
        if isinstance(outcome, RowError):
            self._add_bad(where, outcome)
        elif isinstance(outcome, Dropped):
            self._leave_out("over_limit", where, f" has {outcome.num_tokens} tokens")
        elif isinstance(outcome, Equal):
            self._leave_out("equal", where)
        elif not len(outcome.input_ids):
            self.counts["empty"] += 1
        elif not outcome.targets and not outcome.is_prompt:
            self._leave_out("without_target", where)
        else:
            self.counts["truncated"] += outcome.is_truncated
            table = self.shard.table_of(number)
            self.kept[table].append(outcome)
            self.numbers[table].append(number)

    def _leave_out(self, count: str, where: Where, more: str = "") -> None:
        self.counts[count] += 1
        if count not in self.firsts:
            self.firsts[count] = files.place(*where) + more

    def _add_bad(self, where: Where, error: RowError) -> None:
        if self.plan.bad_rows == "error":
            self.problems.append(f"{files.place(*where)}: {error}")
            return
        self._leave_out("bad", where, f": {error}")
        if self.plan.bad_rows == "quarantine":
            path, row, line = files.position(*where)
            content = files.content(*where) if error.text is None else error.text
            self.bad.append(
                {"file": path, "row": row, "line": line, "reason": str(error), "content": content}
            )


def build_shard(plan: Plan, index: int) -> ShardReport:
    """Build a shard, unless it is finished; its rows are wrong if the report has problems.

    Raises:
        StoreError: it cannot be written.
    """
    note = Path(plan.staging) / _note(index)
    if note.exists():
        return finished(plan, index)
    found = sort_rows(plan, plan.shards[index])
    if found.problems:
        return ShardReport({}, found.counts, {}, tuple(found.problems))
    return _write(plan, index, found)


def sort_rows(plan: Plan, shard: Shard) -> SortedRows:
    """Build the rows of a shard; stops after the first `MOST_PROBLEMS` wrong ones."""
    found = SortedRows(plan, shard)
    for number, where, outcome in outcomes(plan, shard):
        found.add(number, where, outcome)
        if len(found.problems) == MOST_PROBLEMS:
            break
    return found


def _write(plan: Plan, index: int, found: SortedRows) -> ShardReport:
    """Write the files of a shard, and last its report, which makes it finished."""
    staging = Path(plan.staging)
    counts = dict(found.counts)
    names = []
    for table in plan.tables:
        rows = found.kept[table]
        counts[f"{table}_rows"] = len(rows)
        counts[f"{table}_tokens"] = sum(len(row.input_ids) for row in rows)
        counts[f"{table}_targets"] = sum(row.num_targets for row in rows)
        if rows:
            names.append(_file(table, index))
            shards.write(staging / names[-1], rows, found.numbers[table])
    if found.bad:
        names.append(_bad_file(index))
        store.write_atomic(staging / names[-1], "".join(map(bad_line, found.bad)))
    done = ShardReport(store.seal(staging, names), counts, found.firsts)
    store.write_atomic(staging / _note(index), json.dumps(asdict(done), sort_keys=True))
    return replace(done, is_new=True)


def bad_line(row: Mapping[str, Any]) -> str:
    """A row that was put aside, as a line of JSON."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row, default=str)
    return line + "\n"


def finished(plan: Plan, index: int) -> ShardReport:
    """The report of a finished shard.

    Raises:
        StoreError: it is not finished.
    """
    path = Path(plan.staging) / _note(index)
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(
            f"Shard {index} of {len(plan.shards)} is not built: {path} is missing. Required: all "
            "shards. Build it, then commit."
        ) from None
    sums = {name: FileSum(**entry) for name, entry in raw.pop("files").items()}
    return ShardReport(sums, **{k: v for k, v in raw.items() if k != "problems"})


Where = tuple[Piece, int]
Found = tuple[int, Where, Conversation | RowError]


def outcomes(plan: Plan, shard: Shard) -> Iterator[tuple[int, Where, Outcome]]:
    """For each row of a shard its number, its place, and its features or what is wrong."""
    for batch in _batches(_conversations(plan, shard), plan.batch_size):
        kinds = [plan.features_of(shard.table_of(number)) for number, _, _ in batch]
        built = {kind: _built(plan, kind, kinds, batch) for kind in set(kinds)}
        for kind, (number, where, found) in zip(kinds, batch, strict=True):
            outcome = next(built[kind]) if isinstance(found, Conversation) else found
            if FEATURES[kind].keeps_said and isinstance(outcome, RowFeatures):
                assert isinstance(found, Conversation), "it has features"
                outcome = replace(outcome, said=spoken.write(found))
            yield number, where, outcome


def _built(
    plan: Plan, kind: str, kinds: Sequence[str], batch: Sequence[Found]
) -> Iterator[Outcome]:
    """The features of those rows of a batch that are of a kind of `FEATURES`, in order."""
    right = [
        found
        for own, (_, _, found) in zip(kinds, batch, strict=True)
        if own == kind and isinstance(found, Conversation)
    ]
    encoder = _encoder(plan.tokenizer_json, plan.plain)

    def build(conversations: Sequence[Conversation]) -> list[Outcome]:
        if plan.plain is not None:
            conversations = [plan.plain.hidden(one) for one in conversations]
        return FEATURES[kind].build(conversations, encoder, plan.renderer, plan.options)

    try:
        return iter(build(right))
    except (TypeError, UnicodeEncodeError):
        return iter(_built_without_halves(right, build))


def _built_without_halves(
    conversations: Sequence[Conversation],
    build: Callable[[Sequence[Conversation]], list[Outcome]],
) -> list[Outcome]:
    """Outcomes where some texts are no Unicode, which tokenizers refuse with various errors."""
    errors = [half_a_character(conversation) for conversation in conversations]
    pairs = list(zip(conversations, errors, strict=True))
    built = iter(build([conversation for conversation, error in pairs if error is None]))
    return [next(built) if error is None else error for error in errors]


def half_a_character(conversation: Conversation) -> RowError | None:
    """Why the texts of a conversation are no Unicode, None where they are."""
    answers = [conversation.chosen, *conversation.rejected, conversation.label]
    said = [*conversation.messages, *(answer for answer in answers if answer is not None)]
    texts = [conversation.system, conversation.tools, *(message.content for message in said)]
    try:
        "".join(text for text in texts if text).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        return RowError(f"{half} is half a character. Required: text in Unicode. Mend the row.")
    return None


def _batches(rows: Iterator[Found], size: int) -> Iterator[list[Found]]:
    """Rows that are tokenized at once: at most `size`, and few enough where they are long."""
    batch: list[Found] = []
    num_chars = 0
    for number, where, found in rows:
        batch.append((number, where, found))
        if isinstance(found, Conversation):
            num_chars += _num_chars(found)
        if len(batch) == size or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _num_chars(conversation: Conversation) -> int:
    """Characters that are tokenized; those before a pair of answers are, with each of them."""
    said = sum(len(message.content) for message in conversation.messages)
    if conversation.chosen is None:
        return said
    answers = (conversation.chosen, *conversation.rejected)
    return len(answers) * said + sum(len(answer.content) for answer in answers)


def _conversations(plan: Plan, shard: Shard) -> Iterator[Found]:
    """The rows of a shard that are used, each with its number in the shard; pairs one by one."""
    kind = FEATURES[plan.stage].kind
    number = -1
    for piece, layout in shard.pieces:
        for index, row in enumerate(files.read(piece)):
            number += 1
            if shard.uses and shard.uses[number] == UNUSED:
                continue
            made: Sequence[Conversation | RowError]
            try:
                if shard.uses and shard.uses[number] == REPEATED:
                    raise _repeated(row, layout)
                if isinstance(row, RowError):
                    raise row
                made = to_conversation(row, layout, kind).pairs()
            except RowError as error:
                made = [error]
            for found in made:
                yield number, (piece, index), found


def _repeated(row: Any, layout: RowFormat) -> RowError:
    column = layout.column("id")
    return RowError(
        f"{column!r} is {row[column]!r}, as in an earlier row of the set. Required: ids that "
        "differ. Mend them, or name no id among the set's columns."
    )


@lru_cache(maxsize=2)
def _encoder(tokenizer_json: str, plain: PlainText | None) -> Encoder:
    return Encoder(tokenizer_json, plain)


def raise_problems(reports: Sequence[ShardReport]) -> None:
    """Raise one error that says the first wrong rows; nothing where there are none.

    Raises:
        DataError: if there are.
    """
    problems = [problem for report in reports for problem in report.problems]
    if not problems:
        return
    shown = problems[:MOST_PROBLEMS]
    if len(problems) == 1:
        raise DataError(f"{shown[0]} {GO_ON}")
    count = f"{len(problems)}" if len(problems) < MOST_PROBLEMS else f"the first {MOST_PROBLEMS}"
    raise DataError(
        f"Rows of the data are wrong ({count} shown):\n"
        + "\n".join(f"  - {problem}" for problem in shown)
        + f"\nMend them, or take them out. {GO_ON}"
    )


def tables(plan: Plan, reports: Sequence[ShardReport]) -> dict[str, list[str]]:
    """The files of each table in order."""
    found: dict[str, list[str]] = {table: [] for table in plan.tables}
    for index in range(len(plan.shards)):
        for table, names in found.items():
            if _file(table, index) in reports[index].files:
                names.append(_file(table, index))
    return found


def bad_files(reports: Sequence[ShardReport]) -> list[str]:
    """The files with the rows that were put aside."""
    names = map(_bad_file, range(len(reports)))
    return [name for name, report in zip(names, reports, strict=True) if name in report.files]


def write_orders(plan: Plan, reports: Sequence[ShardReport]) -> dict[str, str]:
    """Write the orders of tables that have one; returns their files by table."""
    files_of = {}
    for table, order in _orders(plan, reports).items():
        files_of[table] = f"order-{plan.tables.index(table):05d}.npy"
        with store.explained(plan.staging):
            np.save(Path(plan.staging, files_of[table]), order)
    return files_of


def _orders(plan: Plan, reports: Sequence[ShardReport]) -> dict[str, np.ndarray]:
    """The orders of tables that have one: (num_rows,) int64 numbers of the rows that were kept.

    Rows that were left out are in no order; one that is drawn several times is there as often.
    """
    found = {}
    for table, order in plan.orders.items():
        parts = [np.empty(0, np.int64)]
        first = 0
        for index, shard in enumerate(plan.shards):
            if shard.table != table:
                continue
            if _file(table, index) in reports[index].files:
                kept = shards.row_numbers(Path(plan.staging, _file(table, index)))
                parts.append(kept.astype(np.int64) + first)
            first += shard.num_rows
        found[table] = _places(np.concatenate(parts), order)
    return found


def _places(numbers: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Where the rows of an order stand, several where a row of the files became several.

    Args:
        numbers: of the rows that were kept, in rising order, (num_kept,) int64.
        order: numbers of rows, (num_drawn,) int64.
    """
    starts = np.searchsorted(numbers, order, "left")
    counts = np.searchsorted(numbers, order, "right") - starts
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    places: np.ndarray = np.repeat(starts, counts) + within
    return places


def sums(plan: Plan, reports: Sequence[ShardReport], more: Iterable[str]) -> dict[str, FileSum]:
    """The sums of all files of finished shards, their reports and `more` among them."""
    found = {name: entry for report in reports for name, entry in report.files.items()}
    return found | store.seal(Path(plan.staging), [*map(_note, range(len(reports))), *more])


def counts(
    plan: Plan, reports: Sequence[ShardReport], opened: Mapping[str, SampleTable]
) -> dict[str, Any]:
    """Counts of all shards together, and in `firsts` where the first row of some counts is.

    `train_rows` and `eval_rows` are rows of the tables: blocks, where texts are laid into blocks.
    Those of sets that are evaluated one by one are summed in `eval_rows`.
    `repeated` of them were drawn before, `unused` rows were not drawn.

    Args:
        plan: that was built.
        reports: of its shards.
        opened: its tables.
    """
    total: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    for report in reports:
        for name, count in report.counts.items():
            total[name] = total.get(name, 0) + count
    firsts = reversed([report.firsts for report in reports])
    total["firsts"] = {name: place for first in firsts for name, place in first.items()}
    total["unused"] = sum(shard.uses.count(UNUSED) for shard in plan.shards)
    total["repeated"] = 0
    for table, rows in opened.items():
        if rows.order is not None:
            total["repeated"] += len(rows.order) - len(np.unique(rows.order))
        total[f"{table}_rows"] = len(rows)
        total[f"{table}_tokens"] = rows.num_tokens
        total[f"{table}_targets"] = int(rows.target_counts.sum(dtype=np.int64))
    for what in ("rows", "tokens", "targets"):
        evaluated = sum(total[f"{table}_{what}"] for table in plan.tables[1:])
        total[f"{EVAL}_{what}"] = evaluated
        if what != "rows":
            total[what] = total[f"{TRAIN}_{what}"] + evaluated
    return total


def _file(table: str, index: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', table)}-{index:05d}.arrow"


def _note(index: int) -> str:
    return f"shard-{index:05d}.json"


def _bad_file(index: int) -> str:
    return f"bad-{index:05d}.jsonl"
