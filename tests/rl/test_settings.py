"""Every key of stage ppo reaches the part that it is for."""

import pytest

from llmray.arguments.group import Group
from llmray.arguments.rlhf import RlhfArguments
from llmray.arguments.run import GROUP_OF, RunArguments
from llmray.rl import settings
from llmray.train.generate import Sampling

SAMPLING = Sampling(stop_ids=(2,), pad_id=0)


def arguments(**keys):
    """Run arguments with these keys, whatever of them is built."""
    whole = RunArguments()
    for key, value in keys.items():
        group = getattr(whole, GROUP_OF[key])
        changed = type(group).model_validate({**group.model_dump(), key: value})
        assert isinstance(changed, Group)
        whole = RunArguments.model_construct(**{**dict(whole), GROUP_OF[key]: changed})
    return whole


def seen(of):
    """All that the parts of stage ppo are told."""
    return {
        "ppo": vars(settings.ppo_options(of, checks_ratio=True)),
        "control": vars(settings.kl_control(of)),
        "plan": vars(settings.plan(of, SAMPLING)),
        "pool": vars(settings.pool_options(of)),
        "api": vars(settings.api_options(of, None)),
        "models": {"names": of.rlhf.reward_models},
    }


@pytest.mark.parametrize(
    ("key", "value", "part", "field", "expected"),
    [
        ("ppo_epochs", 2, "ppo", "epochs", 2),
        ("ppo_score_norm", True, "ppo", "score_norm", True),
        ("ppo_whiten_rewards", True, "ppo", "whiten_rewards", True),
        ("ppo_num_samples", 3, "ppo", "num_samples", 3),
        ("ppo_clip_range", 0.3, "ppo", "clip_range", 0.3),
        ("ppo_value_clip_range", 0.3, "ppo", "value_clip_range", 0.3),
        ("ppo_value_coef", 0.5, "ppo", "value_coef", 0.5),
        ("ppo_entropy_coef", 0.01, "ppo", "entropy_coef", 0.01),
        ("ppo_gamma", 0.9, "ppo", "gamma", 0.9),
        ("ppo_lambda", 0.9, "ppo", "lam", 0.9),
        ("ppo_kl_estimator", "k2", "ppo", "kl_estimator", "k2"),
        ("ppo_early_stop_kl", 0.1, "ppo", "early_stop_kl", 0.1),
        ("ppo_missing_eos_penalty", 1.0, "ppo", "missing_eos_penalty", 1.0),
        ("per_device_train_batch_size", 3, "ppo", "per_device", 3),
        ("gradient_accumulation_steps", 3, "ppo", "accumulation", 3),
        ("seed", 7, "ppo", "seed", 7),
        ("ppo_init_kl", 0.1, "control", "beta", 0.1),
        ("ppo_target", 3.0, "control", "target", 3.0),
        ("ppo_kl_control", "fixed", "control", "target", None),
        ("ppo_kl_horizon", 500.0, "control", "horizon", 500.0),
        ("ppo_num_samples", 3, "plan", "num_samples", 3),
        ("ppo_rollout_batch_size", 5, "plan", "side_by_side", 5),
        ("per_device_train_batch_size", 3, "plan", "side_by_side", 12),
        ("seed", 7, "plan", "seed", 7),
        ("reward_timeout_s", 5, "pool", "timeout_s", 5.0),
        ("reward_request_timeout_s", 5, "pool", "request_timeout_s", 5.0),
        ("reward_error", "mask", "pool", "on_error", "mask"),
        ("reward_error_value", -1, "pool", "error_value", -1.0),
        ("reward_batching", "fixed", "pool", "batching", "fixed"),
        ("reward_batch_tokens", 100, "pool", "batch_tokens", 100),
        ("reward_num_retries", 1, "api", "num_retries", 1),
        ("reward_request_timeout_s", 5, "api", "timeout_s", 5.0),
        ("reward_model", "a, b:c,", "models", "names", ("a", "b:c")),
    ],
)
def test_a_key_reaches_its_part(key, value, part, field, expected):
    found, default = seen(arguments(**{key: value})), seen(arguments())
    assert found[part][field] == expected != default[part][field]


def test_a_pool_waits_longer_for_a_server_than_all_attempts_of_its_client_take():
    """Three requests of 5 s, and two pauses of 30 s at most: 75 s."""
    of = arguments(reward_request_timeout_s=5, reward_num_retries=2, reward_num_requests=3)
    pool = settings.pool_options(of, of_server=True)
    assert (pool.request_timeout_s, pool.slots) == (75.0, 3)
    assert settings.pool_options(of).request_timeout_s == 5.0
    assert settings.pool_options(of).slots == 2


def test_defaults_are_those_of_trl_where_it_has_them():
    of = settings.ppo_options(arguments(), checks_ratio=True)
    assert (of.clip_range, of.value_clip_range, of.value_coef) == (0.2, 0.2, 0.1)
    assert (of.gamma, of.lam, of.epochs, of.kl_estimator) == (1.0, 0.95, 4, "k1")
    control = settings.kl_control(arguments())
    assert (control.beta, control.target, control.horizon) == (0.2, 6.0, 10_000.0)


def test_the_divergence_as_a_loss_is_k3():
    of = arguments(advantage_estimator="grpo")
    assert settings.ppo_options(of, checks_ratio=False).kl_estimator == "k3"
    assert settings.ppo_options(of, checks_ratio=False).checks_ratio is False


def test_evaluation_has_one_response_to_each_prompt():
    of = arguments(ppo_num_samples=4)
    assert settings.plan(of, SAMPLING, evaluates=True).num_samples == 1
    small = arguments(per_device_eval_batch_size=3)
    assert settings.plan(small, SAMPLING, evaluates=True).side_by_side == 12
    assert settings.plan(of, SAMPLING, evaluates=True).name != settings.plan(of, SAMPLING).name


def test_every_key_that_is_declared_for_ppo_is_looked_at_here_or_in_the_wiring():
    """Keys that no part of this package reads: which data, which models, how often."""
    elsewhere = {
        *("ppo_buffer_size", "rollout_log_steps", "reward_weights", "reward_num_requests"),
        *("reward_model_adapters", "reward_model_quantization_bit", "reward_model_type"),
        *("reward_num_actors", "reward_resources_per_actor"),
        *("reward_placement_strategy", "reward_label_selector"),
    }
    declared = {key for key in RlhfArguments.model_fields if key.startswith(("ppo_", "reward_"))}
    marks = test_a_key_reaches_its_part.pytestmark[0].args[1]
    assert declared - elsewhere == {row[0] for row in marks} & declared
