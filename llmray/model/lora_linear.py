"""LoRA's product beside a linear layer as one operation, and folded into the weight for sampling.

`use` gives peft's plain layers a forward of their own; what it does not know goes peft's way.
Narrow matrices decide its form: a product whose result has as many columns as the rank takes a
multiple of the time of its transpose in common kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_FOLDED_BYTES = 512 * 2**20  # of weights that are kept a second time while sampling


class _Product(torch.autograd.Function):
    """x W^T + bias + scaling * (x A^T) B^T for a frozen W; all of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        hidden = F.linear(flat, a)  # (T, r)
        result = F.linear(flat, weight, bias).addmm_(hidden, b.t(), alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, hidden)
        ctx.scale, ctx.shape = scale, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, hidden = ctx.saved_tensors
        slope = slope.reshape(-1, slope.shape[-1])
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            of_hidden = F.linear(slope, b.t().contiguous()).mul_(ctx.scale)  # (T, r)
            if ctx.needs_input_grad[3]:
                of_a = of_hidden.t() @ flat
            if ctx.needs_input_grad[0]:
                of_x = (slope @ weight).addmm_(of_hidden, a).view(ctx.shape)
        if ctx.needs_input_grad[4]:
            of_b = (hidden.t() @ slope).mul_(ctx.scale).t()
        return of_x, None, None, of_a, of_b, None


class LoraLinear(Linear):
    """peft's layer with one operation in place of six, wherever nothing else is asked for."""

    llmray_folded: Tensor | None = None  # the weight with the product added, while sampling

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As peft's."""
        base = self.base_layer
        if self.llmray_folded is not None:
            return F.linear(x, self.llmray_folded, base.bias)
        if self._disable_adapters and not self.merged:
            bare: Tensor = base(x, *args, **kwargs)
            return bare
        name = None if args or kwargs else self._plain()
        if name is None:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        same = x.dtype == base.weight.dtype == a.dtype == b.dtype
        if not same or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return _Product.apply(x, base.weight, base.bias, a, b, self.scaling[name])

    def _plain(self) -> str | None:
        """The adapter at work, where it is one of the plain kind; None where peft is to know."""
        if self._disable_adapters or self.merged or len(self._active_adapter_names()) != 1:
            return None
        [name] = self._active_adapter_names()
        if name not in self.lora_A or name in self.lora_variant:
            return None
        dropout, base = self.lora_dropout[name], self.base_layer
        drops = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
        first, second = self.lora_A[name], self.lora_B[name]
        parts = (base, first, second)
        if drops or second.bias is not None or base.weight.requires_grad:
            return None
        return name if all(map(_is_bare, parts)) else None

    def _active_adapter_names(self) -> list[str]:
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)


def use(tuned: nn.Module) -> None:
    """Let the layers of peft's model that are plain LoRA compute in one operation."""
    for module in tuned.modules():
        if type(module) is Linear and not module.fan_in_fan_out:
            module.__class__ = LoraLinear


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Inside, without gradient, the weights are those with the product added, where they are small.

    A layer then costs what it costs without an adapter; what comes out differs by rounding.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    names = [layer._plain() for layer in layers]
    weights = [layer.base_layer.weight for layer in layers]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if size > MOST_FOLDED_BYTES or None in names:
        yield
        return
    try:
        for layer, name, weight in zip(layers, names, weights, strict=True):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            if a.dtype == b.dtype == weight.dtype == torch.float32:
                layer.llmray_folded = torch.addmm(weight, b, a, alpha=layer.scaling[name])
        yield
    finally:
        for layer in layers:
            layer.llmray_folded = None


def _is_bare(module: nn.Module) -> bool:
    """Whether a linear layer is nothing but its weight: no hooks, not split over processes."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not hasattr(module.weight, "ds_id")  # of deepspeed
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )
