"""A real SIGKILL at every phase, from outside: the final weights are those of a run without one.

What a killer does to catch a moment: it stops the processes (SIGSTOP) when it sees the moment's
trace in the run directory, makes sure that the moment still is, and only then kills.
"""

import json
import os
import re
import signal
import time

import pytest

pytestmark = pytest.mark.ray

SAVE_STEPS = 4


def stop(pids):
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def go_on(pids):
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def kill(pid, rest):
    os.kill(pid, signal.SIGKILL)
    go_on(rest)


def committed(run):
    return {name for name in os.listdir(run.run_dir) if re.fullmatch(r"checkpoint-\d+", name)}


def reported(run):
    path = run.run_dir / "checkpoint_manager_snapshot.json"
    return path.read_text() if path.is_file() else ""


def logged_step(run):
    path = run.run_dir / "trainer_log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["current_steps"] if lines else 0


def kill_between_steps_and_saves(run, pids):
    """Not at a save: after a step whose number is no multiple of save_steps."""
    while (step := logged_step(run)) % SAVE_STEPS != 2 or step < SAVE_STEPS:
        assert run.process.poll() is None, run.text
        time.sleep(0.001)
    os.kill(pids[1], signal.SIGKILL)
    return step


def kill_in_a_save(run, pids):
    """While the staging directory of the second checkpoint is there and its commit is not."""
    while True:
        assert run.process.poll() is None, run.text
        unfinished = [n for n in os.listdir(run.run_dir) if n.startswith(".tmp-checkpoint-8")]
        if not unfinished:
            continue
        stop([pids[0]])
        if os.path.isdir(run.run_dir / unfinished[0]) and "checkpoint-8" not in committed(run):
            kill(pids[0], [])
            return 8
        go_on([pids[0]])


def kill_between_commit_and_report(run, pids):
    """After the rename of a checkpoint, before Ray Train has heard of it."""
    seen = committed(run)
    while True:
        assert run.process.poll() is None, run.text
        new = committed(run) - seen
        if not new:
            continue
        stop(pids.values())
        time.sleep(0.5)
        [name] = new
        if f'"{name}"' not in reported(run):
            kill(pids[0], [pids[1]])
            return int(name.rpartition("-")[2])
        seen |= new
        go_on(pids.values())


@pytest.mark.parametrize(
    ("killer", "strategy"),
    [
        (kill_between_steps_and_saves, "STRICT_SPREAD"),
        (kill_in_a_save, "PACK"),
        (kill_between_commit_and_report, "PACK"),
    ],
)
def test_killed_worker_costs_a_save_interval_and_changes_nothing(
    killer, strategy, undisturbed, launch, ray_address
):
    run = launch(f"killed-{killer.__name__}", address=ray_address, placement_strategy=strategy)
    pids = run.pids()
    step = killer(run, pids)
    assert run.finish() == 0, run.text
    assert "Traceback" not in run.text
    begun = int(run.wait_for(r"resuming from \S+: step (\d+) of 12").group(1))
    assert 0 < begun <= step
    assert step - begun <= SAVE_STEPS
    assert set(run.pids(attempt=2).values()).isdisjoint(pids.values())
    assert "attempt 3" not in run.text
    assert len(run.nodes()) == (2 if strategy == "STRICT_SPREAD" else 1)
    assert run.weights() == undisturbed.weights()
    assert losses(run) == losses(undisturbed)
    assert not [name for name in os.listdir(run.run_dir) if name.startswith(".tmp-")]


def test_killed_driver_leaves_nothing_running_and_the_run_goes_on(
    undisturbed, launch, ray_address, nothing_runs
):
    run = launch("killed-driver", address=ray_address)
    run.pids()
    while logged_step(run) < SAVE_STEPS + 2:
        assert run.process.poll() is None, run.text
        time.sleep(0.001)
    run.process.kill()
    run.finish()
    nothing_runs()
    # overwrite_output_dir stands in most users' files: the explicit resume wins
    again = launch(
        "killed-driver",
        address=ray_address,
        resume_from_checkpoint=True,
        overwrite_output_dir=True,
    )
    assert again.finish() == 0, again.text
    begun = int(again.wait_for(r"resuming from \S+: step (\d+) of 12").group(1))
    assert begun >= SAVE_STEPS
    assert again.weights() == undisturbed.weights()
    assert losses(again) == losses(undisturbed)


def losses(run):
    return [(record["current_steps"], record["loss"]) for record in run.log()]
