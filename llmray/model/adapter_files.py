"""Whether an adapter's files fit a model, and each other; read from their headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from logging import getLogger
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmray.errors import ModelError
from llmray.model.layers import nearest

if TYPE_CHECKING:
    from peft import LoraConfig

log = getLogger("llmray")

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

Shapes = Mapping[str, tuple[int, ...]]


def check(model: PreTrainedModel, directory: Path, config: LoraConfig) -> None:
    """Compare an adapter's matrices with the modules they are for, and with its own settings.

    Raises:
        ModelError: names the first module that is missing or of another size, and says where an
            adapter's rank or vocabulary is another than that of its settings or of the model.
        SafetensorError: if the file is damaged.
    """
    shapes = _shapes(directory / WEIGHTS)
    modules = {name: m for name, m in model.named_modules() if not name.endswith(".base_layer")}
    _require_modules(shapes, modules, directory)
    for name, module, kind, shape in _matrices(shapes, modules):
        found, expected = _sizes(module, kind, shape)
        if found != expected:
            raise _other_size(model, directory, name, module, found, expected)
        rank = shape[1 if kind.endswith("B") else 0]
        if kind in ("lora_A", "lora_B") and found is not None and rank != _rank(config, name):
            raise ModelError(
                f"the adapter in {directory} says rank {_rank(config, name)} in "
                f"adapter_config.json, and its matrices for {name} have rank {rank}. Files of one "
                "adapter are required: fetch or save it again."
            )
    _tell_of_base(model, directory, config)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _split(name: str) -> tuple[str, str]:
    """The module's name in the model and what the tensor is of it: lora_A, weight and so on."""
    bare = name.removeprefix(PREFIX)
    match = re.fullmatch(r"(.*)\.(lora_\w+?)(\.weight|\.bias)?", bare)
    if match is None:
        owner, _, own = bare.rpartition(".")
        return owner.removesuffix(".base_layer"), own  # an embedding beside its own adapter
    owner = match[1]
    while owner.endswith(".base_layer"):  # several adapters of one module's parameters
        owner = owner.removesuffix(".base_layer")
    return owner, match[2]


def _require_modules(shapes: Shapes, modules: Mapping[str, nn.Module], directory: Path) -> None:
    missing = sorted({owner for owner, _ in map(_split, shapes)} - modules.keys())
    if missing:
        raise ModelError(
            f"the adapter in {directory} has weights for {len(missing)} modules that the model "
            f"does not have, first {missing[0]}.{nearest(missing[0], modules)} An adapter of this "
            "very model is required: correct adapter_name_or_path or model_name_or_path."
        )


def _matrices(
    shapes: Shapes, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, nn.Module, str, tuple[int, ...]]]:
    for name, shape in sorted(shapes.items()):
        owner, kind = _split(name)
        yield owner, modules[owner], kind, shape


def _sizes(
    module: nn.Module, kind: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """A tensor's size that must be the module's, and the module's; None where nothing is known."""
    inputs, outputs = _inputs_outputs(module)
    match kind:
        case "lora_A" if inputs is not None:
            return (shape[1],), (inputs,)
        case "lora_B" if outputs is not None:
            return (shape[0],), (outputs,)
        case "lora_embedding_A" if isinstance(module, nn.Embedding):
            return (shape[1],), (module.num_embeddings,)
        case "lora_embedding_B" if isinstance(module, nn.Embedding):
            return (shape[0],), (module.embedding_dim,)
        case "weight":
            own = getattr(module, "weight", None)
            return (shape, tuple(own.shape)) if isinstance(own, nn.Parameter) else (None, None)
    return None, None


def _inputs_outputs(module: nn.Module) -> tuple[int | None, int | None]:
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    if isinstance(module, nn.Linear):  # quantised ones too, whose weights are packed
        return module.in_features, module.out_features
    return None, None


def _other_size(
    model: PreTrainedModel,
    directory: Path,
    name: str,
    module: nn.Module,
    found: tuple[int, ...] | None,
    expected: tuple[int, ...] | None,
) -> ModelError:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if module in ends and found is not None and expected is not None and found[1:] == expected[1:]:
        return ModelError(
            f"the adapter in {directory} was made for a vocabulary of {found[0]} rows, and {name} "
            f"has {expected[0]}. The vocabulary of its training is required: write the keys "
            "add_tokens, add_special_tokens and resize_vocab as they were then, or name the model "
            "that has it."
        )
    return ModelError(
        f"the adapter in {directory} does not fit the model: for {name} it has a size of "
        f"{found}, the model {expected}. An adapter of this very model is required: correct "
        "adapter_name_or_path or model_name_or_path."
    )


def _rank(config: LoraConfig, name: str) -> int:
    for pattern, rank in config.rank_pattern.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return int(rank)
    return int(config.r)


def _tell_of_base(model: PreTrainedModel, directory: Path, config: LoraConfig) -> None:
    """Say so where the adapter names another model than the one it is put on."""
    theirs, ours = str(config.base_model_name_or_path or ""), str(model.name_or_path or "")
    if theirs and ours and PurePosixPath(theirs).name != PurePosixPath(ours).name:
        log.warning(
            "the adapter in %s was made for %s and is put on %s: every size fits, whether the "
            "weights are the same is not known",
            directory,
            theirs,
            ours,
        )
