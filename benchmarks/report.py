"""What every benchmark prints: hardware, versions, command and a markdown table, and its JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """One benchmark's outcome.

    Rows hold what the columns say, facts what stands below, failures what is not as required.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)  # raw figures; in the JSON only

    def publish(self, path: Path | None) -> None:
        """Print as markdown, write as JSON where a path is given; exit with 1 after failures."""
        lines = [
            f"### {self.title}",
            "",
            f"{hardware()}; {versions()}.",
            "",
            f"    {command()}",
            "",
        ]
        lines += [row(self.columns), row(["---"] * len(self.columns)), *map(row, self.rows), ""]
        lines += [f"- {fact}" for fact in self.facts]
        lines += [f"- FAILED: {failure}" for failure in self.failures]
        print("\n".join(lines), flush=True)
        if path is not None:
            about = {"hardware": hardware(), "versions": versions(), "command": command()}
            path.write_text(json.dumps({**about, **asdict(self)}, indent=2) + "\n")
        if self.failures:
            raise SystemExit(1)


def row(cells: Sequence[Any]) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def hardware() -> str:
    """Processor, cores, memory and GPUs of this machine."""
    name = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    memory = next((int(x.split()[1]) for x in _lines("/proc/meminfo") if "MemTotal" in x), 0)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return f"{name}, {os.cpu_count()} cores, {memory / 2**20:.0f} GiB, {gpus} GPUs"


def versions() -> str:
    """Versions that decide the figures."""
    packages = ("llmray", "torch", "transformers", "peft", "ray")
    found = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {found}"


def command() -> str:
    """This process's command line, without the directories of this machine."""
    words = [Path(sys.argv[0]).name]
    words += [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return "python benchmarks/" + " ".join(words)


def gflops(threads: int, size: int = 2048, repeats: int = 8) -> float:
    """Billions of fp32 operations a second in matrix products, best of three rounds."""
    import time

    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * repeats / best / 1e9


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
