"""Arguments of preference learning and of reinforcement learning from rewards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator

from llmray.arguments.group import Field, Float, Group, Int, Names, Numbers, Object, as_number

Bits = Annotated[Literal[4, 8], BeforeValidator(as_number)]


RewardKind = Literal["api", "function", "model"]

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def kind_of(reward_model: str) -> RewardKind:
    """What a name in reward_model stands for."""
    if reward_model.startswith(("http://", "https://")):
        return "api"
    return "function" if FUNCTION.fullmatch(reward_model) else "model"


def names_of(reward_models: Sequence[str]) -> list[str]:
    """Short names for metrics: the last part of each, numbered where two would be equal."""
    names: list[str] = []
    for model in reward_models:
        last = re.split(r"[/:]", model.rstrip("/"))[-1]
        short = re.sub(r"[^\w.-]", "_", last) or "reward"
        same = sum(name == short or name.startswith(f"{short}_") for name in names)
        names.append(f"{short}_{same + 1}" if same else short)
    return names


class RlhfArguments(Group):
    """Everything about dpo, kto and ppo."""

    pref_beta: Float = Field(
        0.1,
        gt=0,
        description="Beta of the preference losses; larger stays closer to the reference.",
    )
    pref_ftx: Float = Field(
        0.0, ge=0, description="Weight of the supervised loss on chosen responses."
    )
    pref_bco_weight: Float = Field(
        0.0, ge=0, description="Weight of the binary classifier loss beside that of pairs (MPO)."
    )
    pref_loss: Literal["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"] = Field(
        "sigmoid", description="Loss of stage dpo; orpo and simpo need no reference."
    )
    dpo_label_smoothing: Float = Field(
        0.0, ge=0, le=0.5, description="Share of pairs taken to be labelled the wrong way round."
    )
    ld_alpha: Float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of tokens beyond the shorter response of a pair (LD-DPO).",
    )
    kto_chosen_weight: Float = Field(1.0, ge=0, description="Weight of good responses in kto.")
    kto_rejected_weight: Float = Field(1.0, ge=0, description="Weight of bad responses in kto.")
    simpo_gamma: Float = Field(0.5, description="Margin between the two rewards in SimPO.")
    ppo_buffer_size: Int = Field(
        1, ge=1, description="Batches of responses sampled before the policy is optimized."
    )
    ppo_epochs: Int = Field(
        4, ge=1, description="Passes of the optimizer over the sampled responses."
    )
    ppo_score_norm: bool = Field(
        False, description="Bring scores to mean 0 and deviation 1 of all scores seen so far."
    )
    ppo_target: Float = Field(
        6.0,
        gt=0,
        description="Divergence of a whole response from the reference, in nats, that its weight "
        "aims at where ppo_kl_control is adaptive.",
    )
    ppo_whiten_rewards: bool = Field(
        False, description="Bring token rewards to deviation 1 before advantages; the mean stays."
    )
    ppo_num_samples: Int = Field(1, ge=1, description="Responses drawn to each prompt.")
    ppo_clip_range: Float = Field(
        0.2, gt=0, description="How far a token's probability ratio may leave 1 in an update."
    )
    ppo_value_clip_range: Float = Field(
        0.2, gt=0, description="How far a value may leave the one at sampling in an update."
    )
    ppo_value_coef: Float = Field(0.1, ge=0, description="Weight of the value loss.")
    ppo_entropy_coef: Float = Field(0.0, ge=0, description="Weight of the entropy that is sought.")
    ppo_gamma: Float = Field(1.0, ge=0, le=1, description="Discount of later rewards, by tokens.")
    ppo_lambda: Float = Field(
        0.95, ge=0, le=1, description="Lambda of generalized advantage estimation."
    )
    ppo_init_kl: Float = Field(
        0.2, ge=0, description="Weight of the divergence from the reference at the start."
    )
    ppo_kl_control: Literal["adaptive", "fixed"] = Field(
        "adaptive", description="Whether that weight follows ppo_target or stays."
    )
    ppo_kl_horizon: Float = Field(
        10_000.0, gt=0, description="Responses in which the weight follows; larger is slower."
    )
    ppo_kl_estimator: Literal["k1", "k2", "k3"] | None = Field(
        None,
        description="Estimate of the divergence at a token. Not given: k1 with gae, k3 with grpo.",
    )
    ppo_early_stop_kl: Float | None = Field(
        None,
        gt=0,
        description="Divergence of a mini-batch from the policy that sampled, in nats a token, "
        "from which on the rollout is optimized no further.",
    )
    ppo_missing_eos_penalty: Float | None = Field(
        None, ge=0, description="Taken from the score of a response that was cut before its end."
    )
    advantage_estimator: Literal["gae", "grpo"] = Field(
        "gae",
        description="Whether a response is compared with what a value head expects (gae), or with "
        "the others to its prompt (grpo).",
    )
    ref_model: str | None = Field(
        None,
        description="Reference model of dpo, kto and ppo. Not given: the policy as it was at the "
        "start.",
    )
    ref_model_adapters: Names = Field(
        (),
        description="Adapters merged into the reference model; into the run's own where ref_model "
        "is not given.",
    )
    ref_model_quantization_bit: Bits | None = Field(
        None, description="Bits per weight of the reference model."
    )
    precompute_ref_logps: Literal["auto"] | bool = Field(
        "auto",
        description="Whether the reference's log-probabilities are computed once for all rows, "
        "kept beside the prepared data, and its memory given back: true, false, or auto, which "
        "does so where rows are seen more than once or they are kept already.",
    )
    reward_model: str | None = Field(
        None,
        description="Reward of ppo: a model, an adapter, a server's address, or a function "
        "`module:function`; several with commas are added.",
    )
    reward_weights: Numbers = Field(
        (), description="Weight of each reward in reward_model; none weighs all by 1."
    )
    reward_model_adapters: Names = Field((), description="Adapters merged into the reward model.")
    reward_model_quantization_bit: Bits | None = Field(
        None, description="Bits per weight of the reward model."
    )
    reward_model_type: Literal["lora", "full", "api"] = Field(
        "lora",
        description="What reward_model names: an adapter of the policy's model, a whole model, or "
        "a server.",
    )
    reward_timeout_s: Float = Field(
        600.0, gt=0, description="Seconds to wait for a reward model where all are gone."
    )
    reward_request_timeout_s: Float = Field(
        120.0, gt=0, description="Seconds without an answer after which a reward model hangs."
    )
    reward_error: Literal["fail", "mask", "value"] = Field(
        "fail",
        description="What becomes of a response that gets no score: the run fails, it is left out, "
        "or it gets reward_error_value.",
    )
    reward_error_value: Float = Field(
        0.0, description="Score of such a response where reward_error is value."
    )
    reward_batching: Literal["arrival", "fixed"] = Field(
        "arrival",
        description="Whether responses are scored together as they come, or as rank and number "
        "say, which gives the same scores to the bit at a resume.",
    )
    reward_batch_tokens: Int = Field(
        8192, ge=1, description="Most tokens that a reward model scores at one time."
    )
    reward_num_retries: Int = Field(
        4, ge=0, description="Further attempts where a reward server is busy or not there."
    )
    reward_num_requests: Int = Field(
        8, ge=1, description="Requests to a reward server at one time, of each process."
    )
    reward_num_actors: Int | None = Field(
        None, ge=1, description="Actors of each reward model in a run on Ray. Not given: 1."
    )
    reward_resources_per_actor: Object | None = Field(
        None,
        description='Resources of each of them, a mapping or JSON such as {"GPU": 0.5}. Not given: '
        "one GPU where the cluster has any and use_cpu is false, else one core.",
    )
    reward_placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = (
        Field(
            None,
            description="How actors of a reward model lie on nodes: together or apart if possible, "
            "or strictly so. Not given: PACK.",
        )
    )
    reward_label_selector: Object | None = Field(
        None,
        description='Labels of the nodes that they may lie on, such as {"accelerator-type": "L4"}; '
        "`!value`, `in(a, b)` and `!in(a, b)` are understood.",
    )
    ppo_rollout_batch_size: Int | None = Field(
        None,
        ge=1,
        description="Responses sampled side by side. Not given: four times "
        "per_device_train_batch_size, at evaluations per_device_eval_batch_size.",
    )
    rollout_log_steps: Int = Field(
        10, ge=1, description="Steps between samples of responses in rollouts.jsonl."
    )

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The names in `reward_model`, one for each reward that is added."""
        return tuple(name.strip() for name in (self.reward_model or "").split(",") if name.strip())
