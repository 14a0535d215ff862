"""How much each searched key decides: the share of the metric's variance that it explains alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_BINS = 4  # of numbers that were drawn
PER_BIN = 3  # trials that a bin has at least


def importance(
    keys: Sequence[str], values: Sequence[Mapping[str, Any]], metrics: Sequence[float]
) -> dict[str, float]:
    """Between 0 and 1 for each key: eta squared, less what chance would explain.

    Trials are grouped by the key's value, or by quantiles where a number hardly repeats; the share
    of the variance that lies between groups is adjusted as the R squared of a regression is, with
    the groups as its terms. Effects of two keys together are nobody's share.

    Args:
        keys: the searched keys.
        values: of each trial; a key that did not count there is missing.
        metrics: of each trial.
    """
    found = np.asarray(metrics, dtype=float)
    total = float(((found - found.mean()) ** 2).sum()) if len(found) else 0.0
    if len(found) < 3 or total == 0:
        return dict.fromkeys(keys, 0.0)
    return {key: _explained(_groups([v.get(key) for v in values]), found, total) for key in keys}


def _explained(groups: Sequence[int], metrics: np.ndarray, total: float) -> float:
    labels = np.asarray(groups)
    names, count = np.unique(labels), len(metrics)
    if len(names) < 2 or len(names) >= count:
        return 0.0
    within = sum(
        float(((part - part.mean()) ** 2).sum())
        for part in (metrics[labels == name] for name in names)
    )
    adjusted = 1 - (within / (count - len(names))) / (total / (count - 1))
    return max(0.0, adjusted)


def _groups(column: Sequence[Any]) -> list[int]:
    """A number for the group of each trial."""
    numbers = [value for value in column if _is_number(value)]
    different = sorted({json.dumps(value, sort_keys=True, default=str) for value in column})
    if len(numbers) < len(column) or 2 * len(different) <= len(column):
        return [different.index(json.dumps(v, sort_keys=True, default=str)) for v in column]
    bins = max(2, min(MAX_BINS, len(column) // PER_BIN))
    edges = np.quantile(np.asarray(numbers, dtype=float), np.linspace(0, 1, bins + 1)[1:-1])
    return [int(np.searchsorted(edges, value, side="right")) for value in numbers]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
