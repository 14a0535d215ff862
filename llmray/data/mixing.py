"""The order in which rows of several sets become one table: numbers of rows, in numpy, no rows.

Everything here follows from sizes and the seed alone, so it is the same in every process. The
strategies are those of Hugging Face's `datasets.interleave_datasets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from llmray.errors import DataError

Strategy = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]

DRAWS = 1 << 16  # of a set for each row, made at a time
MOST_ROWS = 1 << 31


def table_order(
    sizes: Sequence[int],
    num_samples: Sequence[int | None],
    max_samples: int | None,
    strategy: Strategy,
    probabilities: Sequence[float],
    seed: int,
) -> np.ndarray | None:
    """The rows of a table, in its order: (num_rows,) int64 numbers of rows of all sets together.

    Args:
        sizes: rows of each set.
        num_samples: how many rows to draw from each set; None: all, as they come.
        max_samples: how many rows of each set, of those drawn, are taken at most.
        strategy: how the sets become one.
        probabilities: of drawing from each set; without any, sets take turns.
        seed: of all draws.

    Returns: None if all rows come as they stand, set after set.

    Raises:
        DataError: the table would have more rows than can be.
    """
    plain = all(number is None for number in num_samples)
    if plain and (strategy == "concat" or len(sizes) < 2):
        return None
    starts = np.cumsum([0, *sizes])
    parts = [
        start + drawn(size, number, seed + place)[:max_samples]
        for place, (start, size, number) in enumerate(
            zip(starts[:-1], sizes, num_samples, strict=True)
        )
    ]
    rows = np.concatenate(parts)
    if strategy == "concat" or len(sizes) < 2:
        return rows
    return rows[interleaved([len(part) for part in parts], strategy, probabilities, seed)]


def drawn(num_rows: int, num_samples: int | None, seed: int) -> np.ndarray:
    """Numbers of rows drawn from a set: (num_samples,) int64; all, as they come, for None.

    Every row is drawn once before any is drawn again.
    """
    if num_samples is None or not num_rows:
        return np.arange(num_rows, dtype=np.int64)
    generator = np.random.default_rng(seed)
    rounds = -(-num_samples // num_rows)
    return np.concatenate([generator.permutation(num_rows) for _ in range(rounds)])[:num_samples]


def interleaved(
    sizes: Sequence[int], strategy: Strategy, probabilities: Sequence[float], seed: int
) -> np.ndarray:
    """Rows of sets in turns: (num_rows,) int64 numbers of rows of all sets together.

    `interleave_under` ends when a set is used up, `interleave_over` when all are (a set that is
    used up begins again), `interleave_once` takes every row once.

    Args:
        sizes: rows of each set.
        strategy: not concat.
        probabilities: of drawing from each set; without any, sets take turns.
        seed: of the draws.

    Raises:
        DataError: the table would have more rows than can be.
    """
    if probabilities:
        sets = _draw_sets(np.array(sizes), strategy, np.array(probabilities, np.float64), seed)
    else:
        sets = _take_turns(sizes, strategy)
    starts = np.cumsum([0, *sizes])
    rows = np.empty(len(sets), np.int64)
    for number, size in enumerate(sizes):
        places = np.flatnonzero(sets == number)
        rows[places] = starts[number] + np.arange(len(places)) % max(size, 1)
    return rows


def _take_turns(sizes: Sequence[int], strategy: Strategy) -> np.ndarray:
    """The set of each row, where sets take turns: (num_rows,) int16."""
    rounds = min(sizes) if strategy == "interleave_under" else max(sizes)
    _require_possible(rounds * len(sizes))
    sets = np.tile(np.arange(len(sizes), dtype=np.int16), rounds)
    if strategy != "interleave_once":
        return sets
    turn = np.repeat(np.arange(rounds), len(sizes))
    return sets[turn < np.array(sizes)[sets]]


def _draw_sets(
    sizes: np.ndarray, strategy: Strategy, probabilities: np.ndarray, seed: int
) -> np.ndarray:
    """The set of each row, where sets are drawn: (num_rows,) int16."""
    generator = np.random.default_rng(seed)
    left = np.where(probabilities > 0, sizes, 0)  # a set that is never drawn is not waited for
    drawable = left > 0
    if strategy == "interleave_over":
        _require_possible(float((left[drawable] / probabilities[drawable]).max()))
    found: list[np.ndarray] = []
    while True:
        weights = probabilities
        if strategy == "interleave_once":
            weights = np.where(left > 0, probabilities, 0)
        sets = generator.choice(len(sizes), DRAWS, p=weights / weights.sum()).astype(np.int16)
        ends = _used_up_at(sets, left)  # in this block; beyond it if not
        last = int(ends[drawable].min() if strategy == "interleave_under" else ends.max())
        if strategy == "interleave_once":
            block = sets[: last + 1]
            found.append(block[np.arange(len(block)) <= ends[block]])
        else:
            found.append(sets[: last + 1])
        if last < DRAWS:
            return np.concatenate(found)
        left = np.maximum(left - np.bincount(sets, minlength=len(sizes)), 0)


def _used_up_at(sets: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The draw that takes the last row that is left of each set; -1 for none, DRAWS for later."""
    ends = np.full(len(left), -1, np.int64)
    for number, rows in enumerate(left.tolist()):
        if rows:
            places = np.flatnonzero(sets == number)
            ends[number] = places[rows - 1] if len(places) >= rows else len(sets)
    return ends


def _require_possible(num_rows: float) -> None:
    if num_rows > MOST_ROWS:
        raise DataError(
            f"mix_strategy and interleave_probs make a table of about {num_rows:.3g} rows. "
            f"Required: at most {MOST_ROWS}. Take mix_strategy: interleave_under, or "
            "interleave_once, or raise the smallest probability."
        )
