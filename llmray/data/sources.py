"""dataset_info.json: the sets that a run names, their files, and how their rows are laid out.

Files are read by `files`, rows by `conversation`; what lies elsewhere is had by `fetch`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from llmray.arguments import environment
from llmray.data import fetch, files
from llmray.data.formattings import FORMATTINGS
from llmray.data.pieces import BOM, CHUNK_BYTES, DataFile
from llmray.data.row_format import COLUMNS, TAGS, Kind, RowFormat
from llmray.errors import DataError

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
ONLINE, REMOTE = "ONLINE", "REMOTE:"
INLINE = "dataset_dir"  # where an entry stands that the run file itself holds


@dataclass(frozen=True)
class DataSet:
    """A set: its name, its files in order, the layout of its rows, how many of them to draw."""

    name: str
    files: tuple[DataFile, ...]
    layout: RowFormat
    num_samples: int | None = None


@dataclass(frozen=True)
class _Info:
    """Entries of sets, where they stand, and where the files lie that they name."""

    entries: Mapping[str, Any]
    where: str
    folder: Callable[[str], Path]


def open_sets(
    names: Sequence[str],
    dataset_dir: str | Mapping[str, Any],
    *,
    cache: Path,
    kind: Kind = "responses",
) -> list[DataSet]:
    """The sets that a run names, in their order.

    Args:
        names: keys of dataset_info.json; names of a hub's sets where dataset_dir is ONLINE.
        dataset_dir: the folder that holds it, and the files it names; REMOTE:name, a repository
            of the hub that does; or the entries themselves.
        cache: where files are kept that lie elsewhere.
        kind: what the stage reads of a row.

    Raises:
        DataError: a name, a key or a file is not there, or not of the kind required.
    """
    if not names:
        return []
    info = _info(names, dataset_dir)
    sets = []
    for name in names:
        if name not in info.entries:
            raise DataError(
                f"{name} is no set of {info.where}.{nearest(name, info.entries)} Required: one of "
                f"{_listed(info.entries)}. Mend the name, or add the set to the file."
            )
        sets.append(_open_set(name, info, cache, kind))
    return sets


def kind_of(name: str, dataset_dir: str | Mapping[str, Any]) -> Kind:
    """What the rows of a set hold, as its entry says: pairs, judged answers, or responses.

    Raises:
        DataError: the entries cannot be read.
    """
    entry = _info([name], dataset_dir).entries.get(name)
    if not isinstance(entry, Mapping):
        return "responses"  # what is wrong with it is said where it is opened
    if entry.get("ranking"):
        return "pair"
    columns = entry.get("columns")
    return "judged" if isinstance(columns, Mapping) and "kto_tag" in columns else "responses"


def fetched(sets: Iterable[DataSet]) -> list[DataSet]:
    """The sets with all their files here.

    Raises:
        DataError: one cannot be had.
    """
    return [replace(dataset, files=tuple(map(fetch.local, dataset.files))) for dataset in sets]


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


def _info(names: Sequence[str], dataset_dir: str | Mapping[str, Any]) -> _Info:
    if isinstance(dataset_dir, Mapping):
        return _Info(dataset_dir, INLINE, lambda name: Path())
    if dataset_dir == ONLINE:
        online = {name: dict.fromkeys(fetch.HUBS, name) for name in names}
        return _Info(online, ONLINE, lambda name: Path())
    if dataset_dir.startswith(REMOTE):
        repository = dataset_dir.removeprefix(REMOTE)
        entries = _read_info(fetch.hub_folder(repository, INFO))
        return _Info(entries, f"{repository}/{INFO}", partial(fetch.hub_folder, repository))
    folder = Path(dataset_dir)
    return _Info(_read_info(folder), f"{folder / INFO}", lambda name: folder)


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


def _open_set(name: str, info: _Info, cache: Path, kind: Kind) -> DataSet:
    where, entry = f"{info.where}: {name}", info.entries[name]
    if not isinstance(entry, Mapping):
        raise DataError(f"{where} is {entry!r}. Required: an object that describes the set.")
    _check_names(where, entry, KEYS)
    if entry.get("script_url") is not None:
        raise DataError(
            f"{where} has script_url={entry['script_url']!r}: sets that come with a loading script "
            "cannot be read: libraries have dropped them. Save the rows as JSON lines and name "
            "them by file_name."
        )
    layout = _layout(where, entry)
    _check_kind(where, entry, layout, kind)
    wanted = entry.get("num_samples")
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise DataError(f"{where} has num_samples={wanted!r}. Required: a number of rows from 1.")
    return DataSet(name, _files(where, entry, info, cache), layout, wanted)


def _files(where: str, entry: Mapping[str, Any], info: _Info, cache: Path) -> tuple[DataFile, ...]:
    """The files of a set, wherever it lies; a hub goes before a file, as in LLaMA-Factory."""
    asked = environment.other_hub(os.environ)
    hubs = [key for key in fetch.HUBS if entry.get(key)]
    if hubs:
        key = HUB_KEYS[asked] if asked is not None and HUB_KEYS[asked] in hubs else hubs[0]
        return (fetch.hub_file(where, key, entry, cache),)
    if entry.get("cloud_file_name"):
        return tuple(fetch.cloud_files(entry["cloud_file_name"], cache))
    if entry.get("file_name"):
        name = entry["file_name"]
        return _local_files(where, info.folder(name) / name, cache)
    raise DataError(
        f"{where} names no data. Required: one of file_name, {', '.join(fetch.HUBS)}, "
        "cloud_file_name."
    )


def _check_kind(where: str, entry: Mapping[str, Any], layout: RowFormat, kind: Kind) -> None:
    """Fail if the rows of a set are not what the stage learns from; prompts are in all of them."""
    if kind == "prompt":
        return
    if bool(entry.get("ranking")) != (kind == "pair"):
        has = "pairs of responses" if entry.get("ranking") else "no pairs of responses"
        raise DataError(
            f"{where} has ranking: {str(bool(entry.get('ranking'))).lower()}: it holds {has}, "
            f"{'from which this stage does not learn' if kind != 'pair' else 'which it needs'}. "
            "Take another set, or another stage."
        )
    if "kto_tag" in layout.columns and kind != "judged":
        raise DataError(
            f"{where} names a kto_tag: its rows hold wanted and unwanted responses, from which "
            "this stage does not learn. Take another set, or another stage."
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


def _local_files(where: str, path: Path, cache: Path) -> tuple[DataFile, ...]:
    if path.is_dir():
        inside = sorted(child for child in path.iterdir() if child.is_file())
        try:
            fetch.require_one_kind(str(path), [child.name for child in inside])
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        return tuple(_local_file(child, cache) for child in inside)
    if not path.exists():
        near = nearest(path.name, [child.name for child in path.parent.glob("*")])
        raise DataError(
            f"{where}: {path} does not exist.{near} Required: a file or a folder of files, named "
            "from dataset_dir. Mend file_name."
        )
    return (_local_file(path, cache),)


def _local_file(path: Path, cache: Path) -> DataFile:
    if fetch.is_compressed(path.name):
        return fetch.compressed(path, cache)
    return files.recognise(path)
