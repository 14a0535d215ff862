"""Other names of keys: aliases, names whose value changes with them, and names that are retired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmray.arguments.problems import Problem, given

# Another name of the same thing.
ALIASES: dict[str, str] = {
    "new_special_tokens": "add_special_tokens",
    "use_cache": "use_kv_cache",
    "use_liger_kernel": "enable_liger_kernel",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "xpu_backend": "ddp_backend",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}

# Another spelling of a value.
VALUES: dict[tuple[str, str], Any] = {
    ("quantization_method", "bitsandbytes"): "bnb",
    **{("compute_dtype", f"torch.{name}"): name for name in ("float16", "bfloat16", "float32")},
}

# What to say of a value that a key once took.
VALUE_HINTS: dict[tuple[str, str], str] = {
    ("optim", "adamw_hf"): "Transformers removed it; use adamw_torch.",
    ("optim", "adamw_apex_fused"): "Transformers removed it; use adamw_torch_fused.",
    **{
        ("quantization_method", name): "A checkpoint in that format is recognised by itself: "
        "remove the key."
        for name in ("gptq", "awq", "aqlm", "mxfp4", "fp8")
    },
}


@dataclass(frozen=True)
class Retired:
    """A name that is no longer a key: what to do instead, and the values that change nothing."""

    sentence: str
    harmless: tuple[Any, ...] = ()


RETIRED: dict[str, Retired] = {
    "save_safetensors": Retired(
        "Weights are always saved as safetensors. Remove the key.", (True,)
    ),
    "fp16_backend": Retired("torch's autocast computes fp16. Remove the key.", ("auto", "amp")),
    "half_precision_backend": Retired(
        "torch's autocast computes fp16 and bf16. Remove the key.", ("auto", "amp")
    ),
    "fp16_opt_level": Retired("Apex is not used. Write fp16: true.", ("O1",)),
    "use_ipex": Retired("The extension of Intel has ended; torch does its work.", (False,)),
    "use_mps_device": Retired("An Apple GPU is used when there is one.", (False,)),
    "jit_mode_eval": Retired("Write torch_compile instead.", (False,)),
    "torchdynamo": Retired("Write torch_compile_backend instead.", (None,)),
    "past_index": Retired("No model uses it any more. Remove the key.", (-1,)),
    "mp_parameters": Retired("SageMaker's launcher set it. Remove the key.", ("",)),
    "tpu_num_cores": Retired("TPUs are not supported. Remove the key.", (None,)),
    "tpu_metrics_debug": Retired("TPUs are not supported. Remove the key.", (False,)),
    "sharded_ddp": Retired("Write fsdp instead.", ("", None)),
    "fsdp_min_num_params": Retired("Write min_num_params into fsdp_config.", (0,)),
    "fsdp_transformer_layer_cls_to_wrap": Retired(
        "Write transformer_layer_cls_to_wrap into fsdp_config.", (None,)
    ),
    "dispatch_batches": Retired("Each worker reads its own rows. Remove the key.", (None, False)),
    "split_batches": Retired(
        "Batch sizes are those of each worker. Remove the key.", (None, False)
    ),
    "include_inputs_for_metrics": Retired("Write include_for_metrics: inputs.", (False,)),
    "include_tokens_per_second": Retired(
        "Every log line has tokens_per_second. Remove the key.", (True, False)
    ),
    "push_to_hub_organization": Retired("Write organization/name as hub_model_id.", (None,)),
    "ray_scope": Retired("Sweeps compare the last result of trials. Remove the key.", ("last",)),
    "ray_storage_filesystem": Retired(
        "Write the address into ray_storage_path, such as s3://bucket/runs.", (None,)
    ),
    "gradient_checkpointing_kwargs": Retired(
        "Write use_reentrant_gc: true or false instead.", (None,)
    ),
    "use_legacy_prediction_loop": Retired("There is one evaluation loop.", (False,)),
}


def _flag(value: Any) -> bool | None:
    """A value as true or false, None where it is neither."""
    words = {"true": True, "false": False}
    return value if isinstance(value, bool) else words.get(str(value).lower())


def _checkpointing(value: Any) -> dict[str, Any]:
    flag = _flag(value)
    return {"disable_gradient_checkpointing": value if flag is None else not flag}


def _projector_only(value: Any) -> dict[str, Any]:
    if _flag(value) is not True:
        return {}
    return {"freeze_language_model": True, "freeze_multi_modal_projector": False}


# A name whose value changes with it: value -> the keys and values that stand for it.
CONVERTED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "train_mm_proj_only": _projector_only,
    "gradient_checkpointing": _checkpointing,
    "activation_checkpointing": _checkpointing,
    "no_cuda": lambda value: {"use_cpu": value},
    "group_by_length": lambda value: {
        "train_sampling_strategy": "group_by_length" if _flag(value) else "random"
    },
    "adafactor": lambda value: {"optim": "adafactor"} if _flag(value) else {},
}


def resolve(flat: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The keys and values with every other name replaced, and the names that are retired."""
    resolved: dict[str, Any] = {}
    problems: list[Problem] = []
    origin: dict[str, str] = {}
    for name, value in flat.items():
        if name in RETIRED:
            problems += _retired(name, value)
            continue
        for key, meant in _replaced(name, value).items():
            if key in resolved and resolved[key] != meant:
                problems.append(
                    Problem(
                        (key,),
                        f"{given(name, value)} and {given(origin[key], flat[origin[key]])} say "
                        f"different things of {key}. Keep one of them.",
                    )
                )
            resolved[key] = meant
            origin[key] = name
    return _qlora(resolved), problems


def all_names() -> tuple[str, ...]:
    """Every name beside the keys themselves."""
    return (*ALIASES, *CONVERTED, *RETIRED)


def _replaced(name: str, value: Any) -> dict[str, Any]:
    if name in CONVERTED:
        return {} if value is None else CONVERTED[name](value)
    key = ALIASES.get(name, name)
    if isinstance(value, str):
        value = VALUES.get((key, value), value)
    return {key: value}


def _retired(name: str, value: Any) -> list[Problem]:
    retired = RETIRED[name]
    if any(value == harmless and type(value) is type(harmless) for harmless in retired.harmless):
        return []
    return [Problem((name,), f"{given(name, value)}: no longer a key. {retired.sentence}")]


def _qlora(flat: dict[str, Any]) -> dict[str, Any]:
    """`finetuning_type: qlora` as lora over 4-bit weights."""
    if flat.get("finetuning_type") != "qlora":
        return flat
    bits = flat.get("quantization_bit")
    return flat | {"finetuning_type": "lora", "quantization_bit": 4 if bits is None else bits}
