"""Number formats: which dtype weights are loaded in, and which dtype the arithmetic runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from logging import getLogger

import torch

from llmray.arguments import derived
from llmray.arguments.run import RunArguments
from llmray.errors import ArgumentsError

log = getLogger("llmray")


@dataclass(frozen=True)
class Precision:
    """One way to compute.

    `load_dtype` is the dtype of weights that do not train; trainable ones are float32 unless
    `pure`. `autocast` is the dtype of mixed-precision arithmetic, None where there is none.
    """

    name: str
    load_dtype: torch.dtype
    autocast: torch.dtype | None = None
    scales_loss: bool = False
    pure: bool = False

    def keys(self) -> dict[str, bool]:
        """The arguments that ask for exactly this."""
        names = ("bf16", "fp16", "fp32", "pure_bf16")
        return {name: name == self.name for name in names}

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, autocast=torch.bfloat16),
    "fp16": Precision("fp16", torch.float16, autocast=torch.float16, scales_loss=True),
    "pure_bf16": Precision("pure_bf16", torch.bfloat16, pure=True),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OF_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


# evaluation without training: all weights in few bits, and no casts between them
FULL_EVALUATION: dict[str, Precision] = {
    "bf16_full_eval": Precision("bf16", torch.bfloat16, pure=True),
    "fp16_full_eval": Precision("fp16", torch.float16, pure=True),
}


def choose_for_evaluation(arguments: RunArguments, device: torch.device) -> Precision:
    """As `choose` for a run that does not train: bf16_full_eval and fp16_full_eval come first."""
    set_tf32(arguments.training.tf32, device)
    for key, found in FULL_EVALUATION.items():
        if getattr(arguments.training, key):
            _require_bf16(found.name, key, device)
            return found
    return choose(arguments, device)


def set_tf32(allows: bool | None, device: torch.device) -> None:
    """Let float32 products round their operands to TF32, or not; None leaves torch as it is.

    Raises:
        ArgumentsError: if it is asked for where there is none.
    """
    if allows is None:
        return
    is_able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if allows and not is_able:
        raise ArgumentsError(
            f"tf32=true, but {device} has no TF32. An NVIDIA GPU of compute capability 8.0 or "
            "newer is required: remove tf32."
        )
    torch.set_float32_matmul_precision("high" if allows else "highest")
    torch.backends.cudnn.allow_tf32 = allows


def choose(arguments: RunArguments, device: torch.device) -> Precision:
    """The precision that the run asks for; what suits `device` where it asks for none.

    Raises:
        ArgumentsError: if the device cannot compute in the dtype that was asked for.
    """
    set_tf32(arguments.training.tf32, device)
    dtype = derived.compute_dtype(arguments)
    if arguments.finetuning.pure_bf16:
        name = "pure_bf16"
    elif dtype is None:
        name, why = _by_hardware(device)
        log.info("dtype %s: %s (bf16, fp16, fp32 or pure_bf16: true chooses)", name, why)
    else:
        name = OF_DTYPE[dtype]
    _require_bf16(name, name, device)
    return PRECISIONS[name]


def _require_bf16(name: str, key: str, device: torch.device) -> None:
    if device.type == "cuda" and "bf16" in name and not torch.cuda.is_bf16_supported(False):
        raise ArgumentsError(
            f"{key}: true, but {torch.cuda.get_device_name(device)} has no bf16 arithmetic. "
            "A device with compute capability 8.0 or newer is required. Set fp16: true instead."
        )


def inference_dtype(infer_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of a model that answers or scores: what is asked for, else what suits `device`."""
    if infer_dtype != "auto":
        return DTYPES[infer_dtype]
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def _by_hardware(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 arithmetic"
        return "fp16", "this GPU has no bf16 arithmetic"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16", "this CPU has bf16 instructions"
    return "fp32", "this CPU has no bf16 instructions"
