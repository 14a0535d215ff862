"""Which parameters a run trains, by their names alone: for estimates, before anything is loaded.

What really trains is `tuning`'s and `adapters`' business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmray.arguments.finetuning import FinetuningArguments
from llmray.model.architecture import (
    Decoder,
    Shapes,
    is_expert,
    is_linear,
    joint_name,
    layer_of,
    module_of,
)


@dataclass(frozen=True)
class Trained:
    """Parameters of the model that train, values of adapters, and the modules that have one."""

    own: Shapes = field(default_factory=dict)
    adapted: Shapes = field(default_factory=dict)  # weights of modules with an adapter
    num_adapter: int = 0

    @property
    def first_layer(self) -> int:
        """The first layer that backward reaches; 0 where the embedding trains."""
        names = [*self.own, *self.adapted]
        layers = [found[0] for name in names if (found := layer_of(name)) is not None]
        outside = any("embed" in name or "wte" in name for name in names)
        return 0 if outside or not layers else min(layers)

    def in_layer(self, index: int) -> Iterator[str]:
        """The modules of a layer of which the input is kept for a gradient of their weights."""
        for name, shape in {**self.own, **self.adapted}.items():
            found = layer_of(name)
            if found is not None and found[0] == index and is_linear(name, shape):
                yield module_of(found[1])


def what_trains(tuning: FinetuningArguments, model: Decoder, table: Shapes) -> Trained:
    """The parameters that train by finetuning_type and its keys."""
    if tuning.finetuning_type == "full":
        return Trained(own=dict(table))
    if tuning.finetuning_type == "freeze":
        return Trained(own=_unfrozen(tuning, model, table))
    adapted = {n: s for n, s in table.items() if _is_target(tuning, n, s)}
    ranks = {n: _rank(tuning, module_of(n)) for n in adapted}
    number = sum(
        math.prod(s[:-2]) * ranks[n] * (s[-1] + s[-2]) + (s[-2] if tuning.use_dora else 0)
        for n, s in adapted.items()
    )
    names = tuning.additional_target
    whole = {
        n: s for n, s in table.items() if any(_ends_with(module_of(n), name) for name in names)
    }
    return Trained(own=whole, adapted=adapted, num_adapter=number)


def _unfrozen(tuning: FinetuningArguments, model: Decoder, table: Shapes) -> Shapes:
    number, layers = tuning.freeze_trainable_layers, range(model.num_layers)
    chosen = set(layers[-number:] if number > 0 else layers[:-number] if number else ())
    modules, extra = tuning.freeze_trainable_modules, tuning.freeze_extra_modules
    found = {}
    for name, shape in table.items():
        inside = layer_of(name)
        if inside is None:
            if any(_ends_with(module_of(name), module) for module in extra):
                found[name] = shape
        elif inside[0] in chosen and (
            "all" in modules or any(inside[1].startswith(f"{module}.") for module in modules)
        ):
            found[name] = shape
    return found


def _is_target(tuning: FinetuningArguments, name: str, shape: tuple[int, ...]) -> bool:
    if "all" in tuning.lora_target and is_linear(name, shape):
        return True
    module = module_of(name) if name.endswith(".weight") else name
    owners = {joint_name(name), module_of(joint_name(name))} if is_expert(name) else {module}
    return len(shape) >= 2 and any(
        _ends_with(owner, t) or _matches(t, owner) for owner in owners for t in tuning.lora_target
    )


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error:
        return False


def _rank(tuning: FinetuningArguments, module: str) -> int:
    for name, rank in (tuning.lora_rank_pattern or {}).items():
        if _ends_with(module, name) or _matches(name, module):
            return int(rank)
    return tuning.lora_rank
