"""Which files a reward model of a run is made of, and how much memory they take; none is loaded."""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from llmray import hub
from llmray.arguments.loading import load
from llmray.arguments.rlhf import kind_of
from llmray.arguments.run import RunArguments
from llmray.model.architecture import (
    UnknownSizesError,
    decoder,
    read_config,
    shapes,
    shapes_of,
    stored_bytes,
)
from llmray.model.memory import frozen_bytes
from llmray.rl.rewards import Elsewhere
from llmray.train.precision import inference_dtype

log = getLogger("llmray")

# how a reward model is fetched and loaded is how the policy is
AS_THE_POLICY = (
    *("cache_dir", "hf_hub_token", "ms_hub_token", "om_hub_token"),
    *("trust_remote_code", "allow_pickled_weights", "infer_dtype"),
    *("quantization_method", "quantization_type", "double_quantization"),
)
# which tokens there are: an adapter was trained on the policy's base with those of its run
WORDS = (
    *("add_tokens", "add_special_tokens", "new_special_tokens_config", "init_special_tokens"),
    *("resize_vocab", "split_special_tokens", "use_fast_tokenizer"),
)


def run_file(
    name: str, arguments: RunArguments, base: str | None, use_cpu: bool | None = None
) -> RunArguments:
    """The run file that `llmray score` would have for a reward model.

    Args:
        name: as it is in reward_model.
        arguments: of the run.
        base: the policy's model, for adapters of it.
        use_cpu: None is as the run does.
    """
    rlhf, model = arguments.rlhf, arguments.model
    keys: dict[str, Any] = {
        "stage": "rm",
        "template": arguments.data.template,
        "cutoff_len": arguments.data.cutoff_len,
        **{key: getattr(model, key) for key in AS_THE_POLICY},
        "use_cpu": arguments.training.use_cpu if use_cpu is None else use_cpu,
    }
    if rlhf.reward_model_type == "lora":
        keys |= {
            "model_name_or_path": base,
            "adapter_name_or_path": [name],
            "quantization_bit": model.quantization_bit,
            **{key: getattr(model, key) for key in WORDS},
        }
    else:
        keys |= {
            "model_name_or_path": name,
            "adapter_name_or_path": list(rlhf.reward_model_adapters),
            "quantization_bit": rlhf.reward_model_quantization_bit,
        }
    return load({k: v for k, v in keys.items() if v is not None}, environ={})


def bytes_here(
    arguments: RunArguments, model_dir: Path, device: torch.device, elsewhere: Elsewhere | None
) -> int:
    """The memory that the reward models of a run take in a worker's own process.

    Adapters are merged or small, and not counted; nor is a model whose sizes are not known.

    Args:
        arguments: of the run.
        model_dir: the policy's, whose adapter a reward model may be.
        device: that they are loaded to.
        elsewhere: has those that live in other processes.

    Raises:
        LlmrayError: one is not there.
    """
    if arguments.finetuning.stage != "ppo":
        return 0
    there = elsewhere.handles if elsewhere is not None else {}
    here = [n for n in arguments.rlhf.reward_models if kind_of(n) == "model" and n not in there]
    return sum(_bytes(run_file(name, arguments, str(model_dir)), name, device) for name in here)


def _bytes(asked: RunArguments, name: str, device: torch.device) -> int:
    directory = hub.resolve(asked.model.model_name_or_path, asked.model)
    config = read_config(directory)
    if "quantization_config" in config:
        return stored_bytes(directory)
    try:
        table = shapes(directory) or shapes_of(decoder(config))
    except UnknownSizesError as error:
        log.warning("the memory of reward model %s is not counted: %s", name, error)
        return 0
    size = inference_dtype(asked.model.infer_dtype, device).itemsize
    return frozen_bytes(asked.model, table, size)
