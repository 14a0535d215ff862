"""tune.png: the metric of every trial over its steps, parallel coordinates, importance of keys.

matplotlib is loaded only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmray.arguments.problems import shown
from llmray.arguments.space import Distribution
from llmray.arguments.tune import Sweep
from llmray.sweep.importance import importance
from llmray.train.plots import plain, save

BEST_COLOUR = "#d55e00"
BAR_COLOUR = "#1f5fa8"
NAMED = 10  # trials with which each line has its own name
LONGEST_LABEL = 18
LONGEST_NAME = 30


@dataclass(frozen=True)
class Line:
    """A trial as it is drawn: its values, the (step, metric) points, and the metric it is given."""

    name: str
    values: Mapping[str, Any]
    curve: Sequence[tuple[int, float]]
    metric: float


def draw(sweep: Sweep, lines: Sequence[Line], path: Path) -> None:
    """Write the picture of the trials, of which the first is the best."""
    from matplotlib.figure import Figure

    keys = sweep.space.keys
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1.3))
    colours = _colours(len(lines))
    _draw_curves(figure.add_subplot(grid[0, :]), sweep, lines, colours)
    _draw_coordinates(figure.add_subplot(grid[1, 0]), sweep, lines, colours)
    _draw_importance(figure.add_subplot(grid[1, 1]), sweep, keys, lines)
    figure.suptitle(plain(_title(lines, sweep)), fontsize=11)
    save(figure, path)


def _title(lines: Sequence[Line], sweep: Sweep) -> str:
    best = lines[0]
    said = ", ".join(f"{key} {_label(value)}" for key, value in best.values.items())
    return f"best of {len(lines)}: {best.name}, {sweep.metric} {best.metric:.5g} ({said})"


def _colours(count: int) -> list[Any]:
    """A colour a trial, darker for a better place; the best has its own."""
    from matplotlib import colormaps

    shades = [colormaps["viridis"](0.9 * place / max(1, count - 1)) for place in range(count)]
    return [BEST_COLOUR, *shades[1:]]


def _draw_curves(axes: Any, sweep: Sweep, lines: Sequence[Line], colours: Sequence[Any]) -> None:
    for number in reversed(range(len(lines))):  # the best on top
        line, is_best = lines[number], number == 0
        steps, values = zip(*line.curve, strict=True)
        axes.plot(
            steps,
            values,
            color=colours[number],
            linewidth=2.4 if is_best else 1.2,
            marker="o",
            markersize=4 if is_best else 2.5,
            label=plain(_name(line)) if is_best or len(lines) <= NAMED else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel(plain(sweep.metric))
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )


def _name(line: Line) -> str:
    values = ", ".join(_label(value) for value in line.values.values())
    return f"{line.name}  {values}" if len(values) <= LONGEST_NAME else line.name


def _draw_coordinates(
    axes: Any, sweep: Sweep, lines: Sequence[Line], colours: Sequence[Any]
) -> None:
    keys = [*sweep.space.keys, sweep.metric]
    columns = [[line.values.get(key) for line in lines] for key in keys[:-1]]
    columns.append([line.metric for line in lines])
    logarithmic = {d.key for d in sweep.space.dimensions if _is_log(d.distribution)}
    scales = [
        _Scale.of(column, key in logarithmic) for key, column in zip(keys, columns, strict=True)
    ]
    for number in reversed(range(len(lines))):
        heights = [
            scale.place(column[number]) for scale, column in zip(scales, columns, strict=True)
        ]
        axes.plot(
            range(len(keys)),
            heights,
            color=colours[number],
            linewidth=2.4 if number == 0 else 1.1,
            alpha=1 if number == 0 else 0.75,
            zorder=3 if number == 0 else 2,
        )
    for place, scale in enumerate(scales):
        axes.axvline(place, color="#888888", linewidth=0.8, zorder=1)
        for height, label in scale.marks:
            axes.annotate(
                plain(label),
                (place, height),
                xytext=(4, 2),
                textcoords="offset points",
                fontsize=8,
                zorder=4,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )
    axes.set_xticks(range(len(keys)), [plain(key) for key in keys], rotation=12, fontsize=9)
    axes.set_xlim(-0.15, len(keys) - 0.6)
    axes.set_ylim(-0.06, 1.08)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _is_log(distribution: Distribution) -> bool:
    """Whether its numbers are told apart by their logarithm."""
    ends = [end for end in distribution.ends() if _is_number(end)]
    spreads = distribution.is_list and bool(ends) and min(ends) > 0 and max(ends) / min(ends) >= 20
    return spreads or distribution.kind == "loguniform"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class _Scale:
    """Where values lie on one axis, from 0 to 1, and what is written there."""

    places: Mapping[str, float]
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    marks: tuple[tuple[float, str], ...] = ()

    @staticmethod
    def of(column: Sequence[Any], is_log: bool) -> _Scale:
        """Numbers in proportion or by their logarithm, other things side by side."""
        numbers = sorted(
            v for v in column if isinstance(v, int | float) and not isinstance(v, bool)
        )
        if len(numbers) < len(column):
            return _Scale._of_names(column)
        low, high = numbers[0], numbers[-1]
        made = _Scale({}, low, high, is_log)
        different = sorted(set(numbers))
        marked = different if len(different) <= 6 else [low, made.middle(), high]
        marks = tuple((made.place(value), f"{value:.4g}") for value in marked)
        return _Scale({}, low, high, is_log, marks)

    @staticmethod
    def _of_names(column: Sequence[Any]) -> _Scale:
        ordered = sorted(
            column, key=lambda v: (not _is_number(v), v is None, v if _is_number(v) else 0)
        )
        names = list(dict.fromkeys(_label(value) for value in ordered))
        last = max(1, len(names) - 1)
        places = {name: number / last for number, name in enumerate(names)}
        return _Scale(places, marks=tuple((height, name) for name, height in places.items()))

    def middle(self) -> float:
        return math.sqrt(self.low * self.high) if self.is_log else (self.low + self.high) / 2

    def place(self, value: Any) -> float:
        if self.places:
            return self.places[_label(value)]
        if self.high == self.low:
            return 0.5
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))


def _label(value: Any) -> str:
    if value is None:
        return "(run file's)"
    text = f"{value:.4g}" if isinstance(value, float) else shown(value)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def _draw_importance(axes: Any, sweep: Sweep, keys: Sequence[str], lines: Sequence[Line]) -> None:
    step, there = _comparable(lines)
    shares = importance(keys, [line.values for line in lines], there)
    ordered = sorted(shares, key=lambda key: shares[key])
    bars = axes.barh(
        [plain(key) for key in ordered], [shares[k] for k in ordered], color=BAR_COLOUR
    )
    axes.bar_label(bars, [f"{shares[key]:.0%}" for key in ordered], padding=3, fontsize=8)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    where = "after each trial's last evaluation" if step is None else f"at step {step}"
    axes.set_xlabel(plain(f"variance of {sweep.metric} {where}\nexplained by the key alone"))
    axes.set_title("importance", fontsize=10)
    axes.grid(alpha=0.3, axis="x")


def _comparable(lines: Sequence[Line]) -> tuple[int | None, list[float]]:
    """The last step that all trials reached, and their metrics there.

    Trials may evaluate at other steps than each other, as with other batch sizes: where one has
    nothing up to that step, it is None, and each has its last metric.
    """
    step = min(max(step for step, _ in line.curve) for line in lines)
    found = [[value for at, value in line.curve if at <= step] for line in lines]
    if all(found):
        return step, [values[-1] for values in found]
    return None, [line.curve[-1][1] for line in lines]
