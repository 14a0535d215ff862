"""What llmray does not do yet, and what it never will: the one table that says so.

A key that stands here fails when it is set away from its default, unless `works` allows the value.
Whoever builds a capability removes its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmray.arguments.problems import Problem, given

Flat = Mapping[str, Any]  # key -> value of the whole run
Works = Callable[[Any, Flat], bool]


@dataclass(frozen=True)
class Gap:
    """A key that does not work: the sentence that says why, and the values that do work."""

    sentence: str
    works: Works | None = None

    def allows(self, value: Any, default: Any, flat: Flat) -> bool:
        """Whether the value works in the run that `flat` describes."""
        return value == default or (self.works is not None and self.works(value, flat))


def only(*values: Any) -> Works:
    """The condition that the value is among `values`."""
    return lambda value, flat: value in values


def _family(sentence: str, *keys: str) -> dict[str, Gap]:
    return {key: Gap(sentence) for key in keys}


_REMOVE = "Remove it, or set it to its default."

# Later work removes these rows.
NOT_BUILT: dict[str, Gap] = {
    # stages and methods
    "finetuning_type": Gap(
        "Orthogonal fine-tuning is not built yet. Use lora, freeze or full.",
        only("full", "freeze", "lora"),
    ),
    **_family(
        f"Orthogonal fine-tuning is not built yet. {_REMOVE}",
        "oft_rank",
        "oft_block_size",
        "oft_target",
        "module_dropout",
    ),
    "use_llama_pro": Gap(f"Training of added blocks is not built yet. {_REMOVE}"),
    **_family(
        f"Losses beside cross-entropy are not built yet. {_REMOVE}",
        "use_dft_loss",
        "use_asft_loss",
        "asft_alpha",
        "use_eaft_loss",
        "eaft_alpha",
        "label_smoothing_factor",
        "neftune_noise_alpha",
    ),
    **_family(
        f"Megatron and HyperParallel are not built in yet. {_REMOVE}",
        "use_mca",
        "use_hyper_parallel",
        "hyper_parallel_args",
        "hyper_parallel_cp_size",
    ),
    # optimizers and schedules
    "optim": Gap(
        "Of the optimizers only torch's own and Adafactor are built yet. Use adamw_torch, "
        "adamw_torch_fused, adafactor, sgd, adagrad or rmsprop.",
        only("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    ),
    **_family(
        f"Optimizers of low rank, by blocks or by matrices are not built yet. {_REMOVE}",
        "optim_target_modules",
        "use_galore",
        "galore_target",
        "galore_rank",
        "galore_update_interval",
        "galore_scale",
        "galore_proj_type",
        "galore_layerwise",
        "use_apollo",
        "apollo_target",
        "apollo_rank",
        "apollo_update_interval",
        "apollo_scale",
        "apollo_proj",
        "apollo_proj_type",
        "apollo_scale_type",
        "apollo_layerwise",
        "apollo_scale_front",
        "use_badam",
        "badam_mode",
        "badam_start_block",
        "badam_switch_mode",
        "badam_switch_interval",
        "badam_update_ratio",
        "badam_mask_mode",
        "badam_verbose",
        "use_adam_mini",
        "use_muon",
    ),
    "lr_scheduler_type": Gap(
        "Rates that follow the loss up and down are not built yet. Use reduce_lr_on_plateau.",
        lambda value, flat: value != "greedy",
    ),
    # data
    **_family(
        f"Images, video and audio are not built yet. {_REMOVE}",
        "media_dir",
        "image_max_pixels",
        "image_min_pixels",
        "image_do_pan_and_scan",
        "crop_to_patches",
        "video_max_pixels",
        "video_min_pixels",
        "video_fps",
        "video_maxlen",
        "use_audio_in_video",
        "audio_sampling_rate",
        "freeze_vision_tower",
        "freeze_multi_modal_projector",
        "freeze_language_model",
    ),
    # model
    "shift_attn": Gap(f"Shifted sparse attention is not built yet. {_REMOVE}"),
    "mixture_of_depths": Gap(f"Mixture of depths is not built yet. {_REMOVE}"),
    "use_v1_kernels": Gap(f"Kernels chosen for the device are not built in yet. {_REMOVE}"),
    "infer_backend": Gap("Only transformers generates yet. Use huggingface."),
    "quantization_method": Gap("HQQ and EETQ are not built in yet. Use bnb."),
    **_family(
        f"Training in 8-bit floating point is not built yet. {_REMOVE}",
        "fp8",
        "fp8_backend",
        "fp8_enable_fsdp_float8_all_gather",
    ),
    **_family(
        f"vLLM and SGLang are not built in yet. {_REMOVE}",
        "vllm_maxlen",
        "vllm_gpu_util",
        "vllm_enforce_eager",
        "vllm_max_lora_rank",
        "vllm_config",
        "sglang_maxlen",
        "sglang_mem_fraction",
        "sglang_tp_size",
        "sglang_config",
        "sglang_lora_backend",
    ),
    **_family(
        f"KTransformers is not built in yet. {_REMOVE}",
        "use_kt",
        "kt_optimize_rule",
        "cpu_infer",
        "chunk_size",
        "mode",
        "kt_maxlen",
        "kt_use_cuda_graph",
        "kt_mode",
        "kt_force_think",
    ),
    # training
    "auto_find_batch_size": Gap(f"A search for the batch size is not built yet. {_REMOVE}"),
    **_family(
        f"torch.compile is not built in yet. {_REMOVE}",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
    ),
    **_family(
        f"Settings of the process group are not built yet. {_REMOVE}",
        "ddp_backend",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
    ),
    "deepspeed": Gap("DeepSpeed is not built in yet. Remove the key."),
    "fsdp": Gap("Sharding by FSDP is not built in yet. Remove the key.", only("", False)),
    **_family(
        "Sharding over workers is not built yet. Remove the key.",
        "fsdp_config",
        "parallelism_config",
    ),
    **_family(
        f"Profiling and memory reports are not built yet. {_REMOVE}",
        "skip_memory_metrics",
        "enable_torch_profiler",
        "profiler_output_dir",
        "profiler_wait_steps",
        "profiler_warmup_steps",
        "profiler_active_steps",
        "profiler_repeat",
        "profiler_record_shapes",
        "profiler_profile_memory",
        "profiler_with_stack",
        "profile_modules",
    ),
    # tracking, export, evaluation, sweeps
    **_family(
        f"Trackio is not built in. {_REMOVE}",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
    ),
    **_family(
        f"Quantised export is not built yet. {_REMOVE}",
        "export_quantization_bit",
        "export_quantization_dataset",
        "export_quantization_nsamples",
        "export_quantization_maxlen",
    ),
    **_family(
        f"Uploads to a hub are not built yet. {_REMOVE}",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "hub_strategy",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
    ),
    **_family(
        f"Benchmarks are not built yet. {_REMOVE}",
        "task",
        "task_dir",
        "batch_size",
        "lang",
        "n_shot",
        "save_dir",
        "download_mode",
    ),
}

# Names of transformers or LLaMA-Factory that have no place here, with what to use instead.
NOT_SUPPORTED: dict[str, Gap] = {
    "use_fast_tokenizer": Gap(
        "Transformers 5 always takes the fast tokenizer, and data is prepared by nothing else. "
        "Remove the key."
    ),
    "use_unsloth": Gap(
        "Unsloth patches a transformers of its own (at most 5.17 in its release of October 2026, "
        "and datasets below 5), so the two cannot be installed together. Write flash_attn: fa2 and "
        "enable_liger_kernel: true for fast kernels, use_unsloth_gc: true for its memory, and "
        "remove the key."
    ),
    "low_cpu_mem_usage": Gap(
        "Weights are always read from their file's pages, without a second copy in memory. Remove "
        "the key."
    ),
    "offload_folder": Gap(
        "Each process holds the whole model on its one device, and nothing is put on disk. Remove "
        "the key; quantization_bit: 4 makes the model smaller."
    ),
    "ignore_pad_token_for_loss": Gap(
        "Padding is never learnt: targets are marked by their place in a row, where there is none. "
        "Set it to true, or remove the key."
    ),
    "average_tokens_across_devices": Gap(
        "The loss is always divided by the tokens of all workers, so that it does not depend on "
        "how a batch is split. Remove the key."
    ),
    "logging_nan_inf_filter": Gap("A loss that is not finite ends the run. Remove the key."),
    **_family(
        "The first rank alone speaks; LLAMAFACTORY_VERBOSITY sets how much. Remove the key.",
        "log_on_each_node",
        "log_level",
        "log_level_replica",
    ),
    "save_on_each_node": Gap(
        "A checkpoint is written once, to storage that all nodes see. Remove the key."
    ),
    "enable_jit_checkpoint": Gap(
        "SIGTERM always saves a checkpoint before the run ends. Remove the key."
    ),
    **_family(
        "Evaluation sums on the device and needs no such setting. Remove the key.",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "batch_eval_metrics",
        "include_for_metrics",
        "prediction_loss_only",
    ),
    "ignore_data_skip": Gap(
        "A resumed run opens the data where it stopped, at no cost. Remove the key."
    ),
    "restore_callback_states_from_checkpoint": Gap(
        "All state is in the checkpoint and restored. Remove the key."
    ),
    "generation_config": Gap(
        "How responses are drawn stands in the run file: do_sample, temperature, top_p, top_k, "
        "num_beams and the like, none of which is left to a model's folder. Remove the key."
    ),
    "activation_checkpointing_kwargs": Gap("Write use_reentrant_gc: true or false instead."),
    **_family(
        "Rows are read ahead by threads, which live as long as the run. Write "
        "dataloader_num_workers, and remove the key.",
        "dataloader_persistent_workers",
        "dataloader_multiprocessing_context",
    ),
    "dataloader_in_order": Gap("Batches always come in their order. Remove the key."),
    **_family(
        "Columns are named in dataset_info.json. Remove the key.",
        "remove_unused_columns",
        "label_names",
        "length_column_name",
    ),
    "sortish_sampler": Gap("Rows are not padded; their order by length is of no use. Remove it."),
    "local_rank": Gap("The launcher says it in LOCAL_RANK. Remove the key."),
    "accelerator_config": Gap("Accelerate does not run the training. Remove the key."),
    "debug": Gap("Set LLMRAY_DEBUG=1 for tracebacks. Remove the key."),
}


@dataclass(frozen=True)
class Combination:
    """Keys that work alone and not yet together."""

    keys: tuple[str, ...]
    holds: Callable[[Flat], bool]
    sentence: str


def _adds_to_low_bits(key: str) -> Combination:
    return Combination(
        (key, "quantization_bit"),
        lambda flat: bool(flat[key]) and flat["quantization_bit"] is not None,
        "A larger vocabulary of low-bit weights is not built yet. Add the tokens to the model in "
        "full precision first.",
    )


COMBINATIONS_NOT_BUILT: tuple[Combination, ...] = (
    Combination(
        ("stage", "streaming"),
        lambda flat: flat["stage"] == "ppo" and flat["streaming"],
        "Prompts of a stream are not built yet. Set streaming: false.",
    ),
    Combination(
        ("load_best_model_at_end", "save_only_model"),
        lambda flat: flat["load_best_model_at_end"] and flat["save_only_model"],
        "Weights that were saved alone are not restored within a run yet. Remove save_only_model.",
    ),
    Combination(
        ("adapter_name_or_path", "quantization_bit"),
        lambda flat: len(flat["adapter_name_or_path"]) > 1 and flat["quantization_bit"] is not None,
        "Several adapters on low-bit weights are not built yet. Name one.",
    ),
    Combination(
        ("create_new_adapter", "quantization_bit"),
        lambda flat: (
            flat["create_new_adapter"]
            and bool(flat["adapter_name_or_path"])
            and flat["quantization_bit"] is not None
        ),
        "Merging into low-bit weights is not built yet. Remove create_new_adapter.",
    ),
    Combination(
        ("resize_vocab", "quantization_bit"),
        lambda flat: flat["resize_vocab"] and flat["quantization_bit"] is not None,
        "A larger vocabulary of low-bit weights is not built yet. Remove one of the two.",
    ),
    *map(_adds_to_low_bits, ("add_tokens", "add_special_tokens", "new_special_tokens_config")),
    Combination(
        ("precompute_ref_logps", "pissa_init", "quantization_bit"),
        lambda flat: (
            flat["precompute_ref_logps"] is True
            and flat["pissa_init"]
            and flat["quantization_bit"] is not None
            and not (
                flat["adapter_name_or_path"] or flat["ref_model"] or flat["ref_model_adapters"]
            )
        ),
        "Low-bit weights are rounded anew when PiSSA starts, at the first update; a reference that "
        "is asked before would be another. Write precompute_ref_logps: auto.",
    ),
    Combination(
        ("pissa_init", "quantization_bit", "stage"),
        lambda flat: (
            flat["stage"] == "ppo" and flat["pissa_init"] and flat["quantization_bit"] is not None
        ),
        "Low-bit weights are rounded anew when PiSSA starts, at the first update, and responses "
        "are sampled before it. Remove pissa_init or quantization_bit.",
    ),
    Combination(
        ("use_dora", "quantization_method"),
        lambda flat: (
            flat["use_dora"]
            and flat["quantization_bit"] is not None
            and flat["quantization_method"] != "bnb"
        ),
        "DoRA of weights of that library is not built yet. Use quantization_method: bnb.",
    ),
    Combination(
        ("use_asft_loss", "finetuning_type"),
        lambda flat: flat["use_asft_loss"] and flat["finetuning_type"] == "lora",
        "ASFT with an adapter is not built yet. Use finetuning_type: full.",
    ),
)


def gaps(flat: Flat, defaults: Flat) -> list[Problem]:
    """What the run asks for that llmray does not do; keys that lack the same thing in one problem.

    Args:
        flat: the value of every key of the run.
        defaults: the default of every key.
    """
    asked: dict[str, list[str]] = {}
    for key, gap in (NOT_BUILT | NOT_SUPPORTED).items():
        if not gap.allows(flat[key], defaults[key], flat):
            asked.setdefault(gap.sentence, []).append(key)
    found = [_problem(tuple(keys), sentence, flat, ", ") for sentence, keys in asked.items()]
    said = {key for keys in asked.values() for key in keys}
    return found + [
        _problem(combination.keys, combination.sentence, flat, " with ")
        for combination in COMBINATIONS_NOT_BUILT
        if combination.holds(flat) and not said.intersection(combination.keys)
    ]


def _problem(keys: tuple[str, ...], sentence: str, flat: Flat, between: str) -> Problem:
    return Problem(keys, f"{between.join(given(key, flat[key]) for key in keys)}: {sentence}")


def is_partial(key: str) -> bool:
    """Whether some values of the key work and others not yet."""
    return key in NOT_BUILT and NOT_BUILT[key].works is not None
