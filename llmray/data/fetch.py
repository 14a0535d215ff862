"""Data that lies elsewhere as local files: sets of hubs, cloud storage, compressed files.

Nothing is fetched before it is to be read. Until then a `DataFile` says by its `identity` which
bytes it stands for, so that data which is prepared already needs none of them.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from llmray import store
from llmray.data import files
from llmray.data.pieces import DataFile
from llmray.errors import DataError

log = getLogger("llmray")

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
COMPRESSED_FORMATS = ("json", "jsonl", "csv", "txt")
# what storages say of a file that changes with its bytes, the best first
VERSIONS = ("etag", "md5hash", "content_md5", "crc32c", "generation")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
REMEDY = "Where there is no network, download its files and name them by file_name."


def local(file: DataFile) -> DataFile:
    """The file here, fetched and unpacked if it is not yet; its format as its bytes say.

    Raises:
        DataError: it cannot be had, or not unpacked.
        StoreError: it cannot be written here.
    """
    if file.origin is None:
        return file
    path = Path(file.path)
    if not path.exists():
        log.info("data: %s is kept in %s", file.origin, path)
        with (
            store.replacing(path) as unfinished,
            _opened(file.origin) as source,
            open(unfinished, "wb") as target,
        ):
            _copy(source, target, file.origin)
    return replace(files.recognise(path), origin=file.origin, identity=file.identity)


# --- compressed files ------------------------------------------------------------------------


def is_compressed(name: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return PurePosixPath(name).suffix.lower() in COMPRESSIONS


def extension(name: str) -> str:
    """What a file's name says of its format, without its compression: .json of rows.json.gz."""
    path = PurePosixPath(name.lower())
    return path.with_suffix("").suffix if is_compressed(name) else path.suffix


def require_one_kind(where: str, names: Iterable[str]) -> None:
    """Fail unless all files have one extension.

    Raises:
        DataError: they have several, or there is none.
    """
    kinds = {extension(name) for name in names}
    if len(kinds) != 1:
        raise DataError(
            f"the folder {where} holds files of {len(kinds)} kinds "
            f"({', '.join(sorted(kinds)) or 'no file'}). Required: files of one extension."
        )


def compressed(path: Path, cache: Path) -> DataFile:
    """A compressed file here, to be unpacked into `cache`.

    Raises:
        DataError: it is of a format that is compressed by itself, or of none that is read.
    """
    found = os.stat(path)
    state = f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
    return DataFile(str(_kept(cache, state, path.name)), _format(path.name), str(path))


def _format(name: str) -> str:
    kind = extension(name).removeprefix(".")
    if is_compressed(name) and kind not in COMPRESSED_FORMATS:
        raise DataError(
            f"{name} is compressed. Required: a compressed file of "
            f"{', '.join(COMPRESSED_FORMATS)}, "
            "such as rows.jsonl.gz. Unpack it, or mend its name."
        )
    return files.format_of(kind, name)


def _kept(cache: Path, state: str, name: str) -> Path:
    """Where a file that is known by `state` is kept."""
    return cache / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}{extension(name)}"


@contextmanager
def _unpacked(raw: BinaryIO, name: str) -> Iterator[BinaryIO]:
    import bz2
    import gzip

    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        with pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as stream:
            yield stream
        return
    readers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    if suffix not in readers:
        yield raw
        return
    with readers[suffix](raw, "rb") as stream:
        yield cast("BinaryIO", stream)


def _copy(source: BinaryIO, target: BinaryIO, name: str) -> None:
    try:
        with _unpacked(source, name) as stream:
            shutil.copyfileobj(stream, target, 1 << 20)
    except (EOFError, OSError, ValueError, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno in store.REMEDIES:
            raise  # of the disk, not of the file
        raise DataError(
            f"{name} cannot be unpacked: {error}. Required: a whole compressed file. Mend or "
            "replace it."
        ) from error


@contextmanager
def _opened(origin: str) -> Iterator[BinaryIO]:
    if "://" not in origin:
        with open(origin, "rb") as source:
            yield source
        return
    system, path = _cloud(origin)
    with _explained(origin):
        handle = system.open(path, "rb")
    with handle:
        yield handle


# --- cloud storage ---------------------------------------------------------------------------


def cloud_files(url: str, cache: Path) -> list[DataFile]:
    """The files at a URL of cloud storage: itself, or those of one extension in the folder.

    Raises:
        DataError: there is nothing, or it cannot be reached.
    """
    system, path = _cloud(url)
    with _explained(url):
        names = [path]
        if system.isdir(path):
            found = system.ls(path, detail=True)
            names = sorted(entry["name"] for entry in found if entry["type"] == "file")
        infos = [(name, system.info(name)) for name in names]
    require_one_kind(url, [name for name, _ in infos])
    scheme = url.partition("://")[0]
    return [_cloud_file(f"{scheme}://{name.lstrip('/')}", info, cache) for name, info in infos]


def _cloud_file(url: str, info: Mapping[str, Any], cache: Path) -> DataFile:
    lowered = {str(name).lower().replace("-", "_"): value for name, value in info.items()}
    version = next((f"{name} {lowered[name]}" for name in VERSIONS if lowered.get(name)), None)
    if version is None:  # all that is said: its size, its times
        version = " ".join(f"{name}={info[name]}" for name in sorted(info))
    identity = f"{url} {version}"
    return DataFile(str(_kept(cache, identity, url)), _format(url), url, identity)


def _cloud(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(scheme, "the package that fsspec names for it")
        raise DataError(
            f"{url} needs a package that is not installed: {error}. Required: {package}. Install "
            f"it on every node: pip install {package}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{url} is of a storage that is not known: {error}. Required: such as s3:// or gs://. "
            "Mend cloud_file_name."
        ) from error
    return system, path


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{url} does not exist. Required: a file, or a folder of files. Mend cloud_file_name."
        ) from error
    except Exception as error:  # each storage's package raises what it likes
        raise DataError(
            f"{url} cannot be read: {type(error).__name__}: {error}. Required: a network that "
            f"reaches the storage, and credentials for it. {REMEDY}"
        ) from error


# --- hubs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hub:
    """A hub of data sets: its name for users, its package, and how that loads a set."""

    name: str
    package: str
    load: Callable[[str, Mapping[str, Any]], Any]


def _from_hugging_face(name: str, entry: Mapping[str, Any]) -> Any:
    import datasets

    return datasets.load_dataset(
        name,
        name=entry.get("subset"),
        data_dir=entry.get("folder"),
        split=entry.get("split") or "train",
    )


def _from_modelscope(name: str, entry: Mapping[str, Any]) -> Any:
    from modelscope import MsDataset

    found = MsDataset.load(
        dataset_name=name,
        subset_name=entry.get("subset"),
        data_dir=entry.get("folder"),
        split=entry.get("split") or "train",
        token=os.environ.get("MODELSCOPE_API_TOKEN"),
    )
    return found.to_hf_dataset() if isinstance(found, MsDataset) else found


def _from_openmind(name: str, entry: Mapping[str, Any]) -> Any:
    from openmind import OmDataset

    return OmDataset.load_dataset(
        path=name,
        name=entry.get("subset"),
        data_dir=entry.get("folder"),
        split=entry.get("split") or "train",
        token=os.environ.get("OM_HUB_TOKEN"),
    )


HUBS: dict[str, Hub] = {
    "hf_hub_url": Hub("Hugging Face hub", "datasets", _from_hugging_face),
    "ms_hub_url": Hub("ModelScope hub", "modelscope", _from_modelscope),
    "om_hub_url": Hub("Modelers hub", "openmind", _from_openmind),
}


def hub_file(where: str, key: str, entry: Mapping[str, Any], cache: Path) -> DataFile:
    """The rows of a set on a hub as a local parquet file, downloaded if needed.

    Args:
        where: the entry, for messages.
        key: of `HUBS`; the entry names the set by it.
        entry: of dataset_info.json; its subset, split and folder say which part.
        cache: where the file is kept.

    Raises:
        DataError: a package is missing, the hub does not answer or has no such set.
    """
    hub, name = HUBS[key], str(entry[key])
    try:
        rows = hub.load(name, entry)
    except ImportError as error:
        raise DataError(
            f"{where} is on the {hub.name}, which needs a package that is not installed: "
            f"{error}. Required: {hub.package}. Install it on every node: pip install "
            f"{hub.package}. {REMEDY}"
        ) from error
    except Exception as error:  # each hub's package raises what it likes
        raise DataError(
            f"{where}: the set {name} could not be had from the {hub.name}: {error}. Required: a "
            f"set of that name, and a network that reaches the hub or a cached copy. {REMEDY}"
        ) from error
    path = cache / f"{rows._fingerprint}.parquet"
    if not path.exists():
        log.info("%s: %d rows from the hub, kept in %s", name, len(rows), path)
        with store.replacing(path) as unfinished:
            rows.to_parquet(str(unfinished))
    return DataFile(str(path), "parquet")


def hub_folder(repository: str, name: str) -> Path:
    """A local copy of a data set's repository with the file or folder `name` of it.

    Raises:
        DataError: the hub does not answer, or has no such repository.
    """
    from huggingface_hub import snapshot_download

    patterns = [name, f"{name.rstrip('/')}/*"]
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # of the hub's package, its network library, or the disk
        raise DataError(
            f"{name} of the repository {repository} could not be had from the Hugging Face hub: "
            f"{error}. Required: a data set's repository of that name, and a network that reaches "
            f"the hub or a cached copy. {REMEDY}"
        ) from error
