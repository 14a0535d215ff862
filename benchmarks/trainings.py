"""Runs one training in a process of its own and reads what came of it: ours, or the peer's.

Both get the same flat run file. Ours writes its figures itself; the peer is LLaMA-Factory in an
environment of its own, timed by `peer_probe.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PROBE = Path(__file__).with_name("peer_probe.py")


@dataclass(frozen=True)
class Measured:
    """One training: seconds in updates, real tokens in them, the loss of each, peak memory."""

    seconds: float
    tokens: int
    losses: list[float]
    step_rates: list[float]  # real tokens a second, step by step
    peak_mib: float  # resident, of the largest process
    wall: float  # of the whole process
    step_tokens: list[int] = field(default_factory=list)  # where the figures have them
    steps: list[dict[str, float]] = field(default_factory=list)  # as the program wrote them

    @property
    def rate(self) -> float:
        """Real tokens a second over all updates."""
        return self.tokens / self.seconds


def ours(
    run: Mapping[str, Any],
    directory: Path,
    threads: int,
    launcher: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Measured:
    """Train `run` with llmray in a fresh process; `launcher` may be torchrun's words."""
    out = directory / "out"
    file = _write_run(run, directory, out)
    words = [sys.executable, *launcher, "-m", "llmray", "train", str(file)]
    own = {"OMP_NUM_THREADS": str(threads)}
    peak, wall = _spawn(words, directory, {**own, **(environ or {})})
    results = json.loads((out / "train_results.json").read_text())
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    log = [record for record in log if "loss" in record]
    tokens = results["train_tokens"]
    return Measured(
        seconds=tokens / results["train_tokens_per_second"],
        tokens=tokens,
        losses=[record["loss"] for record in log],
        step_rates=[record["tokens_per_second"] for record in log],
        peak_mib=peak,
        wall=wall,
    )


def peer(run: Mapping[str, Any], directory: Path, threads: int, python: str) -> Measured:
    """Train `run` with LLaMA-Factory, whose environment's interpreter is `python`."""
    environ = {
        "DISABLE_VERSION_CHECK": "1",
        "USE_RAY": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "hf"),
    }
    return measure_steps([python, str(PROBE)], run, directory, threads, environ)


def measure_steps(
    words: Sequence[str],
    run: Mapping[str, Any],
    directory: Path,
    threads: int,
    environ: Mapping[str, str] | None = None,
) -> Measured:
    """Train `run` with a program that is given its file.

    It writes a JSON object a step into the file that LLMRAY_PROBE_OUT names.
    """
    file = _write_run(run, directory, directory / "out")
    figures = directory / "probe.jsonl"
    own = {"OMP_NUM_THREADS": str(threads), "LLMRAY_PROBE_OUT": str(figures)}
    peak, wall = _spawn([*words, str(file)], directory, {**own, **(environ or {})})
    steps = [json.loads(line) for line in figures.read_text().splitlines()]
    return Measured(
        seconds=sum(step["seconds"] for step in steps),
        tokens=sum(step["tokens"] for step in steps),
        losses=[step["loss"] for step in steps],
        step_rates=[step["tokens"] / step["seconds"] for step in steps],
        peak_mib=peak,
        wall=wall,
        step_tokens=[step["tokens"] for step in steps],
        steps=steps,
    )


def peer_versions(python: str) -> str:
    """The versions in the peer's environment that decide its figures."""
    code = (
        "from importlib.metadata import version as v\n"
        "names = 'llamafactory', 'torch', 'transformers', 'peft'\n"
        "print(', '.join(f'{n} {v(n)}' for n in names))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _write_run(run: Mapping[str, Any], directory: Path, out: Path) -> Path:
    directory.mkdir(parents=True)
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump({**run, "output_dir": str(out)}))
    return file


def _spawn(
    words: Sequence[str], directory: Path, environ: Mapping[str, str]
) -> tuple[float, float]:
    """Run to the end; returns peak memory in MiB and seconds. Fails with the end of its output."""
    # with byte code left unwritten Ray would compile its modules at every start
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    with (directory / "log.txt").open("w") as log:
        process = subprocess.Popen(
            words, env={**inherited, **environ}, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join((directory / "log.txt").read_text().splitlines()[-25:])
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{tail}")
    return usage.ru_maxrss / 1024, time.perf_counter() - started
