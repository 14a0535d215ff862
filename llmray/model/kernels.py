"""Which kernels a model computes with: of attention (`flash_attn`), and Liger's.

`prepare` refuses what cannot be, `adopt` makes a loaded model use the choice. A package that a run
file names must be there; `auto` takes what there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmray.arguments.problems import given
from llmray.batch import Segments
from llmray.errors import ArgumentsError, ModelError
from llmray.model.attention import FLAT, Settings, keep_own, register

log = getLogger("llmray")

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernel:
    """How a model attends under one value of flash_attn.

    `own` is transformers' name, for padded rows and generation, None where that is the model's own
    choice; `flat` is the name for flat rows, None where rows are padded. `package` must be there,
    and be installed as `install` says.
    """

    own: str | None
    flat: str | None
    package: str | None = None
    install: str = ""


KERNELS: dict[str, Kernel] = {
    "auto": Kernel(None, FLAT),
    "disabled": Kernel("eager", None),
    "sdpa": Kernel("sdpa", FLAT),
    "fa2": Kernel("flash_attention_2", f"{FLAT}_2", "flash_attn", "pip install flash-attn"),
    "fa3": Kernel(
        "flash_attention_3",
        f"{FLAT}_3",
        "flash_attn_interface",
        "build the folder hopper of the flash-attention repository",
    ),
    "flex": Kernel("flex_attention", f"{FLAT}_x"),
}
BEST = ("fa3", "fa2")  # what auto prefers where it is there


@dataclass(frozen=True)
class Choice:
    """The kernel of one model, and the sentence that says why."""

    kernel: Kernel
    reason: str


def prepare(flash_attn: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The kernel that a model of `dtype` on `device` will attend with.

    Raises:
        ArgumentsError: if the one that is named needs another device.
        ModelError: if its package is missing.
    """
    if flash_attn == "auto":
        return _best(device, dtype)
    kernel = KERNELS[flash_attn]
    if kernel.package is not None:
        if device.type != "cuda":
            raise ArgumentsError(
                f"flash_attn={flash_attn}, but this process computes on {device}. An NVIDIA GPU is "
                "required: write flash_attn: auto."
            )
        if find_spec(kernel.package) is None:
            raise ModelError(
                f"flash_attn={flash_attn} needs the package {kernel.package}, which is not "
                f"installed. Install it ({kernel.install}), or write flash_attn: auto."
            )
    return Choice(kernel, "as flash_attn says")


def require_gradients(flash_attn: str, device: torch.device) -> None:
    """Raise ArgumentsError if the kernel cannot train on `device`."""
    if flash_attn == "flex" and device.type == "cpu":
        raise ArgumentsError(
            "flash_attn=flex, but torch computes no gradients of it on a CPU. A GPU is required to "
            "train with it: write flash_attn: auto."
        )


def adopt(model: PreTrainedModel, flash_attn: str, choice: Choice) -> None:
    """Make `model`, loaded under the choice's own name, take it for flat rows too; say so."""
    if choice.kernel.flat is None:
        keep_own(model, f"flash_attn: {flash_attn} asks for plain attention")
    else:
        model.llmray_flat = choice.kernel.flat
    names = {FLAT: "torch's, sequence by sequence", **{k.flat: n for n, k in NAMED.items()}}
    flat = names.get(choice.kernel.flat, "none")
    log.info(
        "attention: %s in flat rows, %s in padded ones (flash_attn: %s, %s)",
        flat,
        model.config._attn_implementation,
        flash_attn,
        choice.reason,
    )


NAMED = {name: kernel for name, kernel in KERNELS.items() if kernel.flat not in (None, FLAT)}


def _best(device: torch.device, dtype: torch.dtype) -> Choice:
    plain = KERNELS["auto"]
    if device.type != "cuda":
        return Choice(plain, f"the best on a {device.type}")
    if dtype not in HALF:
        return Choice(plain, f"FlashAttention computes in 16 bits, the weights are {dtype}")
    for name in BEST:
        kernel = KERNELS[name]
        if kernel.package is not None and find_spec(kernel.package) is not None:
            return Choice(Kernel(None, kernel.flat), f"{kernel.package} is installed")
    return Choice(plain, "no package of FlashAttention is installed")


# ---- flat rows by other kernels -----------------------------------------------------------------


def by_flash_2(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, settings: Settings
) -> Tensor:
    """FlashAttention 2 over all segments at once."""
    from flash_attn import flash_attn_varlen_func

    return _by_flash(
        flash_attn_varlen_func, (query, key, value), segments, settings, dropout_p=settings.dropout
    )


def by_flash_3(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, settings: Settings
) -> Tensor:
    """FlashAttention 3 over all segments at once; it has no dropout."""
    from flash_attn_interface import flash_attn_varlen_func

    _require(settings.dropout == 0, "fa3", "no dropout of attention")
    return _by_flash(flash_attn_varlen_func, (query, key, value), segments, settings)


def by_flex(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, settings: Settings
) -> Tensor:
    """Torch's flex attention over all segments at once; compiled on a GPU."""
    _require(settings.dropout == 0, "flex", "no dropout of attention")
    _require(settings.sinks is None, "flex", "no attention sinks here")
    cap = settings.softcap or 1.0

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    output: Tensor = _flex(query.device.type)(
        query,
        key,
        value,
        score_mod=None if settings.softcap is None else capped,
        block_mask=_blocks(segments.lengths_q, segments.lengths_k, settings.window, query.device),
        scale=settings.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


register(f"{FLAT}_2", by_flash_2)
register(f"{FLAT}_3", by_flash_3)
register(f"{FLAT}_x", by_flex)


def _by_flash(
    function: Callable[..., Any],
    operands: tuple[Tensor, Tensor, Tensor],
    segments: Segments,
    settings: Settings,
    **own: Any,
) -> Tensor:
    """A varlen function; its causal mask puts the last query at the last key of each segment."""
    _require(settings.sinks is None, "FlashAttention", "no attention sinks here")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in operands)  # (N, heads, head size)
    dtype = value.dtype
    if dtype not in HALF:
        device = value.device.type
        _require(torch.is_autocast_enabled(device), "FlashAttention", "16 bits alone")
        dtype = torch.get_autocast_dtype(device)
    window = (-1, -1) if settings.window is None else (settings.window - 1, 0)
    output = function(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        cu_seqlens_q=_borders(segments.lengths_q, query.device),
        cu_seqlens_k=_borders(segments.lengths_k, query.device),
        max_seqlen_q=max(segments.lengths_q),
        max_seqlen_k=max(segments.lengths_k),
        softmax_scale=settings.scale,
        causal=True,
        window_size=window,
        softcap=settings.softcap or 0.0,
        **own,
    )
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first.to(value.dtype)[None]


def _require(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise ModelError(f"{name} has {what}, which this model asks for. Write flash_attn: auto.")


@lru_cache(maxsize=4)
def _borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(segments + 1,) int32, where each segment begins and the last one ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=1)
def _flex(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    run: Callable[..., Any] = flex_attention
    return run if device_type == "cpu" else torch.compile(run)


@lru_cache(maxsize=4)
def _blocks(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], window: int | None, device: torch.device
) -> Any:
    """Flex attention's mask: causal in each segment, the last query at the last key."""
    from torch.nn.attention.flex_attention import create_block_mask

    def numbered(lengths: tuple[int, ...], shifts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        segment = [number for number, length in enumerate(lengths) for _ in range(length)]
        place = [
            i + shift for length, shift in zip(lengths, shifts, strict=True) for i in range(length)
        ]
        return torch.tensor(segment, device=device), torch.tensor(place, device=device)

    behind = tuple(k - q for q, k in zip(lengths_q, lengths_k, strict=True))
    segment_q, place_q = numbered(lengths_q, behind)
    segment_k, place_k = numbered(lengths_k, (0,) * len(lengths_k))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = place_q[query] - place_k[key]
        visible = (segment_q[query] == segment_k[key]) & (distance >= 0)
        return visible if window is None else visible & (distance < window)

    return create_block_mask(sees, None, None, sum(lengths_q), sum(lengths_k), device=str(device))


# ---- Liger --------------------------------------------------------------------------------------

LOSSES = ("cross_entropy", "fused_linear_cross_entropy")  # ours is at the targets alone, in chunks


def use_liger(model: PreTrainedModel, kernels: dict[str, Any] | None) -> None:
    """Replace layers of `model` by Liger's kernels, all or those that `kernels` says.

    Raises:
        ArgumentsError: if there is no GPU, or a kernel is named that the model's type has not.
        ModelError: if the package is missing or knows nothing of the model's type.
    """
    if model.device.type != "cuda":
        raise ArgumentsError(
            f"enable_liger_kernel=true, but the model is on {model.device}. Liger's kernels are "
            "Triton's and need a GPU: remove enable_liger_kernel."
        )
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ModelError(
            f"enable_liger_kernel=true needs liger-kernel, which cannot be imported ({error}). "
            "Install it (pip install 'llmray[liger]'), or remove enable_liger_kernel."
        ) from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(
            f"enable_liger_kernel=true, but liger-kernel has no kernels for {kind}. One of "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))} is required: remove the key."
        )
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    known = set(inspect.signature(apply).parameters) - {"model", *LOSSES}
    asked = dict(kernels or {})
    wrong = sorted(set(asked) - known)
    if wrong:
        raise ArgumentsError(
            f"{given('liger_kernel_config', asked)}: of {kind} there is no {wrong[0]} to replace "
            f"(the loss is computed in chunks at the targets alone). Name some of "
            f"{', '.join(sorted(known))}."
        )
    parameters = inspect.signature(apply).parameters
    apply(model=model, **dict.fromkeys((n for n in LOSSES if n in parameters), False), **asked)
    log.info("Liger's kernels: %s", ", ".join(sorted(n for n in known if asked.get(n, True))))
