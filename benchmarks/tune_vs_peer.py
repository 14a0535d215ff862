"""Eight trials (rank x learning rate) beside eight runs of LLaMA-Factory, one after another.

    python benchmarks/tune_vs_peer.py --peer-python PEER/venv/bin/python --model SMOLLM2 --data DATA

Three rows: the peer with its published settings, eight runs one after another; `llmray tune` of the
same eight without early stopping; and under ASHA. All in fp32, batches equal. Ours trains several
trials at a time on the same cores. Seconds are those of whole processes, from the start of the
first to the end of the last; memory is the largest sum over all processes of PSS, in which a page
that several processes share counts once.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from report import Report
from sft_vs_peer import run_file
from trainings import peer, peer_versions

RANKS, RATES = (4, 8, 16, 32), (1.0e-4, 1.0e-3)
SOONER, SOONER_ASHA, MEMORY, APART, OVERHEAD = 1.7, 3.0, 0.5, 0.01, 0.05
START_S = 15.0
PEER, GRID, ASHA = "peer, eight runs", "llmray tune", "llmray tune, ASHA"
SAMPLE_S = 2.0  # to read the maps of all processes takes a while


@dataclass
class Swept:
    """One sweep of ours: seconds, peak of all processes, best metric, and what it says of time."""

    wall: float
    peak_mib: float
    best: float
    steps: int
    starting: float  # seconds until workers asked for their first trial
    overhead: float  # between trials, as a share of the time in them
    lines: list[str] = field(default_factory=list)


def main() -> None:
    """Measure, compare, publish."""
    options = parse()
    run = {
        **run_file(options.model, options.data, options.steps),
        "per_device_train_batch_size": options.batch,
        "cutoff_len": options.cutoff,
    }
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        grid = ours(run, home / "grid", options)
        asha = ours(run, home / "asha", options, scheduler=asha_settings(options.steps))
        pairs = list(product(RANKS, RATES))
        theirs = [
            peer(
                {**run, **evaluating(options), "lora_rank": rank, "learning_rate": rate},
                home / f"peer-{number}",
                options.threads,
                options.peer_python,
            )
            for number, (rank, rate) in enumerate(pairs[: options.peer_runs])
        ]
    compare(grid, asha, theirs, options).publish(options.json)


def evaluating(options: argparse.Namespace) -> dict[str, Any]:
    """What trials are compared by; the peer's user needs it as well."""
    return {
        "val_size": options.val_size,
        "eval_strategy": "steps",
        "eval_steps": max(1, options.steps // 5),
        "per_device_eval_batch_size": 4,
    }


def asha_settings(steps: int) -> dict[str, Any]:
    """A first halving after a fifth of the steps."""
    return {"asha": {"grace_period": max(1, steps // 5), "reduction_factor": 4}}


def ours(
    run: dict[str, Any],
    home: Path,
    options: argparse.Namespace,
    *,
    scheduler: Any = "none",
) -> Swept:
    """One sweep in processes of its own, with a cluster of its own."""
    home.mkdir(parents=True)
    keys = {
        **run,
        "fp32": True,
        "disable_gradient_checkpointing": True,
        **evaluating(options),
        "output_dir": str(home / "out"),
        "ray_storage_path": str(home / "saves"),
        "resources_per_worker": {"CPU": options.threads / options.at_once},
        "ray_init_kwargs": {"address": "local", "num_cpus": options.threads},
        "tune": {
            "search": {
                "lora_rank": {"grid": list(RANKS)},
                # from best to worst, so that what is stopped had something to be compared with
                "learning_rate": {"grid": sorted(RATES, reverse=True)},
            },
            "scheduler": scheduler,
            "max_concurrent": options.at_once,
        },
    }
    file = home / "run.yaml"
    file.write_text(yaml.safe_dump(keys))
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environ |= {"LLMRAY_CACHE": str(home / "cache")}
    began = time.perf_counter()
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmray", "tune", str(file)],
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        peak = Peak(process.pid)
        code = process.wait()
    wall = time.perf_counter() - began
    text = (home / "log.txt").read_text()
    if code:
        raise SystemExit(f"llmray tune ended with {code}:\n{text[-3000:]}")
    with (home / "out" / "results.csv").open() as table:
        rows = list(csv.DictReader(table))
    ready, share = re.search(r"ready after ([\d.]+) s .*\(([\d.]+) %\)", text).groups()  # type: ignore[union-attr]
    return Swept(
        wall=wall,
        peak_mib=peak.stop(),
        best=min(float(row["eval_loss"]) for row in rows if row["state"] == "finished"),
        steps=sum(int(row["steps"]) for row in rows),
        starting=float(ready),
        overhead=float(share) / 100,
        lines=[line for line in text.splitlines() if line.startswith(("data:", "base weights"))],
    )


class Peak:
    """Samples PSS of a process and all below it, in a thread."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._ends = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """The largest sum, in MiB."""
        self._ends.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        import psutil

        while not self._ends.wait(SAMPLE_S):
            try:
                root = psutil.Process(self._pid)
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self._most = max(self._most, sum(map(pss_mib, family)))


def pss_mib(process: Any) -> float:
    """The process's share of memory in MiB; 0 where it has gone."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^Pss:\s+(\d+)", text, re.M)
    return int(found.group(1)) / 1024 if found else 0.0


def compare(grid: Swept, asha: Swept, theirs: list[Any], options: argparse.Namespace) -> Report:
    """The table, and what is not as required."""
    count = len(RANKS) * len(RATES)
    seconds = sum(one.wall for one in theirs) / len(theirs) * count
    eight = count * max(one.peak_mib for one in theirs)
    columns = ["run", "seconds", "sooner", "peak MiB", "of eight peers", "steps", "best eval_loss"]
    title = f"{count} trials of {options.steps} steps of {options.batch} x {options.cutoff} tokens"
    report = Report(f"{title} at most, {options.threads} threads", columns)
    report.rows.append([PEER, f"{seconds:.0f}", "", f"{eight / count:.0f}", "", "", ""])
    for name, one in ((GRID, grid), (ASHA, asha)):
        report.rows.append(
            [
                name,
                f"{one.wall:.0f}",
                f"{seconds / one.wall:.2f} times",
                f"{one.peak_mib:.0f}",
                f"{one.peak_mib / eight:.2f}",
                one.steps,
                f"{one.best:.5f}",
            ]
        )
    report.facts = [
        f"The peer's environment: {peer_versions(options.peer_python)}; {len(theirs)} of its "
        f"{count} runs were made, the others count as their mean.",
        f"{options.at_once} of our trials at a time; all evaluate {options.val_size} rows five "
        "times.",
        f"Workers were ready after {grid.starting:.1f} s; between trials {grid.overhead:.1%} of "
        f"the time in them (ASHA: {asha.starting:.1f} s, {asha.overhead:.1%}).",
        *grid.lines,
    ]
    report.details = {GRID: vars(grid), ASHA: vars(asha), PEER: [vars(one) for one in theirs]}
    limits = {
        f"{GRID} is {seconds / grid.wall:.2f} times sooner": seconds / grid.wall >= SOONER,
        f"{ASHA} is {seconds / asha.wall:.2f} times sooner": seconds / asha.wall >= SOONER_ASHA,
        f"peak memory is {grid.peak_mib / eight:.2f} of eight peers'": grid.peak_mib
        <= MEMORY * eight,
        f"ASHA's best is {asha.best:.5f}": asha.best <= grid.best * (1 + APART),
        f"between trials {grid.overhead:.1%}": grid.overhead <= OVERHEAD,
        f"workers start in {grid.starting:.1f} s": grid.starting <= START_S,
    }
    report.failures = [text for text, holds in limits.items() if not holds]
    return report


def parse() -> argparse.Namespace:
    """The command line; paths may come from the environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("peer-python", "model", "data"):
        variable = "LLMRAY_BENCH_" + flag.upper().replace("-", "_")
        default = os.environ.get(variable)
        parser.add_argument(
            f"--{flag}", default=default, required=default is None, help=f"or {variable}"
        )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cutoff", type=int, default=256)
    parser.add_argument("--val-size", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=2, help="trials at a time")
    parser.add_argument("--peer-runs", type=int, default=8, help="of its eight; 2 save time")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
