"""What a run's keys say to the parts of stage ppo."""

from __future__ import annotations

from dataclasses import replace

from llmray.arguments.run import RunArguments
from llmray.rl.advantages import KlControl, KlEstimator
from llmray.rl.pool import PoolOptions
from llmray.rl.ppo import PpoOptions
from llmray.rl.reward_api import ApiOptions
from llmray.rl.rollout import Plan
from llmray.train.generate import Sampling


def kl_estimator(arguments: RunArguments) -> KlEstimator:
    """The estimate of the divergence: k1 as a reward, k3 as a loss."""
    rlhf = arguments.rlhf
    return rlhf.ppo_kl_estimator or ("k3" if rlhf.advantage_estimator == "grpo" else "k1")


def ppo_options(
    arguments: RunArguments, *, checks_ratio: bool, checks_sampling: bool = False
) -> PpoOptions:
    """How a step learns.

    Args:
        arguments: of the run.
        checks_ratio: in float32 without dropout; see `PpoOptions`.
        checks_sampling: see `PpoOptions` too.
    """
    rlhf, training = arguments.rlhf, arguments.training
    return PpoOptions(
        per_device=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        epochs=rlhf.ppo_epochs,
        advantage_estimator=rlhf.advantage_estimator,
        num_samples=rlhf.ppo_num_samples,
        clip_range=rlhf.ppo_clip_range,
        value_clip_range=rlhf.ppo_value_clip_range,
        value_coef=rlhf.ppo_value_coef,
        entropy_coef=rlhf.ppo_entropy_coef,
        gamma=rlhf.ppo_gamma,
        lam=rlhf.ppo_lambda,
        kl_estimator=kl_estimator(arguments),
        score_norm=rlhf.ppo_score_norm,
        whiten_rewards=rlhf.ppo_whiten_rewards,
        missing_eos_penalty=rlhf.ppo_missing_eos_penalty,
        early_stop_kl=rlhf.ppo_early_stop_kl,
        seed=training.seed,
        checks_ratio=checks_ratio,
        checks_sampling=checks_sampling,
    )


def kl_control(arguments: RunArguments) -> KlControl:
    """The weight of the divergence at the start of a run."""
    rlhf = arguments.rlhf
    target = rlhf.ppo_target if rlhf.ppo_kl_control == "adaptive" else None
    return KlControl(rlhf.ppo_init_kl, target, rlhf.ppo_kl_horizon)


def plan(arguments: RunArguments, sampling: Sampling, *, evaluates: bool = False) -> Plan:
    """How a rank samples; evaluation has one response to each prompt, and seeds of its own."""
    training, rlhf = arguments.training, arguments.rlhf
    per_device = training.per_device_train_batch_size
    if evaluates:
        per_device = training.per_device_eval_batch_size
    beside = rlhf.ppo_rollout_batch_size or 4 * per_device
    made = Plan(
        sampling=sampling,
        num_samples=rlhf.ppo_num_samples,
        side_by_side=beside,
        seed=training.seed,
    )
    return replace(made, num_samples=1, name="eval") if evaluates else made


def pool_options(arguments: RunArguments, *, of_server: bool = False) -> PoolOptions:
    """How a pool of reward models works, or one of a reward server.

    A server's client has the time limit of a request, and asks several times; the pool's own is
    behind that.
    """
    rlhf = arguments.rlhf
    slots, limit = 2, rlhf.reward_request_timeout_s
    if of_server:
        slots, limit = rlhf.reward_num_requests, api_options(arguments, None).longest_s
    return PoolOptions(
        batch_tokens=rlhf.reward_batch_tokens,
        batching=rlhf.reward_batching,
        slots=slots,
        request_timeout_s=limit,
        timeout_s=rlhf.reward_timeout_s,
        on_error=rlhf.reward_error,
        error_value=rlhf.reward_error_value,
    )


def api_options(arguments: RunArguments, token: str | None) -> ApiOptions:
    """How a reward server is asked; each request may take reward_request_timeout_s."""
    rlhf = arguments.rlhf
    return ApiOptions(
        timeout_s=rlhf.reward_request_timeout_s,
        num_retries=rlhf.reward_num_retries,
        token=token,
    )
