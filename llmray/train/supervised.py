"""One update of pt and sft: rows of the plan, collated, forward, backward, update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmray.batch import Batch
from llmray.data.batches import Batches
from llmray.data.collate import collate
from llmray.data.prepared import SampleTable
from llmray.train.engine import Engine
from llmray.train.loop import StepResult
from llmray.train.losses import Objective


@dataclass(frozen=True)
class Rows:
    """Rows of a table as batches in the layout that the model takes."""

    table: SampleTable
    flat: bool
    pad_id: int

    def batch(self, indices: np.ndarray) -> Batch:
        """The micro-batch of these rows; no rows give one token without a target."""
        return collate([self.table[int(i)] for i in indices], flat=self.flat, pad_id=self.pad_id)


@dataclass(frozen=True)
class SupervisedStep:
    """A `do_step` of the loop."""

    engine: Engine
    rows: Rows
    batches: Batches
    objective: Objective

    def __call__(self, step: int) -> StepResult:
        """Make update number `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.batches.steps_per_epoch)
        micro_batches = [self.rows.batch(rows) for rows in self.batches.step(epoch, index)]
        done = self.engine.forward_backward(micro_batches, self.objective)
        update = self.engine.optim_step()
        return StepResult(
            loss=done.loss,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            num_tokens=done.num_tokens,
            metrics=done.metrics,
        )
