"""Rotary positions stretched beyond the length that a model was trained for.

`configure` changes a configuration before the model is built, so that a saved model keeps it. An
adapter is saved without a configuration: `write_record` puts the change beside it, `configure`
reads it wherever that adapter is loaded again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llmray.errors import ArgumentsError, ModelError

log = getLogger("llmray")

RECORD = "rope_parameters.json"  # beside an adapter's weights
FIELDS = ("max_position_embeddings", "rope_parameters")

# transformers' types that multiply with more of themselves: the length they count from stays
STRETCHED = ("linear", "yarn", "llama3")


def configure(
    config: Any, scaling: str | None, cutoff_len: int | None, adapters: Sequence[Path] = ()
) -> bool:
    """Stretch the positions of `config` as its adapters were trained and as the run asks for.

    The factor is `cutoff_len` over the model's own length, rounded up, as LLaMA-Factory has it;
    where `cutoff_len` fits, nothing changes. Linear: https://arxiv.org/abs/2306.15595, yarn:
    https://arxiv.org/abs/2309.00071, llama3: https://arxiv.org/abs/2407.21783.

    Args:
        config: of the whole model; its text part is changed.
        scaling: linear, dynamic, yarn, llama3, or None.
        cutoff_len: the longest row in tokens.
        adapters: folders of adapters that are loaded on top.

    Returns: whether anything changed.

    Raises:
        ArgumentsError: if the model has no rotary positions, or ones stretched in another way.
        ModelError: if adapters were trained on different positions.
    """
    text = config.get_text_config()
    is_changed = _apply_records(text, adapters)
    if scaling is None:
        return is_changed
    if cutoff_len is None:
        raise ValueError("rope_scaling follows from cutoff_len: it must be handed over")
    own = getattr(text, "max_position_embeddings", None)
    if not getattr(text, "rope_parameters", None) or own is None:
        raise ArgumentsError(
            f"rope_scaling={scaling}, but {text.model_type} has no rotary positions to stretch. A "
            "model that has some is required: remove rope_scaling."
        )
    if cutoff_len <= own:
        log.info("rope_scaling: not needed, the model has positions for %d tokens", own)
        return is_changed
    factor = float(math.ceil(cutoff_len / own))
    if scaling != "dynamic":  # which counts from this very length
        text.max_position_embeddings = int(own * factor)
    for parameters in _stretchable(text):
        _stretch(parameters, scaling, factor, own, text.model_type)
    text.validate_rope()
    log.info(
        "rope_scaling: %s by %g: positions for %d tokens, the model was trained for %d",
        scaling,
        factor,
        own * factor,
        own,
    )
    return True


def max_positions(config: Any) -> int | None:
    """How many tokens a model has positions for, None where that is not bounded."""
    text = config.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    if own is None or not getattr(text, "rope_parameters", None):
        return own
    factors = [p["factor"] for p in _stretchable(text) if p.get("rope_type") == "dynamic"]
    return int(own * max(factors, default=1.0))


def follows_length(config: Any) -> bool:
    """Whether positions change with the length of the text; a cache of keys keeps those before."""
    text = config.get_text_config()
    if not getattr(text, "rope_parameters", None):
        return False
    return any(p.get("rope_type") in ("dynamic", "longrope") for p in _stretchable(text))


def write_record(config: Any, directory: Path) -> None:
    """Write the positions of `config` beside an adapter that needs them."""
    text = config.get_text_config()
    record = {name: getattr(text, name) for name in FIELDS}
    (directory / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def make_stateless(model: nn.Module) -> None:
    """Let dynamic positions follow the length of each sequence alone.

    Transformers takes the longest sequence of a batch, and goes on with it in later batches: then
    a result would depend on what stands beside a sequence and on what came before it.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        forward = getattr(type(module).forward, "__wrapped__", None)  # without torch.no_grad
        plain = getattr(forward, "__wrapped__", None)  # and without transformers' update
        if "dynamic" in kinds and plain is not None:
            module.llmray_plain = plain
            module.forward = MethodType(_by_length, module)


@torch.no_grad()
def _by_length(module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """Cosines and sines, (B, T, size) each, of every token by the length of its own sequence."""
    config, prefix = module.config, "" if layer_type is None else f"{layer_type}_"
    parameters = (
        config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    )
    kept = {} if layer_type is None else {"layer_type": layer_type}
    plain: Callable[..., tuple[Tensor, Tensor]] = module.llmray_plain
    if parameters["rope_type"] != "dynamic":
        return plain(module, x, position_ids, **kept)
    own, name = config.max_position_embeddings, f"{prefix}inv_freq"
    original = getattr(module, f"{prefix}original_inv_freq")
    lengths = _lengths(position_ids).clamp_min(own)  # (B, T)
    cos = sin = None
    for length in lengths.unique().tolist():
        exponent = _exponent(parameters["factor"], length / own, 2 * original.shape[-1])
        setattr(module, name, original.to(x.device) * exponent.to(x.device))
        found = plain(module, x, position_ids, **kept)
        chosen = (lengths == length)[..., None].expand(*lengths.shape, found[0].shape[-1])
        cos = found[0] if cos is None else torch.where(chosen, found[0], cos)
        sin = found[1] if sin is None else torch.where(chosen, found[1], sin)
    setattr(module, name, original)
    return cos, sin


def _exponent(factor: float, ratio: float, size: int) -> Tensor:
    """What the inverse frequencies are multiplied by at `ratio` times the model's own length.

    The base b becomes b * s with s = (factor * ratio - (factor - 1)) ** (size / (size - 2)), so the
    frequency b ** (-2i / size) is multiplied by s ** (-2i / size).
    """
    stretch = (factor * ratio - (factor - 1)) ** (size / (size - 2)) if size > 2 else 1.0
    return stretch ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)


def _lengths(position_ids: Tensor) -> Tensor:
    """(B, T), the length of each token's sequence; one begins where positions do not go on."""
    begins = torch.ones_like(position_ids)
    begins[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).long()
    index = begins.cumsum(1) - 1
    longest = torch.zeros_like(position_ids).scatter_reduce(1, index, position_ids + 1, "amax")
    return longest.gather(1, index)


def _stretchable(text: Any) -> list[dict[str, Any]]:
    """The parameters of layers that see the whole row; windows are never longer than trained."""
    parameters: dict[str, Any] = text.rope_parameters
    nested = text.nested_rope_parameter_keys(parameters)
    if not nested:
        return [parameters]
    whole = [key for key in nested if key != "sliding_attention" and parameters[key] is not None]
    return [parameters[key] for key in whole]


def _stretch(
    parameters: dict[str, Any], scaling: str, factor: float, own: int, model_type: str
) -> None:
    """Change the parameters of one kind of layer."""
    present = parameters.get("rope_type", "default")
    if present not in ("default", scaling):
        raise ArgumentsError(
            f"rope_scaling={scaling}, but the positions of this {model_type} are stretched by "
            f"{present} already. The same kind is required"
            + (f": write rope_scaling: {present}." if present in STRETCHED else ": remove the key.")
        )
    parameters["rope_type"] = scaling
    if scaling == "dynamic":
        parameters["factor"] = factor
        return
    parameters["factor"] = parameters.get("factor", 1.0) * factor
    if scaling in ("yarn", "llama3"):
        parameters.setdefault("original_max_position_embeddings", own)
    if scaling == "llama3":
        parameters.setdefault("low_freq_factor", 1.0)
        parameters.setdefault("high_freq_factor", 4.0)


def _apply_records(text: Any, adapters: Sequence[Path]) -> bool:
    """Give `text` the positions that its adapters were trained with."""
    records = {str(d): _read(d / RECORD) for d in adapters if (d / RECORD).is_file()}
    if not records:
        return False
    first, *others = records.items()
    for directory, record in others:
        if record != first[1]:
            raise ModelError(
                f"the adapters in {first[0]} and {directory} were trained on different rotary "
                "positions. Adapters of one length are required: remove one of them."
            )
    for name in FIELDS:
        setattr(text, name, first[1][name])
    log.info("rotary positions as the adapter in %s was trained with", first[0])
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        if set(record) == set(FIELDS):
            return dict(record)
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    raise _damaged(path, f"it has {', '.join(sorted(record))}")


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path} is damaged ({why}). The file that was saved with the adapter is required: restore "
        "it."
    )
