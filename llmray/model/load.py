"""A model from a local folder: number format, positions, kernels, device, recomputed activations.

Where the folder comes from is `hub`'s business; which parameters train is `tuning`'s.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from logging import getLogger
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmray import hub
from llmray.arguments import derived
from llmray.arguments.model import ModelArguments
from llmray.errors import LlmrayError, ModelError
from llmray.model import converted, embedding, kernels, mapped, pickled, quantize, rope
from llmray.model.quiet import quiet
from llmray.model.recompute import recompute_activations
from llmray.model_code import optional_imports

log = getLogger("llmray")

DAMAGED = (SafetensorError, UnpicklingError, EOFError)


def load_config(model_dir: Path | str, model_args: ModelArguments) -> PretrainedConfig:
    """The configuration of the model in a folder; no weights are read.

    Raises:
        ModelError: if there is none, or it is not one that transformers knows.
    """
    _require_config(Path(model_dir))
    try:
        with quiet(), optional_imports():
            return AutoConfig.from_pretrained(
                model_dir, trust_remote_code=model_args.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise _unreadable(Path(model_dir), error) from error


def load_model(
    model_dir: Path | str,
    model_args: ModelArguments,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gradient_checkpointing: bool,
    cutoff_len: int | None = None,
    is_shared: bool = False,
) -> PreTrainedModel:
    """The causal language model of a folder with rows for the run's tokens, in eval mode.

    Args:
        model_dir: from `hub.resolve`.
        model_args: which attention, in how many bits, whether from scratch, whether code may run.
        dtype: of all weights.
        device: where they go.
        gradient_checkpointing: recompute activations in the backward pass.
        cutoff_len: the longest row in tokens; required where rope_scaling is given.
        is_shared: others on this node load the same and leave it as it is: what has to be
            converted on a CPU is converted once.

    Raises:
        ModelError: if a file is missing or damaged, or the architecture cannot do what is asked.
        ArgumentsError: if a key asks for what this device or this model has not, or the keys of
            added tokens are wrong.
    """
    directory = Path(model_dir)
    derived.check_device(model_args.device_map, str(device))
    choice = kernels.prepare(model_args.flash_attn, device, dtype)
    config = load_config(directory, model_args)
    adapters = _adapters(model_args)
    is_stretched = rope.configure(config, model_args.rope_scaling, cutoff_len, adapters)
    if model_args.trust_remote_code:
        log.warning("trust_remote_code: Python code in %s may run", directory)
    own = choice.kernel.own
    read = partial(_read, config=config, args=model_args, attention=own, dtype=dtype, device=device)
    shares = is_shared and device.type == "cpu" and _is_plain(config, model_args)
    source = converted.folder(directory, dtype, read) if shares else directory
    model = _placed(read(source), dtype, device)
    mapped.note(model, directory)
    model.llmray_directory = directory
    # what adapters and model cards name as their base: not the place of a cache
    model.name_or_path = model_args.model_name_or_path or str(directory)
    model.config._name_or_path = model.name_or_path
    model.llmray_is_stretched = is_stretched  # what an adapter of it records
    rope.make_stateless(model)
    embedding.fit(model, directory, model_args)
    kernels.adopt(model, model_args.flash_attn, choice)
    if model_args.enable_liger_kernel:
        kernels.use_liger(model, model_args.liger_kernel_config)
    if gradient_checkpointing:
        recompute_activations(
            model,
            is_reentrant=bool(model_args.use_reentrant_gc),
            offloads=model_args.use_unsloth_gc,
        )
    return model


def load_ordinary(directory: Path | str, model_args: ModelArguments) -> PreTrainedModel:
    """The model of a folder as its files have it, on the CPU, to read its weights.

    Args:
        directory: of ordinary weights.
        model_args: whether code may run; nothing else of it counts.

    Raises:
        ModelError: as `load_model`.
    """
    folder = Path(directory)
    config = load_config(folder, model_args)
    settings = {"dtype": "auto", "trust_remote_code": model_args.trust_remote_code}
    try:
        with quiet(), optional_imports():
            pickled.require_safe(folder, model_args)
            return _from_files(folder, config, torch.device("cpu"), settings)
    except (OSError, ValueError, RuntimeError, ImportError, *DAMAGED) as error:
        raise _unreadable(folder, error) from error


def _adapters(model_args: ModelArguments) -> list[Path]:
    """The folders of the adapters that lie on the model."""
    names = model_args.adapter_name_or_path
    return [Path(hub.resolve(name, model_args, kind="adapter")) for name in names]


def _placed(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model on its device, in eval mode."""
    if quantize.is_low_bit(model):  # lies where it was quantised
        quantize.settle(model, dtype)
        return model.eval()
    return model.to(device).eval()


def _read(
    directory: Path,
    *,
    config: PretrainedConfig,
    args: ModelArguments,
    attention: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The model with the folder's weights, in low bits where asked for, or with weights of its own.

    `attention` is transformers' name of what computes it, None for the model's own choice.
    """
    config = deepcopy(config)  # which reading may change
    settings: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "trust_remote_code": args.trust_remote_code,
    }
    try:
        with quiet(), optional_imports():
            if args.train_from_scratch:
                config.__dict__.pop("quantization_config", None)  # of weights that are not read
                return AutoModelForCausalLM.from_config(config, **settings)
            pickled.require_safe(directory, args)
            low_bit = quantize.settings(config, args, dtype=dtype, device=device)
            return _from_files(directory, config, device, settings | low_bit)
    except (OSError, ValueError, RuntimeError, ImportError, *DAMAGED) as error:
        raise _unreadable(directory, error) from error


def _is_plain(config: PretrainedConfig, model_args: ModelArguments) -> bool:
    """Whether the model is that of its files, weight by weight, and needs no code beside them."""
    others = (
        model_args.is_quantized,
        model_args.train_from_scratch,
        model_args.trust_remote_code,
        getattr(config, "quantization_config", None),
    )
    return not any(others)


def _from_files(
    directory: Path, config: PretrainedConfig, device: torch.device, settings: dict[str, Any]
) -> PreTrainedModel:
    if device.type == "cuda":  # straight to the device, shard by shard
        settings = {"device_map": {"": device}, **settings}
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, config=config, output_loading_info=True, local_files_only=True, **settings
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of the model's weights, first {missing[0]}. Whole "
            "weights are required: complete the folder, or set train_from_scratch: true."
        )
    return model


def _require_config(directory: Path) -> None:
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is no folder. A folder with config.json and weights is required: "
            "correct model_name_or_path."
        )
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} has no config.json. A folder in Hugging Face's format is required: "
            "complete it, or correct model_name_or_path."
        )


def _unreadable(directory: Path, error: Exception) -> LlmrayError:
    if isinstance(error, LlmrayError):
        return error
    first_line = str(error).strip().split("\n")[0]
    if isinstance(error, DAMAGED):
        return ModelError(
            f"a weight file in {directory} is damaged, or holds more than weights ({first_line}). "
            "Whole files of weights are required: fetch the model again."
        )
    return ModelError(
        f"{directory} cannot be loaded: {first_line}. A causal language model that transformers "
        "knows is required: check the folder, flash_attn and trust_remote_code."
    )
