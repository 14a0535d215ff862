"""Arguments of training: batches, length, cadence of logs and saves, number formats, processes.

The names are those of transformers' TrainingArguments, with their meaning.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from llmray.arguments.group import (
    Field,
    Float,
    Group,
    Int,
    Names,
    Object,
    PathOrFlag,
    Share,
    TextOrObject,
    as_interval,
)


def _counted_tokens(value: Any) -> Any:
    """The two booleans that `include_num_input_tokens_seen` once was, as today's words."""
    words = {True: "all", False: "no"}
    return words[value] if isinstance(value, bool) else value


Interval = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(as_interval)]
SaveInterval = Annotated[Literal["no", "steps", "epoch", "best"], BeforeValidator(as_interval)]
TokenCount = Annotated[Literal["no", "all", "non_padding"], BeforeValidator(_counted_tokens)]


# Scores of generated responses; in metrics they follow the name of what was evaluated.
GENERATED_METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "exact_match")


class LengthArguments(Group):
    """What is done, for how long, in which batches."""

    output_dir: str | None = Field(
        None, min_length=1, description="Folder of the run: model, logs, plots, checkpoints."
    )
    overwrite_output_dir: bool = Field(
        False,
        description="Start anew although the folder holds checkpoints; these are moved aside.",
    )
    do_train: bool = Field(False, description="Train.")
    do_eval: bool = Field(False, description="Evaluate after training.")
    do_predict: bool = Field(
        False,
        description="Predict the evaluation rows at the end: responses with predict_with_generate "
        "and in stage ppo, otherwise the loss; into predict_results.json and "
        "generated_predictions.jsonl.",
    )
    predict_with_generate: bool = Field(
        False,
        description="Evaluation and prediction also generate a response to each prompt and score "
        "it against the row's last one: BLEU-4, ROUGE-1, -2, -L, exact match, in percent.",
    )
    per_device_train_batch_size: Int = Field(
        8, ge=1, description="Rows that each worker computes at once in training."
    )
    per_device_eval_batch_size: Int = Field(
        8, ge=1, description="Rows that each worker computes at once in evaluation."
    )
    gradient_accumulation_steps: Int = Field(
        1, ge=1, description="Batches of each worker that make one step."
    )
    num_train_epochs: Float = Field(
        3.0, gt=0, description="Passes over the training rows; counts where max_steps is not given."
    )
    max_steps: Int = Field(-1, ge=-1, description="Steps of the run; -1 leaves it to the epochs.")
    auto_find_batch_size: bool = Field(
        False, description="Halve the batch when memory does not suffice."
    )
    average_tokens_across_devices: bool = Field(
        True, description="Divide the loss by the tokens of all workers. llmray always does."
    )
    label_smoothing_factor: Float = Field(
        0.0, ge=0, lt=1, description="Probability given to all tokens beside the right one."
    )
    neftune_noise_alpha: Float | None = Field(
        None, ge=0, description="Noise on embeddings in training (NEFTune)."
    )


class CadenceArguments(Group):
    """When the run logs, saves and evaluates."""

    logging_strategy: Interval = Field("steps", description="When metrics are logged.")
    logging_steps: Share = Field(
        500, gt=0, description="Steps between two log lines; below 1 a share of all steps."
    )
    logging_first_step: bool = Field(False, description="Also log the first step.")
    logging_nan_inf_filter: bool = Field(
        True, description="Leave losses that are not finite out of the logged mean."
    )
    log_on_each_node: bool = Field(True, description="One speaker on each node.")
    log_level: str = Field("passive", description="Log level of the first rank.")
    log_level_replica: str = Field("warning", description="Log level of the other ranks.")
    disable_tqdm: bool | None = Field(
        None,
        description="True prints lines, false draws a bar. Not given: a bar on a terminal alone.",
    )
    include_num_input_tokens_seen: TokenCount = Field(
        "no",
        description="Log the tokens seen so far, all or those that are not padding, as "
        "num_input_tokens_seen.",
    )
    save_strategy: SaveInterval = Field("steps", description="When a checkpoint is saved.")
    save_steps: Share = Field(
        500, gt=0, description="Steps between two checkpoints; below 1 a share of all steps."
    )
    save_total_limit: Int | None = Field(
        None, ge=1, description="Checkpoints kept, the newest. Not given: all."
    )
    save_only_model: bool = Field(
        False, description="Checkpoints without optimizer: smaller, but nothing resumes from them."
    )
    save_on_each_node: bool = Field(False, description="Save checkpoints on every node.")
    enable_jit_checkpoint: bool = Field(False, description="Save when the job is about to end.")
    eval_strategy: Interval = Field("no", description="When the evaluation rows are evaluated.")
    eval_steps: Share | None = Field(
        None,
        gt=0,
        description="Steps between two evaluations; below 1 a share of all steps. Not given: "
        "logging_steps.",
    )
    eval_delay: Float = Field(0, ge=0, description="Steps or epochs before the first evaluation.")
    eval_on_start: bool = Field(False, description="Evaluate before the first step.")
    eval_accumulation_steps: Int | None = Field(
        None, ge=1, description="Batches of an evaluation before its results leave the device."
    )
    eval_do_concat_batches: bool = Field(
        True, description="Join the results of an evaluation's batches."
    )
    eval_use_gather_object: bool = Field(False, description="Gather nested objects from workers.")
    batch_eval_metrics: bool = Field(False, description="Compute metrics batch by batch.")
    include_for_metrics: Names = Field((), description="What metric functions get beside logits.")
    prediction_loss_only: bool = Field(False, description="Evaluate the loss alone.")
    load_best_model_at_end: bool = Field(
        False, description="End with the weights of the best evaluation instead of the last."
    )
    metric_for_best_model: str | None = Field(
        None, description="Metric that says which evaluation is best. Not given: the loss."
    )
    greater_is_better: bool | None = Field(
        None, description="Whether a larger metric is better. Not given: unless it is a loss."
    )
    resume_from_checkpoint: PathOrFlag | None = Field(
        None,
        description="Checkpoint to go on from: its folder, or true for the newest in output_dir. "
        "Not given: the newest one there, if any; false: none.",
    )
    ignore_data_skip: bool = Field(False, description="Resume with the data from its start.")
    restore_callback_states_from_checkpoint: bool = Field(
        False, description="Restore callbacks from the checkpoint. llmray restores all its state."
    )


class PrecisionArguments(Group):
    """Number formats and reproducibility."""

    seed: Int = Field(
        42, ge=0, le=2**32 - 1, description="Seed of weights, dropout, order and split of the data."
    )
    data_seed: Int | None = Field(
        None, ge=0, le=2**32 - 1, description="Seed of the order of the data. Not given: seed."
    )
    full_determinism: bool = Field(
        False, description="Use deterministic kernels only, which may be slower."
    )
    bf16: bool | None = Field(
        None, description="Compute in bfloat16, weights in float32. Not given: as hardware suits."
    )
    fp16: bool | None = Field(
        None,
        description="Compute in float16 with loss scaling, weights in float32. Not given: no.",
    )
    fp32: bool | None = Field(None, description="Compute in float32. Not given: as hardware suits.")
    bf16_full_eval: bool = Field(
        False, description="Evaluate and predict with weights in bfloat16, where nothing trains."
    )
    fp16_full_eval: bool = Field(
        False, description="Evaluate and predict with weights in float16, where nothing trains."
    )
    tf32: bool | None = Field(
        None,
        description="Round the operands of float32 products to TF32, on NVIDIA GPUs. Not given: "
        "as torch is set.",
    )
    use_cpu: bool = Field(False, description="Train on the CPU although there is a GPU.")
    torch_compile: bool = Field(False, description="Compile the model with torch.compile.")
    torch_compile_backend: str | None = Field(None, description="Back end of torch.compile.")
    torch_compile_mode: str | None = Field(None, description="Mode of torch.compile.")
    torch_empty_cache_steps: Int | None = Field(
        None,
        ge=1,
        description="Steps between two releases of memory that is kept unused.",
    )
    activation_checkpointing_kwargs: Object | None = Field(
        None, description="Settings of torch's recomputation of activations."
    )


class LoaderArguments(Group):
    """How rows reach the device; nothing but the order and the last step changes a result."""

    dataloader_num_workers: Int = Field(
        0,
        ge=0,
        description="Threads that lay rows out as batches ahead of time. 0: when they are needed.",
    )
    dataloader_pin_memory: bool = Field(
        True, description="Copy batches to a GPU through pinned memory."
    )
    dataloader_persistent_workers: bool = Field(
        False, description="Keep reading processes between epochs. Threads stay as they are."
    )
    dataloader_prefetch_factor: Int | None = Field(
        None, ge=1, description="Batches that each thread reads ahead. Not given: 2."
    )
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = Field(
        None, description="How reading processes start. Threads need no start."
    )
    dataloader_in_order: bool = Field(True, description="Take batches in their order.")
    dataloader_drop_last: bool = Field(
        False, description="Leave out the last step of an epoch when it is not full."
    )
    remove_unused_columns: bool = Field(
        False, description="Drop columns that the model's forward does not name."
    )
    label_names: Names = Field((), description="Inputs that are labels.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        "random",
        description="Order of the training rows; group_by_length brings rows of like length near "
        "each other, in a random order of groups.",
    )
    length_column_name: str = Field("length", description="Column that holds the rows' lengths.")
    sortish_sampler: bool = Field(False, description="Order rows roughly by length.")
    generation_max_length: Int | None = Field(
        None,
        ge=1,
        description="Tokens of prompt and response together when evaluation generates. Not given: "
        "max_new_tokens or max_length.",
    )
    generation_num_beams: Int | None = Field(
        None, ge=1, description="Beams when evaluation generates. Not given: num_beams."
    )
    generation_config: str | None = Field(
        None, description="Model folder whose generation settings evaluation takes."
    )


class ProcessArguments(Group):
    """Several processes: torch's DDP, sharding, profiling."""

    ddp_timeout: Int = Field(
        1800, ge=1, description="Seconds that a worker waits for the others before it gives up."
    )
    ddp_backend: str | None = Field(
        None, description="Communication library of the workers. Not given: as the device needs."
    )
    ddp_find_unused_parameters: bool | None = Field(
        None, description="Search each step for parameters without a gradient."
    )
    ddp_bucket_cap_mb: Int | None = Field(
        None, ge=1, description="Megabytes of gradients that are reduced together."
    )
    ddp_broadcast_buffers: bool | None = Field(
        None, description="Send buffers from the first worker to all before each step."
    )
    ddp_static_graph: bool | None = Field(
        None, description="Promise that every step uses the same parameters."
    )
    local_rank: Int = Field(-1, ge=-1, description="Rank on the node, set by the launcher.")
    fsdp: str | bool | None = Field(
        None, description="Shard parameters over the workers through torch's FSDP."
    )
    fsdp_config: TextOrObject | None = Field(None, description="Settings of FSDP, or their file.")
    deepspeed: TextOrObject | None = Field(
        None, description="Settings of DeepSpeed, or their file."
    )
    accelerator_config: TextOrObject | None = Field(
        None, description="Settings of accelerate, or their file."
    )
    parallelism_config: Object | None = Field(
        None, description="Sizes of tensor, context and data parallelism."
    )
    skip_memory_metrics: bool = Field(True, description="Do not report memory use.")
    debug: Names = Field((), description="Debugging aids of transformers.")
    enable_torch_profiler: bool = Field(False, description="Record traces of torch's profiler.")
    profiler_output_dir: str | None = Field(None, description="Folder of the traces.")
    profiler_wait_steps: Int = Field(1, ge=0, description="Steps left out before each trace.")
    profiler_warmup_steps: Int = Field(1, ge=0, description="Steps that warm the profiler up.")
    profiler_active_steps: Int = Field(1, ge=1, description="Steps of each trace.")
    profiler_repeat: Int = Field(1, ge=0, description="Number of traces; 0 for no end.")
    profiler_record_shapes: bool = Field(True, description="Record the shapes of tensors.")
    profiler_profile_memory: bool = Field(True, description="Record memory use.")
    profiler_with_stack: bool = Field(True, description="Record call stacks.")
    profile_modules: Names = Field((), description="Modules whose times are reported.")


class TrainingArguments(
    ProcessArguments, LoaderArguments, PrecisionArguments, CadenceArguments, LengthArguments
):
    """Everything about training that is not model, data, method or optimizer."""
