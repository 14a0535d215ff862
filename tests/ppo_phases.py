"""Holds the workers of a run of stage ppo in phases of a step until a file is there.

`install(folder, phases)` runs in the driver, before `llmray train`: what workers call is then
`held`, which is sent to them by value. Each leaves `folder/PHASE-RANK` when it has come there, at
its second step or its first save, and waits for `folder/PHASE-go`; once in a run.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

PHASES = ("rollout", "scoring", "update", "save")
OF_PHASES = {"rollout": "rollout", "logprobs": "scoring", "update": "update"}


def words(folder, *phases: str) -> str:
    """A line of Python for the driver of such a run."""
    tests = str(Path(__file__).parent)
    called = f"ppo_phases.install({str(folder)!r}, *{phases!r})"
    return f"import sys; sys.path.insert(0, {tests!r}); import ppo_phases; {called}"


def install(folder: str, *phases: str) -> None:
    """Let workers of this driver's run wait in phases."""
    import ray.cloudpickle

    from llmray.orchestration import train_job

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    core = functools.partial(held, folder, phases)
    train_job.train = functools.partial(train_job.train, core=core)


def held(folder, phases, arguments, context):
    """Train as a worker does, and wait in some phases."""
    import time
    from contextlib import contextmanager
    from pathlib import Path

    from llmray import run
    from llmray.rl.experience import Phases
    from llmray.train import checkpoint

    seen = []

    def arrive(name):
        mark = Path(folder, f"{name}-{context.world.rank}")
        seen.append(name)
        if name not in phases or seen.count(name) != (1 if name == "save" else 2) or mark.exists():
            return
        mark.touch()
        deadline = time.monotonic() + 300
        while not Path(folder, f"{name}-go").exists():
            assert time.monotonic() < deadline, "nobody says go"
            time.sleep(0.01)

    of, save = Phases.of, checkpoint.save

    @contextmanager
    def marked(self, name):
        with of(self, name):
            if name in OF_PHASES:
                arrive(OF_PHASES[name])
            yield

    def marked_save(*words, **named):
        arrive("save")
        return save(*words, **named)

    Phases.of, checkpoint.save = marked, marked_save
    try:
        return run.run(arguments, context)
    finally:
        Phases.of, checkpoint.save = of, save
