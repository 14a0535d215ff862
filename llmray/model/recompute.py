"""Activations computed again in the backward pass, their layers' inputs kept in host memory."""

from __future__ import annotations

from typing import Any

from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmray.errors import ModelError


def recompute_activations(
    model: PreTrainedModel, *, is_reentrant: bool, offloads: bool = False
) -> None:
    """Keep of each layer its input alone, and run the layer again in the backward pass.

    Args:
        model: of which the layers are to do so in training.
        is_reentrant: torch's older implementation.
        offloads: keep the inputs in host memory, pinned where the model is on a GPU.

    Raises:
        ModelError: if the architecture cannot.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": is_reentrant})
    except ValueError as error:
        raise ModelError(
            f"{type(model).__name__} cannot recompute activations ({error}). Set "
            "disable_gradient_checkpointing: true."
        ) from error
    if not offloads:
        return
    run = _Offloaded(is_reentrant, pins=model.device.type == "cuda")
    found = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    if not found:
        raise ModelError(
            f"{type(model).__name__} recomputes activations in a way of its own, which cannot keep "
            "them in host memory. Remove use_unsloth_gc."
        )
    for module in found:
        module._gradient_checkpointing_func = run


class _Offloaded:
    """torch's checkpoint whose saved inputs are copied to host memory until backward."""

    def __init__(self, is_reentrant: bool, *, pins: bool) -> None:
        self.keywords: dict[str, Any] = {"use_reentrant": is_reentrant}
        self.pins = pins

    def __call__(self, function: Any, *inputs: Any) -> Any:
        with save_on_cpu(pin_memory=self.pins):
            return checkpoint(function, *inputs, **self.keywords)
