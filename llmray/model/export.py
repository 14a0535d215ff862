"""Weights on disk as others read them: an adapter, or a whole model; with the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmray import store
from llmray.model import embedding, pissa, rope
from llmray.model.attention import causal_lm, native
from llmray.model.quiet import quiet


def write_weights(
    model: nn.Module,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write `model` and `tokenizer` into `directory`, in Hugging Face's format.

    Of a model with an adapter the adapter alone is written: adapter_model.safetensors,
    adapter_config.json and the vocabulary that it needs. Otherwise config.json,
    generation_config.json and safetensors.

    Args:
        model: a model of transformers or peft's wrapper of one.
        directory: is made if needed; whoever calls sees to it that it is committed whole.
        tokenizer: with its chat template.
        dtype: of the weights in the files; None keeps that in memory.
        shard_bytes: the largest weight file of a whole model; None leaves that to transformers.

    Raises:
        StoreError: if it cannot be written.
    """
    with store.explained(directory), quiet(), native(model):
        directory.mkdir(parents=True, exist_ok=True)
        if hasattr(model, "peft_config"):
            _write_adapter(model, directory, dtype)
        else:
            _write_model(model, directory, dtype, shard_bytes)
        tokenizer.save_pretrained(directory)
        store.share(directory)


def _write_adapter(model: Any, directory: Path, dtype: torch.dtype | None) -> None:
    state = None
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    embedding.write(causal_lm(model), directory)
    # "auto" would ask the hub for the base model's vocabulary
    model.save_pretrained(
        directory, save_embedding_layers=embedding.is_saved_along(model), state_dict=state
    )
    pissa.complete(model, directory)
    base = causal_lm(model)
    if getattr(base, "llmray_is_stretched", False):
        rope.write_record(base.config, directory)


def _write_model(
    model: Any, directory: Path, dtype: torch.dtype | None, shard_bytes: int | None
) -> None:
    base = causal_lm(model)
    settings = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    if dtype is None or all(p.dtype == dtype for p in base.parameters()):
        base.save_pretrained(directory, **settings)
        return
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in base.state_dict().items()
    }
    base.save_pretrained(directory, state_dict=state, **settings)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
