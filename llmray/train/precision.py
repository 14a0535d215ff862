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
OF_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def choose(arguments: RunArguments, device: torch.device) -> Precision:
    """The precision that the run asks for; what suits `device` where it asks for none.

    Raises:
        ArgumentsError: if the device cannot compute in the dtype that was asked for.
    """
    dtype = derived.compute_dtype(arguments)
    if arguments.finetuning.pure_bf16:
        name = "pure_bf16"
    elif dtype is None:
        name, why = _by_hardware(device)
        log.info("dtype %s: %s (bf16, fp16, fp32 or pure_bf16: true chooses)", name, why)
    else:
        name = OF_DTYPE[dtype]
    if device.type == "cuda" and "bf16" in name and not torch.cuda.is_bf16_supported(False):
        raise ArgumentsError(
            f"{name}: true, but {torch.cuda.get_device_name(device)} has no bf16 arithmetic. "
            "A device with compute capability 8.0 or newer is required. Set fp16: true instead."
        )
    return PRECISIONS[name]


def _by_hardware(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 arithmetic"
        return "fp16", "this GPU has no bf16 arithmetic"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16", "this CPU has bf16 instructions"
    return "fp32", "this CPU has no bf16 instructions"
