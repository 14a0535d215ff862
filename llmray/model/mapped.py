"""How much of a model's weights lies in files that are mapped, and so once in a node's memory.

safetensors maps a file instead of reading it; a weight that keeps its dtype on a CPU stays there
until somebody writes to it, and all processes of a node share the page cache's one copy. `note`
counts that at every load, `take` gives what was counted since it was last asked.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from torch import nn

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Load:
    """One load of a model: its folder, the bytes of its weights, and those that are mapped."""

    directory: str
    num_bytes: int
    num_mapped: int


_loads: list[Load] = []


def note(model: nn.Module, directory: Path | str) -> Load:
    """Count a model that was just loaded."""
    starts, ends = _mapped_ranges()
    num_bytes = num_mapped = 0
    for parameter in {p.data_ptr(): p for p in model.parameters()}.values():
        size = parameter.numel() * parameter.element_size()
        num_bytes += size
        place = bisect_right(starts, parameter.data_ptr()) - 1
        if parameter.device.type == "cpu" and place >= 0 and parameter.data_ptr() < ends[place]:
            num_mapped += size
    _loads.append(Load(str(directory), num_bytes, num_mapped))
    return _loads[-1]


def take() -> list[Load]:
    """The loads of this process since the last call."""
    found = list(_loads)
    _loads.clear()
    return found


def _mapped_ranges() -> tuple[list[int], list[int]]:
    """Where files of weights are mapped into this process: first addresses and ends, in order."""
    if not MAPS.is_file():
        return [], []
    starts, ends = [], []
    for line in MAPS.read_text().splitlines():
        if line.endswith((".safetensors", ".bin")):
            first, _, last = line.split()[0].partition("-")
            starts.append(int(first, 16))
            ends.append(int(last, 16))
    return starts, ends
