"""Which parameters train: all (full), some layers (freeze), or an adapter beside them (lora).

`apply` also loads and merges adapters, and gives trainable parameters their number format. The
libraries of adapters are imported only where one is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from logging import getLogger
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmray.arguments.run import RunArguments
from llmray.errors import ArgumentsError
from llmray.model import adapters, embedding, quantize
from llmray.model.layers import decoder_layers, nearest

log = getLogger("llmray")


def apply(
    model: PreTrainedModel,
    arguments: RunArguments,
    *,
    is_trainable: bool,
    upcast: bool,
    keeps_last: bool = False,
) -> nn.Module:
    """`model` ready to train as `finetuning_type` says, or to answer.

    Args:
        model: freshly loaded.
        arguments: of the run.
        is_trainable: False merges every adapter into the model, of which nothing trains.
        upcast: keep what trains in float32, whatever the dtype of the rest.
        keeps_last: where nothing trains, do not merge the last adapter, which can be switched off.

    Raises:
        ArgumentsError: if a key names a module that the model does not have.
        ModelError: if an adapter is missing, damaged or made for another model.
    """
    model.requires_grad_(False)
    names = arguments.model.adapter_name_or_path
    if not is_trainable:
        if names and keeps_last:
            base = adapters.merge(model, names[:-1], arguments.model)
            return adapters.beside(base, names[-1], arguments.model)
        return adapters.merge(model, names, arguments.model)
    quantize.require_adapter(model, arguments.finetuning.finetuning_type)
    tuned = TUNING[arguments.finetuning.finetuning_type](model, arguments)
    found = trainable(tuned)
    if not found:
        raise ArgumentsError(
            "nothing trains: freeze_trainable_layers is 0 and freeze_extra_modules names nothing. "
            "At least one parameter is required: set one of the two."
        )
    embedding.warn_if_frozen(model)
    if upcast:
        for parameter in found.values():
            parameter.data = parameter.data.float()
    elif quantize.is_low_bit(model):  # beside low-bit weights adapters are made in float32
        for parameter in found.values():
            parameter.data = parameter.data.to(model.dtype)
    _report(tuned, is_detailed=arguments.model.print_param_status)
    return tuned


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def status(model: nn.Module, value_head: nn.Module | None = None) -> dict[str, Any]:
    """Which parameters train: counts, share, counts by dtype, and each one's shape and dtype.

    Those of a value head that stands beside the model are called `value_head.…`.
    """
    whole = dict(model.named_parameters())
    if value_head is not None:
        whole |= {f"value_head.{name}": p for name, p in value_head.named_parameters()}
    found = {name: p for name, p in whole.items() if p.requires_grad}
    dtypes = {"trains": Counter[str](), "frozen": Counter[str]()}
    for parameter in whole.values():
        kind = "trains" if parameter.requires_grad else "frozen"
        dtypes[kind][_name(parameter.dtype)] += quantize.num_weights(parameter)
    count, total = dtypes["trains"].total(), sum(n.total() for n in dtypes.values())
    return {
        "trainable": count,
        "total": total,
        "share": count / max(1, total),
        "trainable_by_dtype": dict(dtypes["trains"]),
        "frozen_by_dtype": dict(dtypes["frozen"]),
        "parameters": {
            name: {"shape": list(p.shape), "dtype": _name(p.dtype)} for name, p in found.items()
        },
    }


def _full(model: PreTrainedModel, arguments: RunArguments) -> nn.Module:
    model = adapters.merge(model, arguments.model.adapter_name_or_path, arguments.model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return model


def _freeze(model: PreTrainedModel, arguments: RunArguments) -> nn.Module:
    model = adapters.merge(model, arguments.model.adapter_name_or_path, arguments.model)
    settings = arguments.finetuning
    prefix, layers = decoder_layers(model)
    number = settings.freeze_trainable_layers
    if abs(number) > len(layers):
        raise ArgumentsError(
            f"freeze_trainable_layers={number}, but the model has {len(layers)} layers. At most "
            "as many are required; finetuning_type: full trains all."
        )
    chosen = list(layers)[-number:] if number > 0 else list(layers)[:-number]
    names = settings.freeze_trainable_modules
    known = {name for layer in layers for name, _ in layer.named_children()}
    if "all" in names:
        names = tuple(sorted(known))
    _require_known("freeze_trainable_modules", names, {*known, "all"})
    for layer in chosen:
        for name, module in layer.named_children():
            if name in names:
                module.requires_grad_(True)
        if "all" in settings.freeze_trainable_modules:
            layer.requires_grad_(True)  # parameters of the layer itself as well
    outside = _modules_outside(model, prefix)
    _require_known("freeze_extra_modules", settings.freeze_extra_modules, set(outside))
    for name in settings.freeze_extra_modules:
        for module in outside[name]:
            module.requires_grad_(True)
    return model


def _lora(model: PreTrainedModel, arguments: RunArguments) -> nn.Module:
    names, finetuning = arguments.model.adapter_name_or_path, arguments.finetuning
    if names and not finetuning.create_new_adapter:
        base = adapters.merge(model, names[:-1], arguments.model)
        return adapters.resume(base, names[-1], arguments)
    return adapters.create(adapters.merge(model, names, arguments.model), arguments)


TUNING: dict[str, Callable[[PreTrainedModel, RunArguments], nn.Module]] = {
    "full": _full,
    "freeze": _freeze,
    "lora": _lora,
}


def _modules_outside(model: PreTrainedModel, prefix: str) -> dict[str, list[nn.Module]]:
    """Modules with parameters of their own outside the layers, by the last part of their name."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        is_inside = name == prefix or name.startswith(f"{prefix}.")
        if not is_inside and next(module.parameters(recurse=False), None) is not None:
            found.setdefault(name.rpartition(".")[2], []).append(module)
    return found


def _require_known(key: str, names: tuple[str, ...], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ArgumentsError(
                f"{key}={name}: the model has no such module.{nearest(name, known)} Name some of "
                f"{', '.join(sorted(known))}."
            )


def _report(model: nn.Module, *, is_detailed: bool) -> None:
    if is_detailed:
        for name, p in model.named_parameters():
            state = "trains" if p.requires_grad else "frozen"
            log.info("%s %s %s %s %s", name, tuple(p.shape), _name(p.dtype), p.device, state)
    told = status(model)
    frozen = sorted(told["frozen_by_dtype"])
    rest = f"; the rest is {', '.join(frozen)}" if frozen else ""
    log.info(
        "%s of %s parameters train (%.2f %%), in %s%s",
        f"{told['trainable']:,}",
        f"{told['total']:,}",
        100 * told["share"],
        ", ".join(sorted(told["trainable_by_dtype"])),
        rest,
    )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
