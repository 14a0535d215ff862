"""Flat rows: attention per sequence over one row `(1, N)` that holds all samples, without padding.

Registered with transformers under the name `FLAT`, and names that begin with it for other kernels
(`kernels`); no mask is ever built. `why_not_flat` says for which models this would be wrong: they
take padded batches in their own implementation.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from llmray.batch import Segments

# transformers dispatches on the substrings flash, sdpa, flex, "paged|" and "/": none may be in it
FLAT = "llmray_flat"

BLOCK = 256  # queries of a layer with a window that are computed at once, or the window if wider

PLAIN_LAYERS = {"full_attention", "sliding_attention"}

# model types on which flat rows equal lone sequences, held by tests; others are probed at loading
VERIFIED = {
    *("cohere2", "deepseek_v3", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "granite", "llama"),
    *("mistral", "mixtral", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    "smollm3",
}


def why_not_flat(model: nn.Module) -> str | None:
    """The reason why `model` cannot take flat rows, or None where it can.

    A model type without a test is tried on two short sequences: in one row, and one at a time.
    """
    base = causal_lm(model)
    if hasattr(base, "llmray_keeps_own"):
        return str(base.llmray_keeps_own)
    reason = _by_configuration(base)
    if reason is None and base.config.model_type not in VERIFIED:
        reason = _by_trial(base)
    return reason


def causal_lm(model: Any) -> PreTrainedModel:
    """The model of transformers inside `model`, which may be wrapped by peft."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_flat(model: nn.Module) -> None:
    """Make `model` attend within the segments that come with each call; calls need segments."""
    base = causal_lm(model)
    if not is_flat(base):
        base.llmray_own_attention = base.config._attn_implementation
        base.set_attn_implementation(getattr(base, "llmray_flat", FLAT))


def is_flat(model: PreTrainedModel) -> bool:
    """Whether `model` attends within the segments of a flat row now."""
    return str(model.config._attn_implementation).startswith(FLAT)


def keep_own(model: PreTrainedModel, reason: str) -> None:
    """Make `why_not_flat` answer `reason`: the user chose the model's attention."""
    model.llmray_keeps_own = reason


@contextmanager
def native(model: nn.Module) -> Iterator[None]:
    """Inside, `model` attends by its own implementation: generation, padded calls, saving."""
    base = causal_lm(model)
    if not is_flat(base):
        yield
        return
    flat = base.config._attn_implementation
    base.set_attn_implementation(base.llmray_own_attention)
    try:
        yield
    finally:
        base.set_attn_implementation(flat)


@dataclass(frozen=True)
class Settings:
    """How one layer attends: as transformers' layers say, beside queries, keys and values."""

    scale: float | None  # of the scores; None: one over the root of the head size
    dropout: float
    window: int | None  # tokens that a query looks back, itself included
    softcap: float | None
    sinks: Tensor | None  # (heads,)


# (1, heads, N, head size) of queries, keys and values -> (1, N, heads, head size)
Attend = Callable[[Tensor, Tensor, Tensor, Segments, Settings], Tensor]


def register(name: str, attend: Attend) -> None:
    """Make flat rows attend by `attend` in models whose implementation is `name`."""
    assert name.startswith(FLAT)
    AttentionInterface.register(name, partial(flat_attention, attend=attend))


def by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, settings: Settings
) -> Tensor:
    """Torch's own kernel, one segment after the other."""
    rows = zip(
        query.split(segments.lengths_q, 2),
        key.split(segments.lengths_k, 2),
        value.split(segments.lengths_k, 2),
        strict=True,
    )
    outputs = [_segment(q, k, v, settings) for q, k, v in rows]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    attend: Attend = by_segment,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface, within each segment.

    Args:
        module: the attention layer that calls.
        query, key, value: (1, heads, N, head size); fewer heads of keys and values are shared.
        attention_mask: None; a mask would be ignored, so any other value is refused.
        scaling, dropout, sliding_window, softcap, s_aux: as transformers' layers give them.
        segments: the sequences of the row.
        attend: the kernel.
        kwargs: what layers hand on for other implementations.

    Returns: (1, N, heads, head size), and None for the attention weights.
    """
    if segments is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            "a flat row is required: one row with segments and no mask. Wrap a padded call or a "
            "generation in llmray.model.attention.native(model)."
        )
    window = _window(module, sliding_window)
    if segments.key_index is not None:
        key, value = key[:, :, segments.key_index], value[:, :, segments.key_index]
    settings = Settings(scaling, dropout, window, softcap, s_aux)
    return attend(query, key, value, segments, settings), None


AttentionInterface.register(FLAT, flat_attention)  # no mask is registered: none is to be built


def _window(module: nn.Module, sliding_window: int | None) -> int | None:
    """The layer's window in tokens; some models (qwen2_moe) put it only into their mask."""
    if sliding_window is not None:
        return sliding_window
    config: Any = module.config
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[module.layer_idx] == "sliding_attention":
        return int(config.sliding_window)
    return None


def _segment(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    num_queries, num_keys = q.shape[2], k.shape[2]
    window, scale, dropout = settings.window, settings.scale, settings.dropout
    softcap, sinks = settings.softcap, settings.sinks
    window = None if window is None or window >= num_keys else window
    if softcap is None and sinks is None:
        if window is not None:
            return _windowed(q, k, v, window, scale, dropout)
        is_square = num_queries == num_keys
        mask = None if is_square else _hidden(num_queries, num_keys, None, q.device, q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=is_square, scale=scale, enable_gqa=True
        )
    shared = q.shape[1] // k.shape[1]
    scores = (
        q @ k.repeat_interleave(shared, 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~_visible(num_queries, num_keys, window, q.device)
    scores = scores.float().masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., :num_keys].to(v.dtype)
    return F.dropout(weights, dropout) @ v.repeat_interleave(shared, 1)


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, dropout: float
) -> Tensor:
    """Blocks of queries, each with the keys that one of them sees: memory grows with the length."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    behind, size = num_keys - num_queries, max(window, BLOCK)
    outputs = []
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        first, last = max(0, start + behind - window + 1), stop + behind
        mask = _hidden(stop - start, last - first, window, q.device, q.dtype)
        block = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        outputs.append(
            F.scaled_dot_product_attention(*block, mask, dropout, scale=scale, enable_gqa=True)
        )
    return torch.cat(outputs, 2)


@lru_cache(maxsize=4)
def _hidden(
    num_queries: int, num_keys: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(queries, keys), minus infinity where a query may not look.

    Kept, so that all layers save one mask for backward; torch makes such a copy of a boolean one.
    """
    hidden = ~_visible(num_queries, num_keys, window, device)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))


def _visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys), True where a query may look: causal, the last query at the last key."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    causal = key <= query
    return causal if window is None else causal & (key > query - window)


def _by_configuration(model: PreTrainedModel) -> str | None:
    if not _uses_interface(type(model)):
        return f"{type(model).__name__} does not use transformers' attention interface"
    config = model.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or []) - PLAIN_LAYERS
    if odd:
        return f"layers of kind {', '.join(sorted(odd))}"
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention"
    if getattr(model, "_is_stateful", False):
        return "recurrent layers"
    if not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    ):
        return "attention that is not causal"
    return None


def _uses_interface(cls: type[PreTrainedModel]) -> bool:
    """Whether the class's module asks transformers' interface for its attention.

    Read from the source: transformers' own answer is remembered on classes and leaks to others.
    """
    module = sys.modules.get(cls.__module__)
    try:
        return module is not None and "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(
            module
        )
    except (OSError, TypeError):
        return False


@torch.no_grad()
def _by_trial(model: PreTrainedModel) -> str | None:
    """Compare two sequences in one row with each alone; and see that a mix-up would show."""
    name = model.config.model_type
    device = next(model.parameters()).device
    if device.type == "meta":
        return f"{name} was not tried yet and holds no weights"
    ids = torch.arange(3, 3 + 24, device=device)[None] % model.config.get_text_config().vocab_size
    lengths, was_training = (10, 14), model.training
    model.eval()
    try:
        lone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
        model.llmray_own_attention = model.config._attn_implementation
        model.set_attn_implementation(FLAT)
        apart = _row_logits(model, ids, lengths)
        mixed = _row_logits(model, ids, (sum(lengths),))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{name} does not run on a flat row ({error})"
    finally:
        if is_flat(model):
            model.set_attn_implementation(model.llmray_own_attention)
        model.train(was_training)
    wrong, shows = _distance(apart, lone), _distance(mixed, lone)
    limit = {torch.float32: 1e-4, torch.float64: 1e-4}.get(lone.dtype, 3e-2)
    if wrong < limit and shows > 10 * limit:
        return None
    return f"{name} differs on a flat row by {wrong:.0e} (sequences mixed up: {shows:.0e})"


def _row_logits(model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None]
    segments = Segments(lengths, lengths)
    logits: Tensor = model(ids, position_ids=positions, segments=segments, use_cache=False).logits
    return logits


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()
