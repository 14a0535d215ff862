"""A shard built by a plan, and what came of all of them together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmray import store
from llmray.data import files, shards
from llmray.data.conversation import Conversation, RowError, to_conversation
from llmray.data.encoding import Encoder
from llmray.data.features import FEATURES, RowFeatures
from llmray.data.pieces import Piece
from llmray.data.planning import EVAL, TRAIN, Plan, Shard
from llmray.errors import DataError, StoreError
from llmray.store import FileSum

MOST_PROBLEMS = 10
BATCH_CHARS = 1 << 22  # tokenizing takes about 100 bytes of memory a character


@dataclass
class SortedRows:
    """Rows of a shard by what came of them: those of each table, and what is wrong with others."""

    counts: dict[str, int]
    kept: dict[str, list[RowFeatures]]
    first_without_target: str | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShardReport:
    """What came of a shard: sums of its files by name, counts by table, and wrong rows."""

    files: dict[str, FileSum]
    counts: dict[str, int]
    first_without_target: str | None = None
    problems: tuple[str, ...] = ()


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
        return ShardReport({}, found.counts, None, tuple(found.problems))
    report = ShardReport({}, found.counts, found.first_without_target)
    return _write(plan, index, report, found.kept)


def sort_rows(plan: Plan, shard: Shard) -> SortedRows:
    """Build the rows of a shard; stops after the first `MOST_PROBLEMS` wrong ones."""
    counts = dict.fromkeys(("read", "truncated", "empty", "without_target"), 0)
    found = SortedRows(counts, {table: [] for table in plan.tables})
    for number, where, outcome in outcomes(plan, shard):
        counts["read"] += 1
        if isinstance(outcome, RowError):
            found.problems.append(f"{files.place(*where)}: {outcome}")
            if len(found.problems) == MOST_PROBLEMS:
                break
        elif not len(outcome.input_ids):
            counts["empty"] += 1
        elif not outcome.targets:
            counts["without_target"] += 1
            found.first_without_target = found.first_without_target or files.place(*where)
        else:
            counts["truncated"] += outcome.is_truncated
            found.kept[shard.table_of(number)].append(outcome)
    return found


def _write(
    plan: Plan, index: int, report: ShardReport, kept: Mapping[str, list[RowFeatures]]
) -> ShardReport:
    """Write the files of a shard, and last its report, which makes it finished."""
    staging = Path(plan.staging)
    counts = dict(report.counts)
    names = []
    for table, rows in kept.items():
        counts[f"{table}_rows"] = len(rows)
        counts[f"{table}_tokens"] = sum(len(row.input_ids) for row in rows)
        counts[f"{table}_targets"] = sum(row.num_targets for row in rows)
        if rows:
            names.append(_file(table, index))
            shards.write(staging / names[-1], rows)
    done = ShardReport(store.seal(staging, names), counts, report.first_without_target)
    store.write_atomic(staging / _note(index), json.dumps(asdict(done), sort_keys=True))
    return done


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
Found = tuple[Where, Conversation | RowError]


def outcomes(plan: Plan, shard: Shard) -> Iterator[tuple[int, Where, RowFeatures | RowError]]:
    """For each row of a shard its number, its place, and its features or what is wrong."""
    rows = _conversations(plan, shard)
    number = 0
    for batch in _batches(rows, plan.batch_size):
        kinds = [plan.features_of(shard.table_of(number + i)) for i in range(len(batch))]
        built = {kind: _built(plan, kind, kinds, batch) for kind in set(kinds)}
        for kind, (where, found) in zip(kinds, batch, strict=True):
            outcome = next(built[kind]) if isinstance(found, Conversation) else found
            yield number, where, outcome
            number += 1


def _built(
    plan: Plan, kind: str, kinds: Sequence[str], batch: Sequence[Found]
) -> Iterator[RowFeatures | RowError]:
    """The features of those rows of a batch that are of a kind of `FEATURES`, in order."""
    right = [
        found
        for own, (_, found) in zip(kinds, batch, strict=True)
        if own == kind and isinstance(found, Conversation)
    ]
    encoder = _encoder(plan.tokenizer_json)
    return iter(FEATURES[kind].build(right, encoder, plan.renderer, plan.options))


def _batches(rows: Iterator[Found], size: int) -> Iterator[list[Found]]:
    """Rows that are tokenized at once: at most `size`, and few enough where they are long."""
    batch: list[Found] = []
    num_chars = 0
    for where, found in rows:
        batch.append((where, found))
        if isinstance(found, Conversation):
            num_chars += sum(len(message.content) for message in found.messages)
        if len(batch) == size or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _conversations(plan: Plan, shard: Shard) -> Iterator[Found]:
    needs_response = FEATURES[plan.stage].needs_response
    for piece, layout in shard.pieces:
        for index, row in enumerate(files.read(piece)):
            found: Conversation | RowError
            try:
                if isinstance(row, RowError):
                    found = row
                else:
                    found = to_conversation(row, layout, needs_response)
            except RowError as error:
                found = error
            yield (piece, index), found


@lru_cache(maxsize=2)
def _encoder(tokenizer_json: str) -> Encoder:
    return Encoder(tokenizer_json)


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
        raise DataError(shown[0])
    count = f"{len(problems)}" if len(problems) < MOST_PROBLEMS else f"the first {MOST_PROBLEMS}"
    raise DataError(
        f"Rows of the data are wrong ({count} shown):\n"
        + "\n".join(f"  - {problem}" for problem in shown)
        + "\nMend them, or take them out."
    )


def tables(plan: Plan, reports: Sequence[ShardReport]) -> dict[str, list[str]]:
    """The files of each table in order."""
    found: dict[str, list[str]] = {table: [] for table in plan.tables}
    for index in range(len(plan.shards)):
        for table, names in found.items():
            if _file(table, index) in reports[index].files:
                names.append(_file(table, index))
    return found


def sums(plan: Plan, reports: Sequence[ShardReport]) -> dict[str, FileSum]:
    """The sums of all files of finished shards, their reports among them."""
    found = {name: entry for report in reports for name, entry in report.files.items()}
    return found | store.seal(Path(plan.staging), map(_note, range(len(reports))))


def counts(plan: Plan, reports: Sequence[ShardReport]) -> dict[str, Any]:
    """Counts of all shards together, and the place of the first row without a target.

    `train_rows` and `eval_rows` are rows of the tables: blocks, where texts are laid into blocks.
    Those of sets that are evaluated one by one are summed in `eval_rows`.
    """
    total: dict[str, Any] = {}
    for report in reports:
        for name, count in report.counts.items():
            total[name] = total.get(name, 0) + count
    places = (report.first_without_target for report in reports)
    total["first_without_target"] = next((place for place in places if place), None)
    if plan.block_len is not None:
        for table in plan.tables:
            total[f"{table}_rows"] = -(-total[f"{table}_tokens"] // plan.block_len)
            total[f"{table}_targets"] = total[f"{table}_tokens"] - total[f"{table}_rows"]
    for what in ("rows", "tokens", "targets"):
        found = sum(total[f"{table}_{what}"] for table in plan.tables[1:])
        total[f"{EVAL}_{what}"] = found
        if what != "rows":
            total[what] = total[f"{TRAIN}_{what}"] + found
    return total


def _file(table: str, index: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', table)}-{index:05d}.arrow"


def _note(index: int) -> str:
    return f"shard-{index:05d}.json"
