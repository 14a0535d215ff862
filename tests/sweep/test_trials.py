"""Which trials a sweep has, and what run each of them is."""

import json

import pytest
from sweeps import GRID, sweep

from llmray.arguments.loading import load
from llmray.data import prepared
from llmray.errors import ArgumentsError
from llmray.sweep.trials import (
    Trial,
    by_data,
    data_key,
    run_of,
    runs_by_rewards,
    sweep_name,
    trials_of,
)

RATES = {"learning_rate": {"loguniform": [1e-5, 1e-3]}}


def values(section):
    return [trial.values for trial in trials_of(sweep(section)[1])]


def test_a_grid_has_each_point_once():
    found = trials_of(sweep()[1])
    assert [trial.name for trial in found] == [f"trial_00{number}" for number in range(1, 7)]
    assert [tuple(trial.values.values()) for trial in found] == [
        (rank, rate) for rank in (4, 8) for rate in (1e-5, 1e-4, 1e-3)
    ]


def test_draws_are_the_same_for_the_same_seed_and_differ_for_another():
    first = values({"search": RATES, "num_samples": 4, "seed": 1})
    assert first == values({"search": RATES, "num_samples": 4, "seed": 1})
    assert first != values({"search": RATES, "num_samples": 4, "seed": 2})


def test_more_draws_begin_with_the_same_ones():
    few = values({"search": RATES, "num_samples": 3})
    assert values({"search": RATES, "num_samples": 5})[:3] == few


def test_no_two_draws_are_alike():
    found = values({"search": {"lora_rank": {"randint": [1, 6]}}, "num_samples": 6})
    assert sorted(value["lora_rank"] for value in found) == [1, 2, 3, 4, 5, 6]


def test_draws_are_made_at_each_point_of_a_grid_and_for_each_variant():
    section = {
        "search": {**RATES, "lora_rank": {"grid": [4, 8], "when": {"finetuning_type": "lora"}}},
        "variants": [{"finetuning_type": "full"}, {"finetuning_type": "lora", "lora_alpha": 8}],
        "num_samples": 2,
    }
    found = values(section)
    assert [(v["finetuning_type"], v.get("lora_rank"), v.get("lora_alpha")) for v in found] == [
        ("full", None, None),
        ("lora", 4, 8),
        ("lora", 8, 8),
    ] * 2
    assert len({value["learning_rate"] for value in found}) == 6


def test_a_searcher_that_learns_has_no_list():
    with pytest.raises(ValueError, match="one by one"):
        trials_of(sweep({"search": RATES, "searcher": "optuna"})[1])


def test_a_trial_is_the_run_with_its_values_and_a_folder_of_its_own():
    base, found = sweep(
        report_to="tensorboard", logging_dir="logs", overwrite_output_dir=True, seed=3
    )
    run = run_of(base, trials_of(found)[1])
    assert (run.finetuning.lora_rank, run.optimizer.learning_rate) == (4, 1e-4)
    assert run.training.output_dir == "saves/one/trial_002"
    assert run.cluster.ray_storage_path == "./saves/one"
    assert (run.cluster.ray_run_name, run.tracking.run_name) == ("trial_002", "one/trial_002")
    assert run.tracking.logging_dir == "logs/trial_002"
    assert run.ray_enabled
    assert (run.tune.tune, run.training.overwrite_output_dir) == (None, False)
    same = base.flat().keys() - {
        *("lora_rank", "learning_rate", "output_dir", "ray_storage_path", "ray_run_name"),
        *("run_name", "logging_dir", "use_ray", "tune", "overwrite_output_dir"),
    }
    assert {key: run.flat()[key] for key in same} == {key: base.flat()[key] for key in same}


def test_a_run_on_ray_keeps_its_names():
    base, found = sweep(
        ray_run_name="mine",
        ray_storage_path="s3://bucket/runs",
        use_swanlab=True,
        swanlab_mode="offline",
        swanlab_run_name="shown",
    )
    run = run_of(base, trials_of(found)[0])
    assert sweep_name(base) == "mine"
    assert run.cluster.ray_storage_path == "s3://bucket/runs/mine"
    assert run.tracking.run_name == "mine/trial_001"
    assert run.tracking.swanlab_run_name == "shown/trial_001"


def test_other_names_of_values_mean_the_same_in_trials():
    base, _ = sweep()
    run = run_of(base, Trial(1, {"finetuning_type": "qlora"}))
    assert (run.finetuning.finetuning_type, run.model.quantization_bit) == ("lora", 4)
    with pytest.raises(ArgumentsError, match="trial_002: lora_rank=0 is wrong"):
        run_of(base, Trial(2, {"lora_rank": 0}))


@pytest.fixture
def base(tmp_path, tiny_llama_dir):
    """A run over ten rows, and how its data is named."""
    rows = [{"instruction": f"say {number}", "output": "word " * number} for number in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    keys = {
        "model_name_or_path": str(tiny_llama_dir),
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "do_train": True,
        "output_dir": "o",
        "val_size": 2,
        "eval_strategy": "steps",
        "template": "default",
    }
    return load(keys, environ={})


def test_trials_share_data_unless_a_key_of_the_data_differs(base, tmp_path):
    search = {**GRID, "cutoff_len": {"grid": [64, 128]}}
    _, found = sweep({"search": search})
    runs = {trial.name: run_of(base, trial) for trial in trials_of(found)}
    groups = by_data(runs, lambda run: data_key(run, tmp_path / "prepared"))
    assert sorted(len(names) for names in groups.values()) == [6, 6]
    lengths = {key: {runs[name].data.cutoff_len for name in names} for key, names in groups.items()}
    assert sorted(lengths.values(), key=str) == [{128}, {64}]
    ref = prepared.ensure(
        runs["trial_001"], base.model.model_name_or_path, root=tmp_path / "prepared"
    )
    assert "trial_001" in groups[ref.key]


def test_what_lies_at_a_named_place_is_that_place(base, tmp_path):
    assert (
        data_key(load({**base.flat(), "tokenized_path": "/there"}, environ={}), tmp_path)
        == "/there"
    )


def test_runs_of_a_searcher_that_learns_have_all_that_decides_reward_models():
    """Two templates, of which one has two kinds of batches: three sets, whatever else is drawn."""
    keys = {"stage": "ppo", "reward_model": "rm", "reward_model_type": "full"}
    search = {
        "template": {"choice": ["chatml", "llama3"]},
        "reward_batching": {"choice": ["fixed", "arrival"], "when": {"template": "chatml"}},
        "learning_rate": {"loguniform": [1e-6, 1e-4]},
    }
    runs = runs_by_rewards(*sweep({"search": search, "searcher": "optuna"}, **keys))
    found = {(run.data.template, run.rlhf.reward_batching) for run in runs}
    assert found == {("chatml", "fixed"), ("chatml", "arrival"), ("llama3", "arrival")}
    runs = runs_by_rewards(*sweep({"search": search, "num_samples": 3}, **keys))
    assert len({run.optimizer.learning_rate for run in runs}) == 3
