"""A node's one copy of a model's weights in another number format than their files have.

Processes that keep a format share the pages of the files that they map (`mapped`). Where all of
them want another, the first to come writes the weights in it beside other converted models, and
all map those.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from logging import getLogger
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmray import downloads, hub, store
from llmray.arguments import environment
from llmray.model import architecture

log = getLogger("llmray")

FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
GENERATION = "generation_config.json"
DISK_FACTOR = 1.2  # of the weights' size, that must be free


def folder(directory: Path, dtype: torch.dtype, read: Callable[[Path], PreTrainedModel]) -> Path:
    """A folder with the weights of `directory` in `dtype`, made at the first call on this node.

    It is `directory` itself where the files are in that format already, where they are not in
    safetensors, or where the disk has no room; the last is said.

    Args:
        directory: of a model, in Hugging Face's format.
        dtype: of all weights.
        read: the model of a folder, with weights in `dtype`, as every process will read it.

    Raises:
        LlmrayError: what `read` raises.
    """
    kept = architecture.formats(directory)
    if not kept or kept == {FORMATS.get(dtype)}:
        return directory
    name = f"{directory.name}-{hub.identity(directory)}-{str(dtype).removeprefix('torch.')}"
    root = environment.cache_directory(os.environ) / "models"
    target = root / name
    if store.is_committed(target):
        return target
    try:
        with downloads.locked(root / f"{name}.lock"):
            if not store.is_committed(target):  # else another process made it meanwhile
                store.sweep(root)
                _write(directory, target, dtype, read)
    except store.StoreError as error:
        log.warning("each run on this node converts weights of its own: %s", error)
        return directory
    return target if store.is_committed(target) else directory


def _write(
    directory: Path, target: Path, dtype: torch.dtype, read: Callable[[Path], PreTrainedModel]
) -> None:
    model = read(directory)
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(target.parent).free
    if free < DISK_FACTOR * needed:
        log.warning(
            "each run on this node converts weights of its own: %s has %d MiB free, and the "
            "weights in %s take %d",
            target.parent,
            free >> 20,
            dtype,
            needed >> 20,
        )
        return
    log.info("weights in %s for all runs on this node: %s", dtype, target)
    with store.staging(target) as staged:
        model.save_pretrained(staged)
        (staged / GENERATION).unlink(missing_ok=True)
        if (directory / GENERATION).is_file():
            shutil.copyfile(directory / GENERATION, staged / GENERATION)
        store.share(staged)
        if difference := _difference(model, read(staged)):
            log.warning(
                "each run on this node converts weights of its own: %s is read back otherwise",
                difference,
            )
            return
        store.commit(staged, target, {"source": str(directory)})


def _difference(model: PreTrainedModel, again: PreTrainedModel) -> str | None:
    """The first weight of two models that is not the same to the bit."""
    mine, theirs = model.state_dict(), again.state_dict()
    if mine.keys() != theirs.keys():
        return min(mine.keys() ^ theirs.keys())
    for name, weight in mine.items():
        other = theirs[name]
        if weight.dtype != other.dtype or not torch.equal(weight, other):
            return name
    return None
