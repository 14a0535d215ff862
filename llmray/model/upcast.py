"""Single parts of a model in float32: its normalisation layers, and the output of its head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmray.model.attention import causal_lm


def upcast_norms(model: nn.Module) -> int:
    """Keep the weights of normalisation layers in float32; their outputs keep the input's dtype.

    Returns: how many parameters were changed.
    """
    number = 0
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if "norm" not in type(module).__name__.lower() or not own:
            continue
        low = [p for p in own.values() if p.is_floating_point() and p.dtype.itemsize < 4]
        for parameter in low:
            parameter.data = parameter.data.float()
        if low:
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave)
        number += len(low)
    return number


def upcast_logits(model: nn.Module) -> None:
    """Let what the output layer gives go on in float32."""
    head = causal_lm(model).get_output_embeddings()
    if head is not None:
        head.register_forward_hook(lambda module, args, output: output.float())


def _enter(module: Any, args: Any) -> Any:
    if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return None
    module.llmray_dtype = args[0].dtype
    return (args[0].float(), *args[1:])


def _leave(module: Any, args: Any, output: Any) -> Any:
    """Without it a sum with this output, or a product outside of autocast, would be in float32."""
    return output.to(module.llmray_dtype) if isinstance(output, Tensor) else output
