"""Training speed on rows of skewed length: packed into bins, in padded batches, in flat batches.

    python benchmarks/packing_training.py

A small random Llama learns the same rows in all three ways, in turns; a micro-batch holds one bin,
or as many rows as a bin holds on average. Counted are target tokens a second, of which all three
learn the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from report import Report
from transformers import LlamaConfig, LlamaForCausalLM

from llmray.arguments.optimizer import OptimizerArguments
from llmray.data import shards
from llmray.data.batches import Batches
from llmray.data.features import RowFeatures
from llmray.data.packing import PackedTable, pack
from llmray.data.shards import SampleTable
from llmray.model.head import TokenModel
from llmray.train import optimizers, schedules
from llmray.train.engine import Engine
from llmray.train.losses import LanguageModeling
from llmray.train.parallel import World
from llmray.train.precision import PRECISIONS
from llmray.train.reading import Ahead, Reader, Rows
from llmray.train.supervised import SupervisedStep

VOCABULARY = 4096
LEAST_GAIN = 2.0  # over padded batches
LEAST_OF_FLAT = 0.97  # not slower than flat batches, within what rounds differ by


@dataclass(frozen=True)
class Way:
    """A way to train: its rows, and how many of them a micro-batch holds."""

    table: SampleTable | PackedTable
    flat: bool
    per_device: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=144)
    parser.add_argument("--cutoff-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        table = rows_of(options.rows, options.cutoff_len, Path(directory) / "rows.arrow")
        compare(options, table).publish(options.json)


def compare(options: argparse.Namespace, table: SampleTable) -> Report:
    """Medians of all ways over rounds that alternate."""
    packing = pack(table.lengths, options.cutoff_len)
    bins = PackedTable(table, packing)
    per_device = max(1, round(len(table) / len(bins)))
    ways = {
        "packed": Way(bins, True, 1),
        "flat": Way(table, True, per_device),
        "padded": Way(table, False, per_device),
    }
    engines = {name: engine(way.flat) for name, way in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():  # warms up, and shows that all learn the same
        epoch(engines[name], way, steps=1)
    for _ in range(options.rounds):
        for name, way in ways.items():
            found[name].append(epoch(engines[name], way))
    middle = {name: statistics.median(values) for name, values in found.items()}
    parameters = sum(p.numel() for p in engines["flat"].model.parameters())
    report = Report(
        f"{len(table)} rows of {table.lengths.min()} to {table.lengths.max()} tokens, median "
        f"{int(np.median(table.lengths))}, mean {table.lengths.mean():.0f}; a Llama of "
        f"{parameters / 1e6:.1f} M parameters, fp32, {options.threads} threads",
        ["rows are", "in a micro-batch", "target tokens/s", "rounds", "computed cells"],
    )
    for name, way in ways.items():
        held = "1 bin" if isinstance(way.table, PackedTable) else f"{way.per_device} rows"
        rounds = ", ".join(f"{value:.0f}" for value in found[name])
        report.rows.append([name, held, f"{middle[name]:.0f}", rounds, cells(way)])
    report.facts.append(
        f"Bins of {options.cutoff_len} tokens: {len(bins)}, "
        f"{packing.efficiency(table.lengths):.1%} full."
    )
    gain, of_flat = middle["packed"] / middle["padded"], middle["packed"] / middle["flat"]
    report.facts.append(f"Packed: {gain:.2f} times padded, {of_flat:.2f} times flat.")
    report.details["target_tokens_per_second"] = found
    if gain < LEAST_GAIN:
        report.failures.append(f"packed is {gain:.2f} times padded, below {LEAST_GAIN}")
    if of_flat < LEAST_OF_FLAT:
        report.failures.append(f"packed is {of_flat:.2f} times flat, below {LEAST_OF_FLAT}")
    return report


def rows_of(count: int, cutoff_len: int, path: Path) -> SampleTable:
    """Random rows of log-normal length, whose second halves are learned."""
    draw = np.random.default_rng(0)
    rows = []
    for length in np.clip(draw.lognormal(np.log(80), 1.0, count), 8, cutoff_len).astype(int):
        ids = draw.integers(0, VOCABULARY, length).astype(np.int32)
        rows.append(RowFeatures(ids, (int(length) // 2, int(length)), False))
    shards.write(path, rows)
    return SampleTable([str(path)])


def engine(is_flat: bool) -> Engine:
    """A model that trains with AdamW; the same weights for every way."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = TokenModel(LlamaForCausalLM(config), flat=is_flat)
    trainable = dict(model.named_parameters())
    options = OptimizerArguments(learning_rate=1e-4)
    return Engine(
        model,
        trainable,
        optimizers.build(model, trainable, options),
        schedules.schedule(options, 1000),
        world=World.single(torch.device("cpu")),
        precision=PRECISIONS["fp32"],
        max_grad_norm=1.0,
    )


def plan(way: Way) -> Batches:
    """Steps of one micro-batch."""
    return Batches(way.table.lengths, way.per_device, 1, 1, 0, seed=0, order="random")


def epoch(trained: Engine, way: Way, steps: int | None = None) -> float:
    """Train an epoch, or some steps of it; returns target tokens a second."""
    batches = plan(way)
    rows = Rows(way.table, flat=way.flat, pad_id=0)
    step = SupervisedStep(trained, Reader(rows, batches, Ahead()), LanguageModeling())
    started = time.perf_counter()
    for number in range(steps or batches.steps_per_epoch):
        step(number)
    return float(way.table.target_counts.sum()) / (time.perf_counter() - started)


def cells(way: Way) -> int:
    """Positions that an epoch computes, padding counted."""
    return sum(batch.input_ids.numel() for batch in micro_batches(way))


def micro_batches(way: Way) -> Iterator:
    """All batches of an epoch."""
    batches, rows = plan(way), Rows(way.table, flat=way.flat, pad_id=0)
    for number in range(batches.steps_per_epoch):
        for indices in batches.step(0, number):
            yield from rows.batches(indices)


if __name__ == "__main__":
    main()
