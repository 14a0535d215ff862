"""`llmray prepare`: build a run's prepared data, say what is in it, and manage what is kept.

Loads no model weights; on Ray the cluster prepares as it would for the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmray import hub, store
from llmray.arguments import environment
from llmray.data import packing, prepared
from llmray.errors import ArgumentsError

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

PICTURE = "lengths.png"
BINS = 60
LATELY = "%Y-%m-%d %H:%M"


def prepare(arguments: RunArguments) -> prepared.PreparedRef:
    """The run's prepared data, built if it is not there, on this machine."""
    model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
    return prepared.ensure(arguments, model_dir, root=_root())


def report(ref: prepared.PreparedRef, seconds: float) -> str:
    """What the data holds, as lines of text; draws its lengths beside it."""
    metadata = store.read_manifest(ref.path).metadata
    counts, packed = metadata["counts"], metadata.get("packing")
    opened = prepared.open(ref)
    lengths = opened.train.lengths
    facts = {
        "key": ref.key,
        "folder": ref.path,
        "size": _size(_bytes(ref.path)),
        "rows": _rows(ref, opened),
        "tokens": f"{ref.num_tokens}, {ref.num_targets} of them targets",
        "lengths": _quantiles(lengths),
        "tokenised": f"{ref.num_built} rows now" if ref.num_built else "before",
    }
    for name, count in counts.items():
        if name in NAMES and count:
            facts[NAMES[name]] = f"{count} rows"
    if packed:
        facts["packing"] = packing.described(packed)
    facts["seconds"] = f"{seconds:.1f}"
    picture = Path(ref.path, PICTURE)
    draw_lengths(lengths, picture)
    facts["picture"] = str(picture)
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


# what a build counts, as users say it
NAMES = {
    "truncated": "cut to cutoff_len",
    "over_limit": "over cutoff_len, left out",
    "bad": "cannot be read, left out",
    "empty": "empty, left out",
    "equal": "pairs of equal answers, left out",
    "without_target": "without a response, left out",
}


def _rows(ref: prepared.PreparedRef, opened: prepared.Prepared) -> str:
    parts = [f"{ref.num_train} to train on"]
    parts += [f"{len(table)} in {name}" for name, table in opened.eval.items()]
    return ", ".join(parts)


def _quantiles(lengths: np.ndarray) -> str:
    if not len(lengths):
        return "none"
    low, middle, high, most = np.quantile(lengths, [0, 0.5, 0.95, 1]).astype(int)
    return f"{low} to {most} tokens, median {middle}, 95 % within {high}"


def draw_lengths(lengths: np.ndarray, path: Path) -> None:
    """Write a histogram of rows over their length in tokens as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=BINS, color="#1f5fa8")
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("rows")
    axes.grid(alpha=0.3)
    with store.replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")


@dataclass(frozen=True)
class Kept:
    """Prepared data in the store: its key, size in bytes, rows, and when it was last used."""

    key: str
    path: str
    size: int
    rows: int
    used: float  # seconds since 1970
    sets: tuple[str, ...]


def kept() -> list[Kept]:
    """All prepared data in this machine's store, that used last first."""
    found = []
    for path in store.list_committed(_root()):
        metadata = store.read_manifest(path).metadata
        if metadata.get("kind") == prepared.KIND:
            found.append(_kept(path, metadata))
    return sorted(found, key=lambda one: -one.used)


def _kept(path: str, metadata: dict[str, Any]) -> Kept:
    return Kept(
        metadata["key"],
        path,
        _bytes(path),
        metadata["counts"]["train_rows"],
        os.stat(store.join(path, store.MANIFEST)).st_mtime,
        tuple(metadata.get("names", ())),
    )


def table(entries: Sequence[Kept]) -> str:
    """The store as a table of text."""
    if not entries:
        return f"Nothing is kept in {_root()}."
    lines = [f"{'key':<32}  {'size':>9}  {'rows':>9}  {'last used':<16}  sets"]
    for one in entries:
        used = time.strftime(LATELY, time.localtime(one.used))
        sets = ", ".join(one.sets)
        lines.append(f"{one.key:<32}  {_size(one.size):>9}  {one.rows:>9}  {used:<16}  {sets}")
    total = sum(one.size for one in entries)
    return "\n".join([*lines, f"{len(entries)} kept in {_root()}, {_size(total)}"])


def remove(keys: Sequence[str]) -> list[Kept]:
    """Remove prepared data by its key, or the beginning of it; returns what was removed.

    Raises:
        ArgumentsError: a key is not there, or begins several; nothing is removed then.
    """
    entries = kept()
    chosen = []
    for key in keys:
        found = [one for one in entries if one.key.startswith(key)]
        if len(found) != 1:
            there = ", ".join(one.key for one in entries) or "nothing"
            what = "begins several keys" if found else "is no key"
            raise ArgumentsError(
                f"{key!r} {what} of the store. Required: one of {there}. `llmray prepare --list` "
                "shows them."
            )
        chosen += found
    for one in chosen:
        store.remove(one.path)
        Path(f"{one.path}.lock").unlink(missing_ok=True)
    return chosen


def _bytes(path: str) -> int:
    return sum(entry.size for entry in store.read_manifest(path).files.values())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _root() -> Path:
    return environment.prepared_directory(os.environ)


def manage(action: str, keys: Sequence[str]) -> int:
    """List what is kept, or remove some of it, as `llmray prepare --list | --remove KEY ...` asks.

    Raises:
        ArgumentsError: words are missing, or too many.
    """
    if action == "--list" and keys:
        raise ArgumentsError(f"--list takes no words, found {keys[0]!r}. Leave it out.")
    if action == "--remove" and not keys:
        raise ArgumentsError("--remove needs keys. `llmray prepare --list` shows them.")
    if action == "--list":
        print(table(kept()))
    for gone in remove(keys) if keys else ():
        print(f"removed {gone.key}, {gone.rows} rows")
    return 0
