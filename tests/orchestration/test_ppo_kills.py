"""A real SIGKILL of every role of stage ppo in every phase of a step.

Each run loses one role four times: in a rollout, while scores are under way, in an update, and in a
save, among the files of a checkpoint that is not committed. All end as the run that lost nothing,
to the bit where batches of rewards are fixed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import ppo_phases
import pytest
import ray_ppo

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# the step that is disturbed is the second: there is a checkpoint to go on from
KEYS = {
    **ray_ppo.KEYS,
    "max_steps": 3,
    "save_steps": 1,
    "ppo_buffer_size": 2,
    "ray_max_failures": 4,
    "reward_request_timeout_s": 200,  # of actors and servers that are stopped for a while
    "reward_timeout_s": 600,
}
# which answers are scored together follows from the number of actors
FIXED = {**KEYS, "reward_num_actors": 2, "reward_batching": "fixed"}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return ray_ppo.make_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def held(launch, ray_address, reward_model, tmp_path):
    """Starts a run whose workers wait in every phase."""

    def start(name, **keys):
        before = ppo_phases.words(tmp_path, *ppo_phases.PHASES)
        keys = {"reward_model": reward_model, **keys}
        return launch(name, address=ray_address, before=before, **keys)

    return start


@pytest.fixture(scope="module")
def undisturbed_ppo(launch, ray_address, reward_model):
    run = launch("kills-none", address=ray_address, reward_model=reward_model, **FIXED)
    assert run.finish() == 0, run.text
    return run


def check_same(run, other):
    assert ray_ppo.files(run) == ray_ppo.files(other)
    assert ray_ppo.told(run) == ray_ppo.told(other)


def test_killed_actors(held, undisturbed_ppo, nothing_runs, ray_cluster, tmp_path):
    """In scoring the last one dies with what it was asked, and the run waits for both."""
    run = held("actors", **FIXED)
    go = ray_ppo.arrived(run, tmp_path, "rollout")
    first, second = ray_ppo.reward_pids(ray_cluster[1], 2)
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGSTOP)
    go()
    go = ray_ppo.arrived(run, tmp_path, "scoring")
    os.kill(second, signal.SIGKILL)
    go()
    killed = {first, second}
    for phase in ("update", "save"):
        go = ray_ppo.arrived(run, tmp_path, phase)
        pid = min(ray_ppo.reward_pids(ray_cluster[1], 2))
        assert pid not in killed
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
        go()
    assert run.finish() == 0, run.text
    assert "attempt 2" not in run.text
    assert "answers again" in run.text
    check_same(run, undisturbed_ppo)
    nothing_runs()


def test_killed_workers(held, undisturbed_ppo, nothing_runs, tmp_path):
    """Each group goes on from the checkpoint before the step; actors stay."""
    run = held("workers", **FIXED)
    pids = []
    for attempt, phase in enumerate(ppo_phases.PHASES, start=1):
        ray_ppo.arrived(run, tmp_path, phase)
        pids.append([actor["pid"] for actor in ray_ppo.actors(run)])
        # rank 0 is the one that writes
        victim = ray_ppo.workers(run)[0 if phase == "save" else 1]
        os.kill(victim["pid"], signal.SIGKILL)
        run.wait_for(f"attempt {attempt + 1}: ")
    assert run.finish() == 0, run.text
    assert pids == [pids[0]] * len(ppo_phases.PHASES)
    # a line of a group that is killed may be lost with it, one of the last group is not
    assert "checkpoint-1: step 1 of 3" in run.text
    assert "checkpoint-2: step 2 of 3" not in run.text
    assert "attempt 6" not in run.text
    check_same(run, undisturbed_ppo)
    nothing_runs()


def test_killed_drivers(held, undisturbed_ppo, nothing_runs, tmp_path):
    """Each ends all of its run in the midst of a phase; the same command goes on."""
    for phase in ppo_phases.PHASES:
        run = held("drivers", **FIXED)
        ray_ppo.arrived(run, tmp_path, phase)
        os.kill(run.process.pid, signal.SIGKILL)
        run.finish()
        nothing_runs()
    assert {path.name for path in run.run_dir.glob("checkpoint-*")} == {"checkpoint-1"}
    run = held("drivers", **FIXED)
    assert run.finish() == 0, run.text
    assert "checkpoint-1: step 1 of 3" in run.text
    check_same(run, undisturbed_ppo)
    nothing_runs()


class Server:
    """A reward server in processes of their own, one after the other, at one port."""

    def __init__(self, reward_model):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = [sys.executable, "-m", "llmray", "reward-server", "--port", str(self.port)]
        words += [f"model_name_or_path={reward_model}", "template=chatml", "use_cpu=true"]
        self.words = words
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self.words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait(self, timeout=300.0):
        """Until it listens."""
        deadline = time.monotonic() + timeout
        while True:
            assert self.process.poll() is None
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.05)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def kill_and_start(self):
        self.wait()
        self.kill()
        self.start()


def test_killed_servers(held, reward_model, undisturbed_ppo, nothing_runs, tmp_path):
    """In scoring one dies with what it was asked; batches of a server are as they come."""
    with ExitStack() as stack:
        server = Server(reward_model)
        stack.callback(lambda: server.kill())
        address = f"http://127.0.0.1:{server.port}/v1/score/evaluation"
        keys = {key: value for key, value in KEYS.items() if key != "reward_resources_per_actor"}
        keys |= {"reward_model": address, "reward_model_type": "api"}
        run = held("servers", **keys)
        go = ray_ppo.arrived(run, tmp_path, "rollout")
        server.kill_and_start()
        server.wait()
        server.process.send_signal(signal.SIGSTOP)
        go()
        go = ray_ppo.arrived(run, tmp_path, "scoring")
        server.kill()
        server.start()
        go()
        for phase in ("update", "save"):
            go = ray_ppo.arrived(run, tmp_path, phase)
            server.kill_and_start()
            go()
        assert run.finish() == 0, run.text
    assert "attempt 2" not in run.text
    for ours, theirs in zip(ray_ppo.told(run), ray_ppo.told(undisturbed_ppo), strict=True):
        if "score" in ours:
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
    nothing_runs()
