"""All schedules in one picture, beside transformers' values, and how far they are apart.

    python benchmarks/schedules.py --picture schedules.png

Compares the rates of llmray's schedules with those of transformers (of torch for `step`) at every
update of a run of 200; exits with 1 where a factor differs by more than 1e-7.
"""

from __future__ import annotations

import argparse
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from report import Report
from torch import nn

from llmray.arguments.optimizer import OptimizerArguments
from llmray.arguments.settings import SCHEDULE_SETTINGS
from llmray.train.schedules import schedule

TOTAL, WARMUP, HIGHEST, LIMIT = 200, 20, 1e-3, 1e-7
EVERY = 10  # updates between two evaluations
SETTINGS: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.2},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.4},
    "warmup_stable_decay": {"num_decay_steps": 80, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
    "step": {"step_size": 40, "gamma": 0.5},
}


def loss_after(update: int) -> float:
    """A loss that falls for half of the run."""
    return max(1.0, 3.0 - update / 50)


def ours(name: str, warmup: int) -> list[float]:
    """The rate of each update."""
    made = schedule(
        OptimizerArguments(
            lr_scheduler_type=name,
            lr_scheduler_kwargs=SETTINGS.get(name),
            learning_rate=HIGHEST,
            warmup_steps=warmup,
        ),
        TOTAL,
    )
    rates = []
    for update in range(TOTAL):
        rates.append(HIGHEST * made(update))
        if (update + 1) % EVERY == 0:
            made.observe(loss_after(update + 1), greater_is_better=False)
    return rates


def theirs(name: str, warmup: int) -> list[float]:
    """The rate of each update by transformers, or by torch where it has no such schedule."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=HIGHEST)
    if name == "step":
        made: Any = torch.optim.lr_scheduler.StepLR(optimizer, **SETTINGS[name])
    else:
        made = get_scheduler(name, optimizer, warmup, TOTAL, SETTINGS.get(name))
    rates = []
    for update in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if name != "reduce_lr_on_plateau":
            made.step()
        elif (update + 1) % EVERY == 0:
            made.step(loss_after(update + 1))
    return rates


def draw(curves: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """One small plot a schedule: transformers' values as a broad line, ours as dots on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.5), layout="constrained")
    for axes, (name, (own, other)) in zip(
        figure.subplots(3, 4, sharex=True, sharey=True).flat, curves.items(), strict=True
    ):
        axes.plot(other, color="#f2b880", linewidth=6, label="torch" if name == "step" else "HF")
        axes.plot(own, color="#1f5fa8", linewidth=1.4, label="llmray")
        pairs = [f"{key}={value}" for key, value in SETTINGS.get(name, {}).items()]
        said = textwrap.fill(", ".join(pairs), 44)
        axes.set_title(f"{name}\n{said}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left")
    figure.supxlabel("update")
    figure.supylabel("learning rate")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare, draw, and fail where they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("schedules.png"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.optim.lr_scheduler")
    report = Report("Schedules beside transformers", ["schedule", "largest difference of a factor"])
    curves = {}
    for name in SCHEDULE_SETTINGS:
        warmup = 0 if name == "step" else WARMUP
        curves[name] = ours(name, warmup), theirs(name, warmup)
        apart = max(abs(a - b) for a, b in zip(*curves[name], strict=True)) / HIGHEST
        report.rows.append([name, f"{apart:.1e}"])
        if apart > LIMIT:
            report.failures.append(f"{name} is {apart:.1e} away, {LIMIT} is allowed")
    draw(curves, options.picture)
    report.facts.append(f"all curves are in {options.picture}")
    report.publish(options.json)


if __name__ == "__main__":
    main()
