"""Memory of the device that a run computes on: free, at its peak, and given back unused."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

UNBOUNDED = 1 << 62
MEMINFO = Path("/proc/meminfo")
# where Linux says how much a container may take: directory, limit, usage, name of cached files
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def release(device: torch.device) -> None:
    """Give memory that the allocator keeps without use back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """The most that tensors took so far, and the most that was reserved for them.

    On a CPU both are the most that this process held, as far as the system tells.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    held = _peak_of_process()
    return held, held


def free_bytes(device: torch.device) -> int:
    """What a worker may still take on its device: its share where workers share a machine.

    On a CPU that is what the system has available, or less where a container has a limit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    system = next(
        (int(line.split()[1]) * 1024 for line in _lines(MEMINFO) if line.startswith("MemAvail")),
        UNBOUNDED,
    )
    return min(system, *map(_left_in, CGROUPS)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_in(group: tuple[Path, str, str, str]) -> int:
    """What a control group leaves: its limit less what is in use, files that can go not counted."""
    directory, limit, usage, cached = group
    words = "".join(_lines(directory / limit)).strip()
    if not words.isdecimal():
        return UNBOUNDED
    used = int("".join(_lines(directory / usage)).strip() or 0)
    pages = dict(line.split() for line in _lines(directory / "memory.stat"))
    return max(0, int(words) - used + int(pages.get(cached, 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _peak_of_process() -> int:
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
