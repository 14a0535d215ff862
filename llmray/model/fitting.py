"""Whether a run fits into free memory, and recomputes activations where it must; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from llmray.arguments.loading import replace
from llmray.arguments.run import RunArguments
from llmray.errors import ArgumentsError, ModelError
from llmray.model.architecture import UnknownSizesError, decoder, read_config
from llmray.model.memory import ERROR, Estimate, estimate_for, gigabytes

log = getLogger("llmray")

# model types whose estimates were compared with what runs hold: of others, none is refused
MEASURED = {"llama", "qwen3", "gemma3_text", "qwen3_moe"}
NUM_KEYS = 3  # that an error names


@dataclass(frozen=True)
class Room:
    """What a worker has: the bytes that are free, and what `memory.Situation` says of it.

    `rewards` are bytes of reward models that the same process holds.
    """

    free: int
    precision: str
    device: str
    num_workers: int
    rewards: int = 0


def choose_recomputation(
    arguments: RunArguments, directory: Path, lengths: Sequence[int], room: Room
) -> bool:
    """Whether activations are recomputed: as the run file says, else where they would not fit.

    Args:
        arguments: of the run.
        directory: of the model.
        lengths: of the rows, in tokens.
        room: of the worker that has the least.

    Raises:
        ModelError: if the run would not fit by more than the estimate may be wrong.
    """
    said = arguments.model.disable_gradient_checkpointing
    asked = True if arguments.model.use_unsloth_gc else None if said is None else not said
    try:
        whole = _estimate(arguments, directory, lengths, room, recomputes=bool(asked))
    except UnknownSizesError as error:
        log.warning("memory is not estimated: %s", error)
        return bool(asked)
    if asked is None and whole.peak * (1 + ERROR) > room.free:
        asked = True
        log.info(
            "gradient checkpointing on: without it the run needs about %s, and %s are free "
            "(disable_gradient_checkpointing: true turns it off)",
            gigabytes(whole.peak),
            gigabytes(room.free),
        )
        whole = _estimate(arguments, directory, lengths, room, recomputes=True)
    log.debug("memory of a worker by estimate: %s", "; ".join(whole.lines()))
    if whole.peak * (1 + ERROR) > room.free:
        _complain(whole, arguments, directory, lengths, room)
    return bool(asked)


def _complain(
    found: Estimate, arguments: RunArguments, directory: Path, lengths: Sequence[int], room: Room
) -> None:
    parts = ", ".join(" ".join(line.split()) for line in found.lines()[:3])
    help_ = "; ".join(
        f"{key} ({gigabytes(peak)})"
        for key, peak in _remedies(found, arguments, directory, lengths, room)
    )
    text = (
        f"a worker needs about {gigabytes(found.peak)} ({parts}), but {gigabytes(room.free)} are "
        f"free: {gigabytes(found.peak - room.free)} too few. "
        + (f"What would help most: {help_}." if help_ else "A larger machine is required.")
    )
    kind = decoder(read_config(directory)).model_type
    if found.peak * (1 - ERROR) > room.free and kind in MEASURED:
        raise ModelError(text)
    if found.peak > room.free:
        log.warning("%s", text)
    else:
        log.warning(
            "memory will be scarce: a worker needs about %s, and %s are free",
            gigabytes(found.peak),
            gigabytes(room.free),
        )


def _remedies(
    found: Estimate, arguments: RunArguments, directory: Path, lengths: Sequence[int], room: Room
) -> list[tuple[str, int]]:
    """The keys that lower the estimate most, with what it would be; at most three."""
    tried = []
    for words, keys in _changes(arguments):
        try:
            changed = replace(arguments, **keys)
        except ArgumentsError:  # what this run does not go together with
            continue
        limit = keys.get("cutoff_len", max(lengths, default=0))
        precision = "pure_bf16" if keys.get("pure_bf16") else room.precision
        lower = _estimate(
            changed,
            directory,
            [min(length, limit) for length in lengths],
            dataclasses.replace(room, precision=precision),
            recomputes=not changed.model.disable_gradient_checkpointing,
        )
        if lower.peak < 0.98 * found.peak:
            tried.append((words, lower.peak))
    return sorted(tried, key=lambda item: item[1])[:NUM_KEYS]


def _changes(arguments: RunArguments) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys that lower memory, each with what it leaves as it is."""
    kind, model = arguments.finetuning.finetuning_type, arguments.model
    keeps = {"disable_gradient_checkpointing": bool(model.disable_gradient_checkpointing)}
    if model.disable_gradient_checkpointing:
        words = "disable_gradient_checkpointing: false"
        yield words, {"disable_gradient_checkpointing": False}
    if arguments.training.per_device_train_batch_size > 1:
        yield "per_device_train_batch_size: 1", {**keeps, "per_device_train_batch_size": 1}
    half = arguments.data.cutoff_len // 2
    yield f"cutoff_len: {half}", {**keeps, "cutoff_len": half, "model_max_length": None}
    if kind in ("full", "freeze"):
        yield "finetuning_type: lora", {**keeps, "finetuning_type": "lora"}
        if not arguments.finetuning.pure_bf16:
            formats = {"bf16": None, "fp16": None, "fp32": None, "compute_dtype": None}
            yield "pure_bf16: true", {**keeps, "pure_bf16": True, **formats}
    elif not model.is_quantized:
        yield "quantization_bit: 4", {**keeps, "quantization_bit": 4}


def _estimate(
    arguments: RunArguments,
    directory: Path,
    lengths: Sequence[int],
    room: Room,
    *,
    recomputes: bool,
) -> Estimate:
    found = estimate_for(
        arguments,
        directory,
        lengths,
        room.precision,
        recomputes=recomputes,
        device=room.device,
        num_workers=room.num_workers,
    )
    return dataclasses.replace(found, rewards=room.rewards)
