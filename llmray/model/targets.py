"""Where a low-rank adapter goes: `lora_target` as modules and parameters of a model.

A name stands for all modules that end with it; a name with signs of a regular expression is one,
for the whole name. The matrices of a mixture's experts are parameters, not modules, and are named
like them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from logging import getLogger

from torch import nn
from transformers import PreTrainedModel

from llmray.errors import ArgumentsError
from llmray.model.layers import linear_modules, nearest

log = getLogger("llmray")

SIGNS = frozenset("*+?[](){}|^$\\")  # of these a name that is no regular expression has none


@dataclass(frozen=True)
class Targets:
    """What gets an adapter, as peft's configuration takes it.

    `modules` are names, or last parts of names, of modules; `parameters` are whole names.
    """

    modules: list[str]
    parameters: list[str]


def find(model: PreTrainedModel, names: tuple[str, ...]) -> Targets:
    """The targets that `names` of lora_target stand for.

    `all` is every linear module but the head; further names come on top of it.

    Raises:
        ArgumentsError: if a name or expression matches nothing.
    """
    linear = linear_modules(model)
    known, experts = {*linear, *_others(model)}, expert_parameters(model)
    modules: set[str] = set()
    parameters: set[str] = set()
    for name in names:
        if name == "all":
            modules |= _all(model, linear)
            continue
        found = set(matching(name, known))
        reached = set(matching(name, experts)) | set(_inside(name, experts))
        if not found and not reached:
            raise _no_such("lora_target", name, {*known, *experts})
        if is_expression(name):
            modules |= found
            parameters |= reached
        elif found:
            modules.add(name)
        else:
            parameters |= reached
    _tell_of_experts(model, {name: p for name, p in experts.items() if name not in parameters})
    return Targets(sorted(modules), sorted(parameters))


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The joint matrices of experts, of three dimensions, by their full names."""
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def is_expression(name: str) -> bool:
    """Whether a name is a regular expression; dots alone do not make it one."""
    return bool(SIGNS & set(name))


def matching(name: str, known: Iterable[str]) -> Iterator[str]:
    """Those of the `known` names that are `name`, end with it, or match it as a whole."""
    if is_expression(name):
        pattern = _compiled(name)
        return (full for full in known if pattern.fullmatch(full))
    return (full for full in known if full == name or full.endswith(f".{name}"))


def require_modules(key: str, names: Iterable[str], known: set[str]) -> None:
    """Raise ArgumentsError where one of `names` of `key` is no module, nor the end of one."""
    for name in names:
        if next(matching(name, known), None) is None:
            raise _no_such(key, name, known)


def _others(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Head and embeddings, which get an adapter where they are named."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if module is head or isinstance(module, nn.Embedding)
    }


def _all(model: PreTrainedModel, linear: Mapping[str, nn.Module]) -> set[str]:
    """Last parts of the linear modules' names, or whole names where those would reach others."""
    short = {name.rpartition(".")[2] for name in linear}
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in linear}
    return set(linear) if short & others else short


def _inside(name: str, experts: Iterable[str]) -> Iterator[str]:
    """The matrices of the module that `name` is: `experts` names them all."""
    if is_expression(name):
        return iter(())
    owners = {full: full.rpartition(".")[0] for full in experts}
    return (full for full, owner in owners.items() if f".{owner}".endswith(f".{name}"))


def _tell_of_experts(model: PreTrainedModel, left: Mapping[str, nn.Parameter]) -> None:
    if not left:
        return
    share = sum(p.numel() for p in left.values()) / sum(p.numel() for p in model.parameters())
    names = sorted({".".join(name.split(".")[-2:]) for name in left})
    log.info(
        "lora_target: the experts' joint matrices (%.0f %% of the weights) are no linear modules "
        "and get no adapter; %s would add them",
        100 * share,
        ", ".join(names),
    )


def _no_such(key: str, name: str, known: set[str]) -> ArgumentsError:
    short = {full.rpartition(".")[2] for full in known}
    listed = ", ".join(sorted(part for part in short if not part.isdecimal()))
    if is_expression(name):
        return ArgumentsError(
            f"{key}={name}: the expression matches no module. It must match a whole name, such as "
            f"{min(known)}; last parts of names are {listed}."
        )
    return ArgumentsError(
        f"{key}={name}: the model has no such module.{nearest(name, short)} Name some of {listed}."
    )


def _compiled(name: str) -> re.Pattern[str]:
    try:
        return re.compile(name)
    except re.error as error:
        raise ArgumentsError(
            f"{name} is no regular expression ({error}). A name, or an expression that matches "
            "whole names of modules, is required."
        ) from error
