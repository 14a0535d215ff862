"""Whether prepared data is as it was committed: its bytes are read once on each machine.

What was found intact is remembered by size, time of change and inode of each file, as digests of
source files are, so that no later run, and no second worker, reads them for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import ExitStack
from logging import getLogger
from pathlib import Path

from llmray import store
from llmray.data.locks import locked
from llmray.errors import StoreError

log = getLogger("llmray")

FOLDER = "intact"  # below the root of prepared data


def check(path: str, root: Path) -> None:
    """Compare every byte with what was committed, unless this machine has done so before.

    Args:
        path: of prepared data.
        root: where this machine keeps notes; where it cannot, nothing is remembered.

    Raises:
        StoreError: a file is missing, cut short or altered.
    """
    note = _note(path, root)
    if _read(note) == _states(path):
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(
                locked(note.with_suffix(".lock"), "data: another process is reading it; waiting")
            )
        except StoreError as error:
            log.debug("nothing is remembered of prepared data: %s", error)
        if _read(note) == _states(path):
            return
        _verify(path)
        remember(path, root)


def remember(path: str, root: Path) -> None:
    """Note that this machine has seen, or written, the files as they are."""
    try:
        store.write_atomic(_note(path, root), json.dumps(_states(path)))
    except StoreError as error:
        log.debug("nothing is remembered of prepared data: %s", error)


def _verify(path: str) -> None:
    try:
        store.verify(path)
    except StoreError as error:
        raise StoreError(f"{error} With overwrite_cache: true it is prepared anew.") from None


def machine() -> str:
    """A name that no other machine of a cluster has."""
    return platform.node()


def _note(path: str, root: Path) -> Path:
    about = f"{machine()}\n{os.path.realpath(path)}"
    return root / FOLDER / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"


def _states(path: str) -> dict[str, list[int]]:
    """Size, time of change and inode of each file; shorter for one that is not there."""
    found = {}
    for name in store.read_manifest(path).files:
        try:
            state = os.stat(store.join(path, name))
        except FileNotFoundError:
            found[name] = [0]
            continue
        found[name] = [state.st_size, state.st_mtime_ns, state.st_ino]
    return found


def _read(note: Path) -> dict[str, list[int]] | None:
    try:
        return dict(json.loads(note.read_text()))
    except (OSError, ValueError):
        return None
