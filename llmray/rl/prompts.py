"""The prompts of each step: rows of a table of prompts, planned as other rows are."""

from __future__ import annotations

from llmray.data import spoken
from llmray.data.batches import Batches
from llmray.data.shards import Table
from llmray.errors import DataError
from llmray.rl import dealing
from llmray.rl.rollout import Prompt
from llmray.train.parallel import World


class PromptReader:
    """This rank's prompts of each step, and its position in them.

    Args:
        table: rows of the features `opening`: a prompt and its conversation.
        batches: the plan; Resumable. Its step is a rollout batch: `accumulation` is that of an
            update times `ppo_buffer_size`.
        lanes: responses of a mini-batch, over all ranks.
        world: all ranks.
    """

    def __init__(self, table: Table, batches: Batches, lanes: int, world: World) -> None:
        self._table = table
        self._lanes, self._world = lanes, world
        self.batches = batches

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self._table.num_rows

    def __call__(self, step: int) -> list[Prompt]:
        """The prompts of step number `step`, counted from 0 over all epochs.

        Raises:
            DataError: a row has no prompt.
        """
        at = divmod(step, self.batches.steps_per_epoch)
        rows = self.batches.rows(*at)
        self.batches.pass_by(*at)
        rows = rows[dealing.in_places(self._table.lengths[rows], self._lanes)]
        world, lengths = self._world, self._table.lengths[rows]
        mine = dealing.places_of(lengths, self._lanes, world.world_size, world.rank)
        return [_prompt(self._table, int(rows[place]), place) for place in mine]

    def close(self) -> None:
        """Nothing runs ahead."""


def prompts_of(table: Table, rank: int, world_size: int) -> list[Prompt]:
    """A rank's share of all prompts of a table, to evaluate on.

    Raises:
        DataError: a row has no prompt.
    """
    return [_prompt(table, row, row) for row in range(rank, len(table), world_size)]


def _prompt(table: Table, row: int, place: int) -> Prompt:
    [sample] = table.samples(row)
    if not len(sample.input_ids):
        raise DataError(
            f"row {row} of the data set, counted from 0, has no prompt. Stage ppo answers "
            "prompts: take the row out, or give it one."
        )
    said = None if sample.said is None else spoken.read(sample.said)
    return Prompt(sample.input_ids.tolist(), row, place, said)
