"""Observers: they see what the loop does and return nothing. Console, JSON lines, plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

from llmray import store

Record = dict[str, Any]

LOG_NAME = "trainer_log.jsonl"


class Observer:
    """Empty hooks; rank 0 calls them in the order of the run."""

    def on_start(self, step: int, total_steps: int) -> None:
        """Training begins or goes on after update number `step`."""

    def on_log(self, record: Record) -> None:
        """One logged step or evaluation; the keys are those of trainer_log.jsonl."""

    def on_save(self, step: int, path: str) -> None:
        """A checkpoint was committed at `path`."""

    def on_end(self, metrics: Record) -> None:
        """The run has ended, early or not; `metrics` is what all_results.json holds."""


class JsonLines(Observer):
    """trainer_log.jsonl: one JSON object a logged step; a resumed run drops what it repeats."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG_NAME

    def on_start(self, step: int, total_steps: int) -> None:
        """Keep the lines up to `step`; those of steps that will be repeated go."""
        kept = [record for record in read_log(self.path) if record["current_steps"] <= step]
        store.write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def on_log(self, record: Record) -> None:
        """Append the line and flush it."""
        with store.explained(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[Record]:
    """The records of a trainer_log.jsonl; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Console(Observer):
    """One progress line for the run: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()

    def on_log(self, record: Record) -> None:
        """Show step, loss, rate, tokens per second and the time that is left."""
        text = describe(record)
        if self.is_terminal:
            share = record["current_steps"] / record["total_steps"]
            bar = "#" * round(20 * share)
            self.stream.write(f"\r\x1b[K[{bar:20}] {text}")
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def on_end(self, metrics: Record) -> None:
        """Leave the bar's line."""
        if self.is_terminal:
            self.stream.write("\n")
            self.stream.flush()


def describe(record: Record) -> str:
    """A record as one line of text."""
    parts = [f"step {record['current_steps']}/{record['total_steps']}"]
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
        parts.append(f"lr {record['lr']:.3g}")
        parts.append(f"{record['tokens_per_second']:.0f} tokens/s")
    parts += [f"{key} {record[key]:.4f}" for key in record if key.endswith("_loss")]
    parts.append(f"ETA {record['remaining_time']}")
    return ", ".join(parts)


class LossPlot(Observer):
    """training_loss.png, drawn once at the end from trainer_log.jsonl."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_end(self, metrics: Record) -> None:
        """Draw training_<key>.png for the loss, and for the evaluation loss where there is one."""
        records = read_log(self.directory / LOG_NAME)
        for key in ("loss", "eval_loss"):
            points = [(r["current_steps"], r[key]) for r in records if key in r]
            if points:
                draw_curve(points, key, self.directory / f"training_{key}.png")


def draw_curve(points: list[tuple[int, float]], key: str, path: Path) -> None:
    """Write a picture of (step, value) points: the values and their exponential smoothing."""
    from matplotlib.figure import Figure

    steps, values = zip(*points, strict=True)
    weight = 1 - 1 / max(2.0, len(values) / 20)  # follows a short curve, calms a long one
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="#9ec5e8", linewidth=1.2, label=key, marker=".", markersize=3)
    axes.plot(steps, smooth(list(values), weight), color="#1f5fa8", linewidth=2, label="smoothed")
    axes.set_xlabel("step")
    axes.set_ylabel(key)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average that begins at the first value; larger weights smooth more."""
    smoothed, last = [], values[0]
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    return smoothed
