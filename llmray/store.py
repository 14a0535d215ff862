"""A directory written whole or not at all: stage, checksums, commit, verify, list, remove.

The only place that renames or fsyncs. What it writes is either committed, with a manifest of every
file's size and checksum, or it is not there. Local paths are committed by one rename; on storage
that has no atomic rename (any URI that pyarrow reads) the manifest, written last, is the commit.

    with store.staging(target) as directory:
        ...                                   # write files into `directory`
        store.commit(directory, target, {"rows": 12})

Checksums are CRC-32: it finds every flipped bit and all but one in 2**32 of larger damages at the
speed of memory, and frees the interpreter while it runs. It is no defence against forgery.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmray import remote, temporary
from llmray.errors import StoreError
from llmray.remote import is_uri

MANIFEST = "manifest.json"
FORMAT = 1

REMEDIES = {
    errno.ENOSPC: "The disk is full: free space, or choose a directory on another disk.",
    errno.EDQUOT: "The disk quota is used up: free space, or choose another directory.",
    errno.EROFS: "The file system is read-only: choose a directory that can be written.",
    errno.EACCES: "This user may not write there: change its permissions, or choose another.",
    errno.EPERM: "This user may not write there: change its permissions, or choose another.",
    errno.ENOTDIR: "A part of the path is a file, where a directory is required: choose another.",
    errno.EEXIST: "A part of the path is a file, where a directory is required: choose another.",
}


@dataclass(frozen=True)
class FileSum:
    """What a file must be: its size in bytes and its CRC-32."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a commit holds: sums by path relative to the directory, and the writer's metadata."""

    files: dict[str, FileSum]
    metadata: dict[str, Any]


def join(parent: str | Path, *parts: str) -> str:
    """The path or URI of something inside `parent`."""
    return "/".join([str(parent).rstrip("/"), *parts])


def parent(path: str | Path) -> str:
    """The path or URI of the directory that something lies in."""
    return str(path).rstrip("/").rpartition("/")[0]


@contextmanager
def staging(target: str | Path) -> Iterator[Path]:
    """A fresh local directory for what is to become `target`; gone at exit if not committed.

    Beside a local target, so that a rename commits it; in the temporary directory for a URI.

    Raises:
        StoreError: the directory cannot be made or written.
    """
    directory = open_staging(target)
    try:
        with explained(target):
            yield directory
    finally:
        discard(directory)


def discard(directory: Path) -> None:
    """Remove a staging directory, if it was not committed."""
    shutil.rmtree(directory, ignore_errors=True)


def open_staging(target: str | Path) -> Path:
    """As `staging`, for writers that span processes: they `seal` parts, one of them commits."""
    with explained(target):
        if is_uri(target):
            return Path(tempfile.mkdtemp(prefix="llmray-"))
        local = Path(target)
        local.parent.mkdir(parents=True, exist_ok=True)
        directory = local.parent / temporary.new_name(local.name)
        directory.mkdir()
        return directory


def seal(directory: Path, files: Iterable[str] | None = None) -> dict[str, FileSum]:
    """Make files of a staging directory durable; returns their sums.

    Args:
        directory: the staging directory.
        files: relative paths; all files below the directory if None.
    """
    names = sorted(walk(directory) if files is None else files)
    with explained(directory):
        sums = {name: _seal_file(directory / name) for name in names if name != MANIFEST}
        for parent in {directory, *(directory / Path(name).parent for name in names)}:
            _fsync(parent)
    return sums


def commit(
    directory: Path,
    target: str | Path,
    metadata: Mapping[str, Any] | None = None,
    sums: Mapping[str, FileSum] | None = None,
) -> None:
    """Turn a staging directory into `target`, replacing what is there.

    Args:
        directory: from `staging` or `open_staging`.
        target: where it shall be; the target of the staging.
        metadata: JSON values to keep in the manifest.
        sums: from `seal`, of all parts; None seals everything here.

    Raises:
        StoreError: nothing was committed; the message says why.
    """
    sums = seal(directory) if sums is None else dict(sums)
    with explained(target):
        if is_uri(target):
            uncommit(target)
            upload(directory, str(target))
            commit_remote(str(target), metadata, sums)
            return
        (directory / MANIFEST).write_text(_manifest_text(sums, dict(metadata or {})))
        _fsync(directory / MANIFEST)
        _fsync(directory)
        _swap_in(directory, Path(target))


def commit_remote(
    target: str, metadata: Mapping[str, Any] | None, sums: Mapping[str, FileSum]
) -> None:
    """Commit a URI whose files were uploaded already, by one process or several."""
    with explained(target):
        body = _manifest_text(dict(sums), dict(metadata or {}))
        remote.write(join(target, MANIFEST), body.encode())


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file, local or by URI, whole or not at all; an existing one is replaced."""
    data = content.encode() if isinstance(content, str) else content
    if is_uri(path):
        with explained(path):
            remote.write(path, data)
        return
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)


@contextmanager
def replacing(path: str | Path, *, syncs: bool = True) -> Iterator[Path]:
    """A file name to write to, beside a local file that it replaces at exit, if nothing failed.

    Without `syncs` the file outlives no loss of power until it is sealed.
    """
    target = Path(path)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.parent / temporary.new_name(target.name)
        try:
            yield unfinished
            if syncs:
                _fsync(unfinished)
            os.replace(unfinished, target)
            if syncs:
                _fsync(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def is_committed(path: str | Path) -> bool:
    """Whether `path` was committed; says nothing of damage since, see `verify`."""
    try:
        read_manifest(path)
    except StoreError:
        return False
    return True


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a committed directory.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    place = join(path, MANIFEST)
    try:
        raw = json.loads(read_bytes(place))
    except FileNotFoundError:
        raise StoreError(
            f"{path} has no {MANIFEST}: it was not written by llmray, or not to its end. "
            "A committed directory is required; choose another, or write it anew."
        ) from None
    except (ValueError, NotADirectoryError) as error:
        raise _damaged(path, f"{MANIFEST} is not readable ({error})") from None
    intact = isinstance(raw, dict) and raw.get("crc32") == _body_crc(raw)
    if not intact or raw["format"] != FORMAT:
        raise _damaged(path, f"{MANIFEST} does not have its own checksum or format {FORMAT}")
    files = {name: FileSum(**entry) for name, entry in raw["files"].items()}
    return Manifest(files, raw["metadata"])


def verify(path: str | Path) -> Manifest:
    """Read every file of a committed directory and compare it with the manifest.

    Raises:
        StoreError: names the first file that is missing, cut short or altered.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        place = join(path, name)
        try:
            found = _sum(place)
        except FileNotFoundError:
            raise _damaged(path, f"{name} is missing") from None
        if found.size != expected.size:
            raise _damaged(path, f"{name} has {found.size} bytes, committed were {expected.size}")
        if found.crc32 != expected.crc32:
            raise _damaged(path, f"{name} has other content than was committed")
    return manifest


def list_names(parent: str | Path) -> list[str]:
    """Names of the entries of a directory, sorted; none where it does not exist."""
    if is_uri(parent):
        return remote.list_names(parent)
    return sorted(os.listdir(parent)) if os.path.isdir(parent) else []


def list_files(parent: str | Path) -> list[str]:
    """Names of the files of a directory, sorted; none where it does not exist."""
    if is_uri(parent):
        return remote.list_names(parent, files_only=True)
    return [name for name in list_names(parent) if Path(parent, name).is_file()]


def exists(path: str | Path) -> bool:
    """Whether there is something at a path or URI."""
    return remote.exists(path) if is_uri(path) else os.path.exists(path)


def list_committed(parent: str | Path, pattern: str = "*") -> list[str]:
    """Committed directories of `parent` whose names match the glob, numbers in natural order."""
    names = [name for name in list_names(parent) if fnmatch.fnmatch(name, pattern)]
    paths = [join(parent, name) for name in sorted(names, key=_natural)]
    return [path for path in paths if not temporary.is_temporary(path) and is_committed(path)]


def size_bytes(path: str | Path) -> int:
    """Bytes of all files below a directory."""
    if is_uri(path):
        return remote.size_bytes(path)
    return sum((Path(path) / name).stat().st_size for name in walk(Path(path)))


def read_bytes(path: str | Path) -> bytes:
    """Content of a file, local or by URI.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return remote.read(path) if is_uri(path) else Path(path).read_bytes()


def remove(path: str | Path) -> None:
    """Remove a directory so that no half of it is ever seen under its name."""
    with explained(path):
        if is_uri(path):
            uncommit(path)
            return
        local = Path(path)
        if not local.exists():
            return
        hidden = local.parent / temporary.new_name(local.name)
        os.rename(local, hidden)
        _fsync(local.parent)
        shutil.rmtree(hidden)


def remove_file(path: str | Path) -> None:
    """Remove a file, if it is there."""
    with explained(path):
        if is_uri(path):
            remote.remove(path)
        else:
            Path(path).unlink(missing_ok=True)


def move(source: str | Path, target: str | Path) -> None:
    """Rename a file or directory to a name that is not taken; at a URI file by file."""
    with explained(target):
        if is_uri(source):
            remote.move(source, target)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        _fsync(Path(target).parent)


def move_files(source: Path, target: Path) -> None:
    """Rename every file of one local directory into another, each whole, over what is there."""
    with explained(target):
        for path in sorted(source.iterdir()):
            _fsync(path)
            os.replace(path, target / path.name)
        _fsync(target)


def share(directory: Path) -> None:
    """Give a directory's weight files the permissions of the umask; safetensors makes them private.

    Files of directories inside it are left alone.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def uncommit(uri: str | Path) -> None:
    """Remove what is at a URI: the manifest first, so that the rest never passes for whole."""
    with explained(uri):
        remote.remove(uri, first=MANIFEST)


def sweep(parent: str | Path) -> list[str]:
    """Remove what dead writers left unfinished in a local directory; returns the names.

    A writer of this machine is dead when its process is; one of another machine when it has
    written nothing for a day.
    """
    if is_uri(parent):
        return []
    swept = [name for name in list_names(parent) if temporary.is_temporary(name)]
    swept = [name for name in swept if temporary.is_stale(Path(parent, name))]
    for name in swept:
        path = Path(parent, name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return swept


def upload(directory: Path, uri: str, *, may_vanish: bool = False) -> None:
    """Copy every finished file below a local directory to a URI; staging files are left out.

    With `may_vanish` others may remove files of the directory meanwhile.
    """
    names = [n for n in walk(directory) if not any(map(temporary.is_temporary, Path(n).parts))]
    with explained(uri):
        remote.upload(directory, names, uri, may_vanish=may_vanish)


def download(uri: str, directory: Path) -> None:
    """Copy every file at a URI into a local directory, which is made."""
    with explained(directory):
        remote.download(uri, directory)


def fetch(source: str | Path, names: Sequence[str], directory: str | Path) -> list[str]:
    """Copy named files of a directory or URI into a local directory, each whole or not at all.

    Returns: the names that were there.
    """
    found = []
    for name in names:
        place = join(source, name)
        try:
            with replacing(join(directory, name)) as unfinished:
                if is_uri(source):
                    remote.download_file(place, unfinished)
                else:
                    shutil.copyfile(place, unfinished)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not exists(place):
                continue
            raise
        found.append(name)
    return found


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn errors of the file system inside the block into one StoreError about `path`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise _explain(path, error.errno, error) from error
    except SafetensorError as error:  # a Rust error: its number is only in the text
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise _explain(path, int(number.group(1)) if number else None, error) from error


def _explain(path: str | Path, number: int | None, error: Exception) -> StoreError:
    remedy = REMEDIES.get(number or 0, "A path that can be written is required: choose another.")
    message = StoreError(f"{path} could not be written: {error}. {remedy}")
    message.errno = number
    return message


def _damaged(path: str | Path, what: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {what}. An intact directory is required; remove this one, or restore "
        "it from a copy."
    )


def _swap_in(directory: Path, target: Path) -> None:
    old = target.parent / temporary.new_name(target.name)
    if target.exists() or target.is_symlink():
        os.rename(target, old)
    os.rename(directory, target)
    _fsync(target.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _manifest_text(sums: dict[str, FileSum], metadata: dict[str, Any]) -> str:
    files = {name: vars(sums[name]) for name in sorted(sums)}
    body = {"format": FORMAT, "files": files, "metadata": metadata}
    # through JSON first, so that what is summed is what will be read
    body = json.loads(json.dumps(body))
    return json.dumps({**body, "crc32": _body_crc(body)}, indent=1) + "\n"


def _body_crc(raw: Mapping[str, Any]) -> int:
    body = {key: value for key, value in raw.items() if key != "crc32"}
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def walk(directory: Path) -> Iterator[str]:
    """Paths of all files below a local directory, relative to it."""
    for root, _, names in os.walk(directory):
        for name in names:
            yield Path(root, name).relative_to(directory).as_posix()


def _seal_file(path: Path) -> FileSum:
    found = _sum(path)
    _fsync(path)
    return found


def _sum(place: str | Path) -> FileSum:
    if is_uri(place):
        return FileSum(*remote.size_and_crc32(place))
    size = crc = 0
    with open(place, "rb") as file:
        while chunk := file.read(remote.CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileSum(size, crc)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync no directories
            raise
    finally:
        os.close(descriptor)


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
