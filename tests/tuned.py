"""Tiny models tuned as a run's keys say, shaken as training would, saved as a run would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from layouts import make_rows
from tiny import build_model, make_tokenizer

from llmray.arguments.loading import load
from llmray.model import export, tuning
from llmray.model.head import TokenModel

KEYS = {
    "stage": "sft",
    "do_train": True,
    "dataset": "identity",
    "template": "chatml",
    "output_dir": "out",
    "model_name_or_path": "some/model",
}


def tuned(model=None, *, upcast=True, is_trainable=True, **keys: Any):
    """A model, `build_model`'s tiny llama unless given, tuned by `keys`."""
    model = build_model(amplify=2.0) if model is None else model
    return tuning.apply(model, load({**KEYS, **keys}), is_trainable=is_trainable, upcast=upcast)


def logprobs(model) -> torch.Tensor:
    """The log-probabilities of a few rows."""
    with torch.no_grad():
        return TokenModel(model.eval(), flat=True)(make_rows().flat).logprobs


def shake(model, seed=1, scale=0.1) -> None:
    """Give the trainable parameters random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.trainable(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def saved(model, directory: Path) -> str:
    """The folder into which the model, or its adapter, was written."""
    export.write_weights(model, directory, make_tokenizer(directory))
    return str(directory)


def adapted(model) -> set[str]:
    """The names, in the model itself, of the modules that have an adapter."""
    prefix = "base_model.model."
    return {
        name.split(".lora_")[0].removeprefix(prefix)
        for name in tuning.trainable(model)
        if ".lora_" in name
    }
