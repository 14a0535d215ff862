"""Which runs share the actors of a reward model, and which need their own."""

import pytest

from llmray.arguments import reward_sets
from llmray.arguments.loading import load
from llmray.rl import reward_files

RUN = {
    "model_name_or_path": "m",
    "dataset": "a",
    "template": "chatml",
    "stage": "ppo",
    "do_train": True,
    "output_dir": "o",
    "finetuning_type": "lora",
    "reward_model": "saves/rm",
    "reward_model_type": "full",
    "use_ray": True,
}
BITS = {"reward_model_quantization_bit": 4}
LORA = {"reward_model_type": "lora"}


def run(**keys):
    return load({**RUN, **keys}, environ={})


def sets(*changes):
    return reward_sets.of_runs(run(**keys) for keys in changes)


def test_what_the_policys_side_reads_leaves_the_reward_model_shared():
    """Weights, timeouts and the like; bits of the policy, where the reward model is no adapter."""
    changes = [
        {"learning_rate": 1e-3},
        {"ppo_init_kl": 0.5, "cutoff_len": 64},
        {"reward_weights": [2.0], "reward_request_timeout_s": 3, "reward_timeout_s": 5},
        {"reward_error": "value", "reward_error_value": 1.0},
        {"quantization_bit": 4, "quantization_type": "fp4"},
        {"ray_num_workers": 2, "resources_per_worker": {"CPU": 1}},
    ]
    [found] = sets({}, *changes)
    assert (found.name, found.short, found.apart) == ("saves/rm", "rm", "")


@pytest.mark.parametrize(
    ("key", "value", "keys"),
    [
        ("reward_model_type", "lora", {}),
        ("model_name_or_path", "other", {}),
        ("model_revision", "v2", {}),
        ("template", "llama3", {}),
        ("default_system", "be brief", {}),
        ("add_tokens", ["<x>"], {}),
        ("add_special_tokens", ["<x>"], {}),
        ("split_special_tokens", True, {}),
        ("trust_remote_code", True, {}),
        ("allow_pickled_weights", True, {}),
        ("infer_dtype", "float32", {}),
        ("use_cpu", True, {}),
        ("reward_batching", "fixed", {}),
        ("reward_batch_tokens", 512, {}),
        ("reward_model_adapters", ["a"], {}),
        ("reward_model_quantization_bit", 4, {}),
        ("quantization_bit", 4, LORA),
        ("quantization_type", "fp4", BITS),
        ("quantization_type", "fp4", {**LORA, "quantization_bit": 4}),
        ("double_quantization", False, BITS),
        ("reward_num_actors", 2, {}),
        ("reward_resources_per_actor", {"CPU": 2}, {}),
        ("reward_placement_strategy", "SPREAD", {}),
        ("reward_label_selector", {"a": "b"}, {}),
    ],
)
def test_what_makes_a_reward_model_gives_each_value_its_own(key, value, keys):
    found = sets(keys, {**keys, key: value})
    assert len(found) == 2
    assert key in reward_sets.differing(found)
    assert found[0].apart != found[1].apart
    assert f"{key}=" in found[1].apart


def test_all_that_a_reward_model_is_loaded_by_decides():
    fetched_by = {"cache_dir", "hf_hub_token", "ms_hub_token", "om_hub_token"}
    assert set(reward_files.AS_THE_POLICY) - fetched_by <= set(reward_sets.DECIDE)


def test_each_reward_model_is_there_once_in_whatever_combination_runs_name_it():
    named = ["saves/a", "saves/b", "saves/a,my.rewards:score,saves/b", "http://host/v1"]
    found = sets(*({"reward_model": name} for name in named))
    assert [(one.name, one.apart) for one in found] == [("saves/a", ""), ("saves/b", "")]
    keys = [one.key for one in reward_sets.of_run(run(reward_model=named[2]))]
    assert keys == [one.key for one in found]


def test_only_runs_of_stage_ppo_ask_reward_models():
    keys = {key: value for key, value in RUN.items() if not key.startswith("reward")}
    assert reward_sets.of_run(load({**keys, "stage": "sft"}, environ={})) == []
    assert reward_sets.of_run(run(reward_model="my.rewards:score")) == []
