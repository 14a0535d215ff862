"""Holds the workers of a run of stage ppo in phases of a step, one after the other.

`install(folder, phases)` runs in the driver, before `llmray train`: what workers call is then
`held`, which is sent to them by value. Of the phases the first one that was not met yet is waited
for, the first of all at the second step of an attempt, and the others as soon as they come. There
each rank leaves `folder/PHASE-RANK`, and waits for `folder/PHASE-go`.

In a save rank 0 waits with the weights half written: among the files of a checkpoint that is not
committed. The other ranks wait for it there.
"""

from __future__ import annotations

import functools
import sys
import time
from contextlib import contextmanager
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


class Turns:
    """Whose turn it is to be waited for on a rank, and the waiting."""

    def __init__(self, folder, phases, rank):
        self.folder, self.phases, self.rank = Path(folder), phases, rank
        self.seen = 0

    def is_next(self, phase):
        """Whether the run waits in a phase that it comes to; ranks agree."""
        left = [name for name in self.phases if not (self.folder / f"{name}-{self.rank}").exists()]
        if left[:1] != [phase]:
            return False
        self.seen += 1
        return phase != self.phases[0] or self.seen == 2

    def arrive(self, phase):
        (self.folder / f"{phase}-{self.rank}").touch()

    def wait(self, phase):
        deadline = time.monotonic() + 600
        while not (self.folder / f"{phase}-go").exists():
            assert time.monotonic() < deadline, "nobody says go"
            time.sleep(0.01)


def held(folder, phases, arguments, context):
    """Train as a worker does, and wait in some phases."""
    from llmray import run
    from llmray.rl.experience import Phases
    from llmray.train import checkpoint

    turns = Turns(folder, phases, context.world.rank)
    of, save = Phases.of, checkpoint.save

    @contextmanager
    def marked(self, name):
        with of(self, name):
            if turns.is_next(phase := OF_PHASES.get(name)):
                turns.arrive(phase)
                turns.wait(phase)
            yield

    def marked_save(*words, write_files, **named):
        is_held = turns.is_next("save")
        if is_held and turns.rank:
            turns.arrive("save")

        def write(directory):
            write_files(directory)
            if is_held:
                turns.arrive("save")
                turns.wait("save")

        return save(*words, write_files=write, **named)

    Phases.of, checkpoint.save = marked, marked_save
    try:
        return run.run(arguments, context)
    finally:
        Phases.of, checkpoint.save = of, save
