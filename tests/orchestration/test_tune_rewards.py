"""Sweeps of stage ppo on a cluster: one set of reward models for all trials that can share it."""

import csv
import json
import os
import signal

import pytest
import ray_ppo

pytestmark = pytest.mark.ray

KEYS = {
    **ray_ppo.KEYS,
    "ray_num_workers": 1,
    "max_steps": 4,
    "save_steps": 2,
    "ppo_buffer_size": 1,
    "val_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 4,
    "reward_timeout_s": 600,  # a dead actor is the only one of its set, and imports anew
}
TUNE = {
    "search": {
        "learning_rate": {"grid": [1e-5, 1e-4]},
        "reward_batching": {"grid": ["fixed", "arrival"]},
        "reward_weights": {"grid": [[1.0]]},
    },
    "max_concurrent": 2,
}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return ray_ppo.make_reward_model(tmp_path_factory.mktemp("reward"))


def rows(run):
    with open(run.output_dir / "results.csv") as file:
        return list(csv.DictReader(file))


def actor_pids(run, name):
    """Processes of the reward models that a trial asked, as it wrote them down."""
    path = run.run_dir / name / "placement.json"
    members = json.loads(path.read_text())["members"] if path.is_file() else []
    return {member["pid"] for member in members if member["role"].startswith("reward")}


def test_trials_share_reward_models_and_a_dead_one_comes_back(
    launch, ray_address, reward_model, nothing_runs
):
    """Two kinds of batches are two sets of one actor each, loaded once for two trials each."""
    run = launch(
        "ppo-swept",
        address=ray_address,
        command="tune",
        reward_model=reward_model,
        tune=TUNE,
        **KEYS,
    )
    [pid] = run.until(lambda: actor_pids(run, "trial_001"))
    os.kill(pid, signal.SIGKILL)
    assert run.finish() == 0, run.text
    assert "Traceback" not in run.text
    assert "for all trials: 1 actor of reward model" in run.text
    found = rows(run)
    assert [row["state"] for row in found] == ["finished"] * 4
    assert all(float(row["eval_score"]) for row in found)
    kinds = {row["trial"]: row["reward_batching"] for row in found}
    asked: dict[str, set[int]] = {"fixed": set(), "arrival": set()}
    for name, kind in kinds.items():
        asked[kind] |= actor_pids(run, name)
    assert len(asked["arrival"]) == 1
    assert pid in asked["fixed"]
    assert len(asked["fixed"]) <= 2, "the one that was killed, and its next life"
    assert not asked["fixed"] & asked["arrival"]
    nothing_runs()


def test_more_reward_models_than_find_room_are_refused_before_anything_is_loaded(
    launch, ray_address, reward_model
):
    keys = {**KEYS, "reward_model": reward_model, "reward_num_actors": 3, "tune": TUNE}
    run = launch("ppo-sweep-refused", address=ray_address, command="tune", **keys)
    assert run.finish() == 1
    assert 'The run needs {"CPU": 7} for 1 worker with {"CPU": 1} each, 3 actors of' in run.text
    assert "Trials differ in reward_batching" in run.text
    assert not run.output_dir.exists()
    assert not run.run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_actor_outlives_a_sweep(how, launch, ray_address, reward_model, nothing_runs):
    keys = {**KEYS, "max_steps": 40, "reward_model": reward_model, "tune": TUNE}
    run = launch(f"ppo-sweep-{how}", address=ray_address, command="tune", **keys)
    run.until(lambda: actor_pids(run, "trial_001"))
    os.killpg(run.process.pid, how)
    assert run.finish() == (143 if how == signal.SIGTERM else -how), run.text
    nothing_runs()
