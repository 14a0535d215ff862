"""Rules between keys of training by reward: what an algorithm reads, what a reward needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmray.arguments.problems import Problem, given
from llmray.arguments.rlhf import kind_of

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

Rule = Callable[["RunArguments"], Iterator[Problem]]

# keys of the value head and of token rewards, which grpo has not
OF_GAE = (
    *("ppo_value_coef", "ppo_value_clip_range", "ppo_gamma", "ppo_lambda"),
    *("ppo_whiten_rewards", "ppo_score_norm"),
)
OF_ACTORS = (
    *("reward_num_actors", "reward_resources_per_actor"),
    *("reward_placement_strategy", "reward_label_selector"),
)
OF_ADAPTIVE = ("ppo_target", "ppo_kl_horizon")


ALSO_OF_PPO = ("advantage_estimator", "rollout_log_steps")
OF_MODELS = ("reward_model_adapters", "reward_model_quantization_bit")
OF_SERVERS = ("reward_num_retries", "reward_num_requests")


def _is_default(arguments: RunArguments, key: str) -> bool:
    field = type(arguments.rlhf).model_fields[key]
    return bool(getattr(arguments.rlhf, key) == field.default)


def reward_keys_have_their_stage(arguments: RunArguments) -> Iterator[Problem]:
    """A key of training by reward is for stage ppo."""
    stage = arguments.finetuning.stage
    if stage == "ppo":
        return
    for key in type(arguments.rlhf).model_fields:
        is_one = key.startswith(("ppo_", "reward_")) or key in ALSO_OF_PPO
        if is_one and not _is_default(arguments, key):
            value = given(key, getattr(arguments.rlhf, key))
            yield Problem(
                (key, "stage"),
                f"{value} with stage={stage}: it is for stage ppo. Remove {key}, or write stage: "
                "ppo.",
            )


def responses_have_no_accuracy(arguments: RunArguments) -> Iterator[Problem]:
    """Stage ppo reads no response of the data that tokens could be compared with."""
    if arguments.finetuning.stage == "ppo" and arguments.finetuning.compute_accuracy:
        yield Problem(
            ("compute_accuracy", "stage"),
            "compute_accuracy=true with stage=ppo: responses are sampled and scored, and no token "
            "is right or wrong. Remove compute_accuracy.",
        )


def servers_have_addresses(arguments: RunArguments) -> Iterator[Problem]:
    """A reward of type api is a server, or a function where several are added."""
    rlhf = arguments.rlhf
    wrong = [name for name in rlhf.reward_models if kind_of(name) == "model"]
    if rlhf.reward_model_type == "api" and wrong:
        yield Problem(
            ("reward_model", "reward_model_type"),
            f"reward_model={wrong[0]} with reward_model_type=api: an address is required that "
            "begins with http:// or https://. Write it, or write reward_model_type: full for a "
            "model.",
        )


def rewards_read_their_keys(arguments: RunArguments) -> Iterator[Problem]:
    """Some keys are for reward models that are whole, others for servers."""
    rlhf = arguments.rlhf
    kinds = {kind_of(name) for name in rlhf.reward_models}
    if not kinds:
        return
    is_whole = rlhf.reward_model_type == "full" and "model" in kinds
    for key in OF_MODELS:
        if not is_whole and not _is_default(arguments, key):
            yield Problem(
                (key, "reward_model_type"),
                f"{given(key, getattr(rlhf, key))} with reward_model={rlhf.reward_model} of type "
                f"{rlhf.reward_model_type}: it is for a whole reward model. Remove {key}, or write "
                "reward_model_type: full.",
            )
    for key in OF_SERVERS:
        if "api" not in kinds and not _is_default(arguments, key):
            yield Problem(
                (key, "reward_model"),
                f"{given(key, getattr(rlhf, key))} with reward_model={rlhf.reward_model}: it is "
                f"for reward servers, of which none is named. Remove {key}.",
            )


def groups_have_samples(arguments: RunArguments) -> Iterator[Problem]:
    """Responses are compared with others to their prompt."""
    rlhf = arguments.rlhf
    if rlhf.advantage_estimator == "grpo" and rlhf.ppo_num_samples < 2:
        yield Problem(
            ("advantage_estimator", "ppo_num_samples"),
            f"advantage_estimator=grpo with ppo_num_samples={rlhf.ppo_num_samples}: responses to "
            "one prompt are compared. Write ppo_num_samples: 4, or another number from 2 on.",
        )


def groups_have_no_values(arguments: RunArguments) -> Iterator[Problem]:
    """The critic-free estimator reads no key of the value head."""
    if arguments.rlhf.advantage_estimator != "grpo":
        return
    for key in OF_GAE:
        if not _is_default(arguments, key):
            yield Problem(
                (key, "advantage_estimator"),
                f"{given(key, getattr(arguments.rlhf, key))} with advantage_estimator=grpo, which "
                f"reads values and token rewards nowhere. Remove {key}, or write "
                "advantage_estimator: gae.",
            )


def divergence_as_a_loss_has_a_gradient(arguments: RunArguments) -> Iterator[Problem]:
    """With grpo the divergence is a loss, and the gradient of k1 is 0 on average."""
    rlhf = arguments.rlhf
    if rlhf.advantage_estimator == "grpo" and rlhf.ppo_kl_estimator == "k1":
        yield Problem(
            ("ppo_kl_estimator", "advantage_estimator"),
            "ppo_kl_estimator=k1 with advantage_estimator=grpo: there the divergence is a loss, "
            "and on average the gradient of k1 is 0. Remove ppo_kl_estimator, which leaves k3.",
        )


def fixed_weights_follow_nothing(arguments: RunArguments) -> Iterator[Problem]:
    """A weight of the divergence that stays has no target."""
    rlhf = arguments.rlhf
    if rlhf.ppo_kl_control == "fixed":
        stays, why = "ppo_kl_control", "ppo_kl_control=fixed, which follows nothing"
        instead = "ppo_kl_control: adaptive"
    elif rlhf.ppo_init_kl == 0:
        stays, why = "ppo_init_kl", "ppo_init_kl=0, of which every multiple is 0"
        instead = "a larger ppo_init_kl"
    else:
        return
    for key in OF_ADAPTIVE:
        if not _is_default(arguments, key):
            yield Problem(
                (key, stays),
                f"{given(key, getattr(rlhf, key))} with {why}. Remove {key}, or write {instead}.",
            )


def rollouts_are_drawn(arguments: RunArguments) -> Iterator[Problem]:
    """A policy explores by drawing, one response at a time."""
    generating = arguments.generating
    if arguments.finetuning.stage != "ppo":
        return
    if not generating.do_sample or generating.temperature == 0:
        yield Problem(
            ("stage", "do_sample", "temperature"),
            f"stage=ppo with {given('do_sample', generating.do_sample)} and temperature="
            f"{generating.temperature}: what is always the same teaches nothing. Write do_sample: "
            "true and temperature: 1.0.",
        )
    if generating.num_beams > 1:
        yield Problem(
            ("stage", "num_beams"),
            f"stage=ppo with num_beams={generating.num_beams}: beams are no draws of the policy. "
            "Remove num_beams.",
        )


def every_reward_has_a_weight(arguments: RunArguments) -> Iterator[Problem]:
    """Rewards that are added have a weight each."""
    rlhf = arguments.rlhf
    weights, names = rlhf.reward_weights, rlhf.reward_models
    if weights and len(weights) != len(names):
        yield Problem(
            ("reward_weights", "reward_model"),
            f"{given('reward_weights', list(weights))} are {len(weights)} weights for {len(names)} "
            "rewards in reward_model. Write one for each, or none, which weighs all by 1.",
        )


def a_value_is_used(arguments: RunArguments) -> Iterator[Problem]:
    """The score of answers that get none is for where they get it."""
    rlhf = arguments.rlhf
    if rlhf.reward_error_value != 0 and rlhf.reward_error != "value":
        yield Problem(
            ("reward_error_value", "reward_error"),
            f"reward_error_value={rlhf.reward_error_value} with reward_error={rlhf.reward_error}: "
            "nothing gets it. Write reward_error: value, or remove it.",
        )


def actors_are_of_reward_models(arguments: RunArguments) -> Iterator[Problem]:
    """Actors are made in a run on Ray, of rewards that are models."""
    if arguments.finetuning.stage != "ppo":
        return
    given_keys = [key for key in OF_ACTORS if not _is_default(arguments, key)]
    has_models = any(kind_of(name) == "model" for name in arguments.rlhf.reward_models)
    for key in given_keys:
        said = given(key, getattr(arguments.rlhf, key))
        if not arguments.ray_enabled:
            yield Problem(
                (key, "use_ray"),
                f"{said} without Ray: reward models are then in the process that trains. Write "
                f"use_ray: true, or remove {key}.",
            )
        elif not has_models:
            yield Problem(
                (key, "reward_model"),
                f"{said} with reward_model={arguments.rlhf.reward_model}: servers and functions "
                f"are called by the workers and have no actors. Remove {key}, or name a model.",
            )


def labels_are_text(arguments: RunArguments) -> Iterator[Problem]:
    """A label selector is a mapping of names to text."""
    for key, value in (arguments.rlhf.reward_label_selector or {}).items():
        if not isinstance(value, str) or not value:
            yield Problem(
                ("reward_label_selector",),
                f"reward_label_selector has {key}: {value!r}. The text of a label is required, "
                f'such as {{"{key}": "a"}}, "!a" or "in(a, b)".',
            )


REWARD_RULES: tuple[Rule, ...] = (
    reward_keys_have_their_stage,
    responses_have_no_accuracy,
    servers_have_addresses,
    rewards_read_their_keys,
    actors_are_of_reward_models,
    labels_are_text,
    groups_have_samples,
    groups_have_no_values,
    divergence_as_a_loss_has_a_gradient,
    fixed_weights_follow_nothing,
    rollouts_are_drawn,
    every_reward_has_a_weight,
    a_value_is_used,
)
