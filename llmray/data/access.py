"""The data of a run, prepared first or read while training: made ready in the driver, then opened.

ref = access.ready(arguments, model_dir, root=cache / "prepared")
stream = access.open_stream(arguments, model_dir, root=..., ranks=ranks)    # if it is a stream
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmray.data import identity, planning, prepared, sources
from llmray.data.file_rows import FileRows, FileSet, Ranks
from llmray.data.mismatched import JudgedTable
from llmray.data.planning import Plan
from llmray.data.prepared import BuildShards, PreparedRef
from llmray.data.quarantine import Quarantine
from llmray.data.shards import Sample, Table
from llmray.data.sources import DataSet
from llmray.data.stream_mixing import MixedRows, Mixing
from llmray.data.streaming import Stream, StreamOptions, block
from llmray.errors import DataError

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments


@dataclass(frozen=True)
class StreamRef:
    """What is streamed; picklable. `key` follows from the files' names and sizes, not their bytes.

    Two nodes whose files lie at different places come to the same key. `fingerprint` holds, in JSON
    types, all that it follows from, and `files` the paths of the sets' files here.
    """

    key: str
    fingerprint: dict[str, Any] = field(repr=False, default_factory=dict)
    files: dict[str, list[list[str]]] = field(repr=False, compare=False, default_factory=dict)


class MemoryTable:
    """Rows that are kept in memory, as a table.

    Attributes:
        lengths: tokens of each row, (num_rows,) int32.
        target_counts: targets of each row, (num_rows,) int32.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.lengths = np.array([len(sample.input_ids) for sample in samples], np.int32)
        counts = [int(sample.target_mask.sum()) for sample in samples]
        self.target_counts = np.array(counts, np.int32)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    @property
    def num_rows(self) -> int:
        """Rows, as many as `len`."""
        return len(self)

    def samples(self, index: int) -> list[Sample]:
        """The samples of a row: itself."""
        return [self[index]]


@dataclass(frozen=True)
class Streamed:
    """An opened stream, and the rows to evaluate on by name."""

    train: Stream
    eval: dict[str, Table]


def ready(
    arguments: RunArguments,
    model_dir: Path | str,
    *,
    root: Path,
    run_token: str | None = None,
    build_shards: BuildShards | None = None,
) -> PreparedRef | StreamRef:
    """The data of a run, prepared if that is not done; of a stream, what is known beforehand.

    Args:
        arguments: of the run.
        model_dir: the folder of the tokenizer.
        root: where prepared data lies, and sets from a hub.
        run_token, build_shards: as in `prepared.ensure`.

    Raises:
        DataError: a set, a file, a column or a row is missing or wrong.
        StoreError: the data cannot be written.
    """
    if not arguments.data.streaming:
        return prepared.ensure(
            arguments, model_dir, root=root, run_token=run_token, build_shards=build_shards
        )
    train, evaluation = _sets(arguments, Path(root))
    for dataset in [*train, *evaluation]:
        sources.check_columns(dataset)
    digests = identity.Digests(Path(root) / "digests")
    found = identity.describe(arguments, Path(model_dir), [], [], digests)
    found["sets"] = [_described(dataset) for dataset in train]
    found["eval_sets"] = [_described(dataset) for dataset in evaluation]
    paths = {
        name: [[file.name for file in dataset.files] for dataset in sets]
        for name, sets in (("sets", train), ("eval_sets", evaluation))
    }
    return StreamRef(identity.key_of(found), found, paths)


def place_here(ref: PreparedRef | StreamRef, root: Path) -> PreparedRef | StreamRef:
    """The same data where this machine has it."""
    return prepared.place_here(ref, root) if isinstance(ref, PreparedRef) else ref


def open_stream(
    arguments: RunArguments, model_dir: Path | str, *, root: Path, ranks: Ranks
) -> Streamed:
    """Open the stream of a run at its beginning; a collective call where rows are evaluated on.

    Those are read now and stay in memory: the sets of eval_dataset, or val_size rows that are drawn
    from the first buffer_size of the stream.

    Raises:
        DataError: a set, a file or a row is missing or wrong, or too few rows are there.
        ModelError: there is no usable tokenizer.
    """
    train, evaluation = _sets(arguments, Path(root))
    plan = planning.make_plan(planning.Job("", "", {}, [], []), arguments, Path(model_dir))
    quarantine = Quarantine() if plan.bad_rows == "quarantine" else None
    read = partial(_rows, arguments, plan, ranks, quarantine)
    held_out, tables = _held_out(arguments, plan, partial(read, train))
    one_by_one = arguments.data.eval_on_each_dataset
    names = [f"eval_{dataset.name}" if one_by_one else "eval" for dataset in evaluation]
    for name in dict.fromkeys(names):
        sets = [each for each, own in zip(evaluation, names, strict=True) if own == name]
        rows = [row.sample for row in read(sets, "eval", Mixing()) if row.sample is not None]
        tables[name] = _table(rows, plan)
    judged, opened = arguments.finetuning.stage == "kto", dict[str, Table](tables)
    if judged:
        cutoff_len = arguments.data.cutoff_len
        opened = {name: JudgedTable(rows, cutoff_len, name) for name, rows in tables.items()}
    training = arguments.training
    options = StreamOptions(
        per_device=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        seed=training.seed if training.data_seed is None else training.data_seed,
        buffer_size=_buffer_size(arguments),
        block_len=plan.block_len,
        held_out=held_out,
        drop_last=training.dataloader_drop_last,
        judged_len=arguments.data.cutoff_len if judged else None,
    )
    return Streamed(Stream(read(train, "train"), options, quarantine), opened)


def _sets(arguments: RunArguments, root: Path) -> tuple[list[DataSet], list[DataSet]]:
    """The sets of a run with their files here, none of which asks for what a stream cannot do."""
    train, evaluation = prepared.sets_of(arguments, root)
    for dataset in [*train, *evaluation]:
        if dataset.num_samples is not None:
            raise DataError(
                f"{dataset.name} has num_samples={dataset.num_samples}, and a stream has no known "
                "length to draw from. Remove num_samples, or set streaming: false."
            )
        if dataset.layout.column("id") is not None:
            raise DataError(
                f"{dataset.name} names the column id, and ids of a stream are not compared. Remove "
                "id from its columns, or set streaming: false."
            )
    return sources.fetched(train), sources.fetched(evaluation)


def _described(dataset: DataSet) -> dict[str, Any]:
    layout = dataset.layout
    return {
        "formatting": layout.formatting,
        "columns": dict(layout.columns),
        "tags": dict(layout.tags),
        "files": [
            [file.format, os.path.basename(file.name), os.stat(file.path).st_size]
            for file in dataset.files
        ],
    }


def _rows(
    arguments: RunArguments,
    plan: Plan,
    ranks: Ranks,
    quarantine: Quarantine | None,
    sets: Sequence[DataSet],
    table: str,
    mixed: Mixing | None = None,
) -> MixedRows:
    """The rows of sets, mixed as the run says if nothing else is."""
    data = arguments.data
    if mixed is None:
        mixed = Mixing(data.mix_strategy, data.interleave_probs, arguments.training.seed)
    counts = accumulate((len(dataset.files) for dataset in sets), initial=0)
    numbered = [
        FileSet(first, tuple(dataset.files), dataset.layout, data.max_samples)
        for first, dataset in zip(counts, sets, strict=False)
    ]
    groups = [numbered] if mixed.strategy == "concat" else [[each] for each in numbered]
    readers = [FileRows(plan, table, group, ranks, quarantine) for group in groups]
    return MixedRows(readers, [dataset.name for dataset in sets], mixed)


def _buffer_size(arguments: RunArguments) -> int | None:
    return None if arguments.finetuning.disable_shuffling else arguments.data.buffer_size


def _held_out(
    arguments: RunArguments, plan: Plan, read: Callable[[str], MixedRows]
) -> tuple[frozenset[tuple[int, int]], dict[str, MemoryTable]]:
    """Which rows of the stream are set aside, and the table of them.

    Each row counts once, however often it is drawn: no row is both trained and evaluated.
    """
    count = int(arguments.data.val_size)
    if not count:
        return frozenset(), {}
    window = max(arguments.data.buffer_size, count + 1)
    found: dict[tuple[int, int], Sample] = {}
    for row in read("train"):
        if row.sample is not None:
            found.setdefault(row.number, row.sample)
        if len(found) == window:
            break
    if len(found) <= count:
        raise DataError(
            f"val_size={count} sets {count} rows aside, and there are {len(found)}. Required: rows "
            "left to train on. Lower val_size, or take more data."
        )
    draw = np.random.Generator(np.random.PCG64(arguments.training.seed))
    places = np.sort(draw.permutation(len(found))[:count]).tolist()
    numbers = [list(found)[place] for place in places]
    rows = [found[number] for number in numbers]
    if plan.judges_responses:
        rows = _again(read("eval"), numbers)
    return frozenset(numbers), {"eval": _table(rows, plan)}


def _again(rows: MixedRows, numbers: Sequence[tuple[int, int]]) -> list[Sample]:
    """Rows of some numbers, as another table has them."""
    left = set(numbers)
    found = []
    for row in rows:
        if row.number in left:
            left.remove(row.number)
            found += [] if row.sample is None else [row.sample]
        if not left:
            break
    return found


def _table(rows: Sequence[Sample], plan: Plan) -> MemoryTable:
    """The rows, or blocks of their tokens where the plan lays texts into blocks."""
    if plan.block_len is None:
        return MemoryTable(rows)
    ids = np.concatenate([row.input_ids for row in rows] or [np.empty(0, np.int32)])
    starts = range(0, len(ids), plan.block_len)
    return MemoryTable([block(ids[start : start + plan.block_len]) for start in starts])
