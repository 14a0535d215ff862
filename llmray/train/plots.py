"""Pictures of what a run logged: the loss and whatever else is named, of one run or of several.

They are drawn from trainer_log.jsonl, so that a resumed run has its whole curve. matplotlib is
loaded only when something is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from logging import getLogger
from pathlib import Path
from typing import Any

from llmray import store
from llmray.errors import ArgumentsError
from llmray.train.observers import LOG_NAME, Observer, Record, read_log, records_of

log = getLogger("llmray")

# of two colours, the values are drawn in the lighter one
RAW, SMOOTHED = "#9ec5e8", "#1f5fa8"
# told apart in print, and by most who see colours otherwise: https://jfly.uni-koeln.de/color/
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
RUN_LINES = ("-", "--", ":", "-.")

# what says how training by reward goes
OF_REWARDS = ("score", "kl", "beta", "entropy", "response_length")

Points = list[tuple[int, float]]


# ends of the keys of evaluations that are drawn unasked
JUDGED = ("_loss", "_accuracy", "_margin", "_score", "rewards/accuracies", "rewards/margins")


class Plots(Observer):
    """training_<key>.png, drawn at the end.

    Of loss, what evaluations are judged by, what rewards are watched by, and `keys`.
    """

    def __init__(self, directory: Path, keys: Sequence[str] = ()) -> None:
        self.directory = directory
        self.keys = tuple(keys)

    def on_end(self, metrics: Record) -> None:
        """Draw a picture a key; say which of the named keys were never logged."""
        records = read_log(self.directory / LOG_NAME)
        logged = numeric_keys(records)
        rewarded = OF_REWARDS if "score" in logged else ()
        usual = [k for k in logged if k == "loss" or _is_evaluation(k) or k in rewarded]
        for key in dict.fromkeys([*usual, *self.keys]):
            points = curve(records, key)
            if points:
                draw_curve(points, key, self.directory / file_name(key))
        missing = [key for key in self.keys if key not in logged]
        if missing:
            log.warning(
                "plot_loss names %s, never logged in this run. Logged were: %s",
                ", ".join(missing),
                ", ".join(logged) or "nothing",
            )


def numeric_keys(records: Sequence[Record]) -> list[str]:
    """The keys with a number in any record, in their order; those that count steps left out."""
    keys = {
        key: None
        for record in records
        for key, value in record.items()
        if isinstance(value, int | float) and key not in ("current_steps", "total_steps")
    }
    return list(keys)


def curve(records: Sequence[Record], key: str) -> Points:
    """The (step, value) points of a key."""
    return [
        (record["current_steps"], float(record[key]))
        for record in records
        if isinstance(record.get(key), int | float)
    ]


def file_name(key: str, prefix: str = "training") -> str:
    """The name of a key's picture; what no file name should hold becomes a line."""
    return f"{prefix}_{re.sub(r'[^A-Za-z0-9_]', '_', key)}.png"


def draw_curve(points: Points, key: str, path: Path) -> None:
    """Write a picture of (step, value) points: the values and their smoothing."""
    made, axes = figure("step", key)
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=RAW, linewidth=1.2, label=plain(key), marker=".", markersize=3)
    axes.plot(steps, smooth(values), color=SMOOTHED, linewidth=2, label="smoothed")
    axes.legend()
    save(made, path)


def draw_runs(curves: Mapping[str, Points], key: str, path: Path) -> None:
    """Write a picture of one key of several runs, by name: thin values, thick smoothed curves."""
    made, axes = figure("step", key)
    for number, (name, points) in enumerate(curves.items()):
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        line = RUN_LINES[number // len(RUN_COLOURS) % len(RUN_LINES)]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth(values), line, color=colour, linewidth=2, label=plain(name))
    outside = len(curves) > 8
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5)) if outside else axes.legend()
    save(made, path)


def smooth(values: Sequence[float], weight: float | None = None) -> list[float]:
    """Mean of all values around each, weighted by `weight ** distance`: it does not lag behind.

    The weight, below 1, is larger for more smoothing; not given it follows a short curve and calms
    a long one.
    """
    if weight is None:
        weight = 1 - 1 / max(1.25, len(values) / 40)
    before, after = _sums(values, weight), _sums(values[::-1], weight)[::-1]
    return [
        (left + right - value) / (left_weight + right_weight - 1)
        for value, (left, left_weight), (right, right_weight) in zip(
            values, before, after, strict=True
        )
    ]


def _sums(values: Sequence[float], weight: float) -> list[tuple[float, float]]:
    """At each place the weighted sum of the values up to there, and the sum of their weights."""
    sums, total, weights = [], 0.0, 0.0
    for value in values:
        total, weights = value + weight * total, 1 + weight * weights
        sums.append((total, weights))
    return sums


def read_curves(directories: Sequence[str], key: str) -> dict[str, Points]:
    """The curves of `key` in the logs of runs, by the shortest names that tell these apart.

    Args:
        directories: output directories, or run directories, of which URIs too.
        key: what trainer_log.jsonl calls it.

    Raises:
        ArgumentsError: a directory has no log, or its log has no such key; all of them in one.
    """
    places = list(dict.fromkeys(place.rstrip("/") for place in directories))
    curves, wrong = {}, []
    for name, place in zip(_names(places), places, strict=True):
        try:
            records = records_of(store.read_bytes(store.join(place, LOG_NAME)).decode())
        except (FileNotFoundError, NotADirectoryError):
            wrong.append(_no_log(place))
            continue
        curves[name] = curve(records, key)
        if not curves[name]:
            wrong.append(_no_key(place, key, numeric_keys(records)))
    if wrong:
        raise ArgumentsError("\n".join(wrong))
    return curves


def _no_log(place: str) -> str:
    exists = "has no" if store.exists(place) else "does not exist, so it has no"
    return (
        f"{place} {exists} {LOG_NAME}. Name the output_dir of a run; while a run on Ray goes on, "
        "its log is in <ray_storage_path>/<ray_run_name>."
    )


def _no_key(place: str, key: str, logged: Sequence[str]) -> str:
    close = get_close_matches(key, logged, n=1)
    advice = f"Did you mean {close[0]}? " if close else ""
    return f"{place} logged no {key}. {advice}It has {', '.join(logged) or 'no numbers yet'}."


def _is_evaluation(key: str) -> bool:
    return key.startswith("eval_") and key.endswith(JUDGED)


def _names(places: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as it takes for each to differ from the others."""
    for count in range(1, max(place.count("/") for place in places) + 2):
        names = ["/".join(place.split("/")[-count:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return list(places)


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no formulas, no label that it hides."""
    return text.replace("$", r"\$") if not text.startswith("_") else f" {plain(text[1:])}"


def figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    """An empty picture, matplotlib's figure and its axes."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(7, 4.2), layout="constrained")
    axes = made.subplots()
    axes.set_xlabel(plain(x_label))
    axes.set_ylabel(plain(y_label))
    axes.grid(alpha=0.3)
    return made, axes


def save(figure: Any, path: Path) -> None:
    """Write a picture in the format that its name ends with.

    Raises:
        ArgumentsError: there is no such format.
    """
    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.lstrip(".").lower()
    if kind not in kinds:
        raise ArgumentsError(
            f"{path} is no name of a picture that can be drawn. End it in .png, .svg or .pdf."
        )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=kind)
    store.write_atomic(path, picture.getvalue())
