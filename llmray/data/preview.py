"""The first rows of a run's prepared data, with where each came from and what was taken out of it.

They come out of the same plan, the same features and the same table as the prepared data itself;
only the shards are written to a folder that is gone afterwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from llmray.data import build, files, prepared, shards
from llmray.data.conversation import RowError
from llmray.data.features import RowFeatures
from llmray.data.planning import HELD_OUT, UNUSED, USED, Plan
from llmray.data.shards import Sample, SampleTable
from llmray.errors import DataError

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

BATCH_ROWS = 32  # tokenized at once: few are looked at


@dataclass(frozen=True)
class PreviewRow:
    """A row of a table as the model sees it.

    `sources` are the places of the rows of the files that it holds: one, or several where texts
    are laid into blocks. `cuts` are those of `RowFeatures`.
    """

    sample: Sample
    sources: tuple[str, ...]
    cuts: tuple[int, ...]


@dataclass(frozen=True)
class Preview:
    """The first rows of a table.

    `left_out` are the places of rows before them without a target, which no table has; `tokenizer`
    turns ids into text.
    """

    rows: list[PreviewRow]
    left_out: tuple[str, ...]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Found:
    where: str
    features: RowFeatures
    number: int  # among the rows of the table's shards


def preview(
    arguments: RunArguments, model_dir: Path, *, root: Path, table: str, num_rows: int
) -> Preview:
    """The first rows of a table of a run's data; none where the table is empty.

    Args:
        arguments: of the run.
        model_dir: the folder of the tokenizer.
        root: where prepared data lies; digests of the files are kept there, and nothing else.
        table: `train` or `eval`.
        num_rows: how many rows are wanted.

    Raises:
        DataError: a set, a file or a row is missing or wrong.
    """
    plan = prepared.plan(arguments, model_dir, root=root, trains=True)
    plan = replace(plan, batch_size=min(plan.batch_size, BATCH_ROWS))
    tokens_wanted = None if plan.block_len is None else num_rows * plan.block_len
    found: list[_Found] = []
    left_out: list[str] = []
    num_tokens = 0
    for one in _in_order(plan, table):
        if not one.features.targets and not one.features.is_prompt:
            left_out.append(one.where)
            continue
        found.append(one)
        num_tokens += len(one.features.input_ids)
        is_enough = len(found) >= num_rows if tokens_wanted is None else num_tokens >= tokens_wanted
        if is_enough:
            break
    rows = _rows(found, plan.block_len)[:num_rows]
    return Preview(rows, tuple(left_out), Tokenizer.from_str(plan.tokenizer_json))


def _built(plan: Plan, table: str) -> Iterator[_Found]:
    """The rows of a table in the order of its shards."""
    first = 0
    for shard in plan.shards:
        if shard.table == table or HELD_OUT in shard.uses:
            for number, where, outcome in build.outcomes(plan, shard):
                place = files.place(*where)
                if isinstance(outcome, RowError) and plan.bad_rows == "error":
                    raise DataError(f"{place}: {outcome}")
                if not isinstance(outcome, RowFeatures) or not len(outcome.input_ids):
                    continue
                if shard.table_of(number) == table:
                    yield _Found(place, outcome, first + number)
        if shard.table == table:
            first += shard.num_rows


def _in_order(plan: Plan, table: str) -> Iterator[_Found]:
    """The rows of a table in its order; of one that is mixed, only those are built that come."""
    if table not in plan.orders:
        yield from _built(plan, table)
        return
    order = plan.orders[table]
    first, count = 0, BATCH_ROWS
    while first < len(order):
        wanted = order[first : first + count]
        built: dict[int, list[_Found]] = {}
        for one in _built(_only(plan, table, wanted), table):
            built.setdefault(one.number, []).append(one)
        yield from (one for number in wanted.tolist() for one in built.get(number, []))
        first, count = first + count, 4 * count


def _only(plan: Plan, table: str, wanted: np.ndarray) -> Plan:
    """A plan that builds of a table no rows but those that are wanted."""
    kept = []
    first = 0
    for shard in plan.shards:
        if shard.table != table:
            continue
        mine = wanted[(wanted >= first) & (wanted < first + shard.num_rows)] - first
        first += shard.num_rows
        before = np.frombuffer(shard.uses or bytes([USED]) * shard.num_rows, np.uint8)
        uses = np.full(shard.num_rows, UNUSED, np.uint8)
        uses[mine] = before[mine]
        kept.append(replace(shard, uses=uses.tobytes()))
    return replace(plan, shards=tuple(kept))


def _rows(found: list[_Found], block_len: int | None) -> list[PreviewRow]:
    """The rows as the table gives them that holds them."""
    if not found:
        return []
    with tempfile.TemporaryDirectory(prefix="llmray-preview-") as folder:
        path = Path(folder) / "rows.arrow"
        shards.write(path, [one.features for one in found], range(len(found)))
        table = SampleTable([str(path)], block_len)
        samples = [_copied(table[index]) for index in range(len(table))]
    if block_len is None:
        return [
            PreviewRow(sample, (one.where,), one.features.cuts)
            for sample, one in zip(samples, found, strict=True)
        ]
    ends = np.cumsum([len(one.features.input_ids) for one in found])
    starts = np.arange(len(samples)) * block_len
    firsts = np.searchsorted(ends, starts, "right")
    lasts = np.searchsorted(ends, starts + [len(sample.input_ids) for sample in samples], "left")
    return [
        PreviewRow(sample, tuple(one.where for one in found[first : last + 1]), ())
        for sample, first, last in zip(samples, firsts, lasts, strict=True)
    ]


def _copied(sample: Sample) -> Sample:
    return Sample(np.array(sample.input_ids), sample.target_mask)
