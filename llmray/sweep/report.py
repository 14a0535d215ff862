"""A sweep on the terminal: one table of its trials, one line of progress."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from llmray.arguments.problems import shown
from llmray.arguments.tune import Sweep
from llmray.sweep.results import ENDED, TrialResult, best_of, ranked

LONGEST_CELL = 24


def table(sweep: Sweep, results: Sequence[TrialResult]) -> str:
    """The trials from best to worst: name, parameters, metric, step, state, seconds."""
    keys = sweep.space.keys
    best = best_of(sweep, results)
    rows = [["trial", *keys, sweep.metric, "step", "state", "seconds"]]
    for result in ranked(sweep, results):
        step, value = result.point(sweep) or (result.steps, None)
        values = result.trial.values
        rows.append(
            [
                result.trial.name + (" *" if result is best else ""),
                *(_cell(values[key]) if key in values else "" for key in keys),
                "-" if value is None else f"{value:.6g}",
                f"{step}/{result.total_steps}" if result.total_steps else str(step),
                result.state,
                f"{result.seconds:.0f}",
            ]
        )
    return aligned(rows)


def ties(sweep: Sweep, results: Sequence[TrialResult]) -> str | None:
    """Which trials are as good as the best, in words; None where there are none."""
    best = best_of(sweep, results)
    if best is None:
        return None
    alike = [
        result.trial.name
        for result in results
        if result is not best
        and (result.state, result.value(sweep)) == (best.state, best.value(sweep))
    ]
    return f"as good as {best.trial.name}: {', '.join(alike)}" if alike else None


def progress(
    sweep: Sweep,
    results: Sequence[TrialResult],
    *,
    elapsed_s: float,
    num_trials: int | None = None,
    steps_before: int = 0,
) -> str:
    """One line: how many trials have ended and how, the best so far, and the time that is left.

    Args:
        sweep: what is searched.
        results: of the trials so far.
        elapsed_s: seconds since this driver began.
        num_trials: trials in all; those that `results` lacks wait. Not given: no others come.
        steps_before: steps that were done before this driver began.
    """
    total = num_trials or len(results)
    states = [result.state for result in results]
    ended = sum(state in ENDED for state in states)
    told = [
        f"{states.count(state)} {state}"
        for state in ("stopped early", "out of time", "failed")
        if state in states
    ]
    parts = [f"{ended} of {total} trials" + (f" ({', '.join(told)})" if told else "")]
    if running := states.count("running"):
        parts.append(f"{running} running")
    best = best_of(sweep, results)
    if best is not None:
        parts.append(f"best {sweep.metric} {best.value(sweep):.5g} ({best.trial.name})")
    left = _seconds_left(results, total, elapsed_s, steps_before)
    parts.append("ETA unknown" if left is None else f"ETA {timedelta(seconds=round(left))}")
    return ", ".join(parts)


def _seconds_left(
    results: Sequence[TrialResult], num_trials: int, elapsed_s: float, steps_before: int
) -> float | None:
    """At the rate of steps so far, all trials together; a trial to come is as long as those ended.

    None before the first step, and where no trial has said how many it has.
    """
    if num_trials == len(results) and all(result.state in ENDED for result in results):
        return 0.0
    done = sum(result.steps for result in results) - steps_before
    totals = [result.total_steps for result in results if result.total_steps]
    if done <= 0 or elapsed_s <= 0 or not totals:
        return None
    whole = sum(totals) / len(totals)
    lengths = [r.steps for r in results if r.state in ENDED and r.state != "failed"]
    usual = sum(lengths) / len(lengths) if lengths else whole
    coming = num_trials - len(results) + sum(result.state == "waiting" for result in results)
    running = sum(
        max(0.0, max(usual, result.steps) - result.steps)
        for result in results
        if result.state == "running"
    )
    return (coming * usual + running) * elapsed_s / done


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else shown(value)
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows with columns as wide as they need; numbers stand right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    numeric = [all(_is_number(row[place]) for row in rows[1:]) for place in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    if text in ("", "-"):
        return True
    try:
        float(text.split("/")[0])
    except ValueError:
        return False
    return True
