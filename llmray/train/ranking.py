"""The rewards of pairs of evaluation tables, dealt over the ranks, and how right they are.

A reward model says that the chosen response is preferred with probability sigmoid(margin), the
model of https://doi.org/10.2307/2334029 that its loss is the likelihood of. `draw` compares this
with what is observed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmray.data.batches import Batches
from llmray.errors import RewardError
from llmray.train import plots
from llmray.train.engine import Engine
from llmray.train.reading import Ahead, Reader, Rows

PICTURE = "calibration.png"
MOST_BINS = 10
LEAST_IN_BIN = 20  # pairs, of which a share is told


@dataclass(frozen=True)
class Pair:
    """The rewards of the two responses of a row."""

    chosen: float
    rejected: float

    @property
    def margin(self) -> float:
        """How far the chosen response is ahead."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Bin:
    """Pairs of like margins: the mean probability that is predicted, and the share that is seen."""

    predicted: float
    observed: float
    count: int


def rank(engine: Engine, name: str, rows: Rows, per_device: int, ahead: Ahead) -> list[Pair]:
    """The rewards of the pairs of a table in its order; a collective call, alike on all ranks.

    Args:
        engine: of a model that scores.
        name: of the table, said where a reward is no number.
        rows: of the table.
        per_device: rows of one forward pass of one rank.
        ahead: how reading runs ahead.

    Raises:
        RewardError: a reward is not finite; the row is named.
    """
    world = engine.world
    lengths = rows.table.lengths
    plan = Batches(lengths, per_device, 1, world.world_size, world.rank, seed=0, order="sequential")
    reader = Reader(rows, plan, ahead, plan.steps_per_epoch)
    mine: dict[int, tuple[float, float]] = {}
    for step in range(plan.steps_per_epoch):
        for batch in reader.step(step):
            scores = engine.logprobs(batch).scores
            assert scores is not None, "the model scores"
            both = zip(scores[0::2].tolist(), scores[1::2].tolist(), strict=True)
            mine |= dict(zip(batch.rows, both, strict=True))
    reader.close()
    found = {row: both for part in world.gather(mine) for row, both in part.items()}
    wrong = next((row for row in sorted(found) if not all(map(math.isfinite, found[row]))), None)
    if wrong is not None:
        raise RewardError(
            f"the rewards of row {wrong} (counted from 0) of {name} are {found[wrong]}. Finite "
            "numbers are required: write fp32: true, or take an earlier checkpoint."
        )
    return [Pair(*found[row]) for row in range(len(found))]


def as_lines(pairs: Sequence[Pair]) -> str:
    """The text of generated_predictions.jsonl: an object a pair, with both rewards."""
    return "".join(
        json.dumps({"chosen": pair.chosen, "rejected": pair.rejected}) + "\n" for pair in pairs
    )


def bins(margins: Sequence[float]) -> list[Bin]:
    """Pairs in bins of equal number by how sure the model is, the least sure first.

    Of a pair it predicts that the response with the higher reward is preferred, with probability
    sigmoid(|margin|); observed is the share of pairs where it is. Ties count half.
    """
    values = np.array(margins, np.float64)
    order = np.argsort(np.abs(values), kind="stable")
    number = max(1, min(MOST_BINS, len(values) // LEAST_IN_BIN))
    found = []
    for part in np.array_split(values[order], number):
        if len(part):
            predicted = 1 / (1 + np.exp(-np.abs(part)))
            observed = (part > 0) + 0.5 * (part == 0)
            found.append(Bin(float(predicted.mean()), float(observed.mean()), len(part)))
    return found


def calibration_error(found: Sequence[Bin]) -> float:
    """The mean distance between prediction and observation, weighted by pairs."""
    total = sum(one.count for one in found)
    return sum(one.count * abs(one.predicted - one.observed) for one in found) / max(1, total)


def draw(pairs: Sequence[Pair], path: Path) -> None:
    """Write a picture of the predicted probability of a preference against the observed share.

    Bars say within which limits a share lies that is truly the predicted one, 95 times of 100.
    """
    found = bins([pair.margin for pair in pairs])
    figure, axes = plots.figure("predicted probability", "observed share")
    predicted = [one.predicted for one in found]
    observed = [one.observed for one in found]
    spread = [
        1.96 * math.sqrt(p * (1 - p) / b.count) for p, b in zip(predicted, found, strict=True)
    ]
    axes.plot([0.5, 1], [0.5, 1], color="#777777", linestyle="--", label="calibrated")
    axes.errorbar(
        predicted,
        predicted,
        yerr=spread,
        fmt="none",
        ecolor=plots.RAW,
        capsize=3,
        label="by chance",
    )
    axes.plot(predicted, observed, color=plots.SMOOTHED, marker="o", label="this model")
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(
        f"{len(pairs)} pairs, in bins of {max((one.count for one in found), default=0)}; mean "
        f"distance {calibration_error(found):.3f}"
    )
    axes.legend(loc="lower right")
    plots.save(figure, path)
