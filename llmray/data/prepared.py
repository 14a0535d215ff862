"""The prepared data of a run: built at most once per content key, then only memory-mapped.

    ref = prepared.ensure(arguments, model_dir, root=cache / "prepared")   # fast when it is there
    table = prepared.open(ref).train

A build is `plan`, `build_shard` for each of its shards in any process, and `commit`. A finished
shard is never built again: a build that was killed goes on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmray import store
from llmray.data import (
    build,
    identity,
    intact,
    packing,
    planning,
    sources,
    summary,
    workers,
)
from llmray.data.build import ShardReport
from llmray.data.differences import OF_SOURCES, differences
from llmray.data.features import FEATURES, OF_STAGE
from llmray.data.locks import locked, this_run
from llmray.data.mismatched import JudgedTable
from llmray.data.packing import PackedTable
from llmray.data.planning import Plan
from llmray.data.shards import Sample, SampleTable, Table
from llmray.errors import DataError

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

__all__ = [
    "BuildShards",
    "JudgedTable",
    "PackedTable",
    "Plan",
    "Prepared",
    "PreparedRef",
    "Sample",
    "SampleTable",
    "ShardReport",
    "Table",
    "bad_rows",
    "build_shard",
    "commit",
    "differences",
    "ensure",
    "has_sources",
    "key_of",
    "open",
    "place_here",
    "plan",
    "verify",
]

log = getLogger("llmray")

KIND = "prepared data"
BAD_ROWS = "bad_rows.jsonl"
build_shard = build.build_shard

# builds the shards of a plan, wherever it likes, and yields their reports in any order
BuildShards = Callable[[Plan], Iterable[ShardReport]]


@dataclass(frozen=True)
class PreparedRef:
    """Where prepared data lies, and its counts; picklable.

    `fingerprint` holds, in JSON types, all that decided the data, and `files` the paths of what its
    sets were read from here, if that was looked at. `num_built` counts the rows that were read and
    tokenized for this reference; none, if all were found.
    """

    path: str
    key: str
    num_train: int
    num_eval: int
    num_tokens: int
    num_targets: int
    fingerprint: dict[str, Any] = field(repr=False, default_factory=dict)
    files: dict[str, list[list[str]]] = field(repr=False, compare=False, default_factory=dict)
    num_built: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Prepared:
    """Opened prepared data: the rows to train on, and those to evaluate on by name."""

    path: str
    train: Table
    eval: dict[str, Table]


def ensure(
    arguments: RunArguments,
    model_dir: Path | str,
    *,
    root: Path,
    run_token: str | None = None,
    build_shards: BuildShards | None = None,
) -> PreparedRef:
    """The prepared data of a run, built if it is not there.

    Processes that come at the same time build it once. With `overwrite_cache` it is built anew,
    once for all calls of the same run. `tokenized_path` is its place where that is given.

    Args:
        arguments: of the run.
        model_dir: the folder of the tokenizer.
        root: where prepared data lies.
        run_token: a name of this run for `overwrite_cache`; the ranks of torchrun know their own.
        build_shards: who builds the shards; None is this process, or processes of its own.

    Raises:
        DataError: a set, a file or a row is missing or wrong, or what lies at `tokenized_path` was
            prepared from other inputs.
        StoreError: the data cannot be written.
    """
    root, model_dir = Path(root), Path(model_dir)
    data = arguments.data
    if data.tokenized_path:
        _refuse_foreign(data.tokenized_path)
        if not data.overwrite_cache and store.is_committed(data.tokenized_path):
            return _kept_at(data.tokenized_path, arguments, model_dir, root)
    inputs = _inputs(arguments, model_dir, root)
    target = data.tokenized_path or str(root / inputs.key)
    token = run_token or this_run()
    if not data.overwrite_cache and not data.tokenized_path and store.is_committed(target):
        return _used(target, root, inputs)
    with locked(Path(f"{target}.lock"), "data: another process is preparing it; waiting"):
        if store.is_committed(target) and not (
            data.overwrite_cache and _metadata(target)["run_token"] != token
        ):
            if data.tokenized_path:  # whoever held the lock may have prepared other inputs
                return _kept_at(target, arguments, model_dir, root)
            return _used(target, root, inputs)
        if data.overwrite_cache:
            store.remove(planning.staging_of(target, inputs.key))
        num_built = _build(inputs, arguments, model_dir, target, token, build_shards)
        intact.remember(target, root)
    return replace(_ref(target), files=inputs.files, num_built=num_built)


def has_sources(arguments: RunArguments, *, root: Path) -> bool:
    """Whether this machine sees the files of all the run's sets."""
    try:
        sets_of(arguments, root)
    except DataError:
        return False
    return True


def place_here(ref: PreparedRef, root: Path) -> PreparedRef:
    """The same prepared data where this machine has it: below `root`, else where `ref` says."""
    own = str(root / ref.key)
    return replace(ref, path=own) if own != ref.path and store.is_committed(own) else ref


def key_of(arguments: RunArguments, model_dir: Path | str, *, root: Path) -> str:
    """The content key of a run's data, whether it is prepared or not.

    Raises:
        DataError: a set or a file is missing.
    """
    return _inputs(arguments, Path(model_dir), Path(root)).key


def plan(
    arguments: RunArguments, model_dir: Path | str, *, root: Path, trains: bool | None = None
) -> Plan:
    """All that the shards of a run's data need: files cut into pieces, tokenizer, template.

    Args:
        arguments: of the run.
        model_dir: the folder of the tokenizer.
        root: where prepared data lies.
        trains: whether rows to train on are among them; as `do_train` says if None.

    Raises:
        DataError: a set or a file is missing, or cannot be read.
    """
    inputs = _inputs(arguments, Path(model_dir), Path(root), trains)
    return _plan(inputs, arguments, Path(model_dir), str(Path(root) / inputs.key))


def commit(plan: Plan, *, run_token: str | None = None) -> PreparedRef:
    """Make the finished shards of a plan the prepared data.

    Raises:
        DataError: rows are wrong, or none is left to train on.
        StoreError: a shard is not finished.
    """
    reports = [build.finished(plan, index) for index in range(len(plan.shards))]
    build.raise_problems(reports)
    metadata: dict[str, Any] = {
        "kind": KIND,
        "key": plan.key,
        "run_token": run_token or this_run(),
        "built_at": time.time(),
        "block_len": plan.block_len,
        "tables": build.tables(plan, reports),
        "orders": build.write_orders(plan, reports),
        "bad_files": build.bad_files(reports),
        "names": list(plan.names),
        "inputs": plan.description,
    }
    opened = {name: _table(plan.staging, metadata, name) for name in metadata["tables"]}
    metadata["counts"] = counts = build.counts(plan, reports, opened)
    trains = any(shard.table == planning.TRAIN for shard in plan.shards)
    if not counts["train_rows" if trains else "eval_rows"]:
        raise DataError(
            f"No row is left to {'train' if trains else 'evaluate'} on: of "
            f"{counts['read']} rows, {counts['without_target']} have no "
            f"response within cutoff_len, {counts['over_limit']} have more tokens, "
            f"{counts['bad']} cannot be read, and the rest is empty or set aside for evaluation. "
            "Take more data, raise cutoff_len, or lower val_size."
        )
    store.sweep(plan.staging)
    sums = build.sums(plan, reports, metadata["orders"].values())
    if plan.bin_len is not None:
        lengths = _table(plan.staging, metadata, "train").lengths
        metadata["packing"] = packing.build(Path(plan.staging), lengths, plan.bin_len)
        sums |= store.seal(Path(plan.staging), packing.FILES)
    store.commit(Path(plan.staging), plan.target, metadata, sums)
    return _ref(plan.target)


def open(ref: PreparedRef | str | Path) -> Prepared:
    """Memory-map prepared data; reads no tokens.

    Raises:
        StoreError, DataError: there is none at that place.
    """
    path = ref.path if isinstance(ref, PreparedRef) else str(ref)
    metadata = _metadata(path)
    opened = {name: _table(path, metadata, name) for name in metadata["tables"]}
    tables: dict[str, Any] = {name: rows for name, rows in opened.items() if len(rows)}
    if metadata["inputs"]["stage"] == "kto":
        cutoff_len = metadata["inputs"]["cutoff_len"]
        tables = {name: JudgedTable(opened[name], cutoff_len, name) for name in tables}
    if "packing" in metadata:
        bins = packing.read(path, metadata["packing"]["bin_len"])
        tables["train"] = PackedTable(tables["train"], bins)
    return Prepared(path, tables.pop("train", opened["train"]), tables)


def _table(path: str, metadata: Mapping[str, Any], name: str) -> SampleTable:
    order = metadata["orders"].get(name)
    return SampleTable(
        [store.join(path, file) for file in metadata["tables"][name]],
        metadata["block_len"],
        None if order is None else np.load(store.join(path, order), mmap_mode="r"),
    )


def bad_rows(ref: PreparedRef | str | Path) -> str:
    """The rows that `bad_rows: quarantine` put aside, as JSON lines with their reasons.

    Raises:
        StoreError, DataError: there is no prepared data at that place.
    """
    path = ref.path if isinstance(ref, PreparedRef) else str(ref)
    return "".join(Path(path, name).read_text() for name in _metadata(path)["bad_files"])


def verify(path: PreparedRef | str | Path) -> None:
    """Compare every byte of prepared data with what was committed.

    Raises:
        StoreError, DataError: it is damaged, or none.
    """
    place = path.path if isinstance(path, PreparedRef) else str(path)
    store.verify(place)
    _metadata(place)


@dataclass(frozen=True)
class _Inputs:
    train: list[sources.DataSet]
    evaluation: list[sources.DataSet]
    description: dict[str, Any]
    key: str

    @property
    def files(self) -> dict[str, list[list[str]]]:
        """The paths of the files of each set, by what `description` calls the sets."""
        found = {"sets": self.train, "eval_sets": self.evaluation}
        return {
            name: [[file.name for file in dataset.files] for dataset in sets]
            for name, sets in found.items()
        }


def _refuse_foreign(place: str) -> None:
    """Fail where `tokenized_path` cannot hold prepared data, or holds something else."""
    if store.is_uri(place):
        raise DataError(
            f"tokenized_path={place} is a URI, and prepared data is mapped into memory. Required: "
            "a directory of a file system, which may be a shared one."
        )
    if store.is_committed(place):
        _metadata(place)
    elif os.path.isdir(place) and os.listdir(place):
        raise DataError(
            f"tokenized_path={place} holds files, and no data that llmray prepared. Required: "
            "such data, or a place that is empty or not there. Choose another directory."
        )


def _kept_at(place: str, arguments: RunArguments, model_dir: Path, root: Path) -> PreparedRef:
    """What lies at `tokenized_path`; fails if it was made from other inputs."""
    theirs = dict(_metadata(place)["inputs"])
    inputs = _inputs(arguments, model_dir, root) if has_sources(arguments, root=root) else None
    if inputs is not None:
        ours = inputs.description
    else:
        ours = _describe(arguments, model_dir, [], [], root)
        for name in OF_SOURCES:
            ours.pop(name, None)
            theirs.pop(name, None)
        log.info(
            "tokenized_path=%s is used as it is: the data sets it was made from are not here, so "
            "only the settings and the tokenizer were compared",
            place,
        )
    wrong = differences(theirs, ours)
    if wrong:
        raise DataError(
            f"tokenized_path={place} was prepared from other inputs: {'; '.join(wrong)}. Required: "
            "the same. Name another directory, take these settings back, or set overwrite_cache: "
            "true to prepare it anew."
        )
    return _used(place, root, inputs)


def sets_of(
    arguments: RunArguments, root: Path, trains: bool | None = None
) -> tuple[list[sources.DataSet], list[sources.DataSet]]:
    """The sets that a run trains and evaluates on.

    Raises:
        DataError: one is not there.
    """
    data = arguments.data
    trains = arguments.training.do_train if trains is None else trains
    # a run that only evaluates opens rows to train on where some of them are set aside
    names = data.dataset if trains or data.val_size else ()
    if not names and not data.eval_dataset:
        raise DataError("No dataset is given. Name one or more of dataset_info.json in dataset.")
    open_sets = partial(
        sources.open_sets,
        dataset_dir=data.dataset_dir,
        cache=root / "fetched",
        kind=FEATURES[OF_STAGE[arguments.finetuning.stage]].kind,
    )
    return open_sets(names), open_sets(data.eval_dataset)


def _inputs(
    arguments: RunArguments, model_dir: Path, root: Path, trains: bool | None = None
) -> _Inputs:
    train, evaluation = sets_of(arguments, root, trains)
    description = _describe(arguments, model_dir, train, evaluation, root)
    return _Inputs(train, evaluation, description, identity.key_of(description))


def _describe(
    arguments: RunArguments,
    model_dir: Path,
    train: list[sources.DataSet],
    evaluation: list[sources.DataSet],
    root: Path,
) -> dict[str, Any]:
    digests = identity.Digests(root / "digests")
    return identity.describe(arguments, model_dir, train, evaluation, digests)


def _plan(inputs: _Inputs, arguments: RunArguments, model_dir: Path, target: str) -> Plan:
    train, evaluation = sources.fetched(inputs.train), sources.fetched(inputs.evaluation)
    for dataset in [*train, *evaluation]:
        sources.check_columns(dataset)
    return planning.make_plan(
        planning.Job(inputs.key, target, inputs.description, train, evaluation),
        arguments,
        model_dir,
    )


def _build(
    inputs: _Inputs,
    arguments: RunArguments,
    model_dir: Path,
    target: str,
    token: str,
    build_shards: BuildShards | None,
) -> int:
    """Build what is not finished, and commit; returns how many rows that were."""
    started = time.perf_counter()
    store.sweep(Path(target).parent)
    with ExitStack() as stack:
        num_workers = arguments.data.preprocessing_num_workers or 1
        if build_shards is None and num_workers > 1:
            # they import while the plan is made
            processes = workers.Processes(num_workers, early=_least_shards(inputs, arguments))
            build_shards = stack.enter_context(processes).build
        made = _plan(inputs, arguments, model_dir, target)
        with store.explained(made.staging):
            Path(made.staging).mkdir(parents=True, exist_ok=True)
        store.sweep(made.staging)
        if build_shards is not None:
            reports = build_shards(made)
        else:
            reports = (build_shard(made, index) for index in range(len(made.shards)))
        num_built = _refuse_wrong_rows(reports)
    commit(made, run_token=token)
    metadata = _metadata(target)
    summary.say(metadata["counts"], arguments.data.truncation, time.perf_counter() - started)
    if "packing" in metadata:
        rows = metadata["counts"]["train_rows"]
        log.info("data: %d rows packed into %s", rows, packing.described(metadata["packing"]))
    return num_built


def _least_shards(inputs: _Inputs, arguments: RunArguments) -> int:
    """How many shards there will be at least, as far as that is known from the files' sizes."""
    if arguments.data.max_samples is not None:
        return 0
    paths = [file.path for dataset in [*inputs.train, *inputs.evaluation] for file in dataset.files]
    size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    return min(size // planning.LEAST_SHARD_BYTES, planning.NUM_SHARDS)


def _refuse_wrong_rows(reports: Iterable[ShardReport]) -> int:
    """Take all reports, or as many as show enough wrong rows to say; returns how many were read."""
    wrong: list[ShardReport] = []
    num_read = 0
    for report in reports:
        num_read += report.counts["read"] if report.is_new else 0
        if report.problems:
            wrong.append(report)
        if sum(len(report.problems) for report in wrong) >= build.MOST_PROBLEMS:
            break
    build.raise_problems(wrong)
    return num_read


def _metadata(path: str) -> dict[str, Any]:
    metadata = store.read_manifest(path).metadata
    if metadata.get("kind") != KIND:
        raise DataError(f"{path} holds no prepared data. Name a folder that llmray prepared.")
    return metadata


def _ref(path: str) -> PreparedRef:
    metadata = _metadata(path)
    counts = metadata["counts"]
    return PreparedRef(
        path=path,
        key=metadata["key"],
        num_train=counts["train_rows"],
        num_eval=counts["eval_rows"],
        num_tokens=counts["tokens"],
        num_targets=counts["targets"],
        fingerprint=metadata["inputs"],
    )


def _used(path: str, root: Path, inputs: _Inputs | None = None) -> PreparedRef:
    """`_ref` of what is intact, and the time of this use kept, as far as this user may write it."""
    intact.check(path, root)
    with suppress(OSError):
        os.utime(store.join(path, store.MANIFEST))
    return replace(_ref(path), files=inputs.files if inputs is not None else {})
