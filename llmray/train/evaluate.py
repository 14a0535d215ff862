"""Evaluation by loss: the mean over all units of an evaluation table, dealt over the ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import add

from llmray.batch import Batch
from llmray.data.batches import Batches
from llmray.train.engine import Engine
from llmray.train.losses import StageObjective
from llmray.train.reading import Ahead, Reader, Rows

ALONE = Ahead()


def evaluate(
    engine: Engine,
    tables: Mapping[str, Rows],
    objective: StageObjective,
    per_device: int,
    *,
    whole: str = "eval",
    accuracy: bool = False,
    ahead: Ahead = ALONE,
) -> dict[str, float]:
    """Loss, rows and rows per second for each table; a collective call, alike on all ranks.

    Where sets are evaluated one by one, `eval_loss` is the mean over the units of all of them.

    Args:
        tables: name of an evaluation set, which becomes the metrics' prefix, to its rows.
        per_device: rows of one forward pass of one rank.
        whole: prefix of the metrics of all tables together, where none of them has it.
        accuracy: also the share of targets that were the likeliest token.
        ahead: how reading runs ahead.
    """
    metrics: dict[str, float] = {}
    together = _Sums()
    for name, rows in tables.items():
        started = time.perf_counter()
        sums = _sums(engine, rows, objective, per_device, accuracy, ahead)
        seconds = time.perf_counter() - started
        metrics |= sums.metrics(name, objective)
        metrics |= {
            f"{name}_runtime": round(seconds, 4),
            f"{name}_samples_per_second": round(len(rows.table) / seconds, 3),
        }
        together = together + sums
    if whole not in tables:
        metrics |= together.metrics(whole, objective)
    # times differ from rank to rank, and what follows from metrics must not
    return engine.world.broadcast(metrics)


@dataclass(frozen=True)
class _Sums:
    """Sums over rows of all ranks; `right` and `targets` stay 0 where no accuracy is asked for.

    `others` are those of the objective's metrics, by name.
    """

    loss: float = 0.0
    count: float = 0.0
    right: float = 0.0
    targets: float = 0.0
    others: dict[str, float] = field(default_factory=dict)

    @property
    def plain(self) -> tuple[float, ...]:
        return (self.loss, self.count, self.right, self.targets)

    def __add__(self, other: _Sums) -> _Sums:
        names = dict.fromkeys([*self.others, *other.others])
        loss, count, right, targets = map(add, self.plain, other.plain)
        others = {name: self.others.get(name, 0.0) + other.others.get(name, 0.0) for name in names}
        return _Sums(loss, count, right, targets, others)

    def metrics(self, prefix: str, objective: StageObjective) -> dict[str, float]:
        count = max(1.0, self.count)
        found = {f"{prefix}_loss": self.loss / count}
        if self.targets:
            found[f"{prefix}_accuracy"] = self.right / self.targets
        means = {name: value / count for name, value in self.others.items()}
        return found | {f"{prefix}_{k}": v for k, v in objective.described(means).items()}


def _sums(
    engine: Engine,
    rows: Rows,
    objective: StageObjective,
    per_device: int,
    accuracy: bool,
    ahead: Ahead,
) -> _Sums:
    def batches() -> Iterator[Batch]:
        return _batches(engine, rows, per_device, ahead)

    # what is no sum over units is taken over the whole table, whatever the batches
    objective = engine.informed(objective, batches(), learns=False)
    mine = _Sums()
    for batch in batches():
        output = engine.logprobs(batch, top1=accuracy)
        part = objective(output, batch)
        right = 0.0 if output.is_top1 is None else output.is_top1.sum().item()
        targets = batch.targets.numel() if accuracy else 0
        parts = {name: value.item() for name, value in part.metrics.items()}
        units = objective.count(batch)
        mine = mine + _Sums(part.loss.item(), units, right, targets, parts)
    # every rank has a batch, be it an empty one: all have the same names
    loss, count, right_ones, num, *others = engine.world.sum([*mine.plain, *mine.others.values()])
    return _Sums(loss, count, right_ones, num, dict(zip(mine.others, others, strict=True)))


def _batches(engine: Engine, rows: Rows, per_device: int, ahead: Ahead) -> Iterator[Batch]:
    """The batches of this rank, with what the reference says of them."""
    world = engine.world
    plan = Batches(
        rows.table.lengths, per_device, 1, world.world_size, world.rank, seed=0, order="sequential"
    )
    reader = Reader(rows, plan, ahead, plan.steps_per_epoch)
    for step in range(plan.steps_per_epoch):
        for batch in reader.step(step):
            yield engine.referenced(batch.to(world.device))
    reader.close()
