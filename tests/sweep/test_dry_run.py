"""What is said of a sweep before it starts: trials, resources, what it is expected to cost."""

import json

import pytest
from sweeps import GRID, sweep, trained

from llmray.data import prepared
from llmray.errors import DataError
from llmray.sweep import dry_run, results


@pytest.fixture
def keys(tmp_path, tiny_llama_dir):
    """Of a run over ten rows, of which it trains on eight."""
    rows = [{"instruction": f"say {number}", "output": "word " * number} for number in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return {
        "model_name_or_path": str(tiny_llama_dir),
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "output_dir": str(tmp_path / "one"),
        "val_size": 2,
        "template": "default",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 5,
        "max_steps": -1,
        "cutoff_len": 128,
        "use_cpu": True,
    }


def told(base, found, root):
    lines = dry_run.text(base, found, dry_run.plan(base, found, root=root)).splitlines()
    gap = lines.index("")
    return dict(line.split(maxsplit=1) for line in lines[:gap]), lines[gap + 1 :]


def test_trials_data_workers_and_memory_are_told(keys, tmp_path):
    base, found = sweep(**keys, ray_num_workers=2, resources_per_worker={"CPU": 1})
    facts, table = told(base, found, tmp_path / "prepared")
    assert facts["sweep"] == f"{tmp_path}/one: 6 trials, searcher grid, seed 42"
    assert facts["metric"] == "eval_loss, less is better"
    assert facts["workers"].startswith('2 a trial with {"CPU": 1}; as many trials at a time')
    assert facts["data"].startswith("1 prepared set for all trials, to be prepared")
    assert facts["steps"] == "known once the data is prepared, or max_steps given"
    assert facts["memory"].startswith("at most 0.")
    assert facts["time"].startswith("not known before a trial ran here")
    assert [line.split()[0] for line in table] == ["trial", *(f"trial_00{n}" for n in range(1, 7))]
    assert not (tmp_path / "one").exists()


def test_prepared_rows_decide_the_steps_and_halving_leaves_some(keys, tmp_path):
    """Eight rows in steps of two are four an epoch, 20 in five; six trials make 120.

    Halving by 2 at 5, 10 and 20: 6 trials to 5, 3 to 10, 1.5 to 20 are 30 + 15 + 15.
    """
    section = {"search": GRID, "scheduler": {"asha": {"reduction_factor": 2}}, "max_concurrent": 2}
    base, found = sweep(section, **keys)
    root = tmp_path / "prepared"
    run = dry_run.run_of(base, dry_run.trials_of(found)[0])
    prepared.ensure(run, keys["model_name_or_path"], root=root)
    facts, _ = told(base, found, root)
    assert facts["data"] == "1 prepared set for all trials: 8 rows to train on, prepared"
    assert facts["steps"] == "120 of all trials together, of which asha leaves 60"
    assert facts["scheduler"].endswith("compares at 5, 10")
    results.write(base, found, trained(found))  # two seconds a step
    facts, _ = told(base, found, root)
    assert facts["time"].startswith("0:01:00 at 2.00 s a step")


@pytest.mark.parametrize("searcher", ["grid", "optuna"])
def test_a_scheduler_is_set_for_the_longest_trial(keys, tmp_path, searcher):
    search = {"max_steps": {"grid": [10, 40]}, "eval_steps": {"grid": [5, 2]}}
    if searcher == "optuna":
        search = {key: {"choice": found["grid"]} for key, found in search.items()}
    section = {"search": search, "scheduler": "asha", "searcher": searcher}
    base, found = sweep(section | ({"num_samples": 4} if searcher == "optuna" else {}), **keys)
    facts, _ = told(base, found, tmp_path / "prepared")
    assert "max_t 40" in facts["scheduler"]
    assert facts["scheduler"].endswith("compares at 2, 8, 32")


def test_data_that_differs_is_prepared_more_than_once(keys, tmp_path):
    section = {"search": {"cutoff_len": {"grid": [64, 128, 256]}}, "time_budget_s": 60}
    base, found = sweep(section, **{**keys, "max_steps": 10})
    facts, _ = told(base, found, tmp_path / "prepared")
    assert facts["data"].startswith("3 prepared sets")
    assert facts["steps"] == "30 of all trials together"
    assert "(trial_003)" in facts["memory"]
    assert facts["workers"].endswith("none after 0:01:00")


def test_of_a_searcher_that_learns_the_space_is_told(keys, tmp_path):
    section = {
        "search": {
            "learning_rate": {"loguniform": [1e-5, 1e-3]},
            "lora_rank": {"choice": [4, 8], "when": {"finetuning_type": "lora"}},
        },
        "variants": [{"finetuning_type": "full"}, {"finetuning_type": "lora"}],
        "searcher": "optuna",
        "num_samples": 30,
    }
    base, found = sweep(section, **{**keys, "max_steps": 10})
    facts, table = told(base, found, tmp_path / "prepared")
    assert "30 trials, searcher optuna" in facts["sweep"]
    assert facts["steps"] == "300 of all trials together"
    assert table[1].split() == ["learning_rate", "loguniform", "[1e-05,", "0.001]"]
    assert table[2].endswith('finetuning_type in ["lora"]')
    assert table[4].startswith("variant 2")


def test_many_trials_are_cut(keys, tmp_path):
    section = {"search": {"lora_rank": {"randint": [1, 60]}}, "searcher": "grid"}
    base, found = sweep(section, **keys)
    assert told(base, found, tmp_path / "prepared")[1][-1] == "… and 20 more"


def test_a_data_set_that_is_missing_is_said(keys, tmp_path):
    base, found = sweep(**keys | {"dataset": "row"})
    with pytest.raises(DataError, match="row"):
        told(base, found, tmp_path / "prepared")


def test_reward_models_that_stay_for_the_whole_sweep_are_counted(keys, tmp_path):
    batching = {"reward_batching": {"grid": ["fixed", "arrival"]}}
    section = {"search": {"ppo_init_kl": {"grid": [0.1, 0.2]}, **batching}}
    ppo = {
        "stage": "ppo",
        "reward_model": "saves/rm",
        "reward_model_type": "full",
        "reward_num_actors": 2,
        "reward_resources_per_actor": {"CPU": 2},
        "resources_per_worker": {"CPU": 3},
    }
    facts, _ = told(*sweep(section, **{**keys, **ppo}), tmp_path / "prepared")
    assert facts["rewards"] == (
        '2 actors of rm (reward_batching=fixed) with {"CPU": 2}; 2 actors of rm '
        '(reward_batching=arrival) with {"CPU": 2}: for the whole sweep, {"CPU": 11} with one trial'
    )
