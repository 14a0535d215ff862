"""What keeps processes that prepare the same data apart: a lock, and the name of their run."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

from llmray import store

log = getLogger("llmray")


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock of a file, which is made; free again when this process ends, however it does.

    Args:
        path: the file.
        waiting: what is said where another holds it.

    Raises:
        StoreError: the file cannot be made.
    """
    with store.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s", waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


_calls = 0


def this_run() -> str:
    """A name of this call that the ranks of one torchrun share; else one that nothing has."""
    global _calls
    _calls += 1
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return uuid.uuid4().hex
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    shared = [os.environ.get(name, "") for name in names]
    return "/".join([*shared, str(os.getppid()), str(_calls)])
