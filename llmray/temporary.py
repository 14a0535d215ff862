"""Names of files and directories that are not finished, and whether their writer is dead.

A name carries what its writer was called, its machine, process number and start, so that a later
process can tell work under way from what a killed one left behind.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

PREFIX = ".tmp-"
STALE_AFTER_S = 24 * 3600.0  # for a writer on another machine, of which only the clock is known


def new_name(name: str) -> str:
    """A name that nothing else has, for what is to become `name`."""
    pid = os.getpid()
    return f"{PREFIX}{name}-{_machine()}-{pid}-{_started(pid)}-{uuid.uuid4().hex[:8]}"


def is_temporary(path: str | Path) -> bool:
    """Whether the last part of `path` is such a name."""
    return str(path).rstrip("/").rpartition("/")[2].startswith(PREFIX)


def is_stale(path: Path) -> bool:
    """Whether nobody will finish `path`.

    A writer of this machine is dead when its process is; one of another machine when it has written
    nothing for a day.
    """
    parts = path.name.rsplit("-", 4)
    if len(parts) == 5 and parts[1] == _machine() and parts[2].isdecimal():
        return _started(int(parts[2])) != parts[3]
    try:
        times = [path.stat().st_mtime]
        times += [inner.stat().st_mtime for inner in path.rglob("*")]
    except FileNotFoundError:  # its writer is at work
        return False
    return time.time() - max(times) > STALE_AFTER_S


@cache
def _machine() -> str:
    """A tag of what process numbers are unique in: host, boot and process namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return f"{zlib.crc32('/'.join(parts).encode()):08x}"


def _started(pid: int) -> str | None:
    """When a process began, as the kernel counts; None if it is dead, "0" if that is unknown."""
    try:
        if Path("/proc/self/stat").exists():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if fields[0] in "ZX" else fields[19]
        os.kill(pid, 0)
    except (ProcessLookupError, FileNotFoundError):
        return None
    except PermissionError:
        return "0"
    return "0"
