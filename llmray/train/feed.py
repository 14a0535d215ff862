"""What a run trains on and is evaluated on, as one thing: a table under a plan, or a stream."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from llmray.arguments import environment
from llmray.batch import Batch
from llmray.data import access, prepared
from llmray.data.access import StreamRef
from llmray.data.batches import Batches
from llmray.data.collate import collate
from llmray.data.file_rows import Ranks
from llmray.data.planning import longest_row
from llmray.data.prepared import PreparedRef, Table
from llmray.data.streaming import Stream
from llmray.train.parallel import World
from llmray.train.reading import Ahead, Reader, Rows, Work

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = getLogger("llmray")


@dataclass(frozen=True)
class Feed:
    """The data of a run on this rank.

    Attributes:
        batches: where training stands in the data; Resumable.
        steps_per_epoch: of a stream, whose length is not known, all steps of the run.
        lengths: tokens of what a micro-batch may hold, (n,); of a stream the longest there can be.
        evals: the rows to evaluate on, by name.
    """

    batches: Batches | Stream
    steps_per_epoch: int
    lengths: np.ndarray
    evals: Mapping[str, Table]
    table: Table | None = None  # None: it is a stream

    def reader(
        self,
        world: World,
        ahead: Ahead,
        last_step: int,
        *,
        flat: bool,
        pad_id: int,
        reference: np.ndarray | None = None,
    ) -> Reader | StreamReader:
        """The micro-batches of each step of this rank, in the layout that the model takes.

        `reference` is what is known of it beforehand: see `Rows`.
        """
        if isinstance(self.batches, Stream):
            return StreamReader(self.batches, self.steps_per_epoch, ahead, flat=flat, pad_id=pad_id)
        assert self.table is not None
        rows = Rows(self.table, flat=flat, pad_id=pad_id, reference=reference)
        if rows.splits:
            log.info(
                "packing: the model takes no flat rows; the rows of a bin are padded, each apart"
            )
        return Reader(rows, self.batches, ahead, last_step, world)


def open_feed(
    arguments: RunArguments, ref: PreparedRef | StreamRef, model_dir: Path, world: World
) -> Feed:
    """Open the data of a run; of a stream a collective call.

    Raises:
        LlmrayError: the data is not there, or a row to evaluate on is wrong.
    """
    options = arguments.training
    if isinstance(ref, StreamRef):
        ranks = Ranks(world.rank, world.world_size, world.gather)
        root = environment.cache_directory(os.environ) / "prepared"
        longest = longest_row(arguments.data.cutoff_len, arguments.finetuning.stage)
        opened = access.open_stream(arguments, model_dir, root=root, ranks=ranks)
        return Feed(
            batches=opened.train,
            steps_per_epoch=options.max_steps,
            lengths=np.full(options.per_device_train_batch_size, longest),
            evals=opened.eval,
        )
    tables = prepared.open(ref)
    # a step of ppo is a rollout batch
    rollouts = arguments.rlhf.ppo_buffer_size if arguments.finetuning.stage == "ppo" else 1
    disables = arguments.finetuning.disable_shuffling
    batches = Batches(
        tables.train.lengths,
        options.per_device_train_batch_size,
        options.gradient_accumulation_steps * rollouts,
        world.world_size,
        world.rank,
        seed=options.data_seed if options.data_seed is not None else options.seed,
        order="sequential" if disables else options.train_sampling_strategy,
        drop_last=options.dataloader_drop_last,
    )
    return Feed(
        batches=batches,
        steps_per_epoch=batches.steps_per_epoch,
        lengths=_answered(tables.train.lengths, arguments),
        evals=tables.eval,
        table=tables.train,
    )


def _answered(lengths: np.ndarray, arguments: RunArguments) -> np.ndarray:
    """The most tokens of rows when they are learned from: of prompts, with their responses."""
    asked = arguments.generating
    if arguments.finetuning.stage != "ppo":
        return lengths
    if asked.max_new_tokens:
        return lengths + asked.max_new_tokens
    return np.maximum(lengths, asked.max_length)


class StreamReader:
    """The micro-batches of each step of this rank, as they come from a stream.

    Files are read ahead by a thread of the stream's own; rows are collated when they are asked for,
    since which they are is a collective call.
    """

    def __init__(
        self, stream: Stream, num_steps: int, ahead: Ahead, *, flat: bool, pad_id: int
    ) -> None:
        self.batches = stream
        self.num_rows = num_steps * stream.global_batch  # of what counts as an epoch
        self._pins, self._flat, self._pad_id = ahead.pins, flat, pad_id
        self._work = Work()

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of the next update, which `step` is; a collective call."""
        parts = self.batches.step()
        self._work = Work()
        for sample in (sample for part in parts for sample in part):
            length = len(sample.input_ids)
            self._work += Work(length, int(sample.target_mask.sum()), length**2)
        made = [collate(part, flat=self._flat, pad_id=self._pad_id) for part in parts]
        return [batch.map(Tensor.pin_memory) for batch in made] if self._pins else made

    def work(self, step: int) -> Work:
        """What the rows of the last step amount to."""
        return self._work

    def close(self) -> None:
        """End the thread that reads ahead."""
        self.batches.close()
