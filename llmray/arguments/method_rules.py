"""Rules between keys of the method: number format, optimizer, adapter, low-bit weights, reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmray.arguments.problems import Problem, given

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

Rule = Callable[["RunArguments"], Iterator[Problem]]

GALORE_OPTIMS = ("adamw_torch", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adafactor")


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
        "lora_rank_pattern": bool(tuning.lora_rank_pattern),
        "lora_alpha_pattern": bool(tuning.lora_alpha_pattern),
    }
    for key, is_asked in asked.items():
        if is_asked and tuning.finetuning_type != "lora":
            yield Problem(
                (key, "finetuning_type"),
                f"{given(key, getattr(tuning, key))} with "
                f"finetuning_type={tuning.finetuning_type}: it is a kind of LoRA. "
                f"Write finetuning_type: lora, or remove {key}.",
            )


def parts_of_a_variant(arguments: RunArguments) -> Iterator[Problem]:
    """Settings of a variant of LoRA need the variant."""
    tuning = arguments.finetuning
    parts = {
        "loraplus_lr_embedding": ("loraplus_lr_ratio", tuning.loraplus_lr_ratio is not None),
        "pissa_iter": ("pissa_init", tuning.pissa_init),
        "pissa_convert": ("pissa_init", tuning.pissa_init),
    }
    for key, (whole, is_asked) in parts.items():
        value = getattr(tuning, key)
        if not is_asked and value != type(tuning).model_fields[key].default:
            yield Problem(
                (key, whole),
                f"{given(key, value)} without {whole}: it is a part of that. Write {whole}, or "
                f"remove {key}.",
            )


def converted_is_linear(arguments: RunArguments) -> Iterator[Problem]:
    """The difference of two adapters is an adapter; with magnitudes trained apart it is not."""
    if arguments.finetuning.pissa_convert and arguments.finetuning.use_dora:
        yield Problem(
            ("pissa_convert", "use_dora"),
            "pissa_convert=true with use_dora=true: an adapter with magnitudes of its own cannot "
            "be converted. Remove one of them.",
        )


def patterns_are_numbers(arguments: RunArguments) -> Iterator[Problem]:
    """Ranks and alphas by module are whole numbers from 1 on."""
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        for name, value in (getattr(arguments.finetuning, key) or {}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield Problem(
                    (key,),
                    f"{key}: {name} is {value!r}. A whole number from 1 on is required.",
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


def spread_models_are_quantized(arguments: RunArguments) -> Iterator[Problem]:
    """quantization_device_map places weights of 4 bits."""
    model = arguments.model
    if model.quantization_device_map and model.quantization_bit != 4:
        yield Problem(
            ("quantization_device_map", "quantization_bit"),
            "quantization_device_map=auto without quantization_bit=4: it places weights of 4 bits. "
            "Write quantization_bit: 4, or remove it.",
        )


def random_weights_are_not_quantized(arguments: RunArguments) -> Iterator[Problem]:
    """There is nothing to quantize of weights that are only to be learned."""
    model = arguments.model
    if model.train_from_scratch and model.is_quantized:
        yield Problem(
            ("train_from_scratch", "quantization_bit"),
            f"train_from_scratch=true with quantization_bit={model.quantization_bit}: low-bit "
            "weights do not train. Remove quantization_bit.",
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
            ("stage", "do_train"),
            "stage=ppo needs do_train: true. To evaluate or predict with a policy that is trained, "
            "write stage: sft.",
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


def full_evaluation_alone(arguments: RunArguments) -> Iterator[Problem]:
    """Weights are cast for an evaluation where none of them trains."""
    training = arguments.training
    asked = {"bf16_full_eval": training.bf16_full_eval, "fp16_full_eval": training.fp16_full_eval}
    keys = tuple(key for key, is_asked in asked.items() if is_asked)
    if len(keys) > 1:
        yield Problem(keys, f"{' with '.join(keys)}: a run has one number format. Keep one.")
    if keys and training.do_train:
        yield Problem(
            (keys[0], "do_train"),
            f"{keys[0]}=true with do_train=true: weights that train would lose bits at each "
            f"evaluation. Remove {keys[0]}, or evaluate in a run of its own.",
        )


def offloading_recomputes(arguments: RunArguments) -> Iterator[Problem]:
    """What use_unsloth_gc keeps in host memory is what recomputation starts from."""
    model = arguments.model
    if model.use_unsloth_gc and model.disable_gradient_checkpointing:
        yield Problem(
            ("use_unsloth_gc", "disable_gradient_checkpointing"),
            "use_unsloth_gc=true with disable_gradient_checkpointing=true: it keeps what "
            "recomputation starts from. Remove one of them.",
        )


def liger_is_enabled(arguments: RunArguments) -> Iterator[Problem]:
    """Liger's kernels are chosen where they are used."""
    model = arguments.model
    if model.liger_kernel_config is not None and not model.enable_liger_kernel:
        yield Problem(
            ("liger_kernel_config", "enable_liger_kernel"),
            "liger_kernel_config is given, but enable_liger_kernel is not true. Write "
            "enable_liger_kernel: true, or remove liger_kernel_config.",
        )


METHOD_RULES: tuple[Rule, ...] = (
    one_precision,
    full_evaluation_alone,
    offloading_recomputes,
    liger_is_enabled,
    one_optimizer,
    full_gradient_optimizers,
    galore_wraps_adam,
    layerwise_updates_at_once,
    lora_only,
    parts_of_a_variant,
    converted_is_linear,
    patterns_are_numbers,
    added_blocks_are_some_layers,
    low_bit_weights_do_not_train,
    one_low_bit_format,
    bits_of_the_method,
    spread_models_do_not_train,
    spread_models_are_quantized,
    random_weights_are_not_quantized,
    ppo_needs_reward,
    smoothing_of_sigmoid,
    one_supervised_loss,
)
