"""Optimizers and parameter groups: rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from llmray.arguments.optimizer import OptimizerArguments
from llmray.arguments.settings import optimizer_settings

Groups = list[dict[str, Any]]


def adamw(groups: Groups, arguments: OptimizerArguments, *, fused: bool) -> torch.optim.Optimizer:
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


def adafactor(groups: Groups, arguments: OptimizerArguments) -> torch.optim.Optimizer:
    """Adafactor at the schedule's rate, https://arxiv.org/abs/1804.04235; transformers' own class.

    Configured as transformers' Trainer does: no steps of its own choosing, no scaling by weights.
    """
    from transformers.optimization import Adafactor

    made = Adafactor(groups, lr=arguments.learning_rate, relative_step=False, **_own(arguments))
    assert isinstance(made, torch.optim.Optimizer)
    return made


def _own(arguments: OptimizerArguments) -> dict[str, Any]:
    """The settings in `optim_args` and the defaults of the rest."""
    return optimizer_settings(arguments).model_dump()


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerArguments], torch.optim.Optimizer]] = {
    "adamw_torch": lambda groups, arguments: adamw(groups, arguments, fused=False),
    "adamw_torch_fused": lambda groups, arguments: adamw(groups, arguments, fused=True),
    "adafactor": adafactor,
    "sgd": lambda groups, arguments: torch.optim.SGD(
        groups, lr=arguments.learning_rate, **_own(arguments)
    ),
    "adagrad": lambda groups, arguments: torch.optim.Adagrad(
        groups, lr=arguments.learning_rate, **_own(arguments)
    ),
    "rmsprop": lambda groups, arguments: torch.optim.RMSprop(
        groups, lr=arguments.learning_rate, **_own(arguments)
    ),
}


def parameter_groups(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], weight_decay: float
) -> Groups:
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
    return OPTIMIZERS[arguments.optim](groups, arguments)
