"""The plan of a build: which rows each shard holds, and all else that building one needs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmray.data import duplicates, files, mixing, templates, tokenizer
from llmray.data.features import FEATURES, OF_STAGE, FeatureOptions
from llmray.data.pieces import DataFile, Piece
from llmray.data.plain_text import PlainText
from llmray.data.row_format import RowFormat
from llmray.data.sources import DataSet
from llmray.data.templates import Renderer
from llmray.errors import DataError

if TYPE_CHECKING:
    from llmray.arguments.data import DataArguments
    from llmray.arguments.run import RunArguments

log = getLogger("llmray")

UNUSED, USED, HELD_OUT, REPEATED = range(4)  # what becomes of a row
LEAST_SHARD_BYTES, MOST_SHARD_BYTES = 2 << 20, 64 << 20  # of source text
TRAIN, EVAL = "train", "eval"  # tables; sets that are evaluated one by one have eval_<set>
NUM_SHARDS = 64  # wished for, within these bounds


@dataclass(frozen=True)
class Job:
    """What is to be prepared: its key and place, what decides it, and the sets."""

    key: str
    target: str
    description: dict[str, Any]
    train: Sequence[DataSet]
    evaluation: Sequence[DataSet]


@dataclass(frozen=True)
class Shard:
    """Rows of one table that are built together.

    `uses` says of each row where it goes: nowhere (`UNUSED`), to the table, to the table `eval`
    instead (`HELD_OUT`), nowhere since it is wrong (`REPEATED`); without it, all go to the table.
    """

    table: str
    pieces: tuple[tuple[Piece, RowFormat], ...]
    uses: bytes = b""

    @property
    def num_rows(self) -> int:
        """Rows of its pieces, used or not."""
        return sum(piece.num_rows for piece, _ in self.pieces)

    def table_of(self, number: int) -> str:
        """The table of the row that is `number` in the shard."""
        return EVAL if self.uses and self.uses[number] == HELD_OUT else self.table


@dataclass(frozen=True)
class Plan:
    """All that building needs, picklable.

    `block_len` is set where texts are laid into blocks, `bin_len` where rows are packed into bins.
    `orders` has, by table, the numbers of its rows among those of the table's shards, in the order
    of the table, where that is not the order of the shards.
    `stage` is a key of `FEATURES`. `judges_responses` says that rows to evaluate on are prompts
    with the response to compare with. `plain` holds the special tokens that are plain text where
    rows have them.
    """

    key: str
    target: str
    stage: str
    tokenizer_json: str = field(repr=False)
    renderer: Renderer | None = field(repr=False)
    options: FeatureOptions
    shards: tuple[Shard, ...] = field(repr=False)
    orders: dict[str, np.ndarray] = field(repr=False, compare=False)
    block_len: int | None
    bin_len: int | None
    bad_rows: str
    batch_size: int
    names: tuple[str, ...]  # of the sets
    description: dict[str, Any] = field(repr=False)
    judges_responses: bool = False
    plain: PlainText | None = None

    def features_of(self, table: str) -> str:
        """The key of `FEATURES` for the rows of a table."""
        return "prompt" if self.judges_responses and table != TRAIN else self.stage

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of all tables, that of the rows to train on first."""
        evaluation = dict.fromkeys(s.table for s in self.shards if s.table != TRAIN)
        return (TRAIN, *evaluation) if evaluation else (TRAIN, EVAL)

    @property
    def staging(self) -> str:
        """Where finished shards lie until all are."""
        return staging_of(self.target, self.key)


def staging_of(target: str, key: str) -> str:
    """Where the shards of prepared data lie until it is committed; other data has another place."""
    return f"{target}.building" if target.endswith(key) else f"{target}.{key}.building"


def make_plan(job: Job, arguments: RunArguments, model_dir: Path) -> Plan:
    """The plan of a job; loads the tokenizer and reads the files once to cut them.

    Raises:
        DataError: a file cannot be read, or fewer rows are there than are to be set aside.
        ModelError: there is no usable tokenizer.
    """
    data, stage = arguments.data, OF_STAGE[arguments.finetuning.stage]
    loaded = tokenizer.load_tokenizer(model_dir, arguments.model)
    renderer = renderer_of(data, loaded, stage)
    packs = data.packs(stage)
    block_len = data.cutoff_len if packs and stage == "pt" else None
    bin_len = longest_row(data.cutoff_len, stage) if packs and stage != "pt" else None
    template = templates.find(data.template) if data.template else None
    if template is not None and renderer is not None:
        _warn_of_plain_text(data.template, template.end_of_turn, loaded)
    prefix, suffix = tokenizer.around_text(loaded, template) if stage == "pt" else ((), ())
    if stage == "pt":
        _say_unread([*job.train, *job.evaluation])
    shards, orders = _shards(job, arguments)
    return Plan(
        key=job.key,
        target=job.target,
        stage=stage,
        tokenizer_json=tokenizer.tokenizer_json(loaded),
        renderer=renderer,
        options=FeatureOptions(
            data.cutoff_len,
            data.truncation,
            data.train_on_prompt,
            data.mask_history,
            block_len is not None,
            prefix,
            suffix,
            end_token(data, loaded) if renderer is not None else None,
        ),
        shards=shards,
        orders=orders,
        block_len=block_len,
        bin_len=bin_len,
        bad_rows=data.bad_rows,
        batch_size=data.preprocessing_batch_size,
        names=tuple(dataset.name for dataset in [*job.train, *job.evaluation]),
        description=job.description,
        judges_responses=arguments.training.predict_with_generate,
        plain=tokenizer.plain_text(loaded, arguments.model),
    )


def renderer_of(data: DataArguments, loaded: Any, features: str) -> Renderer | None:
    """What writes the conversations of a run for a key of `FEATURES`, None where none are written.

    Raises:
        DataError: no such template, or none is named and the tokenizer's own cannot be used.
    """
    if not FEATURES[features].renders:
        return None
    if not FEATURES[features].learns_past:  # earlier responses are prompt, as with mask_history
        data = data.model_copy(update={"mask_history": True})
    return tokenizer.renderer(data, loaded)


def end_token(data: DataArguments, loaded: Any) -> int | None:
    """The token that ends responses, where the template's text has none.

    Raises:
        DataError: the prompt is to be learned too, and the token's place is the prompt's.
    """
    if data.template is None or not templates.find(data.template).efficient_eos:
        return None
    if data.train_on_prompt:
        raise DataError(
            f"train_on_prompt=true with template={data.template}: the end of a response is learned "
            "at the place of the next prompt's first token, which can be learned only once. Set "
            "train_on_prompt: false, or name another template."
        )
    return int(loaded.eos_token_id)


def longest_row(cutoff_len: int, stage: str) -> int:
    """Tokens of a row at most: of a pair each answer may take cutoff_len with the prompt."""
    return 2 * cutoff_len if stage in ("rm", "dpo") else cutoff_len


def _shards(job: Job, arguments: RunArguments) -> tuple[tuple[Shard, ...], dict[str, np.ndarray]]:
    """The shards of all tables, and the orders of those tables that have one."""
    data, seed = arguments.data, arguments.training.seed
    cut = _cut([*job.train, *job.evaluation], data.max_samples)
    train, evaluation = cut[: len(job.train)], cut[len(job.train) :]
    orders = {}
    order = mixing.table_order(
        [_num_rows(pieces) for pieces in train],
        [dataset.num_samples for dataset in job.train],
        data.max_samples,
        data.mix_strategy,
        data.interleave_probs,
        seed,
    )
    grouped = _group(train, TRAIN)
    num_rows = sum(shard.num_rows for shard in grouped)
    used = np.arange(num_rows) if order is None else np.unique(order)
    uses = np.full(num_rows, UNUSED, np.uint8)
    uses[used] = USED
    if train:
        uses[used[held_out_rows(len(used), data.val_size, seed)]] = HELD_OUT
    if order is not None:
        orders[TRAIN] = order[uses[order] == USED]
    shards = _with_uses(grouped, _without_repeated(uses, train))
    for table, sets in _evaluation_tables(job, evaluation, data.eval_on_each_dataset).items():
        order = mixing.table_order(
            [_num_rows(pieces) for _, pieces in sets],
            [dataset.num_samples for dataset, _ in sets],
            data.max_samples,
            "concat",
            (),
            seed,
        )
        grouped = _group([pieces for _, pieces in sets], table)
        uses = np.full(sum(shard.num_rows for shard in grouped), USED, np.uint8)
        if order is not None:
            uses[:] = UNUSED
            uses[order] = USED
            orders[table] = order
        shards += _with_uses(grouped, _without_repeated(uses, [pieces for _, pieces in sets]))
    return tuple(shards), orders


def _without_repeated(
    uses: np.ndarray, cut: Sequence[Sequence[tuple[Piece, RowFormat]]]
) -> np.ndarray:
    """The uses of rows, where those with the id of an earlier row of their set are marked."""
    first = 0
    for pieces in cut:
        rows = first + duplicates.repeated_rows(pieces)
        uses[rows[uses[rows] != UNUSED]] = REPEATED
        first += _num_rows(pieces)
    return uses


def _warn_of_plain_text(name: str | None, end_of_turn: str, loaded: Any) -> None:
    if end_of_turn and not tokenizer.is_one_token(loaded, end_of_turn):
        log.warning(
            "template=%s ends responses with %s, which is no token of this tokenizer: it is "
            "learned as plain text, and generation will not stop at it",
            name,
            end_of_turn,
        )


def held_out_rows(num_rows: int, val_size: float, seed: int) -> np.ndarray:
    """Which rows are set aside for evaluation, in rising order.

    Each row counts once, however often it is drawn: no row is both trained and evaluated.

    Args:
        num_rows: different rows of all sets to train on.
        val_size: a share below 1 (of which the rows are rounded up), or a number of rows.
        seed: of the permutation that they are the head of.

    Raises:
        DataError: no row would be left.
    """
    count = math.ceil(num_rows * val_size) if val_size < 1 else int(val_size)
    if count and count >= num_rows:
        raise DataError(
            f"val_size={val_size} sets {count} rows aside, and there are {num_rows}. Required: "
            "rows left to train on. Lower val_size, or take more data."
        )
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)[:count]
    return np.sort(chosen)


def _cut(sets: Sequence[DataSet], limit: int | None) -> list[list[tuple[Piece, RowFormat]]]:
    """The pieces of each set, of its first `limit` rows where no number of them is drawn."""
    total = sum(os.stat(file.path).st_size for dataset in sets for file in dataset.files)
    size = min(max(total // NUM_SHARDS, LEAST_SHARD_BYTES), MOST_SHARD_BYTES)
    cut = []
    for dataset in sets:
        found: list[tuple[Piece, RowFormat]] = []
        head = limit if dataset.num_samples is None else None
        for file in dataset.files:
            left = None if head is None else head - _num_rows(found)
            if left == 0:
                break
            found += [(piece, dataset.layout) for piece in files.cut(file, size, left)]
        if not found:
            names = ", ".join(file.name for file in dataset.files)
            raise DataError(
                f"{dataset.name} has no rows: {names}. Required: at least one. Mend the file, or "
                "take another set."
            )
        cut.append(found)
    return cut


def _evaluation_tables(
    job: Job, cut: Sequence[Sequence[tuple[Piece, RowFormat]]], one_by_one: bool
) -> dict[str, list[tuple[DataSet, Sequence[tuple[Piece, RowFormat]]]]]:
    """The sets to evaluate on with their pieces, by table: of one table, or of a table each."""
    sets = list(zip(job.evaluation, cut, strict=True))
    if one_by_one:
        return {f"{EVAL}_{dataset.name}": [(dataset, pieces)] for dataset, pieces in sets}
    return {EVAL: sets} if sets else {}


def _group(cut: Sequence[Sequence[tuple[Piece, RowFormat]]], table: str) -> list[Shard]:
    """Shards of pieces; small files that follow one another share one."""
    grouped: list[Shard] = []
    waiting: list[tuple[Piece, RowFormat]] = []
    size = 0
    for piece, layout in (entry for entries in cut for entry in entries):
        waiting.append((piece, layout))
        is_table = piece.first_line is None
        size += LEAST_SHARD_BYTES if is_table else piece.stop - piece.start
        if size >= LEAST_SHARD_BYTES:
            grouped.append(Shard(table, tuple(waiting)))
            waiting, size = [], 0
    return [*grouped, Shard(table, tuple(waiting))] if waiting else grouped


def _say_unread(sets: Sequence[DataSet]) -> None:
    """Say of sets with responses that stage pt does not read these."""
    for dataset in sets:
        rows = (row for file in dataset.files[:1] for row in _first_rows(file))
        response = dataset.layout.column("response")
        if any(isinstance(row, Mapping) and row.get(response or "") for row in rows):
            log.info(
                "%s: stage pt learns the text of column %s alone, not that of %s",
                dataset.name,
                dataset.layout.column("prompt"),
                response,
            )


def _first_rows(file: DataFile) -> Iterator[Any]:
    for piece in files.cut(file, LEAST_SHARD_BYTES, limit=1):
        yield from files.read(piece)


def _num_rows(pieces: Sequence[tuple[Piece, RowFormat]]) -> int:
    return sum(piece.num_rows for piece, _ in pieces)


def _with_uses(shards: Sequence[Shard], uses: np.ndarray) -> list[Shard]:
    """The shards of a table with what becomes of their rows; those of which none is used left out.

    Shards all of whose rows go to the table stay as they are.
    """
    found = []
    first = 0
    for shard in shards:
        mine = uses[first : first + shard.num_rows]
        first += shard.num_rows
        found.append(shard if (mine == USED).all() else replace(shard, uses=mine.tobytes()))
    return found
