"""Observers: they see what the loop does and return nothing. Console and JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

from llmray import store
from llmray.arguments.training import TrainingArguments
from llmray.train.sketch import sketch

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
        kept = [r for r in read_log(self.path) if step and r["current_steps"] <= step]
        store.write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def on_log(self, record: Record) -> None:
        """Append the line and flush it."""
        with store.explained(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[Record]:
    """The records of a trainer_log.jsonl; a last line that a kill cut short is left out."""
    return records_of(path.read_text()) if path.is_file() else []


def records_of(text: str) -> list[Record]:
    """The records in the text of a trainer_log.jsonl, as `read_log`."""
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Console(Observer):
    """One progress line for the run: a bar on a terminal, plain lines elsewhere.

    Args:
        stream: standard error where none is given.
        draws_bar: what to do whatever the stream is; None: as it is a terminal or not.
    """

    def __init__(self, stream: IO[str] | None = None, *, draws_bar: bool | None = None) -> None:
        self.stream = stream or sys.stderr
        self.draws_bar = self.stream.isatty() if draws_bar is None else draws_bar
        self._losses: dict[int, float] = {}

    @classmethod
    def of(cls, arguments: TrainingArguments) -> Console:
        """The console that disable_tqdm asks for."""
        disabled = arguments.disable_tqdm
        return cls(draws_bar=None if disabled is None else not disabled)

    def on_start(self, step: int, total_steps: int) -> None:
        """Forget the losses of steps that will be repeated."""
        self._losses = {at: loss for at, loss in self._losses.items() if at <= step}

    def on_log(self, record: Record) -> None:
        """Show step, loss, rate, tokens per second and the time that is left."""
        if "loss" in record:
            self._losses[record["current_steps"]] = record["loss"]
        text = describe(record)
        if self.draws_bar:
            share = record["current_steps"] / record["total_steps"]
            bar = "#" * round(20 * share)
            self.stream.write(f"\r\x1b[K[{bar:20}] {text}")
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def on_end(self, metrics: Record) -> None:
        """Leave the bar's line, and draw the loss of this process's part of the run."""
        if self.draws_bar:
            self.stream.write("\n")
        drawn = sketch(sorted(self._losses.items()), "loss")
        if drawn:
            self.stream.write(drawn + "\n")
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
