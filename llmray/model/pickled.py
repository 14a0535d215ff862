"""Weights in torch's pickle format (.bin): written for tools that read no other, read with care.

A pickle may run code when it is read. torch's `weights_only` reads tensors alone and refuses the
rest; even so such files are read only where a run file says allow_pickled_weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from llmray.arguments.model import ModelArguments
from llmray.errors import ModelError, StoreError

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


def convert(directory: Path) -> None:
    """Turn a model's safetensors files in a folder into .bin files, with the index of shards.

    One file is in memory at a time.

    Raises:
        StoreError: if it cannot be written.
    """
    for path in sorted(directory.glob("model*.safetensors")):
        tensors, target = load_file(path), directory / _renamed(path.name)
        try:
            with target.open("wb") as file:
                torch.save(tensors, file)
        except RuntimeError as error:  # torch's writer hides the number of the error
            raise StoreError(
                f"{target} could not be written: {error}. The disk may be full: free space, or "
                "choose a directory on another disk."
            ) from error
        path.unlink()
    index = directory / f"{SAFE}.index.json"
    if index.is_file():
        body = json.loads(index.read_text())
        body["weight_map"] = {key: _renamed(name) for key, name in body["weight_map"].items()}
        (directory / f"{PICKLED}.index.json").write_text(json.dumps(body, indent=2) + "\n")
        index.unlink()


def require_safe(directory: Path, model_args: ModelArguments) -> None:
    """Let a folder without safetensors be read only where the run file allows it.

    Raises:
        ModelError: if it has no weights, or pickled ones that are not allowed.
    """
    if any(directory.glob("*.safetensors")):
        return
    found = sorted(path.name for path in directory.glob("*.bin"))
    if not found:
        raise ModelError(
            f"{directory} cannot be loaded: it has no weights. Safetensors files are required: "
            "complete the folder. Of a hub's repository pickled weights (.bin) are fetched only "
            "with allow_pickled_weights: true."
        )
    if not model_args.allow_pickled_weights:
        raise ModelError(
            f"{directory} has its weights as pickles alone ({found[0]}), which may run code when "
            "they are read. Safetensors are required: choose a version of the model that has them, "
            "or, if you trust its source, set allow_pickled_weights: true to read tensors alone."
        )


def _renamed(name: str) -> str:
    return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
