"""One update of pt and sft: rows, planned or streamed, forward, backward, update."""

from __future__ import annotations

import time
from dataclasses import dataclass

from llmray.train import device_memory
from llmray.train.engine import Engine
from llmray.train.feed import StreamReader
from llmray.train.loop import StepResult
from llmray.train.losses import Objective
from llmray.train.reading import Reader, Rows

__all__ = ["Rows", "SupervisedStep"]


@dataclass(frozen=True)
class SupervisedStep:
    """A `do_step` of the loop; after every `release_every` updates unused memory is given back."""

    engine: Engine
    reader: Reader | StreamReader
    objective: Objective
    release_every: int | None = None

    def __call__(self, step: int) -> StepResult:
        """Make update number `step`, counted from 0 over all epochs."""
        started = time.perf_counter()
        micro_batches = self.reader.step(step)
        waited = time.perf_counter() - started
        done = self.engine.forward_backward(micro_batches, self.objective)
        update = self.engine.optim_step()
        if self.release_every is not None and (step + 1) % self.release_every == 0:
            device_memory.release(self.engine.world.device)
        return StepResult(
            loss=done.loss,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            other_rates=update.other_rates,
            num_tokens=done.num_tokens,
            metrics=done.metrics,
            work=self.reader.work(step),
            num_positions=sum(batch.input_ids.numel() for batch in micro_batches),
            data_seconds=waited,
        )
