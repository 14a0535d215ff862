"""Low-rank adapters through peft: make a new one, load the last one to train on, merge others.

https://arxiv.org/abs/2106.09685, rank-stabilised: https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmray import hub
from llmray.arguments.model import ModelArguments
from llmray.arguments.run import RunArguments
from llmray.errors import ArgumentsError, ModelError
from llmray.model.layers import linear_modules, nearest

if TYPE_CHECKING:
    from peft import PeftModel

log = getLogger("llmray")


def create(model: PreTrainedModel, arguments: RunArguments) -> PeftModel:
    """`model` with a new adapter that trains; it changes nothing yet, its B matrices are zero.

    The adapter's random half depends on the run's seed alone.

    Raises:
        ArgumentsError: if lora_target or additional_target name a module that is not there.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    settings = arguments.finetuning
    targets = _targets(model, settings.lora_target)
    whole = _whole_modules(model, settings.additional_target)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear_modules(model).values()),
        target_modules=targets,
        modules_to_save=list(whole) or None,
        ensure_weight_tying=_would_untie(model, whole),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _no_advice():
        torch.manual_seed(arguments.training.seed)
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    # get_peft_model puts the folder here, which may lie in a cache
    tuned.peft_config["default"].base_model_name_or_path = arguments.model.model_name_or_path
    return tuned


def resume(model: PreTrainedModel, name: str, arguments: RunArguments) -> PeftModel:
    """`model` with the adapter of a folder or hub name, which trains on.

    Raises:
        ModelError: if it is missing, damaged or made for another model.
    """
    tuned = _load(model, name, arguments.model, is_trainable=True)
    config = tuned.peft_config["default"]
    log.info(
        "training on adapter %s: rank %s, alpha %s, as it was saved",
        name,
        config.r,
        config.lora_alpha,
    )
    return tuned


def merge(
    model: PreTrainedModel, names: Sequence[str], model_args: ModelArguments
) -> PreTrainedModel:
    """`model` with all the adapters added into its weights, in order; nothing trains.

    Raises:
        ModelError: as `resume`.
    """
    for name in names:
        merged = _load(model, name, model_args, is_trainable=False).merge_and_unload()
        merged.requires_grad_(False)
        log.info("merged adapter %s", name)
        model = merged
    return model


def _load(
    model: PreTrainedModel, name: str, model_args: ModelArguments, *, is_trainable: bool
) -> PeftModel:
    from peft import PeftModel

    directory = hub.resolve(name, model_args, kind="adapter")
    try:
        with _no_advice():
            return PeftModel.from_pretrained(
                model, directory, is_trainable=is_trainable, autocast_adapter_dtype=False
            )
    except SafetensorError as error:
        raise ModelError(
            f"the adapter file in {directory} is damaged ({error}). A whole "
            "adapter_model.safetensors is required: correct adapter_name_or_path."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"the adapter in {directory} does not fit the model: {' '.join(lines[:2])}. An adapter "
            "of this very model is required: correct adapter_name_or_path or model_name_or_path."
        ) from error


def _targets(model: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    linear = linear_modules(model)
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    if "all" not in names:
        _require_modules("lora_target", names, {*linear, *heads})
        return list(names)
    short = {name.rpartition(".")[2] for name in linear}
    if short & {name.rpartition(".")[2] for name in heads}:
        return sorted(linear)  # a last part alone would reach the head too
    experts = [p for p in model.parameters() if p.dim() == 3]
    if experts:
        share = sum(p.numel() for p in experts) / sum(p.numel() for p in model.parameters())
        log.info(
            "lora_target all: the experts' joint matrices (%.0f %% of the weights) are no linear "
            "modules and get no adapter",
            100 * share,
        )
    return sorted(short)


def _whole_modules(model: PreTrainedModel, names: tuple[str, ...]) -> tuple[str, ...]:
    known = {name for name, module in model.named_modules() if name and list(module.parameters())}
    _require_modules("additional_target", names, known)
    return names


def _require_modules(key: str, names: tuple[str, ...], known: set[str]) -> None:
    """Each name must be a module's whole name or its last parts, as peft matches them."""
    short = {name.rpartition(".")[2] for name in known}
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in known):
            listed = ", ".join(sorted(part for part in short if not part.isdecimal()))
            raise ArgumentsError(
                f"{key}={name}: the model has no such module.{nearest(name, short)} Name some of "
                f"{listed}."
            )


def _would_untie(model: PreTrainedModel, whole: tuple[str, ...]) -> bool:
    """Whether a module that is to train whole shares its weight with the embedding or the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding is None or embedding.weight is not head.weight:
        return False
    return any(
        module in (embedding, head) and any(f".{full}".endswith(f".{name}") for name in whole)
        for full, module in model.named_modules()
    )


@contextmanager
def _no_advice() -> Iterator[None]:
    """Inside, peft's use of names that transformers is about to rename is not the user's news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
