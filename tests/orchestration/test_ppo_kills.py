"""A real SIGKILL of every role of stage ppo in every phase of a step."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import ppo_phases
import pytest
import ray_ppo

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEYS = {**ray_ppo.KEYS, "max_steps": 4, "save_steps": 2, "ppo_buffer_size": 2}
TWO_ACTORS = {**KEYS, "reward_num_actors": 2, "reward_batching": "fixed"}
PHASES = pytest.mark.parametrize("phase", ppo_phases.PHASES)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return ray_ppo.make_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def held(launch, ray_address, tmp_path):
    """Starts a run whose workers wait in a phase; returns it and what lets them go on."""

    def start(name, phase, **keys):
        before = ppo_phases.words(tmp_path, phase)
        run = launch(f"{name}-{phase}", address=ray_address, before=before, **keys)
        return run, ray_ppo.arrived(run, tmp_path, phase)

    return start


@pytest.fixture(scope="module")
def undisturbed_ppo(launch, ray_address, reward_model):
    run = launch("kills-none", address=ray_address, reward_model=reward_model, **TWO_ACTORS)
    assert run.finish() == 0, run.text
    return run


def same(run, other):
    return ray_ppo.files(run) == ray_ppo.files(other) and ray_ppo.told(run) == ray_ppo.told(other)


@PHASES
def test_a_killed_actor(phase, held, reward_model, undisturbed_ppo, nothing_runs):
    run, go = held("actor", phase, reward_model=reward_model, **TWO_ACTORS)
    os.kill(ray_ppo.actors(run)[0]["pid"], signal.SIGKILL)
    go()
    assert run.finish() == 0, run.text
    assert "attempt 2" not in run.text
    assert same(run, undisturbed_ppo)
    nothing_runs()


@PHASES
def test_a_killed_worker(phase, held, reward_model, undisturbed_ppo, nothing_runs):
    run, go = held("worker", phase, reward_model=reward_model, **TWO_ACTORS)
    pids = [actor["pid"] for actor in ray_ppo.actors(run)]
    os.kill(ray_ppo.workers(run)[1]["pid"], signal.SIGKILL)
    go()
    run.wait_for("attempt 2: ")
    assert run.finish() == 0, run.text
    assert [actor["pid"] for actor in ray_ppo.actors(run)] == pids
    assert "attempt 3" not in run.text
    assert same(run, undisturbed_ppo)
    nothing_runs()


@PHASES
def test_a_killed_driver(
    phase, held, launch, ray_address, reward_model, undisturbed_ppo, nothing_runs
):
    run, go = held("driver", phase, reward_model=reward_model, **TWO_ACTORS)
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    go()
    nothing_runs()
    again = launch(
        f"driver-{phase}",
        address=ray_address,
        reward_model=reward_model,
        resume_from_checkpoint=bool(list(run.run_dir.glob("checkpoint-*"))) or None,
        overwrite_output_dir=True,
        **TWO_ACTORS,
    )
    assert again.finish() == 0, again.text
    assert same(again, undisturbed_ppo)
    nothing_runs()


@contextmanager
def serving(reward_model, port):
    """A reward server in a process of its own, which is killed at the end of the block."""
    words = [sys.executable, "-m", "llmray", "reward-server", "--port", str(port)]
    words += [f"model_name_or_path={reward_model}", "template=chatml", "use_cpu=true"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@PHASES
def test_a_killed_server(phase, held, launch, ray_address, reward_model, undisturbed_ppo):
    """Its requests wait until it is back; batches of a server are as they come."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    keys = {
        **{key: value for key, value in KEYS.items() if key != "reward_resources_per_actor"},
        "reward_model": f"http://127.0.0.1:{port}/v1/score/evaluation",
        "reward_model_type": "api",
    }
    with serving(reward_model, port) as server:
        run, go = held("server", phase, **keys)
        server.kill()
        server.wait()
    go()
    with serving(reward_model, port):
        assert run.finish() == 0, run.text
    assert "attempt 2" not in run.text
    for ours, theirs in zip(ray_ppo.told(run), ray_ppo.told(undisturbed_ppo), strict=True):
        if "score" in ours:
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-3)
