"""Evaluation by loss: the mean over all units of an evaluation table, dealt over the ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping

from llmray.data.batches import Batches
from llmray.train.engine import Engine
from llmray.train.losses import Objective
from llmray.train.supervised import Rows


def evaluate(
    engine: Engine, tables: Mapping[str, Rows], objective: Objective, per_device: int
) -> dict[str, float]:
    """Loss, rows and rows per second for each table; a collective call.

    Args:
        tables: name of an evaluation set, which becomes the metrics' prefix, to its rows.
        per_device: rows of one forward pass of one rank.
    """
    metrics: dict[str, float] = {}
    for name, rows in tables.items():
        started = time.perf_counter()
        loss, count = _sums(engine, rows, objective, per_device)
        seconds = time.perf_counter() - started
        num_rows = len(rows.table)
        metrics |= {
            f"{name}_loss": loss / max(1.0, count),
            f"{name}_runtime": round(seconds, 4),
            f"{name}_samples_per_second": round(num_rows / seconds, 3),
        }
    return metrics


def _sums(engine: Engine, rows: Rows, objective: Objective, per_device: int) -> tuple[float, float]:
    world = engine.world
    batches = Batches(
        rows.table.lengths, per_device, 1, world.world_size, world.rank, seed=0, shuffle=False
    )
    loss = count = 0.0
    for step in range(batches.steps_per_epoch):
        for indices in batches.step(0, step):
            batch = rows.batch(indices).to(world.device)
            output = engine.logprobs(batch)
            loss += objective(output, batch).loss.item()
            count += objective.count(batch)
    total_loss, total_count = world.sum([loss, count])
    return total_loss, total_count
