"""What is not built fails with a sentence; what is built does not; a list names what is left."""

import pytest

from llmray.arguments.capabilities import COMBINATIONS_NOT_BUILT, NOT_BUILT, NOT_SUPPORTED, gaps
from llmray.arguments.loading import load
from llmray.arguments.problems import bounds, choices, plain_types
from llmray.arguments.run import DEFAULTS, FIELDS
from llmray.errors import ArgumentsError

BASE = {
    "model_name_or_path": "m",
    "dataset": "a",
    "output_dir": "o",
    "do_train": True,
}

# Keys of which every value works. A key moves here when its last gap in capabilities.py is closed.
WORKING = """
stage
adapter_folder
model_name_or_path adapter_name_or_path cache_dir model_revision disable_gradient_checkpointing
use_reentrant_gc train_from_scratch infer_dtype hf_hub_token
ms_hub_token om_hub_token print_param_status trust_remote_code
compute_dtype device_map model_max_length block_diag_attn
rope_scaling flash_attn use_unsloth_gc enable_liger_kernel liger_kernel_config moe_aux_loss_coef
upcast_layernorm upcast_lmhead_output bf16_full_eval fp16_full_eval tf32
allow_pickled_weights export_dir export_size export_device export_legacy_format export_hub_model_id
quantization_bit quantization_type double_quantization quantization_device_map
resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens
split_special_tokens
dataset dataset_dir eval_dataset eval_on_each_dataset cutoff_len truncation bad_rows
train_on_prompt mask_history
packing neat_packing streaming buffer_size
overwrite_cache preprocessing_batch_size preprocessing_num_workers max_samples val_size
tokenized_path data_shared_file_system
mix_strategy interleave_probs
default_system template tool_format enable_thinking preserve_thinking
additional_target lora_alpha lora_dropout lora_rank lora_target use_rslora create_new_adapter
loraplus_lr_ratio loraplus_lr_embedding use_dora pissa_init pissa_iter pissa_convert
lora_rank_pattern lora_alpha_pattern
freeze_trainable_layers freeze_trainable_modules freeze_extra_modules pure_bf16 disable_shuffling
plot_loss
report_to logging_dir run_name project use_swanlab swanlab_project swanlab_workspace
swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url
swanlab_lark_secret
learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm warmup_ratio
warmup_steps optim_args lr_scheduler_kwargs
compute_accuracy early_stopping_steps early_stopping_threshold load_best_model_at_end
metric_for_best_model greater_is_better eval_delay eval_on_start logging_strategy save_strategy
output_dir overwrite_output_dir do_train do_eval do_predict
per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps num_train_epochs max_steps logging_steps logging_first_step save_steps
save_total_limit save_only_model eval_strategy eval_steps resume_from_checkpoint
seed data_seed full_determinism bf16 fp16 fp32 ddp_timeout
dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last
train_sampling_strategy include_effective_tokens_per_second include_num_input_tokens_seen
disable_tqdm torch_empty_cache_steps use_cpu
use_ray ray_run_name ray_storage_path ray_num_workers resources_per_worker placement_strategy
ray_init_kwargs ray_max_failures master_addr master_port tune
do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty
length_penalty skip_special_tokens use_kv_cache
pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing ld_alpha simpo_gamma
kto_chosen_weight kto_rejected_weight
ref_model ref_model_adapters ref_model_quantization_bit precompute_ref_logps
ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ppo_num_samples
ppo_clip_range ppo_value_clip_range ppo_value_coef ppo_entropy_coef ppo_gamma ppo_lambda
ppo_init_kl ppo_kl_control ppo_kl_horizon ppo_kl_estimator ppo_early_stop_kl
ppo_missing_eos_penalty advantage_estimator ppo_rollout_batch_size rollout_log_steps
reward_model reward_weights reward_model_adapters reward_model_quantization_bit reward_model_type
reward_timeout_s reward_request_timeout_s reward_error reward_error_value reward_batching
reward_batch_tokens reward_num_retries reward_num_requests
reward_num_actors reward_resources_per_actor reward_placement_strategy reward_label_selector
predict_with_generate eval_num_beams generation_max_length generation_num_beams
"""

# Keys of which some values work.
PARTLY = {
    "finetuning_type": (["full", "freeze", "lora"], ["oft"]),
    "optim": (
        ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"],
        ["adamw_bnb_8bit", "lion_8bit"],
    ),
    "lr_scheduler_type": (["cosine", "linear", "polynomial", "inverse_sqrt"], ["greedy"]),
    "fsdp": ([None, "", False], ["full_shard auto_wrap", True]),
}


def away_from_default(key):
    """Some value of the key that is not its default."""
    field, default = FIELDS[key], DEFAULTS[key]
    kinds = plain_types(field)
    if choices(field):
        return next(choice for choice in choices(field) if choice != default)
    if bool in kinds:
        return not default
    if float in kinds:
        limits = {"ge": 0, "lt": 2} | bounds(field)
        low, high = limits.get("gt", limits["ge"]), limits.get("le", limits["lt"])
        return (low + high) / 2 if (low + high) / 2 != default else (low + high) / 4
    if int in kinds:
        return (default or bounds(field).get("ge", 0)) + 1
    if any("dict" in str(kind) for kind in kinds):
        return {"a": 1}
    return "0.5" if tuple[float, ...] in kinds else "something"


def test_all_keys_are_accounted_for():
    working = WORKING.split()
    assert len(set(working)) == len(working)
    assert set(working) | set(NOT_BUILT) | set(NOT_SUPPORTED) == set(FIELDS)
    assert not set(working) & (set(NOT_BUILT) | set(NOT_SUPPORTED))
    assert set(PARTLY) == {key for key, gap in NOT_BUILT.items() if gap.works}


@pytest.mark.parametrize(
    "key", [key for key, gap in (NOT_BUILT | NOT_SUPPORTED).items() if gap.works is None]
)
def test_a_key_that_does_not_work_fails_away_from_its_default(key):
    sentence = (NOT_BUILT | NOT_SUPPORTED)[key].sentence
    assert sentence.endswith(".")
    value = away_from_default(key)
    with pytest.raises(ArgumentsError) as error:
        load(BASE | {key: value}, environ={})
    assert key in str(error.value)
    assert any(sentence in line for line in str(error.value).splitlines()), str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, (works, _) in PARTLY.items() for value in works]
)
def test_what_works_of_a_key(key, value):
    load(BASE | {key: value}, environ={})


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, (_, fails) in PARTLY.items() for value in fails]
)
def test_what_does_not_work_of_a_key(key, value):
    with pytest.raises(ArgumentsError) as error:
        load(BASE | {key: value}, environ={})
    assert NOT_BUILT[key].sentence in str(error.value)


# the documents' sections on output, training and validation
DOCUMENTED = """
output_dir logging_steps save_steps plot_loss overwrite_output_dir
per_device_train_batch_size gradient_accumulation_steps learning_rate num_train_epochs
lr_scheduler_type warmup_ratio bf16 ddp_timeout
val_size per_device_eval_batch_size eval_strategy eval_steps
"""


def test_documented_keys_of_output_training_and_validation_work():
    """Of lr_scheduler_type all but `greedy`, which the documents do not have."""
    assert set(DOCUMENTED.split()) - set(WORKING.split()) == {"lr_scheduler_type"}
    assert not NOT_BUILT["lr_scheduler_type"].allows("greedy", "linear", {})


def test_keys_that_lack_the_same_are_one_problem():
    flat = DEFAULTS | {"use_galore": True, "galore_rank": 4, "use_dft_loss": True}
    texts = [problem.text for problem in gaps(flat, DEFAULTS)]
    assert len(texts) == 2
    assert any(text.startswith("use_galore=true, galore_rank=4: ") for text in texts)


COMBINED = {
    ("stage", "streaming"): {"streaming": True, "stage": "ppo"},
    ("load_best_model_at_end", "save_only_model"): {
        "load_best_model_at_end": True,
        "save_only_model": True,
    },
    ("adapter_name_or_path", "quantization_bit"): {
        "adapter_name_or_path": ("a", "b"),
        "quantization_bit": 4,
    },
    ("create_new_adapter", "quantization_bit"): {
        "create_new_adapter": True,
        "adapter_name_or_path": ("a",),
        "quantization_bit": 4,
    },
    ("resize_vocab", "quantization_bit"): {"resize_vocab": True, "quantization_bit": 4},
    ("add_tokens", "quantization_bit"): {"add_tokens": ("a",), "quantization_bit": 4},
    ("add_special_tokens", "quantization_bit"): {
        "add_special_tokens": ("a",),
        "quantization_bit": 4,
    },
    ("new_special_tokens_config", "quantization_bit"): {
        "new_special_tokens_config": "t.yaml",
        "quantization_bit": 4,
    },
    ("precompute_ref_logps", "pissa_init", "quantization_bit"): {
        "precompute_ref_logps": True,
        "pissa_init": True,
        "quantization_bit": 4,
    },
    ("pissa_init", "quantization_bit", "stage"): {
        "stage": "ppo",
        "pissa_init": True,
        "quantization_bit": 4,
    },
    ("use_dora", "quantization_method"): {
        "use_dora": True,
        "quantization_bit": 8,
        "quantization_method": "hqq",
    },
    ("use_asft_loss", "finetuning_type"): {"use_asft_loss": True},
}


@pytest.mark.parametrize(
    "combination", COMBINATIONS_NOT_BUILT, ids=lambda item: "-".join(item.keys)
)
def test_combinations(combination):
    assert not combination.holds(DEFAULTS)
    assert combination.holds(DEFAULTS | COMBINED[combination.keys])
    assert set(combination.keys) <= set(FIELDS)
    assert combination.sentence.endswith(".")


@pytest.mark.parametrize("kind", ["lora", "full", "freeze"])
def test_training_may_start_from_an_adapter(kind):
    load(BASE | {"adapter_name_or_path": "a", "finetuning_type": kind}, environ={})


def test_what_always_holds_may_be_said(caplog):
    """Padding is never learned: true says so, false contradicts."""
    given = load(BASE | {"ignore_pad_token_for_loss": True}, environ={})
    assert given.data.ignore_pad_token_for_loss
    assert not caplog.messages
    with pytest.raises(ArgumentsError, match=r"Padding is never learnt: .* Set it to true"):
        load(BASE | {"ignore_pad_token_for_loss": "false"}, environ={})
