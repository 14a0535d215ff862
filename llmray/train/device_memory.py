"""Memory of the device that a run computes on: its peak, and giving back what is not in use."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch


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


def _peak_of_process() -> int:
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
