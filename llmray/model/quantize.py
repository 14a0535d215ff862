"""Low-bit weights: quantised while a model is loaded, or found so in its files.

How each library quantises is a row of `METHODS`; which formats of checkpoints are read, and what
they need, is a row of `FORMATS`. Which parameters train beside such weights is `tuning`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from logging import ERROR, getLogger
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmray.arguments.model import ModelArguments
from llmray.errors import ArgumentsError, ModelError

log = getLogger("llmray")

# says at each product in 8 bits that float32 is multiplied in float16, as it documents
getLogger("bitsandbytes.autograd._functions").setLevel(ERROR)


@dataclass(frozen=True)
class Format:
    """A format of quantised checkpoints.

    `packages` are what reads it: the module to import, and what pip calls it. `plain` makes the
    setting by which transformers turns it into ordinary weights at loading.
    """

    packages: tuple[tuple[str, str], ...] = ()
    plain: Callable[[], Any] | None = None


def settings(
    config: PretrainedConfig,
    model_args: ModelArguments,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """What `from_pretrained` is told beside the ordinary, nothing for ordinary weights.

    Args:
        config: of the model to load.
        model_args: the keys of quantisation.
        dtype: of the arithmetic, and of the weights that keep it.
        device: of the weights.

    Raises:
        ArgumentsError: if the checkpoint is quantised already, otherwise than asked for.
        ModelError: if its format is unknown, or a package that reads it is missing.
    """
    place = "auto" if model_args.quantization_device_map else {"": device}
    found = of_checkpoint(config)
    if found is not None:
        plain = _check(found, config.quantization_config, model_args)
        return ({"quantization_config": plain()} if plain else {}) | {"device_map": place}
    if not model_args.is_quantized:
        return {}
    _require("bitsandbytes", FORMATS["bitsandbytes"])
    make = METHODS[model_args.quantization_method]
    return {"quantization_config": make(model_args, dtype), "device_map": place}


def of_checkpoint(config: PretrainedConfig) -> str | None:
    """The format that a model's configuration says its files have; None for ordinary weights.

    Raises:
        ModelError: if it says one that is not read.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    body = said if isinstance(said, dict) else said.to_dict()
    name = body.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in body else "none")
    name = str(getattr(name, "value", name))
    if name not in FORMATS:
        raise ModelError(
            f"the model's files are quantised as {name}, which is not read here. One of "
            f"{', '.join(FORMATS)} or ordinary weights are required: choose another version of "
            "the model."
        )
    return name


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a freshly loaded model of low-bit weights compute alike everywhere, and say what it is.

    Args:
        model: as loaded.
        dtype: of the arithmetic.

    Raises:
        ModelError: if nothing of it is in low bits though that was asked for, or this device
            would compute with wrong scales.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            _require_whole_blocks(name, module)
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # else a CPU with bf16 instructions repacks weights at the first evaluation, after
            # which they compute in bf16 and pass no gradient on
            module.support_avx512bf16_for_cpu = False
    name = of_checkpoint(model.config)
    if name != "bitsandbytes":
        log.info("weights in %s, as the model's files have them", name)
        return
    size = sum(num_weights(p) for p in model.parameters())
    low = sum(num_weights(p) for p in model.parameters() if not p.is_floating_point())
    if not low:
        raise ModelError(
            f"{type(model).__name__} has no linear modules that bitsandbytes could quantise. "
            "Remove quantization_bit."
        )
    log.info(
        "%.0f %% of %s weights are in low bits, the rest in %s: %.2f GB",
        100 * low / size,
        f"{size:,}",
        str(dtype).removeprefix("torch."),
        sum(p.nbytes for p in model.parameters()) / 1e9,
    )
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3 and p.is_floating_point())
    if experts:
        log.warning(
            "the experts' joint matrices, %.0f %% of the weights, are no linear modules and stay "
            "in %s",
            100 * experts / size,
            str(dtype).removeprefix("torch."),
        )


def is_low_bit(model: nn.Module) -> bool:
    """Whether weights of the model are in low bits; peft's wrapper of it answers alike."""
    return bool(getattr(model, "is_quantized", False))


def require_adapter(model: nn.Module, finetuning_type: str) -> None:
    """Let low-bit weights train by an adapter alone.

    Raises:
        ArgumentsError: if they should train themselves.
    """
    if is_low_bit(model) and finetuning_type != "lora":
        raise ArgumentsError(
            f"finetuning_type={finetuning_type}, but the weights of this model are in low bits, "
            "which do not train. Write finetuning_type: lora, or name a model of ordinary weights."
        )


def require_kind(model: nn.Module, *, use_dora: bool) -> None:
    """Let low-bit weights have an adapter of a kind that works beside them.

    Raises:
        ArgumentsError: for DoRA beside 8 bits on a CPU, where peft 0.21 loses the scales.
    """
    # transformers says so of bitsandbytes' models alone
    is_8_bit = bool(getattr(model, "is_loaded_in_8bit", False))
    if use_dora and is_8_bit and next(model.parameters()).device.type == "cpu":
        raise ArgumentsError(
            "use_dora=true beside weights of 8 bits does not work on a CPU: peft loses their "
            "scales. Write quantization_bit: 4, or remove use_dora."
        )


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: packed ones are more than its elements."""
    return math.prod(shape(parameter))


def shape(parameter: Tensor) -> torch.Size:
    """The shape of the matrix that a parameter stands for."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes' 4-bit parameters
    return parameter.shape if state is None else state.shape


def replace(module: Any, weight: Tensor) -> None:
    """Round other weights into a linear module of bitsandbytes, as its own were.

    Args:
        module: of 4 or 8 bits.
        weight: (out, in), of any floating dtype.
    """
    from bitsandbytes.nn import Int8Params, Params4bit

    old = module.weight
    if isinstance(old, Params4bit):
        rounded = Params4bit(
            weight.to(old.quant_state.dtype),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=module,
        )
        module.weight = rounded.to(old.device)
        return
    # only what comes from the CPU is rounded
    module.weight = Int8Params(weight.float().cpu(), requires_grad=False).to(old.device)
    module.init_8bit_state()  # else the scales are the old ones until a forward pass


def _require_whole_blocks(name: str, module: Any) -> None:
    """Raise where the CPU would read wrong scales, as bitsandbytes 0.50 does.

    Its kernel takes each row of a matrix to begin a block of values that share a scale, which is
    so where the row is whole blocks long.
    """
    block = module.weight.quant_state.blocksize
    if module.weight.device.type == "cpu" and module.in_features % block:
        raise ModelError(
            f"{name} takes {module.in_features} values, but 4-bit weights on a CPU need a multiple "
            f"of {block}: bitsandbytes computes wrong results with others. Write quantization_bit: "
            "8, or use a GPU."
        )


def _bnb(model_args: ModelArguments, dtype: torch.dtype) -> Any:
    """How transformers is told of bitsandbytes' formats; https://arxiv.org/abs/2305.14314."""
    from transformers import BitsAndBytesConfig

    if model_args.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model_args.quantization_type,
        bnb_4bit_use_double_quant=model_args.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


METHODS: dict[str, Callable[[ModelArguments, torch.dtype], Any]] = {"bnb": _bnb}


def _plain_fp8() -> Any:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(dequantize=True)


def _plain_mxfp4() -> Any:
    from transformers import Mxfp4Config

    return Mxfp4Config(dequantize=True)


FORMATS: dict[str, Format] = {
    "bitsandbytes": Format((("bitsandbytes", "bitsandbytes>=0.50"),)),
    "gptq": Format((("optimum", "optimum>=1.24"), ("gptqmodel", "gptqmodel>=2.0"))),
    "awq": Format((("gptqmodel", "gptqmodel>=5.0"),)),
    "aqlm": Format((("aqlm", "aqlm>=1.1.0"),)),
    "hqq": Format((("hqq", "hqq"),)),
    "fp8": Format(plain=_plain_fp8),
    "mxfp4": Format(plain=_plain_mxfp4),
}


def _check(name: str, said: Any, model_args: ModelArguments) -> Callable[[], Any] | None:
    """How weights in format `name` become ordinary ones; None where they stay as they are."""
    row = FORMATS[name]
    _require(name, row)
    body = said if isinstance(said, dict) else said.to_dict()
    bits = model_args.quantization_bit
    has = 8 if body.get("load_in_8bit") else 4
    if bits is not None and (name, model_args.quantization_method, bits) != (
        "bitsandbytes",
        "bnb",
        has,
    ):
        raise ArgumentsError(
            f"quantization_bit={bits}, but the model's files are quantised already, as {name}. "
            "Ordinary weights are required to be quantised: remove quantization_bit, or name the "
            "model of ordinary weights."
        )
    if row.plain is not None:
        log.info("the model's files are in %s; they become ordinary weights at loading", name)
    return row.plain


def _require(name: str, row: Format) -> None:
    """Raise where a package is missing that a format needs."""
    missing = [pip for module, pip in row.packages if find_spec(module) is None]
    if missing:
        raise ModelError(
            f"weights in {name} need {' and '.join(missing)}, which this Python does not have. "
            f"Install it: pip install {' '.join(repr(pip) for pip in missing)}; or name a model of "
            "ordinary weights."
        )
