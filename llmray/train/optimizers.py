"""Optimizers, learning-rate schedules and parameter groups: rows of two tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from llmray.arguments.optimizer import OptimizerArguments

Factor = Callable[[int], float]


@dataclass(frozen=True)
class Horizon:
    """How long a schedule runs, in optimizer updates."""

    total_steps: int
    warmup_steps: int


def adamw(groups: list[dict[str, object]], arguments: OptimizerArguments, fused: bool) -> object:
    """Decoupled weight decay Adam, https://arxiv.org/abs/1711.05101."""
    return torch.optim.AdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
        fused=fused,
        foreach=None if fused else True,
    )


OPTIMIZERS: dict[str, Callable[[list[dict[str, object]], OptimizerArguments], object]] = {
    "adamw_torch": lambda groups, arguments: adamw(groups, arguments, fused=False),
    "adamw_torch_fused": lambda groups, arguments: adamw(groups, arguments, fused=True),
}


def _warm(step: int, horizon: Horizon) -> float:
    return step / max(1, horizon.warmup_steps)


def _progress(step: int, horizon: Horizon) -> float:
    span = max(1, horizon.total_steps - horizon.warmup_steps)
    return min(1.0, (step - horizon.warmup_steps) / span)


SCHEDULES: dict[str, Callable[[int, Horizon], float]] = {
    "constant": lambda step, horizon: 1.0,
    "constant_with_warmup": lambda step, horizon: 1.0,
    "linear": lambda step, horizon: 1.0 - _progress(step, horizon),
    "cosine": lambda step, horizon: 0.5 * (1.0 + math.cos(math.pi * _progress(step, horizon))),
}


def warmup_steps(arguments: OptimizerArguments, total_steps: int) -> int:
    """The length of the warm-up in updates; a ratio is rounded up, and whole steps win over it."""
    steps = arguments.warmup_steps or 0
    if steps >= 1:
        return int(steps)
    ratio = steps or arguments.warmup_ratio or 0.0
    return math.ceil(total_steps * ratio)


def schedule(arguments: OptimizerArguments, total_steps: int) -> Factor:
    """The factor of the learning rate at a step (0 for the first update) of `total_steps`."""
    name = arguments.lr_scheduler_type
    warms_up = name != "constant"
    horizon = Horizon(total_steps, warmup_steps(arguments, total_steps) if warms_up else 0)
    after_warmup = SCHEDULES[name]

    def factor(step: int) -> float:
        if step < horizon.warmup_steps:
            return _warm(step, horizon)
        return after_warmup(step, horizon)

    return factor


def parameter_groups(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    """Two groups: parameters that decay, and norms and biases, which do not."""
    norms = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for own, _ in module.named_parameters(recurse=False)
    }

    def decays(name: str) -> bool:
        return name not in norms and name.rsplit(".", 1)[-1] != "bias"

    groups = [
        {"params": [p for n, p in trainable.items() if decays(n)], "weight_decay": weight_decay},
        {"params": [p for n, p in trainable.items() if not decays(n)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], arguments: OptimizerArguments
) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, over `trainable` (names as in `model`)."""
    groups = parameter_groups(model, trainable, arguments.weight_decay)
    optimizer = OPTIMIZERS[arguments.optim](groups, arguments)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
