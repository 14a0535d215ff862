"""Each rule refuses what contradicts itself and accepts it mended."""

import pytest

from llmray.arguments import rules
from llmray.arguments.run import GROUP_OF, RunArguments

# rule -> (keys that break it, the changes that mend it, what the message names)
CASES = {
    "model_is_named": [({}, {"model_name_or_path": "m"}, "model_name_or_path")],
    "training_needs_data": [
        ({"do_train": True}, {"dataset": "a"}, "dataset"),
        ({"do_train": True}, {"do_train": False}, "do_train"),
    ],
    "runs_need_output": [
        ({key: True}, {"output_dir": "o"}, "output_dir")
        for key in ("do_train", "do_eval", "do_predict")
    ],
    "evaluation_needs_rows": [
        ({"do_eval": True}, {"val_size": 0.1}, "val_size"),
        ({"do_predict": True}, {"eval_dataset": "e"}, "eval_dataset"),
        ({"predict_with_generate": True}, {"val_size": 8}, "predict_with_generate"),
        ({"do_train": True, "eval_strategy": "steps"}, {"val_size": 8}, "eval_strategy=steps"),
    ],
    "sft_only": [
        ({key: True, "stage": "pt"}, {"stage": "sft"}, f"{key}=true with stage=pt")
        for key in ("predict_with_generate", "neat_packing", "train_on_prompt", "mask_history")
    ],
    "prediction_generates": [
        ({"do_predict": True}, {"predict_with_generate": True}, "predict_with_generate"),
        ({"do_predict": True}, {"stage": "rm"}, "do_predict"),
    ],
    "generated_responses_have_no_accuracy": [
        (
            {"predict_with_generate": True, "compute_accuracy": True},
            {"compute_accuracy": False},
            "compute_accuracy",
        )
    ],
    "history_is_masked_or_learnt": [
        (
            {"mask_history": True, "train_on_prompt": True},
            {"train_on_prompt": False},
            "train_on_prompt",
        )
    ],
    "one_source_of_evaluation_rows": [
        ({"val_size": 0.1, "eval_dataset": "e,f"}, {"val_size": 0}, "eval_dataset=e,f")
    ],
    "split_needs_data": [({"val_size": 0.1}, {"dataset": "a"}, "val_size=0.1")],
    "probabilities_interleave": [
        ({"interleave_probs": "0.5,0.5"}, {"mix_strategy": "interleave_under"}, "mix_strategy")
    ],
    "one_probability_a_set": [
        (
            {"interleave_probs": "0.5,0.5", "dataset": "a,b,c"},
            {"dataset": "a,b"},
            "are 2 for 3 sets",
        ),
        (
            {"interleave_probs": "0.5,0.6", "dataset": "a,b"},
            {"interleave_probs": [0.4, 0.6]},
            "sum to 1.1",
        ),
        (
            {"interleave_probs": "-0.5,1.5", "dataset": "a,b"},
            {"interleave_probs": "0,1"},
            "from 0 on",
        ),
    ],
    "streams_have_no_length": [
        ({"streaming": True, "do_train": True}, {"max_steps": 10}, "max_steps"),
        ({"streaming": True, "val_size": 0.1}, {"val_size": 10}, "val_size=0.1 is a share"),
    ],
    "one_precision": [
        ({"bf16": True, "fp16": True}, {"fp16": False}, "bf16=true with fp16=true"),
        ({"fp32": True, "fp16": True}, {"fp32": None}, "fp32"),
        ({"pure_bf16": True, "fp16": True}, {"fp16": None, "bf16": True}, "pure_bf16"),
    ],
    "one_optimizer": [
        ({"use_galore": True, "use_apollo": True}, {"use_apollo": False}, "use_galore"),
        ({"use_badam": True, "use_muon": True}, {"use_badam": False}, "use_badam with use_muon"),
        ({"use_adam_mini": True, "loraplus_lr_ratio": 2}, {"use_adam_mini": False}, "loraplus"),
    ],
    "full_gradient_optimizers": [
        ({f"use_{name}": True, "finetuning_type": "lora"}, {"finetuning_type": "full"}, name)
        for name in ("galore", "apollo", "badam")
    ],
    "galore_wraps_adam": [
        ({"use_galore": True, "optim": "sgd"}, {"optim": "adafactor"}, "optim=sgd"),
        ({"use_apollo": True, "optim": "adafactor"}, {"optim": "adamw_torch"}, "use_apollo"),
    ],
    "layerwise_updates_at_once": [
        (
            {key: True, "gradient_accumulation_steps": 2},
            {"gradient_accumulation_steps": 1},
            key,
        )
        for key in ("galore_layerwise", "apollo_layerwise")
    ],
    "lora_only": [
        ({key: value, "finetuning_type": "full"}, {"finetuning_type": "lora"}, key)
        for key, value in {
            "loraplus_lr_ratio": 16,
            "use_rslora": True,
            "use_dora": True,
            "pissa_init": True,
            "lora_rank_pattern": {"q_proj": 2},
            "lora_alpha_pattern": {"q_proj": 2},
        }.items()
    ]
    + [({"pissa_init": True, "finetuning_type": "oft"}, {"pissa_init": False}, "oft")],
    "parts_of_a_variant": [
        ({"loraplus_lr_embedding": 0.1}, {"loraplus_lr_ratio": 16}, "without loraplus_lr_ratio"),
        ({"pissa_iter": 4}, {"pissa_init": True}, "pissa_iter=4 without pissa_init"),
        ({"pissa_convert": True}, {"pissa_convert": False}, "pissa_convert=true without"),
    ],
    "converted_is_linear": [
        (
            {"pissa_init": True, "pissa_convert": True, "use_dora": True},
            {"use_dora": False},
            "magnitudes",
        )
    ],
    "patterns_are_numbers": [
        ({key: {"q_proj": bad}}, {key: {"q_proj": 1}}, f"{key}: q_proj is {bad!r}")
        for key in ("lora_rank_pattern", "lora_alpha_pattern")
        for bad in (0, 1.5, "many", True)
    ],
    "added_blocks_are_some_layers": [
        (
            {"use_llama_pro": True, "finetuning_type": "full"},
            {"finetuning_type": "freeze"},
            "finetuning_type=full",
        ),
        (
            {"use_llama_pro": True, "freeze_trainable_layers": -2},
            {"freeze_trainable_layers": 2},
            "freeze_trainable_layers=-2",
        ),
    ],
    "low_bit_weights_do_not_train": [
        (
            {"quantization_bit": 4, "finetuning_type": "full", "do_train": True},
            {"finetuning_type": "lora"},
            "quantization_bit=4",
        )
    ],
    "one_low_bit_format": [({"fp8": True, "quantization_bit": 8}, {"fp8": False}, "fp8")],
    "bits_of_the_method": [
        ({"quantization_bit": 3}, {"quantization_method": "hqq"}, "4 or 8 bits"),
        ({"quantization_bit": 4, "quantization_method": "eetq"}, {"quantization_bit": 8}, "eetq"),
    ],
    "spread_models_are_quantized": [
        (
            {"quantization_device_map": "auto", "quantization_bit": 8},
            {"quantization_bit": 4},
            "weights of 4 bits",
        )
    ],
    "random_weights_are_not_quantized": [
        (
            {"train_from_scratch": True, "quantization_bit": 4, "finetuning_type": "lora"},
            {"train_from_scratch": False},
            "train_from_scratch",
        )
    ],
    "spread_models_do_not_train": [
        (
            {"quantization_device_map": "auto", "do_train": True},
            {"do_train": False},
            "quantization_device_map",
        )
    ],
    "ppo_needs_reward": [
        ({"stage": "ppo", "do_train": True}, {"reward_model": "r"}, "reward_model"),
        ({"stage": "ppo", "reward_model": "r"}, {"do_train": True}, "do_train"),
    ],
    "reward_keys_have_their_stage": [
        ({key: value}, {"stage": "ppo"}, f"{key}=")
        for key, value in {
            "ppo_epochs": 2,
            "reward_model": "a:b",
            "advantage_estimator": "grpo",
            "rollout_log_steps": 1,
        }.items()
    ],
    "responses_have_no_accuracy": [
        ({"stage": "ppo", "compute_accuracy": True}, {"compute_accuracy": False}, "no token"),
    ],
    "servers_have_addresses": [
        (
            {"reward_model_type": "api", "reward_model": "a:b,localhost/8000"},
            {"reward_model": "a:b,http://localhost:8000"},
            "reward_model=localhost/8000",
        ),
    ],
    "rewards_read_their_keys": [
        (
            {"reward_model": "m", "reward_model_adapters": ("a",)},
            {"reward_model_type": "full"},
            "of type lora",
        ),
        (
            {
                "reward_model": "a:b",
                "reward_model_type": "full",
                "reward_model_quantization_bit": 4,
            },
            {"reward_model": "a:b,m"},
            "for a whole reward model",
        ),
        (
            {"reward_model": "a:b", "reward_num_retries": 1},
            {"reward_model": "a:b,http://a"},
            "reward servers",
        ),
        (
            {"reward_model": "m", "reward_num_requests": 1},
            {"reward_num_requests": 8},
            "reward servers",
        ),
    ],
    "actors_are_of_reward_models": [
        (
            {"stage": "ppo", "reward_model": "m", "reward_num_actors": 2},
            {"use_ray": True},
            "reward_num_actors=2 without Ray",
        ),
        (
            {
                "stage": "ppo",
                "use_ray": True,
                "reward_model": "a:b",
                "reward_placement_strategy": "SPREAD",
            },
            {"reward_model": "a:b,m"},
            "have no actors",
        ),
    ],
    "labels_are_text": [
        ({"reward_label_selector": {"zone": 1}}, {"reward_label_selector": {"zone": "1"}}, "zone"),
    ],
    "groups_have_samples": [
        ({"advantage_estimator": "grpo"}, {"ppo_num_samples": 2}, "ppo_num_samples=1"),
        ({"advantage_estimator": "grpo"}, {"advantage_estimator": "gae"}, "grpo"),
    ],
    "groups_have_no_values": [
        ({"advantage_estimator": "grpo", key: value}, {"advantage_estimator": "gae"}, f"{key}=")
        for key, value in {
            "ppo_value_coef": 0.5,
            "ppo_value_clip_range": 0.5,
            "ppo_gamma": 0.5,
            "ppo_lambda": 0.5,
            "ppo_whiten_rewards": True,
            "ppo_score_norm": True,
        }.items()
    ],
    "divergence_as_a_loss_has_a_gradient": [
        (
            {"advantage_estimator": "grpo", "ppo_kl_estimator": "k1"},
            {"ppo_kl_estimator": "k3"},
            "leaves k3",
        )
    ],
    "fixed_weights_follow_nothing": [
        ({"ppo_kl_control": "fixed", "ppo_target": 3.0}, {"ppo_target": 6.0}, "ppo_target=3"),
        ({"ppo_init_kl": 0, "ppo_target": 3.0}, {"ppo_init_kl": 0.1}, "of which every multiple"),
        (
            {"ppo_kl_control": "fixed", "ppo_kl_horizon": 3.0},
            {"ppo_kl_control": "adaptive"},
            "ppo_kl_horizon=3",
        ),
    ],
    "rollouts_are_drawn": [
        ({"stage": "ppo", "do_sample": False}, {"do_sample": True}, "do_sample=false"),
        ({"stage": "ppo", "temperature": 0}, {"temperature": 1}, "temperature=0"),
        ({"stage": "ppo", "num_beams": 2}, {"num_beams": 1}, "num_beams=2"),
        ({"stage": "ppo", "num_beams": 2}, {"stage": "sft"}, "num_beams=2"),
    ],
    "every_reward_has_a_weight": [
        (
            {"reward_model": "a, b", "reward_weights": "1,2,3"},
            {"reward_weights": [1, 2]},
            "3 weights for 2 rewards",
        )
    ],
    "a_value_is_used": [
        ({"reward_error_value": -1}, {"reward_error": "value"}, "reward_error=fail"),
    ],
    "smoothing_of_sigmoid": [
        ({"dpo_label_smoothing": 0.1, "pref_loss": "ipo"}, {"pref_loss": "sigmoid"}, "ipo")
    ],
    "preference_keys_have_their_stage": [
        ({key: value, "stage": "sft"}, {"stage": stage}, f"it is for stage {said}")
        for key, value, stage, said in (
            ("pref_beta", 0.5, "kto", "dpo or kto"),
            ("pref_loss", "ipo", "dpo", "dpo."),
            ("kto_chosen_weight", 2.0, "kto", "kto."),
            ("ref_model", "m", "ppo", "dpo or kto or ppo"),
            ("precompute_ref_logps", True, "dpo", "dpo or kto"),
        )
    ],
    "losses_read_their_keys": [
        (
            {"stage": "dpo", "pref_loss": loss, key: value},
            {"pref_loss": "sigmoid"},
            f"pref_loss={loss}: this loss compares with no reference",
        )
        for loss, key, value in (
            ("orpo", "ref_model", "m"),
            ("simpo", "ref_model_adapters", ("a",)),
            ("orpo", "precompute_ref_logps", True),
            ("simpo", "pref_bco_weight", 1.0),
        )
    ]
    + [({"stage": "dpo", "simpo_gamma": 1.0}, {"pref_loss": "simpo"}, "margin of the simpo loss")],
    "bits_of_a_reference_of_its_own": [
        ({"ref_model_quantization_bit": 4}, {"ref_model": "m"}, "without ref_model")
    ],
    "streams_know_no_rows": [
        ({"precompute_ref_logps": True, "streaming": True}, {"streaming": False}, "kept by row")
    ],
    "one_supervised_loss": [
        ({"use_dft_loss": True, "use_eaft_loss": True}, {"use_dft_loss": False}, "use_dft_loss")
    ],
    "streams_are_not_planned": [
        ({"streaming": True, "packing": True}, {"stage": "pt"}, "packing=true: bins"),
        ({"streaming": True, "neat_packing": True}, {"neat_packing": False}, "neat_packing=true"),
        ({"streaming": True, "tokenized_path": "t"}, {"streaming": False}, "keeps nothing"),
        (
            {"streaming": True, "train_sampling_strategy": "group_by_length"},
            {"train_sampling_strategy": "random"},
            "group_by_length",
        ),
        *(
            ({"streaming": True, key: "epoch"}, {key: "steps"}, f"{key}=epoch")
            for key in ("save_strategy", "eval_strategy", "logging_strategy")
        ),
    ],
    "streams_train": [
        ({"streaming": True, "do_eval": True}, {"do_train": True}, "without do_train"),
    ],
    "calibration_needs_texts": [
        (
            {"export_quantization_bit": 4},
            {"export_quantization_dataset": "texts.json"},
            "export_quantization_dataset",
        )
    ],
    "pixel_limits_are_in_order": [
        ({f"{kind}_max_pixels": 64, f"{kind}_min_pixels": 65}, {f"{kind}_min_pixels": 64}, kind)
        for kind in ("image", "video")
    ],
    "trackers_are_known": [
        ({"report_to": "wandb,tensorbord"}, {"report_to": "wandb"}, "Did you mean tensorboard?"),
        ({"report_to": "trackio"}, {"report_to": "all"}, "trackio is not built in"),
    ],
    "signed_notices_have_an_address": [
        (
            {"swanlab_lark_secret": "s"},
            {"swanlab_lark_webhook_url": "https://lark"},
            "swanlab_lark_webhook_url",
        )
    ],
    "nothing_beside_none": [({"report_to": "none,wandb"}, {"report_to": "wandb"}, "none")],
    "plotted_keys_are_logged": [
        ({"plot_loss": ["eval_loss"]}, {"eval_strategy": "steps", "val_size": 0.1}, "eval_loss"),
        ({"plot_loss": "learning_rate"}, {"plot_loss": "lr"}, "Write lr"),
    ],
    "best_needs_evaluations": [
        ({key: value}, {"eval_strategy": "steps"}, key)
        for key, value in {
            "load_best_model_at_end": True,
            "early_stopping_steps": 3,
            "save_strategy": "best",
            "metric_for_best_model": "loss",
            "lr_scheduler_type": "reduce_lr_on_plateau",
        }.items()
    ],
    "best_metric_is_logged": [
        (
            {"stage": "ppo", "metric_for_best_model": "loss"},
            {"metric_for_best_model": "eval_score"},
            "evaluations of this run log eval_score, eval_score_deviation, eval_kl",
        ),
        (
            {"metric_for_best_model": "accuracy"},
            {"compute_accuracy": True},
            "metric_for_best_model=accuracy is never logged: evaluations of this run log eval_loss",
        ),
        (
            {"metric_for_best_model": "eval_b_loss", "eval_dataset": ("a", "b")},
            {"eval_on_each_dataset": True},
            "eval_b_loss is never logged",
        ),
        ({"metric_for_best_model": "los"}, {"metric_for_best_model": "loss"}, "Write eval_loss."),
    ],
    "one_order": [
        (
            {"disable_shuffling": True, "train_sampling_strategy": "group_by_length"},
            {"disable_shuffling": False},
            "train_sampling_strategy=group_by_length",
        )
    ],
    "threads_read_ahead": [
        (
            {"dataloader_prefetch_factor": 4},
            {"dataloader_num_workers": 1},
            "dataloader_prefetch_factor=4 with dataloader_num_workers=0",
        )
    ],
    "the_cpu_is_no_gpu": [
        (
            {"use_cpu": True, "resources_per_worker": {"GPU": 1}},
            {"resources_per_worker": {"CPU": 2}},
            "use_cpu=true with resources_per_worker",
        )
    ],
    "delta_has_patience": [
        (
            {"early_stopping_threshold": 0.1},
            {"early_stopping_steps": 2},
            "early_stopping_threshold=0.1 without early_stopping_steps",
        )
    ],
    "sets_are_named": [
        (
            {"eval_on_each_dataset": True, "val_size": 0.1},
            {"eval_dataset": ("a",)},
            "no eval_dataset is given",
        )
    ],
    "best_is_saved": [
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            {"save_strategy": "epoch"},
            "save_strategy=steps and eval_strategy=epoch",
        )
    ],
    "best_is_saved_when_evaluated": [
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 200,
                "save_steps": 500,
            },
            {"save_steps": 600},
            "save_steps=500 and eval_steps=200",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 250},
            {"logging_steps": 50},
            "eval_steps=500",
        ),
    ],
    "neat_packing_packs": [
        ({"neat_packing": True, "packing": False}, {"packing": None}, "packing=false")
    ],
    "prompts_are_not_packed": [
        ({"packing": True, "stage": "ppo"}, {"packing": False}, "packing=true with stage=ppo"),
        ({"neat_packing": True, "stage": "ppo"}, {"stage": "sft"}, "neat_packing=true with"),
    ],
    "settings_of_the_schedule": [
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            {"lr_scheduler_kwargs": {"min_lr": 1e-6}},
            "lr_scheduler_kwargs",
        ),
        (
            {"lr_scheduler_kwargs": {"num_cycles": 2}},
            {"lr_scheduler_type": "cosine"},
            "num_cycles is no setting of lr_scheduler_type=linear",
        ),
    ],
    "settings_of_the_optimizer": [
        ({"optim_args": "momentum=0.9"}, {"optim": "sgd"}, "momentum is no setting of optim")
    ],
    "described_tokens_need_descriptions": [
        (
            {"init_special_tokens": "desc_init"},
            {"new_special_tokens_config": "tokens.yaml"},
            "new_special_tokens_config",
        )
    ],
    "full_evaluation_alone": [
        ({"bf16_full_eval": True, "fp16_full_eval": True}, {"fp16_full_eval": False}, "Keep one"),
        ({"fp16_full_eval": True, "do_train": True}, {"do_train": False}, "lose bits"),
    ],
    "offloading_recomputes": [
        (
            {"use_unsloth_gc": True, "disable_gradient_checkpointing": True},
            {"disable_gradient_checkpointing": False},
            "what recomputation starts from",
        )
    ],
    "liger_is_enabled": [
        ({"liger_kernel_config": {"rope": False}}, {"enable_liger_kernel": True}, "is not true")
    ],
    "dtype_follows_precision": [
        ({"compute_dtype": "float16", "bf16": True}, {"compute_dtype": "bfloat16"}, "bf16=true"),
        ({"compute_dtype": "bfloat16", "fp32": True}, {"fp32": False}, "that is float32"),
        ({"compute_dtype": "float16", "bf16": False}, {"fp16": True}, "bf16=false"),
        ({"compute_dtype": "float32", "pure_bf16": True}, {"pure_bf16": False}, "pure_bf16=true"),
    ],
    "length_follows_cutoff": [
        ({"model_max_length": 512}, {"cutoff_len": 512}, "cutoff_len=2048"),
    ],
    "texts_are_apart": [
        ({"block_diag_attn": True, "stage": "pt"}, {"packing": False}, "packing: false"),
        ({"block_diag_attn": True, "stage": "pt", "packing": True}, {"stage": "sft"}, "stage=pt"),
    ],
    "model_is_on_one_device": [
        ({"device_map": "auto"}, {"device_map": "cuda"}, "device_map=auto"),
        ({"device_map": {"": 0, "lm_head": 1}}, {"device_map": {"": 0}}, "lm_head"),
        ({"device_map": {"": "disk"}}, {"device_map": {"": "cpu"}}, "disk"),
    ],
    "template_is_known": [
        ({"template": "qwen33"}, {"template": "qwen3"}, "Did you mean qwen3?"),
        ({"template": "no such"}, {"template": None}, "template=no such is not known. Write"),
    ],
    "tool_format_is_known": [
        ({"tool_format": "qwn", "template": "yi"}, {"tool_format": "qwen"}, "Did you mean qwen?")
    ],
    "tool_format_has_a_template": [
        ({"tool_format": "qwen"}, {"template": "yi"}, "tool_format=qwen without template")
    ],
    "resources_are_amounts": [
        ({"resources_per_worker": {"GPU": value}}, {"resources_per_worker": {"CPU": 0.5}}, "GPU")
        for value in (-1, "one", True, 0)
    ],
}


def arguments(flat):
    """Arguments that are checked by no rule and no table."""
    groups = {}
    for key, value in flat.items():
        groups.setdefault(GROUP_OF[key], {})[key] = value
    return RunArguments.model_validate(groups)


@pytest.mark.parametrize(
    ("rule", "broken", "mended", "said"),
    [
        pytest.param(rule, *case, id=f"{rule.__name__}-{i}")
        for rule in rules.RULES
        for i, case in enumerate(CASES[rule.__name__])
    ],
)
def test_rule(rule, broken, mended, said):
    problems = list(rule(arguments(broken)))
    assert len(problems) == 1
    assert said in problems[0].text
    assert set(problems[0].keys) & set(broken | mended)
    assert problems[0].text.endswith(".")
    assert list(rule(arguments(broken | mended))) == []


def test_every_rule_has_a_case():
    assert set(CASES) == {rule.__name__ for rule in rules.RULES}


def test_a_plain_training_run_breaks_no_rule():
    plain = {"model_name_or_path": "m", "dataset": "a", "output_dir": "o", "do_train": True}
    assert rules.broken(arguments(plain)) == []


@pytest.mark.parametrize(
    ("keys", "choice"),
    [
        ({}, "adamw_torch"),
        ({"optim": "sgd"}, "sgd"),
        ({"use_galore": True}, "galore"),
        ({"use_apollo": True}, "apollo"),
        ({"use_badam": True}, "badam"),
        ({"use_adam_mini": True}, "adam_mini"),
        ({"use_muon": True}, "muon"),
    ],
)
def test_optimizer_keys_fold_into_one_choice(keys, choice):
    assert arguments(keys).optimizer.choice == choice
