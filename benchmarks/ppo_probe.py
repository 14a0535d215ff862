"""Runs `llmray train` in stage ppo with a stopwatch on every step, as `peer_ppo_probe.py` does.

Writes one JSON object a step to the file that LLMRAY_PROBE_OUT names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from llmray.cli import main
from llmray.rl.experience import Collector
from llmray.rl.ppo import PpoStep

PHASES = ("rollout", "logprobs", "waiting", "update")


def install() -> None:
    """Wrap the step and what collects its experience."""
    step, collect = PpoStep.__call__, Collector.collect
    found: dict[str, Any] = {}
    mark = 0.0

    def kept(self: Collector, *args: Any) -> Any:
        experience = collect(self, *args)
        found["experience"] = experience
        return experience

    def timed(self: PpoStep, number: int) -> Any:
        nonlocal mark
        mark = mark or time.perf_counter()
        result = step(self, number)
        now = time.perf_counter()
        experience = found["experience"]
        line = {
            "seconds": now - mark,
            "tokens": int(experience.rollout.lengths_S.sum()),
            "loss": float(result.loss),
            "reward": float(experience.scores_S.mean()),
            **{name: getattr(experience.phases, name) for name in PHASES},
        }
        with Path(os.environ["LLMRAY_PROBE_OUT"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
        mark = time.perf_counter()
        return result

    Collector.collect, PpoStep.__call__ = kept, timed  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    sys.exit(main(["train", *sys.argv[1:]]))
