"""What Ray Train costs: one worker beside no Ray, two workers beside torchrun's two ranks.

    python benchmarks/ray_overhead.py --model SMOLLM2 --data DATA

All runs have the same global batch and one thread a process. Compared are the rates of the same
updates, leaving out the first ones: a local cluster is busy with itself for some seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from report import Report
from sft_vs_peer import run_file
from trainings import Measured, ours

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
WARM_UP = 3

NO_RAY, ONE_WORKER = "no Ray", "Ray, 1 worker"
TWO_RANKS, TWO_WORKERS = "torchrun, 2 ranks", "Ray, 2 workers"


def main() -> None:
    """Measure the four runs in turn, publish the ratios of each pair."""
    options = parse(__doc__)
    run = run_file(options.model, options.data, options.steps)
    run |= {"disable_gradient_checkpointing": True, "fp32": True}
    names = (NO_RAY, ONE_WORKER, TWO_RANKS, TWO_WORKERS)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(options.pairs):
            for name, runs in measured.items():
                home = Path(scratch, f"{pair}-{name.replace(', ', '-').replace(' ', '-')}")
                runs.append(train(name, run, home))
    report = Report(
        f"Ray Train beside no Ray and torchrun, {options.steps} steps, one thread a process",
        ["run", "real tokens/s", "of the run above it"],
    )
    add_rows(report, measured)
    report.publish(options.json)


def train(name: str, run: dict[str, Any], home: Path) -> Measured:
    """One of the four runs; the batch of 4 is dealt to one or two processes."""
    if name in (NO_RAY, ONE_WORKER):
        placed = {**run, "per_device_train_batch_size": 4}
    else:
        placed = {**run, "per_device_train_batch_size": 2}
    if name in (NO_RAY, TWO_RANKS):
        return ours(placed, home, 1, TORCHRUN if name == TWO_RANKS else ())
    workers = 1 if name == ONE_WORKER else 2
    ray = {
        "use_ray": True,
        "ray_num_workers": workers,
        "resources_per_worker": {"CPU": 1},
        "ray_storage_path": str(home / "ray"),
    }
    return ours({**placed, **ray}, home, 1)


def add_rows(report: Report, measured: dict[str, list[Measured]]) -> None:
    """A row a run; a pair's ratio is the median over its updates, a row's that over its pairs."""
    for name, base in (
        (NO_RAY, None),
        (ONE_WORKER, NO_RAY),
        (TWO_RANKS, None),
        (TWO_WORKERS, TWO_RANKS),
    ):
        runs = measured[name]
        rate = statistics.median(one.rate for one in runs)
        ratio = ""
        if base is not None:
            pairs = zip(runs, measured[base], strict=True)
            ratio = f"{statistics.median(ratio_of_steps(a, b) for a, b in pairs):.3f}"
        report.rows.append([name, f"{rate:.0f}", ratio])
        report.details[name] = [vars(one) for one in runs]
        losses = [one.losses for one in runs]
        apart = max(
            abs(a - b)
            for mine in losses
            for a, b in zip(mine, measured[NO_RAY][0].losses, strict=True)
        )
        report.facts.append(f"{name}: losses differ from those without Ray by at most {apart:.1e}.")


def ratio_of_steps(one: Measured, base: Measured) -> float:
    """Median over updates of how much faster `one` was than `base`; 1.0 is level."""
    pairs = zip(one.step_rates[WARM_UP:], base.step_rates[WARM_UP:], strict=True)
    return statistics.median(a / b for a, b in pairs)


def parse(doc: str | None) -> argparse.Namespace:
    """The command line; paths may come from the environment."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("model", "data"):
        variable = f"LLMRAY_BENCH_{flag.upper()}"
        default = os.environ.get(variable)
        parser.add_argument(
            f"--{flag}", default=default, required=default is None, help=f"or {variable}"
        )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
