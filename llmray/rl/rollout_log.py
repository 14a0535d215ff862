"""Samples of rollouts as lines of rollouts.jsonl: what was asked, answered, and what it got."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch import Tensor

from llmray import store
from llmray.rl.experience import Experience

NAME = "rollouts.jsonl"
NUM_SHOWN = 8  # responses of a rollout


class RolloutLog:
    """Writes some responses of every so many rollouts; of the rank that has it.

    Args:
        directory: of the run.
        every: rollouts from one that is written to the next.
    """

    def __init__(self, directory: Path, every: int) -> None:
        self._path, self._every = directory / NAME, every
        self._goes_on = False

    def __call__(self, step: int, found: Experience, kl_S: Tensor) -> None:
        """Write samples of rollout number `step`, counted from 0, if it is one of those.

        The first time, what is there of this rollout and later ones is taken out: an earlier
        attempt wrote it, which went beyond its last checkpoint.
        """
        if not self._goes_on:
            self._goes_on = True
            self._forget(step)
        if step % self._every:
            return
        answers = found.rollout.answers[:NUM_SHOWN]
        with self._path.open("a", encoding="utf-8") as file:
            for row, answer in enumerate(answers):
                line = {
                    "step": step + 1,
                    "id": answer.id,
                    "prompt": answer.prompt,
                    "response": answer.response,
                    "score": _number(float(found.scores_S[row])),
                    "kl": float(kl_S[row]),
                    "tokens": len(found.rollout.responses[row]),
                    "ended": bool(found.rollout.ended_S[row]),
                }
                parts = {name: _number(float(part[row])) for name, part in found.parts.items()}
                line |= {"parts": parts} if len(parts) > 1 else {}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _forget(self, step: int) -> None:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        store.write_atomic(self._path, "".join(kept))


def _number(value: float) -> float | None:
    """None for a masked score: NaN is no JSON."""
    return value if math.isfinite(value) else None
