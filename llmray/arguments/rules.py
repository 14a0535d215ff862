"""Rules between keys: what contradicts itself whatever llmray can do. One small function a fact.

Each rule takes the arguments of a run and yields the problems it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmray.arguments.problems import Problem, given, shown

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

Rule = Callable[["RunArguments"], Iterator[Problem]]

GALORE_OPTIMS = ("adamw_torch", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adafactor")


def model_is_named(arguments: RunArguments) -> Iterator[Problem]:
    """A run needs a model."""
    if arguments.model.model_name_or_path is None:
        yield Problem(
            ("model_name_or_path",),
            "model_name_or_path is not given. Write the folder or the hub name of a model.",
        )


def training_needs_data(arguments: RunArguments) -> Iterator[Problem]:
    """Training needs data."""
    if arguments.training.do_train and not arguments.data.dataset:
        yield Problem(
            ("do_train", "dataset"),
            "do_train=true, but no dataset is given. Write dataset: with names that stand in "
            "dataset_info.json.",
        )


def training_needs_output(arguments: RunArguments) -> Iterator[Problem]:
    """Training needs a place for its result."""
    if arguments.training.do_train and arguments.training.output_dir is None:
        yield Problem(
            ("do_train", "output_dir"),
            "do_train=true, but no output_dir is given. Write output_dir: with a folder.",
        )


def evaluation_needs_rows(arguments: RunArguments) -> Iterator[Problem]:
    """Evaluation and prediction need rows."""
    training = arguments.training
    asked = {
        "do_eval": training.do_eval,
        "do_predict": training.do_predict,
        "predict_with_generate": training.predict_with_generate,
        "eval_strategy": training.eval_strategy != "no" and training.do_train,
    }
    for key, is_asked in asked.items():
        if is_asked and not arguments.data.has_evaluation:
            value = given(key, getattr(training, key))
            yield Problem(
                (key, "eval_dataset", "val_size"),
                f"{value}, but there are no rows to evaluate. Write eval_dataset or val_size, or "
                f"remove {key}.",
            )


def sft_only(arguments: RunArguments) -> Iterator[Problem]:
    """Some keys speak of responses, which only stage sft learns."""
    stage = arguments.finetuning.stage
    asked = {
        "predict_with_generate": arguments.training.predict_with_generate,
        "neat_packing": arguments.data.neat_packing,
        "train_on_prompt": arguments.data.train_on_prompt,
        "mask_history": arguments.data.mask_history,
    }
    for key, is_asked in asked.items():
        if is_asked and stage != "sft":
            yield Problem(
                (key, "stage"),
                f"{key}=true with stage={stage}: it is for stage sft. Remove {key}, or write "
                "stage: sft.",
            )


def prediction_generates(arguments: RunArguments) -> Iterator[Problem]:
    """Prediction of stage sft writes responses."""
    training = arguments.training
    is_sft = arguments.finetuning.stage == "sft"
    if is_sft and training.do_predict and not training.predict_with_generate:
        yield Problem(
            ("do_predict", "predict_with_generate"),
            "do_predict=true writes responses and requires predict_with_generate: true. Write it.",
        )


def generated_responses_have_no_accuracy(arguments: RunArguments) -> Iterator[Problem]:
    """Token accuracy is that of the loss, not of generated text."""
    if arguments.training.predict_with_generate and arguments.finetuning.compute_accuracy:
        yield Problem(
            ("predict_with_generate", "compute_accuracy"),
            "predict_with_generate=true with compute_accuracy=true: generated text has no token "
            "accuracy. Remove one of them.",
        )


def history_is_masked_or_learnt(arguments: RunArguments) -> Iterator[Problem]:
    """The history cannot be masked and its prompts learnt."""
    if arguments.data.mask_history and arguments.data.train_on_prompt:
        yield Problem(
            ("mask_history", "train_on_prompt"),
            "mask_history=true with train_on_prompt=true: one leaves prompts out, the other "
            "learns them. Remove one of them.",
        )


def one_source_of_evaluation_rows(arguments: RunArguments) -> Iterator[Problem]:
    """Rows for evaluation are named or set aside, not both."""
    data = arguments.data
    if data.val_size > 0 and data.eval_dataset:
        yield Problem(
            ("val_size", "eval_dataset"),
            f"val_size={data.val_size} with eval_dataset={shown(','.join(data.eval_dataset))}: "
            "rows are set aside or named. Remove one of them.",
        )


def split_needs_data(arguments: RunArguments) -> Iterator[Problem]:
    """Rows are set aside from a data set."""
    if arguments.data.val_size > 0 and not arguments.data.dataset:
        yield Problem(
            ("val_size", "dataset"),
            f"val_size={arguments.data.val_size}, but no dataset is given. Write dataset:, or "
            "remove val_size.",
        )


def probabilities_interleave(arguments: RunArguments) -> Iterator[Problem]:
    """Probabilities are for interleaving."""
    data = arguments.data
    if data.interleave_probs and data.mix_strategy == "concat":
        yield Problem(
            ("interleave_probs", "mix_strategy"),
            f"{given('interleave_probs', data.interleave_probs)} with mix_strategy=concat: sets "
            "that follow one another are not drawn. Write mix_strategy: interleave_under, or "
            "remove interleave_probs.",
        )


def one_probability_a_set(arguments: RunArguments) -> Iterator[Problem]:
    """Each set has a probability; they are positive and sum to 1."""
    data = arguments.data
    probabilities = data.interleave_probs
    if probabilities and len(probabilities) != len(data.dataset):
        yield Problem(
            ("interleave_probs", "dataset"),
            f"{given('interleave_probs', probabilities)} are {len(probabilities)} for "
            f"{len(data.dataset)} sets in dataset. Write one for each set.",
        )
    if probabilities and (min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6):
        yield Problem(
            ("interleave_probs",),
            f"{given('interleave_probs', probabilities)} sum to {sum(probabilities):g}. Write "
            "probabilities from 0 on that sum to 1.",
        )


def streams_have_no_length(arguments: RunArguments) -> Iterator[Problem]:
    """A stream has no known length, so steps and split are counted."""
    data, training = arguments.data, arguments.training
    if data.streaming and training.do_train and training.max_steps <= 0:
        yield Problem(
            ("streaming", "max_steps"),
            "streaming=true, but no max_steps is given: a stream has no known length. Write "
            "max_steps, or streaming: false.",
        )
    if data.streaming and 0 < data.val_size < 1:
        yield Problem(
            ("streaming", "val_size"),
            f"val_size={data.val_size} is a share, but a stream has no known length. Set val_size "
            "to a whole number of rows, or streaming: false.",
        )


def one_precision(arguments: RunArguments) -> Iterator[Problem]:
    """A run computes in one number format; pure_bf16 may stand beside bf16."""
    training = arguments.training
    asked = {
        "bf16": bool(training.bf16),
        "fp16": bool(training.fp16),
        "fp32": bool(training.fp32),
        "pure_bf16": arguments.finetuning.pure_bf16,
    }
    keys = tuple(key for key, is_asked in asked.items() if is_asked)
    if len(keys) > 1 and set(keys) != {"bf16", "pure_bf16"}:
        values = " with ".join(f"{key}=true" for key in keys)
        yield Problem(keys, f"{values}: a run computes in one number format. Keep one of them.")


def one_optimizer(arguments: RunArguments) -> Iterator[Problem]:
    """A run has one optimizer."""
    keys = tuple(f"use_{name}" for name in arguments.optimizer.families)
    if arguments.finetuning.loraplus_lr_ratio is not None and keys:
        keys = (*keys, "loraplus_lr_ratio")
    if len(keys) > 1:
        yield Problem(keys, f"{' with '.join(keys)}: a run has one optimizer. Keep one of them.")


def full_gradient_optimizers(arguments: RunArguments) -> Iterator[Problem]:
    """GaLore, APOLLO and BAdam save memory on whole weights; an adapter has none to save."""
    for name in arguments.optimizer.families:
        if name in ("galore", "apollo", "badam") and arguments.finetuning.finetuning_type in (
            "lora",
            "oft",
        ):
            kind = arguments.finetuning.finetuning_type
            yield Problem(
                (f"use_{name}", "finetuning_type"),
                f"use_{name}=true with finetuning_type={kind}: it is for whole weights. Write "
                f"finetuning_type: full, or remove use_{name}.",
            )


def galore_wraps_adam(arguments: RunArguments) -> Iterator[Problem]:
    """GaLore and APOLLO replace a kind of AdamW or Adafactor."""
    optimizer = arguments.optimizer
    allowed = {"galore": GALORE_OPTIMS, "apollo": ("adamw_torch",)}
    for name in optimizer.families:
        if name in allowed and optimizer.optim not in (*allowed[name], "adamw_torch_fused"):
            yield Problem(
                (f"use_{name}", "optim"),
                f"use_{name}=true with optim={optimizer.optim}: it replaces "
                f"{', '.join(allowed[name])}. Write one of these as optim, or remove optim.",
            )


def layerwise_updates_at_once(arguments: RunArguments) -> Iterator[Problem]:
    """A parameter that is updated in the backward pass has no gradient to accumulate."""
    steps = arguments.training.gradient_accumulation_steps
    asked = {
        "galore_layerwise": arguments.optimizer.galore_layerwise,
        "apollo_layerwise": arguments.optimizer.apollo_layerwise,
    }
    for key, is_asked in asked.items():
        if is_asked and steps > 1:
            yield Problem(
                (key, "gradient_accumulation_steps"),
                f"{key}=true with gradient_accumulation_steps={steps}: parameters are updated in "
                f"each backward pass. Write gradient_accumulation_steps: 1, or remove {key}.",
            )


def lora_only(arguments: RunArguments) -> Iterator[Problem]:
    """Variants of LoRA need a LoRA."""
    tuning = arguments.finetuning
    asked = {
        "loraplus_lr_ratio": tuning.loraplus_lr_ratio is not None,
        "use_rslora": tuning.use_rslora,
        "use_dora": tuning.use_dora,
        "pissa_init": tuning.pissa_init,
    }
    for key, is_asked in asked.items():
        if is_asked and tuning.finetuning_type != "lora":
            yield Problem(
                (key, "finetuning_type"),
                f"{given(key, getattr(tuning, key))} with "
                f"finetuning_type={tuning.finetuning_type}: it is a kind of LoRA. "
                f"Write finetuning_type: lora, or remove {key}.",
            )


def added_blocks_are_some_layers(arguments: RunArguments) -> Iterator[Problem]:
    """LLaMA Pro trains some layers, a positive number of them."""
    tuning = arguments.finetuning
    if not tuning.use_llama_pro:
        return
    if tuning.finetuning_type == "full":
        yield Problem(
            ("use_llama_pro", "finetuning_type"),
            "use_llama_pro=true with finetuning_type=full: added blocks alone train, or all does. "
            "Write finetuning_type: freeze or lora.",
        )
    if tuning.freeze_trainable_layers <= 0:
        yield Problem(
            ("use_llama_pro", "freeze_trainable_layers"),
            f"use_llama_pro=true with freeze_trainable_layers={tuning.freeze_trainable_layers}: "
            "it is the number of added blocks. Write a number above 0.",
        )


def low_bit_weights_do_not_train(arguments: RunArguments) -> Iterator[Problem]:
    """Low-bit weights stay as they are; an adapter trains."""
    kind = arguments.finetuning.finetuning_type
    bits = arguments.model.quantization_bit
    if bits is not None and kind not in ("lora", "oft") and arguments.training.do_train:
        yield Problem(
            ("quantization_bit", "finetuning_type"),
            f"quantization_bit={bits} with finetuning_type={kind}: low-bit weights do not train. "
            "Write finetuning_type: lora, or remove quantization_bit.",
        )


def one_low_bit_format(arguments: RunArguments) -> Iterator[Problem]:
    """Weights are 8-bit floating point or quantized, not both."""
    if arguments.model.fp8 and arguments.model.quantization_bit is not None:
        yield Problem(
            ("fp8", "quantization_bit"),
            f"fp8=true with quantization_bit={arguments.model.quantization_bit}: these are two "
            "formats of the same weights. Remove one of them.",
        )


def bits_of_the_method(arguments: RunArguments) -> Iterator[Problem]:
    """Each library has its bits."""
    allowed = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 5, 6, 8), "eetq": (8,)}
    model = arguments.model
    bits = allowed[model.quantization_method]
    if model.quantization_bit is not None and model.quantization_bit not in bits:
        yield Problem(
            ("quantization_bit", "quantization_method"),
            f"quantization_bit={model.quantization_bit} with "
            f"quantization_method={model.quantization_method}: it has "
            f"{' or '.join(map(str, bits))} bits. Write one of these.",
        )


def spread_models_do_not_train(arguments: RunArguments) -> Iterator[Problem]:
    """A model spread over devices by quantization_device_map is for inference."""
    if arguments.model.quantization_device_map and arguments.training.do_train:
        yield Problem(
            ("quantization_device_map", "do_train"),
            "quantization_device_map=auto with do_train=true: it is for inference. Remove it.",
        )


def ppo_needs_reward(arguments: RunArguments) -> Iterator[Problem]:
    """Stage ppo is training by reward."""
    if arguments.finetuning.stage != "ppo":
        return
    if arguments.rlhf.reward_model is None:
        yield Problem(
            ("stage", "reward_model"),
            "stage=ppo, but no reward_model is given. Write reward_model:.",
        )
    if not arguments.training.do_train:
        yield Problem(
            ("stage", "do_train"), "stage=ppo does nothing but train. Write do_train: true."
        )


def smoothing_of_sigmoid(arguments: RunArguments) -> Iterator[Problem]:
    """Label smoothing is a term of the sigmoid loss."""
    rlhf = arguments.rlhf
    if rlhf.dpo_label_smoothing > 0 and rlhf.pref_loss != "sigmoid":
        yield Problem(
            ("dpo_label_smoothing", "pref_loss"),
            f"dpo_label_smoothing={rlhf.dpo_label_smoothing} with pref_loss={rlhf.pref_loss}: it "
            "is a term of the sigmoid loss. Remove one of them.",
        )


def one_supervised_loss(arguments: RunArguments) -> Iterator[Problem]:
    """A run has one supervised loss."""
    tuning = arguments.finetuning
    asked = {
        "use_dft_loss": tuning.use_dft_loss,
        "use_asft_loss": tuning.use_asft_loss,
        "use_eaft_loss": tuning.use_eaft_loss,
    }
    keys = tuple(key for key, is_asked in asked.items() if is_asked)
    if len(keys) > 1:
        yield Problem(keys, f"{' with '.join(keys)}: a run has one loss. Keep one of them.")


def calibration_needs_texts(arguments: RunArguments) -> Iterator[Problem]:
    """A quantized export is calibrated on texts."""
    export = arguments.export
    if export.export_quantization_bit is not None and export.export_quantization_dataset is None:
        yield Problem(
            ("export_quantization_bit", "export_quantization_dataset"),
            f"export_quantization_bit={export.export_quantization_bit}, but there are no texts to "
            "calibrate it on. Write export_quantization_dataset.",
        )


def pixel_limits_are_in_order(arguments: RunArguments) -> Iterator[Problem]:
    """The smallest size is not above the largest."""
    model = arguments.model
    limits = {
        "image": (model.image_min_pixels, model.image_max_pixels),
        "video": (model.video_min_pixels, model.video_max_pixels),
    }
    for kind, (least, most) in limits.items():
        if most < least:
            yield Problem(
                (f"{kind}_max_pixels", f"{kind}_min_pixels"),
                f"{kind}_max_pixels={most} with {kind}_min_pixels={least}: the largest is below "
                "the smallest. Write them the other way round.",
            )


def trackio_keys_need_trackio(arguments: RunArguments) -> Iterator[Problem]:
    """Settings of trackio are for runs that report to it."""
    tracking = arguments.tracking
    for key in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        value = getattr(tracking, key)
        if value is not None and not {"trackio", "all"}.intersection(tracking.report_to):
            yield Problem(
                (key, "report_to"),
                f"{given(key, value)}, but report_to does not name trackio. Write "
                f"report_to: trackio, or remove {key}.",
            )


def nothing_beside_none(arguments: RunArguments) -> Iterator[Problem]:
    """`none` stands alone."""
    report_to = arguments.tracking.report_to
    if "none" in report_to and len(report_to) > 1:
        yield Problem(
            ("report_to",),
            f"report_to={shown(','.join(report_to))}: none stands alone. Remove it, or the others.",
        )


def best_needs_evaluations(arguments: RunArguments) -> Iterator[Problem]:
    """Stopping early and the best checkpoint are decided at evaluations."""
    training = arguments.training
    asked = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "early_stopping_steps": arguments.finetuning.early_stopping_steps is not None,
        "save_strategy": training.save_strategy == "best",
        "lr_scheduler_type": arguments.optimizer.lr_scheduler_type == "reduce_lr_on_plateau",
    }
    for key, is_asked in asked.items():
        if is_asked and training.eval_strategy == "no":
            yield Problem(
                (key, "eval_strategy"),
                f"{key} decides by evaluations, but eval_strategy=no. Write eval_strategy: steps, "
                f"or remove {key}.",
            )


def best_is_saved(arguments: RunArguments) -> Iterator[Problem]:
    """The best evaluation can only be restored where it was saved."""
    training = arguments.training
    if training.load_best_model_at_end and training.save_strategy not in (
        training.eval_strategy,
        "best",
    ):
        yield Problem(
            ("load_best_model_at_end", "save_strategy", "eval_strategy"),
            f"load_best_model_at_end=true with save_strategy={training.save_strategy} and "
            f"eval_strategy={training.eval_strategy}: what is evaluated must be saved. Write the "
            "same for both.",
        )


def minimum_rate_is_given(arguments: RunArguments) -> Iterator[Problem]:
    """Schedules that end at a minimum need it."""
    optimizer = arguments.optimizer
    settings = optimizer.lr_scheduler_kwargs or {}
    if optimizer.lr_scheduler_type in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not (
        {"min_lr", "min_lr_rate"} & set(settings)
    ):
        yield Problem(
            ("lr_scheduler_type", "lr_scheduler_kwargs"),
            f"lr_scheduler_type={optimizer.lr_scheduler_type}, but no minimum is given. Write "
            "lr_scheduler_kwargs: {min_lr_rate: 0.1}.",
        )


def described_tokens_need_descriptions(arguments: RunArguments) -> Iterator[Problem]:
    """Embeddings that start from descriptions need these."""
    model = arguments.model
    if model.init_special_tokens != "noise_init" and model.new_special_tokens_config is None:
        yield Problem(
            ("init_special_tokens", "new_special_tokens_config"),
            f"init_special_tokens={model.init_special_tokens}, but there are no descriptions. "
            "Write new_special_tokens_config.",
        )


def resources_are_amounts(arguments: RunArguments) -> Iterator[Problem]:
    """A worker needs amounts of resources, and at least one of them."""
    resources = arguments.cluster.resources_per_worker
    if resources is None:
        return
    amounts = [
        isinstance(amount, int | float) and not isinstance(amount, bool) and amount >= 0
        for amount in resources.values()
    ]
    if not all(amounts) or not any(resources.values()):
        yield Problem(
            ("resources_per_worker",),
            f"{given('resources_per_worker', resources)}: a worker requires amounts from 0 on, one "
            'of them above 0. Write such as {"GPU": 1} or {"CPU": 2}.',
        )


RULES: tuple[Rule, ...] = (
    model_is_named,
    training_needs_data,
    training_needs_output,
    evaluation_needs_rows,
    sft_only,
    prediction_generates,
    generated_responses_have_no_accuracy,
    history_is_masked_or_learnt,
    one_source_of_evaluation_rows,
    split_needs_data,
    probabilities_interleave,
    one_probability_a_set,
    streams_have_no_length,
    one_precision,
    one_optimizer,
    full_gradient_optimizers,
    galore_wraps_adam,
    layerwise_updates_at_once,
    lora_only,
    added_blocks_are_some_layers,
    low_bit_weights_do_not_train,
    one_low_bit_format,
    bits_of_the_method,
    spread_models_do_not_train,
    ppo_needs_reward,
    smoothing_of_sigmoid,
    one_supervised_loss,
    calibration_needs_texts,
    pixel_limits_are_in_order,
    trackio_keys_need_trackio,
    nothing_beside_none,
    best_needs_evaluations,
    best_is_saved,
    minimum_rate_is_given,
    described_tokens_need_descriptions,
    resources_are_amounts,
)


def broken(arguments: RunArguments) -> list[Problem]:
    """Every rule that the arguments break."""
    return [problem for rule in RULES for problem in rule(arguments)]
