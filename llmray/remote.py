"""Files at URIs (s3://, gs://, hdfs://, file://) through pyarrow: read, copy, move, remove.

Knows no manifest and no commit: that is `store`, whose errors wrap what is raised here.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmray.errors import StoreError

NUM_COPIES = 4  # files on their way at a time
CHUNK_BYTES = 1 << 22


def is_uri(path: str | Path) -> bool:
    """Whether `path` is a URI (s3://, gs://, file://, ...) and not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def filesystem(uri: str | Path) -> tuple[Any, str]:
    """The pyarrow file system of a URI, and the path inside it.

    Raises:
        StoreError: pyarrow knows no such scheme.
    """
    import pyarrow
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(str(uri))
    except pyarrow.ArrowInvalid as error:
        raise StoreError(
            f"{uri} is not a URI that pyarrow can open ({error}). Use a local path or one of "
            "s3://, gs://, abfs://, hdfs://, file://."
        ) from error
    return system, path


def list_names(uri: str | Path, *, files_only: bool = False) -> list[str]:
    """Names of the entries at a URI, sorted; none where there is nothing."""
    from pyarrow import fs

    system, path = filesystem(uri)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.is_file or not files_only)


def exists(uri: str | Path) -> bool:
    """Whether there is something at a URI."""
    from pyarrow import fs

    system, path = filesystem(uri)
    return bool(system.get_file_info(path).type != fs.FileType.NotFound)


def size_bytes(uri: str | Path) -> int:
    """Bytes of all files below a URI."""
    system, _ = filesystem(uri)
    return sum(system.get_file_info(file).size for file in _walk(uri))


def read(uri: str | Path) -> bytes:
    """Content of a file."""
    system, path = filesystem(uri)
    with system.open_input_stream(path) as stream:
        return bytes(stream.read())


def write(uri: str | Path, content: bytes) -> None:
    """Write a file; its directory is made where there is none."""
    system, path = filesystem(uri)
    system.create_dir(path.rpartition("/")[0], recursive=True)
    with system.open_output_stream(path) as stream:
        stream.write(content)


def size_and_crc32(uri: str | Path) -> tuple[int, int]:
    """Size and CRC-32 of a file, read in chunks."""
    system, path = filesystem(uri)
    size = crc = 0
    with system.open_input_stream(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def upload(
    directory: Path, names: Iterable[str], uri: str | Path, *, may_vanish: bool = False
) -> None:
    """Copy files, named relative to a local directory, to below a URI.

    With `may_vanish` those are left out that somebody has removed since they were listed.
    """
    system, path = filesystem(uri)
    places = {name: f"{path}/{name}" for name in names}
    for parent in {path, *(place.rpartition("/")[0] for place in places.values())}:
        system.create_dir(parent, recursive=True)
    with ThreadPoolExecutor(NUM_COPIES) as pool:
        copies = {n: pool.submit(_copy, directory / n, system, at) for n, at in places.items()}
        for name, copy in copies.items():
            try:
                copy.result()
            except FileNotFoundError:
                if not may_vanish or (directory / name).exists():
                    raise


def download(uri: str | Path, directory: Path) -> None:
    """Copy every file below a URI into a local directory, which is made."""
    from pyarrow import fs

    system, path = filesystem(uri)
    directory.mkdir(parents=True, exist_ok=True)
    fs.copy_files(path, str(directory), source_filesystem=system)


def download_file(uri: str | Path, target: Path) -> None:
    """Copy one file to a local path."""
    system, path = filesystem(uri)
    with system.open_input_stream(path) as stream, target.open("wb") as file:
        shutil.copyfileobj(stream, file, CHUNK_BYTES)


def move(source: str | Path, target: str | Path) -> None:
    """Move a file, or a directory file by file."""
    system, old = filesystem(source)
    _, new = filesystem(target)
    for path in _walk(source):
        place = new + path[len(old) :]
        system.create_dir(place.rpartition("/")[0], recursive=True)
        system.move(path, place)
    remove(source)


def remove(uri: str | Path, *, first: str | None = None) -> None:
    """Remove a file or directory, if it is there; the file `first` of a directory goes first."""
    from pyarrow import fs

    system, path = filesystem(uri)
    if first is not None and system.get_file_info(f"{path}/{first}").is_file:
        system.delete_file(f"{path}/{first}")
    kind = system.get_file_info(path).type
    if kind == fs.FileType.Directory:
        system.delete_dir(path)
    elif kind == fs.FileType.File:
        system.delete_file(path)


def _walk(uri: str | Path) -> list[str]:
    from pyarrow import fs

    system, path = filesystem(uri)
    if system.get_file_info(path).is_file:
        return [path]
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    return [info.path for info in system.get_file_info(selector) if info.is_file]


def _copy(source: Path, system: Any, path: str) -> None:
    with source.open("rb") as file, system.open_output_stream(path) as stream:
        shutil.copyfileobj(file, stream, CHUNK_BYTES)
