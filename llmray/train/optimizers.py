"""Optimizers and parameter groups: rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from llmray.arguments.finetuning import FinetuningArguments
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
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    arguments: OptimizerArguments,
    tuning: FinetuningArguments,
) -> Groups:
    """Groups by learning rate and by whether they decay; norms and biases do not.

    With LoRA+ (https://arxiv.org/abs/2402.12354) the B matrices, and adapters of embeddings, have
    rates of their own; these groups have a `name`. Other groups come first.
    """
    norms = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for own, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for kind, rate in _rates(arguments, tuning).items():
        named = {"name": kind, "lr": rate} if kind else {}
        for decays in (True, False):
            decay = arguments.weight_decay if decays else 0.0
            groups[kind, decays] = {"params": [], "weight_decay": decay, **named}
    for name, parameter in trainable.items():
        decays = name not in norms and name.rsplit(".", 1)[-1] != "bias"
        kind = _kind(name) if tuning.loraplus_lr_ratio is not None else ""
        groups[kind, decays]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _rates(arguments: OptimizerArguments, tuning: FinetuningArguments) -> dict[str, float]:
    """The learning rate of each kind of parameter; the kind without a name has the run's own."""
    rate = arguments.learning_rate
    if tuning.loraplus_lr_ratio is None:
        return {"": rate}
    return {
        "": rate,
        "lora_B": rate * tuning.loraplus_lr_ratio,
        "embedding": tuning.loraplus_lr_embedding,
    }


def _kind(name: str) -> str:
    if ".lora_embedding_" in name:
        return "embedding"
    return "lora_B" if ".lora_B." in name else ""


def build(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    arguments: OptimizerArguments,
    tuning: FinetuningArguments | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, over `trainable` (names as in `model`)."""
    groups = parameter_groups(model, trainable, arguments, tuning or FinetuningArguments())
    return OPTIMIZERS[arguments.optim](groups, arguments)
