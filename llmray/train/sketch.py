"""A curve in plain characters, for the last lines of a terminal or of a job's log."""

from __future__ import annotations

from collections.abc import Sequence

HEIGHT = 8  # rows of the curve
WIDTH = 60  # columns of the curve


def sketch(
    points: Sequence[tuple[int, float]], key: str, *, width: int = WIDTH, height: int = HEIGHT
) -> str:
    """Lines of ASCII that draw (step, value) points; empty for fewer than two steps.

    Each column shows the mean of the values whose steps fall into it, or, where there are none, a
    line between its neighbours.
    """
    steps = [step for step, _ in points]
    if not points or min(steps) == max(steps):
        return ""
    columns = _columns(points, width)
    low, high = min(columns), max(columns)
    span = (high - low) or 1.0
    rows = [round((high - value) / span * (height - 1)) for value in columns]
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    margin = max(map(len, labels.values()))
    lines = [
        f"{labels.get(row, ''):>{margin}} |" + "".join(" *"[place == row] for place in rows)
        for row in range(height)
    ]
    first, last = str(min(steps)), f"{key} to step {max(steps)}"
    axis = " " * margin + " +" + "-" * width
    return "\n".join([*(line.rstrip() for line in lines), axis, _ends(margin, first, last, width)])


def _ends(margin: int, first: str, last: str, width: int) -> str:
    return " " * (margin + 2) + first + last.rjust(max(len(last) + 1, width - len(first)))


def _columns(points: Sequence[tuple[int, float]], width: int) -> list[float]:
    start = min(step for step, _ in points)
    scale = (width - 1) / (max(step for step, _ in points) - start)
    found: dict[int, list[float]] = {}
    for step, value in points:
        found.setdefault(round((step - start) * scale), []).append(value)
    known = {column: sum(values) / len(values) for column, values in sorted(found.items())}
    filled = []
    left = right = 0
    places = iter(list(known)[1:])
    for column in range(width):
        if column > right:
            left, right = right, next(places)
        share = (column - left) / (right - left) if right > left else 0.0
        filled.append(known[left] + share * (known[right] - known[left]))
    return filled
