"""`llmray tune` on a cluster: shared data, warm workers, early stops, kills, what is left."""

import csv
import json
import os
import re
import sys
import time
from signal import SIGINT, SIGKILL, SIGTERM

import psutil
import pytest
import yaml

from llmray.stop_signals import EXIT_CODES
from tests.orchestration.conftest import start_cluster

pytestmark = pytest.mark.ray

TRIAL = re.compile(r"attempt (\d+): (.*)")


class Swept:
    """What a sweep left in its folders."""

    def __init__(self, run):
        self.run = run
        self.directory = run.output_dir

    def rows(self):
        with open(self.directory / "results.csv") as file:
            return {row["trial"]: row for row in csv.DictReader(file)}

    def attempts(self, name):
        """Of each attempt of a trial: its number, and the pids of its ranks."""
        text = (self.directory / name / "trial.log").read_text()
        return [
            (int(number), re.findall(r"pid (\d+)", where)) for number, where in TRIAL.findall(text)
        ]

    def steps(self, name):
        path = self.run.run_dir / name / "trainer_log.jsonl"
        return [json.loads(line)["current_steps"] for line in path.read_text().splitlines()]


KEYS = {
    "ray_num_workers": 1,
    "gradient_accumulation_steps": 1,
    "val_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "fp32": False,
    "bf16": True,  # of files in float32: what all trials need is converted once
}


@pytest.fixture(scope="module")
def swept(launch, ray_address):
    """Two trials that learn, and after them two that hardly do, under ASHA."""
    tune = {
        "search": {"learning_rate": {"grid": [1e-3, 2e-3, 1e-9, 2e-9]}},
        "scheduler": {"asha": {"grace_period": 4, "reduction_factor": 2}},
        "max_concurrent": 2,
    }
    run = launch("swept", address=ray_address, command="tune", tune=tune, **KEYS)
    assert run.finish(timeout=280) == 0, run.text
    return Swept(run)


def test_asha_stops_what_does_not_learn_a_step_after_its_word(swept):
    states = {name: row["state"] for name, row in swept.rows().items()}
    assert "finished" in (states["trial_001"], states["trial_002"]), swept.run.text
    assert states["trial_003"] == states["trial_004"] == "stopped early"
    assert max(swept.steps("trial_003")) == max(swept.steps("trial_004")) == 5
    assert (swept.run.run_dir / "trial_003" / "checkpoint-5").is_dir()
    assert "Traceback" not in swept.run.text


def test_data_is_tokenized_once_and_workers_stay_warm(swept):
    assert "data: 1 prepared set(s) for 4 trials, 64 rows tokenized" in swept.run.text
    assert "workers: 2 group(s)" in swept.run.text
    nodes = re.findall(r"(\d+) loads; (\S+) MiB mapped once .*, (\S+) MiB copied", swept.run.text)
    assert sum(int(loads) for loads, _, _ in nodes) == 4
    assert {copied for _, _, copied in nodes} == {"0"}
    assert all(1 < float(mapped) < 5 for _, mapped, _ in nodes), "half of the file's 8 MiB"
    pids = [swept.attempts(f"trial_{number:03d}") for number in range(1, 5)]
    assert [[number for number, _ in found] for found in pids] == [[1]] * 4
    assert len({pid for found in pids for _, ranks in found for pid in ranks}) == 2


def test_best_run_file_trains_to_the_same_metric(swept, launch_words, ray_home):
    file = swept.directory / "best.yaml"
    content = file.read_text()
    keys = yaml.safe_load(content)
    assert "tune" not in keys
    words = [sys.executable, "-m", "llmray", "train", str(file), "use_ray=false"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    again = launch_words(words, variables, keys)
    assert again.finish() == 0, again.text
    results = json.loads((again.output_dir / "all_results.json").read_text())
    best = re.search(r"eval_loss (\S+) after", content).group(1)
    assert f"{results['eval_loss']:.6g}" == best
    assert (swept.directory / "tune.png").stat().st_size > 10_000


def test_a_finished_sweep_is_not_begun_again(swept, launch, ray_address):
    run = launch("swept", address=ray_address, command="tune", tune=swept.run.keys["tune"], **KEYS)
    assert run.finish() == 1
    assert "holds a sweep of 4 trials, of which 4 are over. Write resume=true" in run.text
    assert "Traceback" not in run.text


def test_a_trial_that_the_cluster_cannot_hold_is_refused(swept, launch, ray_address):
    keys = {**KEYS, "ray_num_workers": 9, "tune": swept.run.keys["tune"]}
    run = launch("too-wide", address=ray_address, command="tune", **keys)
    assert run.finish() == 1
    assert "needs 9 CPU (9 workers with 1 each), the cluster has 6" in run.text
    assert not run.output_dir.exists()


@pytest.mark.parametrize("how", [SIGTERM, pytest.param(SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_group_of_a_cluster_of_its_own_keeps_trials(how, launch):
    """As `timeout` and a terminal send it; what the driver started goes on until it has saved."""
    keys = {
        **KEYS,
        "gradient_accumulation_steps": 8,
        "save_steps": 100,
        "ray_init_kwargs": {"address": "local", "num_cpus": 1},
        "tune": {"search": {"learning_rate": {"grid": [1e-3, 2e-3]}}, "max_concurrent": 1},
    }
    environ = {"RAY_AUTH_MODE": "disabled"}
    run = launch(f"own-cluster-{how}", address=None, environ=environ, command="tune", **keys)
    found = Swept(run)
    wait_for_step(found, "trial_001", 2)
    [(_, [pid])] = found.attempts("trial_001")
    os.killpg(run.process.pid, how)
    assert run.finish() == EXIT_CODES[how.name], run.text
    assert f"{how.name}: trials are saved at their next step border" in run.text
    assert "Traceback" not in run.text
    assert re.search(r"trial_001 .* waiting", run.text), "the table"
    assert {row["state"] for row in found.rows().values()} == {"waiting"}
    step = max(found.steps("trial_001"))
    assert step < 12
    assert (run.run_dir / "trial_001" / f"checkpoint-{step}" / "manifest.json").is_file()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(int(pid)):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)


@pytest.mark.slow
def test_killed_worker_and_killed_driver_cost_no_trial(launch, ray_address, nothing_runs):
    keys = {
        **KEYS,
        "ray_num_workers": 2,
        "placement_strategy": "SPREAD",
        "gradient_accumulation_steps": 4,
        "save_steps": 2,
        "tune": {"search": {"learning_rate": {"grid": [1e-3, 2e-3]}}, "max_concurrent": 1},
    }
    run = launch("killed", address=ray_address, command="tune", **keys)
    found = Swept(run)
    wait_for_step(found, "trial_001", 5)
    [(_, pids)] = found.attempts("trial_001")
    assert len(pids) == 2
    os.kill(int(pids[1]), SIGKILL)
    run.wait_for(r"trial_001: rank 1 died: its process or node is gone. It goes on")
    wait_for_step(found, "trial_002", 5)
    assert found.attempts("trial_001")[1][0] == 2
    first = (run.run_dir / "trial_001" / "trainer_log.jsonl").stat().st_mtime_ns
    os.kill(run.process.pid, SIGKILL)
    run.finish()
    nothing_runs()

    again = launch("killed", address=ray_address, command="tune", words=["resume=true"], **keys)
    assert again.finish(timeout=280) == 0, again.text
    assert "going on with the sweep" in again.text
    assert {row["state"] for row in found.rows().values()} == {"finished"}
    assert (run.run_dir / "trial_001" / "trainer_log.jsonl").stat().st_mtime_ns == first
    begun = re.findall(r"resuming from \S+: step (\d+)", log_of(found, "trial_002"))
    assert len(begun) == 1
    assert int(begun[0]) >= 4
    for name in ("trial_001", "trial_002"):
        steps = found.steps(name)
        assert steps == sorted(set(steps)), "no step is logged twice"
        assert steps[-1] == 12


@pytest.mark.slow
def test_killed_node_costs_no_trial(launch, ray_home, tmp_path):
    keys = {
        **KEYS,
        "gradient_accumulation_steps": 24,  # seconds from step 5 to the end
        "save_steps": 2,
        "tune": {"search": {"learning_rate": {"grid": [1e-3, 2e-3, 3e-3, 4e-3]}}},
    }
    with start_cluster(["1", "127.0.0.2"], cwd=tmp_path, RAY_AUTH_MODE="token") as found_cluster:
        run = launch("lost-node", address=found_cluster[0], command="tune", **keys)
        found = Swept(run)
        names = [f"trial_{number:03d}" for number in range(1, 5)]
        lost = None
        while lost is None:
            assert run.process.poll() is None, run.text
            for name in names:
                path = run.output_dir / name / "trial.log"
                text = path.read_text() if path.is_file() else ""
                lost = name if "on 127.0.0.2" in text and "step 5/" in text else lost
            time.sleep(0.05)
        raylet = raylet_of(found_cluster[1], "127.0.0.2")
        for process in [raylet, *raylet.children(recursive=True)]:  # a machine loses all at once
            process.kill()
        assert run.finish() == 0, run.text
        # the leading process of a group may have been on the other node, or on this one
        assert re.search(rf"{lost}: .* gone\. It goes on", run.text), run.text
        assert {row["state"] for row in found.rows().values()} == {"finished"}
        assert {row["step"] for row in found.rows().values()} == {"12"}
        assert len(found.attempts(lost)) == 2
        steps = found.steps(lost)
        assert steps == sorted(set(steps)), "no step is logged twice"


def raylet_of(session_dir, address):
    """The process of a node of the cluster with that session, and of no other cluster."""
    session = os.path.basename(session_dir)
    [found] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (words := process.info["cmdline"] or [])
        and "raylet/raylet" in words[0]
        and f"--node_ip_address={address}" in words
        and any(session in word for word in words)
    ]
    return found


def log_of(found, name):
    return (found.directory / name / "trial.log").read_text()


def wait_for_step(found, name, step, timeout=240.0):
    path = found.directory / name / "trial.log"
    deadline = time.monotonic() + timeout
    while not path.is_file() or f"step {step}/" not in path.read_text():
        assert found.run.process.poll() is None, found.run.text
        assert time.monotonic() < deadline, found.run.text
        time.sleep(0.02)
