"""Reward functions that tests name: each is a share of letters, which no network is needed for."""

from __future__ import annotations

import math
from collections.abc import Sequence


def share_of_e(
    prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str]
) -> list[float]:
    """The share of the letter e in each response."""
    return [response.count("e") / max(1, len(response)) for response in responses]


def length(prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str]) -> list[float]:
    """Characters of each response."""
    return [float(len(response)) for response in responses]


def refused_where_odd(
    prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str]
) -> list[float]:
    """The share of the letter e in responses of even length; NaN for others."""
    shares = share_of_e(prompts, responses, labels)
    return [
        math.nan if len(response) % 2 else share
        for response, share in zip(responses, shares, strict=True)
    ]


def length_of_label(
    prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str]
) -> list[float]:
    """Characters of the data's own response."""
    return [float(len(label)) for label in labels]


def broken(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Raises."""
    raise KeyError("wug")
