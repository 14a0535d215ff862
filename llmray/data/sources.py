"""dataset_info.json: the sets that a run names, their files, and how their rows are laid out.

Files are read by `files`, rows by `conversation`. A set on a hub becomes a local file first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from logging import getLogger
from pathlib import Path
from typing import Any

from llmray import store
from llmray.arguments import environment
from llmray.data import files
from llmray.data.conversation import COLUMNS, FORMATTINGS, TAGS, RowFormat
from llmray.data.pieces import BOM, CHUNK_BYTES, DataFile
from llmray.errors import DataError

log = getLogger("llmray")

INFO = "dataset_info.json"
MOST_NAMES = 40  # shown in an error
KEYS = (
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "formatting",
    "ranking",
    "subset",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
)
HUB_KEYS = {"USE_MODELSCOPE_HUB": "ms_hub_url", "USE_OPENMIND_HUB": "om_hub_url"}
NOT_BUILT: dict[str, str] = {
    "script_url": "sets that come with a loading script cannot be read: libraries have dropped "
    "them. Save the rows as JSON lines and name them by file_name.",
    "cloud_file_name": "files on cloud storage are not built yet. Copy the file and name it by "
    "file_name.",
    "num_samples": "drawing a number of rows is not built yet. Remove num_samples, or take "
    "max_samples of the run file.",
}


@dataclass(frozen=True)
class DataSet:
    """A set: its name, its files in order, the layout of its rows."""

    name: str
    files: tuple[DataFile, ...]
    layout: RowFormat


def open_sets(names: Sequence[str], dataset_dir: str, *, hub_root: Path) -> list[DataSet]:
    """The sets that a run names, in their order.

    Args:
        names: keys of dataset_info.json.
        dataset_dir: the folder that holds it, and the files it names.
        hub_root: where sets from a hub are kept as files.

    Raises:
        DataError: a name, a key or a file is not there, or not of the kind required.
    """
    if not names:
        return []
    info = _read_info(Path(dataset_dir))
    sets = []
    for name in names:
        if name not in info:
            raise DataError(
                f"{name} is no set of {dataset_dir}/{INFO}.{nearest(name, info)} Required: one of "
                f"{_listed(info)}. Mend the name, or add the set to the file."
            )
        sets.append(_open_set(name, info[name], Path(dataset_dir), hub_root))
    return sets


def check_columns(dataset: DataSet) -> None:
    """Fail if a column that dataset_info.json names is in no row of the set.

    Reads rows only until every name was seen.

    Raises:
        DataError: names the column, what is nearest to it, and the columns there are.
    """
    missing = dict(dataset.layout.columns)
    known: dict[str, None] = {}
    for file in dataset.files:
        for piece in files.pieces(file, CHUNK_BYTES) if missing else ():
            for row in files.read(piece):
                if isinstance(row, Mapping):
                    known.update(dict.fromkeys(row))
                    missing = {use: name for use, name in missing.items() if name not in row}
                if not missing:
                    return
    if missing and known:
        use, name = next(iter(missing.items()))
        raise DataError(
            f"{dataset.name}: no row has the column {name!r}, which {INFO} names as {use}."
            f"{nearest(name, known)} The rows have {_listed(known)}. Mend the name."
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that offers the known name most like `name`; empty where none is."""
    close = get_close_matches(name, list(map(str, known)), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _listed(names: Iterable[str]) -> str:
    known = sorted(names)
    more = len(known) - MOST_NAMES
    return ", ".join(known[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _read_info(folder: Path) -> Mapping[str, Any]:
    path = folder / INFO
    try:
        info = json.loads(path.read_bytes().removeprefix(BOM).decode())
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist. Required: a {INFO} that names the data sets, in the folder "
            "that dataset_dir names. Write it, or mend dataset_dir."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Required: a file that this user "
            "may read. Mend dataset_dir or its permissions."
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON: {error}. Required: an object of data sets. Mend the file."
        ) from None
    if not isinstance(info, dict):
        raise DataError(f"{path} holds no object. Required: an object of data sets. Mend it.")
    return info


def _open_set(name: str, entry: Any, folder: Path, hub_root: Path) -> DataSet:
    where = f"{folder / INFO}: {name}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}. Required: an object that describes the set.")
    _check_names(where, entry, KEYS)
    for key, sentence in NOT_BUILT.items():
        if entry.get(key) is not None:
            raise DataError(f"{where} has {key}={entry[key]!r}: {sentence}")
    if entry.get("ranking"):
        raise DataError(
            f"{where} has ranking: true: it holds pairs of responses, from which stages pt and sft "
            "do not learn. Take another set, or another stage."
        )
    layout = _layout(where, entry)
    asked = environment.other_hub(os.environ)
    if asked is not None and entry.get(HUB_KEYS[asked]):
        raise DataError(_other_hub(where, HUB_KEYS[asked]) + f" Or unset {asked} for hf_hub_url.")
    if entry.get("hf_hub_url"):
        return DataSet(name, (_from_hub(where, entry, hub_root),), layout)
    if entry.get("file_name"):
        return DataSet(name, _local_files(where, folder / entry["file_name"]), layout)
    hub_key = next((key for key in HUB_KEYS.values() if entry.get(key)), None)
    if hub_key is not None:
        raise DataError(_other_hub(where, hub_key))
    raise DataError(f"{where} names no data. Required: file_name or hf_hub_url.")


def _other_hub(where: str, key: str) -> str:
    return (
        f"{where} is on another hub ({key}): only hf_hub_url is built yet. Download the set and "
        "name it by file_name."
    )


def _check_names(where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise DataError(
                f"{where} has the unknown key {name!r}.{nearest(name, known)} Required: some of "
                f"{', '.join(known)}."
            )


def _layout(where: str, entry: Mapping[str, Any]) -> RowFormat:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        raise DataError(
            f"{where} has formatting={formatting!r}.{nearest(str(formatting), FORMATTINGS)} "
            f"Required: one of {', '.join(FORMATTINGS)}."
        )
    columns = _words(where, entry, "columns", COLUMNS)
    if "kto_tag" in columns:
        raise DataError(
            f"{where} names a kto_tag: its rows hold wanted and unwanted responses, from which "
            "stages pt and sft do not learn. Take another set, or another stage."
        )
    return RowFormat(formatting, columns, _words(where, entry, "tags", TAGS))


def _words(
    where: str, entry: Mapping[str, Any], key: str, known: Mapping[str, Any]
) -> dict[str, str]:
    given = entry.get(key) or {}
    if not isinstance(given, dict):
        raise DataError(f"{where} has {key}={given!r}. Required: an object of names.")
    _check_names(f"{where}, {key}", given, known)
    for name, word in given.items():
        if not isinstance(word, str):
            raise DataError(f"{where}, {key}: {name} is {word!r}. Required: a name, as text.")
    return dict(given)


def _local_files(where: str, path: Path) -> tuple[DataFile, ...]:
    if path.is_dir():
        inside = sorted(child for child in path.iterdir() if child.is_file())
        extensions = {child.suffix.lower() for child in inside}
        if len(extensions) != 1:
            raise DataError(
                f"{where}: the folder {path} holds files of {len(extensions)} kinds "
                f"({', '.join(sorted(extensions)) or 'no file'}). Required: files of one extension."
            )
        return tuple(files.recognise(child) for child in inside)
    if not path.exists():
        near = nearest(path.name, [child.name for child in path.parent.glob("*")])
        raise DataError(
            f"{where}: {path} does not exist.{near} Required: a file or a folder of files, named "
            "from dataset_dir. Mend file_name."
        )
    return (files.recognise(path),)


def _from_hub(where: str, entry: Mapping[str, Any], hub_root: Path) -> DataFile:
    """The rows of a set on the Hugging Face hub as a local parquet file, downloaded if needed."""
    import datasets

    name = entry["hf_hub_url"]
    try:
        rows = datasets.load_dataset(
            name,
            name=entry.get("subset"),
            data_dir=entry.get("folder"),
            split=entry.get("split", "train"),
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{where}: the set {name} could not be had from the Hugging Face hub: {error}. "
            "Required: a set of that name, and a network that reaches the hub or a cached copy. "
            "Where there is neither, download its files and name them by file_name."
        ) from error
    path = hub_root / f"{rows._fingerprint}.parquet"
    if not path.exists():
        log.info("%s: %d rows from the hub, kept in %s", name, len(rows), path)
        with store.replacing(path) as unfinished:
            rows.to_parquet(str(unfinished))
    return DataFile(str(path), "parquet")
