"""What a build of prepared data came to, in words."""

from __future__ import annotations

from collections.abc import Mapping
from logging import getLogger
from typing import Any

log = getLogger("llmray")

LEFT_OUT = {
    "bad": "rows cannot be read and were left out",
    "over_limit": "rows have more tokens than cutoff_len and were left out",
    "equal": "pairs were left out, since their answers are the same within cutoff_len",
    "without_target": "rows were left out, since within cutoff_len no response is left of them",
}


def say(counts: Mapping[str, Any], truncation: str, seconds: float) -> None:
    """Say what came of the rows: one line, and one for each reason to leave rows out.

    Args:
        counts: from `build.counts`.
        truncation: the key of that name.
        seconds: that the build took.
    """
    rows = {"train": counts["train_rows"], "evaluate": counts["eval_rows"]}
    parts = [f"{number} rows to {verb} on" for verb, number in rows.items() if number]
    parts.append(f"{counts['tokens']} tokens, {counts['targets']} of them targets")
    parts.append(f"{counts['truncated']} rows cut to cutoff_len (truncation: {truncation})")
    if counts["over_limit"]:
        parts.append(f"{counts['over_limit']} rows over cutoff_len left out")
    if counts["equal"]:
        parts.append(f"{counts['equal']} pairs of equal answers left out")
    if counts["empty"]:
        parts.append(f"{counts['empty']} empty rows left out")
    if counts["bad"]:
        parts.append(f"{counts['bad']} bad rows left out")
    if counts["unused"]:
        parts.append(f"{counts['unused']} rows not drawn")
    if counts["repeated"]:
        parts.append(f"{counts['repeated']} rows drawn again")
    log.info("data prepared in %.1f s: %s", seconds, "; ".join(parts))
    for count, said in LEFT_OUT.items():
        if counts[count]:
            log.warning(
                "data: %d %s; the first is %s", counts[count], said, counts["firsts"][count]
            )
