"""The reference of a run in its place: loaded, taken from the policy, or asked beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from torch import nn

from llmray.arguments.run import RunArguments
from llmray.data.mismatched import JudgedTable
from llmray.data.prepared import PackedTable, PreparedRef, Table
from llmray.errors import ArgumentsError
from llmray.model.attention import why_not_flat
from llmray.model.head import TokenModel
from llmray.train import reference
from llmray.train.engine import Engine
from llmray.train.preference import effective_weights
from llmray.train.reading import Ahead, Rows
from llmray.train.stages import STAGES, temperature

log = getLogger("llmray")

# of kto, how much wanted answers are to weigh against unwanted ones: eq. 10 of 2402.01306
BALANCED = (1.0, 4 / 3)


def uses_reference(arguments: RunArguments) -> bool:
    """Whether the run's loss compares with a reference."""
    return STAGES[arguments.finetuning.stage].uses_reference(arguments)


def load_own(
    arguments: RunArguments, model_dir: Path, dtype: torch.dtype, device: torch.device
) -> nn.Module | None:
    """The reference model where it is one of its own, else None."""
    if not (uses_reference(arguments) and reference.is_of_its_own(arguments)):
        return None
    return reference.load_own(arguments, model_dir, dtype=dtype, device=device)


def takes_flat_rows(own: nn.Module | None) -> bool:
    """Whether the reference takes flat rows; where it does not the policy gets none either."""
    reason = None if own is None else why_not_flat(own)
    if reason is not None:
        log.info("batches are padded, not flat, since the reference takes no others: %s", reason)
    return reason is None


def attach(arguments: RunArguments, engine: Engine, own: nn.Module | None) -> None:
    """Give an engine the run's reference, if it has one; before a checkpoint is loaded."""
    if not uses_reference(arguments):
        return
    if own is not None:
        engine.reference = reference.OfItsOwn(
            TokenModel(own, flat=engine.model.flat, temperature=temperature(arguments))
        )
    else:
        engine.reference = reference.of_policy(arguments, engine.model)
    log.info("%s", reference.explained(engine.reference, arguments))


def attach_to_evaluation(arguments: RunArguments, engine: Engine, own: nn.Module | None) -> None:
    """The same where nothing trains: the last adapter is what was learned.

    Raises:
        ArgumentsError: nothing says what the model is to be compared with.
    """
    if not uses_reference(arguments):
        return
    if own is not None:
        attach(arguments, engine, own)
    elif hasattr(engine.model.model, "peft_config"):
        engine.reference = reference.WithoutAdapter()
        log.info("the reference is the model without its last adapter")
    else:
        raise ArgumentsError(
            f"stage={arguments.finetuning.stage} without training compares a model with a "
            "reference, and none is given. Write ref_model, the model that training began with, "
            "or adapter_name_or_path."
        )


def known_beforehand(
    arguments: RunArguments,
    engine: Engine,
    data: object,
    tables: Mapping[str, Rows],
    *,
    model_dir: Path,
    ahead: Ahead,
    sees_rows_again: bool,
) -> dict[str, np.ndarray]:
    """What the reference says of all rows, by table; empty where it is asked as rows come.

    Then the engine's reference is given up. A collective call.

    Args:
        arguments: of the run.
        engine: with the reference, before a checkpoint is loaded.
        data: a `PreparedRef`, or the stream that is not known.
        tables: the rows to train and to evaluate on.
        model_dir: the policy's folder.
        ahead: how reading runs ahead.
        sees_rows_again: whether rows are trained on more than once, by this run or others.
    """
    wish = arguments.rlhf.precompute_ref_logps
    if engine.reference is None or wish is False or not isinstance(data, PreparedRef):
        return {}
    if isinstance(engine.reference, reference.AtTheStart) and engine.reference.is_yet_to_change:
        return {}  # `true` is refused with the arguments
    digest = reference.identity(arguments, model_dir)
    kept = reference.Kept(data.path, digest, engine.world)
    sizes = {name: rows.table.num_rows for name, rows in tables.items()}
    found = kept.read(sizes)
    if found is None and wish == "auto" and not sees_rows_again:
        return {}
    with nullcontext() if found is not None else kept.alone():
        found = found or kept.read(sizes)  # another run may have asked meanwhile
        if found is None:
            per_device = arguments.training.per_device_eval_batch_size
            log.info("the reference is asked once for all rows (precompute_ref_logps: %s)", wish)
            found = {
                name: reference.logps(engine, rows, per_device, ahead)
                for name, rows in tables.items()
            }
            kept.write(found)
        else:
            log.info("what the reference says is known from %s", kept.path)
    engine.reference = None
    return found


def with_known(tables: Mapping[str, Rows], known: Mapping[str, np.ndarray]) -> dict[str, Rows]:
    """The rows with what is known of the reference."""
    return {name: replace(rows, reference=known.get(name)) for name, rows in tables.items()}


def say_weights(arguments: RunArguments, table: Table | None) -> None:
    """Warn where wanted and unwanted answers of stage kto weigh too differently."""
    if isinstance(table, PackedTable):
        table = table.table
    if not isinstance(table, JudgedTable):
        return
    options, wanted, count = arguments.rlhf, table.num_wanted, len(table)
    ratio = effective_weights(wanted, count, options)
    if BALANCED[0] <= ratio <= BALANCED[1] + 1e-9:
        return
    advice = ""
    if 0 < wanted < count and options.kto_rejected_weight:
        balance = options.kto_rejected_weight * (count - wanted) / wanted
        advice = (
            f" kto_chosen_weight between {balance:.3g} and {balance * BALANCED[1]:.3g} would "
            "bring it there."
        )
    log.warning(
        "kto: %d wanted answers with weight %g against %d unwanted ones with weight %g are a ratio "
        "of %.3g; the paper keeps it between 1 and 4/3.%s",
        wanted,
        options.kto_chosen_weight,
        count - wanted,
        options.kto_rejected_weight,
        ratio,
        advice,
    )
