"""Generated responses to the rows of evaluation tables, dealt over the ranks, and their scores.

Which rows are answered together does not depend on the number of ranks, nor do the draws: batches
are planned first and then dealt whole, and each is drawn with a seed of its own. So the responses
are those of one rank, and training's random numbers go on as if nothing had been drawn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch

from llmray.data import spoken
from llmray.data.shards import Sample, Table
from llmray.train.engine import Engine
from llmray.train.generate import Response, Sampling, ended
from llmray.train.similarity import similarity
from llmray.train.supervised import Rows

log = getLogger("llmray")

SAY_EVERY_S = 30.0


@dataclass(frozen=True)
class Prediction:
    """A row of generated_predictions.jsonl: what was asked, what came, what was to come.

    `label` is None where the data has no response.
    """

    prompt: str
    predict: str
    label: str | None


@dataclass(frozen=True)
class Predictor:
    """Answers the prompts of evaluation tables with the model under training.

    `stop` is asked by rank 0 between batches, and gives a reason to stop or None.
    """

    engine: Engine
    tokenizer: Any
    sampling: Sampling
    per_device: int
    seed: int
    skips_special: bool
    stop: Callable[[], str | None] = lambda: None

    def predict(self, rows: Rows) -> list[Prediction] | None:
        """The responses to all rows of a table in its order; None when stopped. A collective call.

        Rows are those of the features `prompt`: a prompt, then the one response as target; or of
        `opening`: a prompt alone, with what was said beside it.
        """
        table, world = rows.table, self.engine.world
        batches = plan(table, self.per_device)
        log.info("generating responses to %d rows", len(table))
        mine: dict[int, list[int]] = {}
        started = said = time.monotonic()
        for first in range(0, len(batches), world.world_size):
            if self._is_stopped():
                return None
            number = first + world.rank
            if number < len(batches):
                mine |= self._answer(table, batches[number], number)
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                log.info(
                    "generating: batch %d of %d, %.0f s",
                    min(first + world.world_size, len(batches)),
                    len(batches),
                    said - started,
                )
        answers = {row: ids for found in world.gather(mine) for row, ids in found.items()}
        return [self._prediction(table, row, answers[row]) for row in range(len(table))]

    def _is_stopped(self) -> bool:
        world = self.engine.world
        reason = self.stop() if world.is_main else None
        return world.sum([1.0 if reason else 0.0])[0] > 0

    def _answer(self, table: Table, batch: np.ndarray, number: int) -> dict[int, list[int]]:
        """The responses to the rows of batch `number`, by row."""
        prompts = [parts(table.samples(int(row))[0])[0] for row in batch]
        device = self.engine.world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + number)
            responses: list[Response] = self.engine.generate(prompts, self.sampling)
        return {int(row): found.ids for row, found in zip(batch, responses, strict=True)}

    def _prediction(self, table: Table, row: int, answer: list[int]) -> Prediction:
        [sample] = table.samples(row)
        prompt, label = parts(sample)
        return Prediction(
            prompt=self._text(prompt, skips_special=False),
            predict=self._text(answer, skips_special=self.skips_special),
            label=self._label(label) if sample.said is None else said_label(sample.said),
        )

    def _label(self, ids: list[int]) -> str:
        whole = ended(ids, self.sampling.stop_ids).ids
        return self._text(whole, skips_special=self.skips_special)

    def _text(self, ids: list[int], *, skips_special: bool) -> str:
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False
            )
        )


def parts(sample: Sample) -> tuple[list[int], list[int]]:
    """The prompt of a row and the response to compare with, as token ids."""
    ids = sample.input_ids.tolist()
    if sample.said is not None:  # it is a prompt
        return ids, []
    start = int(np.argmax(sample.target_mask))
    return ids[:start], ids[start:]


def said_label(said: str) -> str | None:
    """The response that the data has to a prompt."""
    label = spoken.read(said).label
    return None if label is None else label.content


def plan(table: Table, per_device: int) -> list[np.ndarray]:
    """Rows that are answered together, prompts of like length, the longest first."""
    prompt_lens = table.lengths - table.target_counts
    order = np.argsort(-prompt_lens, kind="stable")
    return [order[at : at + per_device] for at in range(0, len(order), per_device)]


@dataclass(frozen=True)
class Judged:
    """Responses to the rows of all tables in order, and the metrics of each table by its name."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def judge(
    predictor: Predictor, tables: Mapping[str, Rows], metrics: Mapping[str, float] | None = None
) -> Judged | None:
    """Answer the rows of tables and score the responses; None when stopped. A collective call.

    Args:
        predictor: answers.
        tables: name of a table, which becomes the metrics' prefix, to its rows.
        metrics: what is known of the tables already; their runtime is added to.
    """
    world = predictor.engine.world
    known = dict(metrics or {})
    everything: list[Prediction] = []
    for name, rows in tables.items():
        started = time.perf_counter()
        found = predictor.predict(rows)
        if found is None:
            return None
        seconds = time.perf_counter() - started + known.get(f"{name}_runtime", 0.0)
        scored: dict[str, float] = {}
        pairs = [(row.predict, row.label) for row in found if row.label is not None]
        if world.is_main and pairs:
            scored = similarity([said for said, _ in pairs], [label for _, label in pairs])
        known |= {f"{name}_{score}": value for score, value in world.broadcast(scored).items()}
        known |= {
            f"{name}_runtime": round(seconds, 4),
            f"{name}_samples_per_second": round(len(found) / max(seconds, 1e-9), 3),
        }
        everything += found
    return Judged(known, everything)


def as_lines(predictions: list[Prediction]) -> str:
    """The text of generated_predictions.jsonl."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in predictions)
