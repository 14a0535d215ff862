"""The parts of a model by name: its decoder layers, its linear modules, the name nearest to one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmray.errors import ModelError


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name in `model`.

    Raises:
        ModelError: if no list of modules is as long as the configuration says.
    """
    number = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return name, module
    raise ModelError(
        f"{type(model).__name__} has no list of {number} layers, as its configuration says. "
        "A decoder of that form is required for finetuning_type: freeze; use full or lora."
    )


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear module but the head, by its full name; quantised ones are linear too."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that `name` may have meant, or nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""
