"""The sizes of a decoder: from its configuration and the headers of its weight files; no torch.

What memory they need is for `memory`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmray.errors import ModelError

Shapes = dict[str, tuple[int, ...]]  # name of a parameter -> its shape

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)")
SINGLE = re.compile(r"experts\.(?:\d+\.)?(\w+?)(?:\.weight)?$")
JOINT = {**dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"), "w2": "down_proj"}
EXPERT = re.compile(r"(?:^|\.)experts\.(\d+\.)?")

# configurations that name a size in another way
OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "d_ff", "block_ff_dim"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "attention_dropout": ("attn_pdrop",),
}
NOT_GATED = {"gpt2", "gptj", "bloom", "gpt_neox", "falcon", "phi", "starcoder2", "opt"}
BOTH_SIDES = {"gemma2", "gemma3_text", "gemma3", "olmo2"}  # norms before and after each block
NORMED_HEADS = {"qwen3", "qwen3_moe", "gemma3_text", "gemma3", "olmo2", "olmo3", "smollm4"}


class UnknownSizesError(ModelError):
    """A configuration names the sizes of its model in a way that is not known here."""


@dataclass(frozen=True)
class Decoder:
    """The sizes that the memory of a decoder follows from; all counts of values.

    `query`, `key` and `value` are the widths of all heads together; `num_norms` those of one layer
    over the hidden size; `copies_of_scores` how many float32 matrices of scores a head keeps, where
    attention has dropout, caps or sinks; `experts` are None in a dense model.
    """

    model_type: str
    num_layers: int
    hidden: int
    num_heads: int
    query: int
    key: int
    value: int
    intermediate: int
    vocabulary: int
    is_gated: bool
    is_tied: bool
    num_norms: int
    has_normed_heads: bool
    copies_of_scores: int
    experts: Experts | None


@dataclass(frozen=True)
class Experts:
    """The feed-forward part of a mixture: `chosen` of `number` experts for each token."""

    number: int
    chosen: int
    intermediate: int
    shared: int  # intermediate size of what all tokens pass through


def read_config(directory: Path | str) -> dict[str, Any]:
    """The configuration in a folder as its file has it.

    Raises:
        ModelError: if there is none that can be read.
    """
    path = Path(directory) / "config.json"
    try:
        found = json.loads(path.read_text())
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}). A folder with config.json is required: correct "
            "model_name_or_path."
        ) from error
    return found


def decoder(config: Mapping[str, Any]) -> Decoder:
    """The sizes of the text part of a configuration.

    Raises:
        UnknownSizesError: if a size is missing.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    kind = str(text.get("model_type", config.get("model_type", "")))
    hidden, heads = int(_size(text, "hidden_size")), int(_size(text, "num_attention_heads"))
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head = int(text.get("head_dim") or hidden // heads)
    query, key, value = heads * head, kv_heads * head, kv_heads * head
    if text.get("kv_lora_rank"):  # latent attention: keys and values of all heads are unpacked
        rotated, plain = int(text["qk_rope_head_dim"]), int(text["qk_nope_head_dim"])
        query = key = heads * (rotated + plain)
        value = heads * int(text["v_head_dim"])
    intermediate = text.get("intermediate_size") or _find(text, "intermediate_size") or 4 * hidden
    is_tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return Decoder(
        model_type=kind,
        num_layers=int(_size(text, "num_hidden_layers")),
        hidden=hidden,
        num_heads=heads,
        query=query,
        key=key,
        value=value,
        intermediate=int(intermediate),
        vocabulary=int(_size(text, "vocab_size")),
        is_gated=kind not in NOT_GATED,
        # what transformers takes where the file is silent
        is_tied=bool(is_tied) if is_tied is not None else kind.startswith(("gemma", "gpt2")),
        num_norms=4 if kind in BOTH_SIDES else 2,
        has_normed_heads=kind in NORMED_HEADS,
        copies_of_scores=_copies_of_scores(text, kind),
        experts=_experts(text),
    )


def shapes(directory: Path | str) -> Shapes:
    """The parameters in the safetensors files of a folder, from their headers; {} without any.

    Raises:
        ModelError: if a header is damaged.
    """
    found: Shapes = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        for name, entry in _header(path).items():
            if name != "__metadata__":
                found[name] = tuple(entry["shape"])
    return found


def formats(directory: Path | str) -> frozenset[str]:
    """The number formats in the safetensors files of a folder, by safetensors' names for them.

    Raises:
        ModelError: if a header is damaged.
    """
    return frozenset(
        entry["dtype"]
        for path in Path(directory).glob("*.safetensors")
        for name, entry in _header(path).items()
        if name != "__metadata__"
    )


def stored_bytes(directory: Path | str) -> int:
    """Bytes of all tensors in the safetensors files of a folder.

    Raises:
        ModelError: if a header is damaged.
    """
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for path in Path(directory).glob("*.safetensors")
        for name, entry in _header(path).items()
        if name != "__metadata__"
    )


def shapes_of(model: Decoder) -> Shapes:
    """The parameters that a decoder of these sizes has, where there are no files yet."""
    found: Shapes = {"model.embed_tokens.weight": (model.vocabulary, model.hidden)}
    for index in range(model.num_layers):
        found |= {f"model.layers.{index}.{name}": s for name, s in _layer(model).items()}
    found["model.norm.weight"] = (model.hidden,)
    if not model.is_tied:
        found["lm_head.weight"] = (model.vocabulary, model.hidden)
    return found


def count(shapes: Shapes) -> int:
    """How many values the parameters have."""
    return sum(math.prod(shape) for shape in shapes.values())


def layer_of(name: str) -> tuple[int, str] | None:
    """The number of the layer that a parameter belongs to and its name there; None outside."""
    match = LAYER.search(name)
    return None if match is None else (int(match[1]), match[2])


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one of a mixture's experts."""
    return EXPERT.search(name) is not None


def joint_name(name: str) -> str:
    """What an expert's parameter in a file is a part of in memory, where experts are joint."""
    return SINGLE.sub(lambda match: f"experts.{JOINT.get(match[1], match[1])}", name)


def is_lone_expert(name: str) -> bool:
    """Whether a parameter is that of one expert alone, not of all of a layer together."""
    match = EXPERT.search(name)
    return match is not None and match[1] is not None


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the matrix of a linear module inside a layer, experts left out."""
    return (
        len(shape) == 2
        and name.endswith(".weight")
        and layer_of(name) is not None
        and not is_expert(name)
        and "conv" not in name
    )


def module_of(name: str) -> str:
    """The full name of the module that a parameter belongs to."""
    return name.rpartition(".")[0]


def _layer(model: Decoder) -> Shapes:
    hidden, width = model.hidden, model.intermediate
    found: Shapes = {
        "self_attn.q_proj.weight": (model.query, hidden),
        "self_attn.k_proj.weight": (model.key, hidden),
        "self_attn.v_proj.weight": (model.value, hidden),
        "self_attn.o_proj.weight": (hidden, model.query),
    }
    for number in range(model.num_norms):
        found[f"norm_{number}.weight"] = (hidden,)
    if model.experts is None:
        names = ("gate_proj", "up_proj") if model.is_gated else ("up_proj",)
        found |= {f"mlp.{name}.weight": (width, hidden) for name in names}
        found["mlp.down_proj.weight"] = (hidden, width)
        return found
    experts = model.experts
    found["mlp.gate.weight"] = (experts.number, hidden)
    found["mlp.experts.gate_up_proj"] = (experts.number, 2 * experts.intermediate, hidden)
    found["mlp.experts.down_proj"] = (experts.number, hidden, experts.intermediate)
    if experts.shared:
        for name in ("gate_proj", "up_proj"):
            found[f"mlp.shared_expert.{name}.weight"] = (experts.shared, hidden)
        found["mlp.shared_expert.down_proj.weight"] = (hidden, experts.shared)
    return found


def _copies_of_scores(text: Mapping[str, Any], kind: str) -> int:
    dropout = _find(text, "attention_dropout")
    if dropout if dropout is not None else kind == "gpt2":
        return 3  # the weights, their mask, the weights after it
    is_capped = text.get("attn_logit_softcapping") is not None
    return 3 if is_capped else 2 if kind == "gpt_oss" else 0


def _experts(text: Mapping[str, Any]) -> Experts | None:
    number = _find(text, "num_experts")
    if not number or int(number) < 2:
        return None
    width = text.get("moe_intermediate_size") or text.get("intermediate_size") or 0
    chosen = text.get("num_experts_per_tok") or text.get("moe_k") or 2
    shared = text.get("shared_expert_intermediate_size") or 0
    if text.get("n_shared_experts"):
        shared = int(text["n_shared_experts"]) * int(width)
    return Experts(int(number), int(chosen), int(width), int(shared))


def _find(text: Mapping[str, Any], name: str) -> Any:
    names = (name, *OTHER_NAMES.get(name, ()))
    return next((text[n] for n in names if text.get(n) is not None), None)


def _size(text: Mapping[str, Any], name: str) -> Any:
    found = _find(text, name)
    if found is None:
        raise UnknownSizesError(
            f"the model's configuration has no {name}. The sizes of a decoder are required for an "
            "estimate of memory: write disable_gradient_checkpointing: true or false."
        )
    return found


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            return dict(json.loads(file.read(size)))
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path} is damaged ({error}). Whole safetensors files are required: fetch the model "
            "again."
        ) from error
