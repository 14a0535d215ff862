"""`ray job submit`: a run is sent to a head with a dashboard, followed, stopped, and goes on.

The head asks for a token, or not. What is sent is a folder with a run file and its data; paths in
the file are relative, so results lie in ~/llmray of the head.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray_ppo
import yaml

pytestmark = pytest.mark.ray

RAY = str(Path(sys.executable).with_name("ray"))
GRACE = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}'

token_only = pytest.mark.parametrize("head", ["token"], indirect=True)


@pytest.fixture
def submit(head, ray_home, run_keys, tmp_path, launch_words):
    """Submits `llmray train run.yaml` with these keys, and follows it."""

    def start(name, *options, has_data=True, **keys):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if has_data:
            (folder / "data").mkdir(exist_ok=True)
            for file in ("rows.json", "dataset_info.json"):
                shutil.copy(Path(run_keys["dataset_dir"], file), folder / "data")
        written = {
            **run_keys,
            "dataset_dir": "data",
            "output_dir": f"out/{name}",
            "ray_storage_path": "saves",
            **keys,
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(written))
        home = ray_home / "llmray"
        places = {"output_dir": str(home / "out" / name), "ray_storage_path": str(home / "saves")}
        words = [RAY, "job", "submit", "--working-dir", str(folder), *options, "--"]
        words += [sys.executable, "-m", "llmray", "train", "run.yaml"]
        return launch_words(words, {**os.environ, **head, "OMP_NUM_THREADS": "1"}, places)

    return start


def ray_job(head, *words):
    done = subprocess.run(
        [RAY, "job", *words],
        env={**os.environ, **head},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout + done.stderr


def check_trained(run, ray_home, steps):
    """A job's log is plain lines, and its results stay on the head."""
    assert run.finish() == 0, run.text
    assert "succeeded" in run.text
    assert re.search(rf"^step {steps}/{steps}, loss \d\.\d+", run.text, re.M)
    assert "\r" not in run.text
    assert f"relative paths start from {ray_home}/llmray" in run.text
    assert "Traceback" not in run.text
    assert [record["current_steps"] for record in run.log()] == list(range(1, steps + 1))
    assert (run.output_dir / "model.safetensors").is_file()


@pytest.mark.parametrize("head", ["disabled"], indirect=True)
def test_a_job_trains_on_a_head_that_asks_for_no_token(submit, head, ray_home):
    run = submit("plain", max_steps=1, save_strategy="no", ray_num_workers=1)
    check_trained(run, ray_home, 1)


# long enough for `ray job stop`, which takes seconds to start
LONG = {"max_steps": 100, "save_steps": 50, "gradient_accumulation_steps": 3}
PPO = {**ray_ppo.KEYS, "max_steps": 60, "save_steps": 30, "ray_num_workers": 1}


@token_only
def test_a_stopped_job_saves_and_the_same_submission_goes_on(submit, head, ray_home):
    stopped = stop(submit, head, "stopped", LONG)
    again = submit("stopped", **LONG)
    check_trained(again, ray_home, 100)
    assert f"step {stopped} of 100, {100 - stopped} steps remain" in again.text
    assert "RAY_JOB_STOP_WAIT_TIME_S" in again.text


@token_only
@pytest.mark.slow
def test_a_stopped_job_of_ppo_saves_and_leaves_no_actor(
    submit, head, tmp_path, nothing_runs_on_head
):
    reward_model = ray_ppo.make_reward_model(tmp_path / "reward")
    stop(submit, head, "stopped-ppo", {**PPO, "reward_model": reward_model})
    nothing_runs_on_head()


def stop(submit, head, name, keys):
    """Submit a run, stop it when it trains, see that it was saved; returns at which step."""
    steps = keys["max_steps"]
    run = submit(name, "--submission-id", name, "--runtime-env-json", GRACE, **keys)
    run.wait_for(rf"step 2/{steps}")
    ray_job(head, "stop", name)
    run.finish()
    said = ray_job(head, "logs", name)
    assert f"Job '{name}' was stopped" in run.text + ray_job(head, "status", name)
    assert f"stopped by SIGTERM, saved in {run.run_dir}" in said
    assert "kills this job after 3 s" not in said
    stopped = run.log()[-1]["current_steps"]
    assert 2 <= stopped < steps
    assert (run.run_dir / f"checkpoint-{stopped}" / "manifest.json").is_file()
    return stopped


@token_only
def test_a_job_that_cannot_be_says_why_and_fails(submit):
    run = submit("without-data", has_data=False)
    assert run.finish() == 1
    assert "dataset_dir=data is neither in the working directory that was sent" in run.text
    assert "failed with exit code 2" in run.text
    assert "Traceback" not in run.text


@token_only
def test_a_wrong_token_is_refused_by_the_job_api(head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    said = ray_job(head, "list")
    assert "Authentication failed" in said
