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


def staged(run):
    return {name for name in os.listdir(run.run_dir) if name.startswith(".tmp-checkpoint-")}


def look_again(run):
    assert run.process.poll() is None, run.text
    time.sleep(0.001)


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
        look_again(run)
    os.kill(pids[1], signal.SIGKILL)
    return step


def kill_in_a_save(run, pids):
    """While the staging directory of a checkpoint is there and its commit is not."""
    left_behind = staged(run)
    while True:
        look_again(run)
        for name in staged(run) - left_behind:
            stop([pids[0]])
            step = int(re.match(r"\.tmp-checkpoint-(\d+)", name).group(1))
            if name in staged(run) and f"checkpoint-{step}" not in committed(run):
                kill(pids[0], [])
                return step
            go_on([pids[0]])


def kill_between_commit_and_report(run, pids):
    """After the rename of a checkpoint, before Ray Train has heard of it."""
    seen = committed(run)
    while True:
        look_again(run)
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


KILLERS = (kill_between_commit_and_report, kill_between_steps_and_saves, kill_in_a_save)


def test_killed_workers_cost_a_save_interval_each_and_change_nothing(
    undisturbed, launch, ray_address
):
    run = launch("killed", address=ray_address, placement_strategy="STRICT_SPREAD")
    groups = [run.pids()]
    for attempt, killer in enumerate(KILLERS, start=1):
        step = killer(run, groups[-1])
        groups.append(run.pids(attempt + 1))
        begun = resumed_at(run)
        assert len(begun) == attempt
        assert 0 < begun[-1] <= step <= begun[-1] + SAVE_STEPS
    assert run.finish() == 0, run.text
    assert "Traceback" not in run.text
    pids = [pid for group in groups for pid in group.values()]
    assert len(set(pids)) == 2 * len(groups)
    assert len(resumed_at(run)) == len(KILLERS)
    assert all(len(run.nodes(attempt)) == 2 for attempt in range(1, len(groups) + 1))
    assert run.weights() == undisturbed.weights()
    assert losses(run) == losses(undisturbed)
    assert not staged(run)


def resumed_at(run):
    """The steps at which attempts went on, once the newest one has said so."""
    newest = run.text.rindex("attempt ")
    run.until(lambda: "resuming from" in run.text[newest:])
    return [int(step) for step in re.findall(r"resuming from \S+: step (\d+) of 12", run.text)]


def test_a_run_goes_on_after_ctrl_c_and_after_its_driver_was_killed(
    undisturbed, launch, ray_address, nothing_runs
):
    """Each leaves nothing running; the first one saves, also on storage without renames."""
    name = "interrupted"
    storage = f"file://{undisturbed.keys['ray_storage_path']}"
    first = launch(name, address=ray_address, ray_storage_path=storage)
    first.wait_for(r"step 2/12")
    # Ctrl-C reaches every process of the terminal's group
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.finish() == 130, first.text
    nothing_runs()
    stopped = logged_step(first)
    assert stopped < 12
    assert (first.run_dir / f"checkpoint-{stopped}" / "manifest.json").is_file()
    second = launch(name, address=ray_address, resume_from_checkpoint=True)
    second.wait_for(rf"step {stopped} of 12, {12 - stopped} steps remain")
    while logged_step(second) == stopped:
        look_again(second)
    stop(second.pids().values())  # else they may reach the end before Ray misses the driver
    second.process.kill()
    second.finish()
    nothing_runs()
    # overwrite_output_dir stands in most users' files: the explicit resume wins
    keys = {"resume_from_checkpoint": True, "overwrite_output_dir": True}
    third = launch(name, address=ray_address, **keys)
    assert third.finish() == 0, third.text
    assert resumed_at(third)[0] >= stopped
    assert third.weights() == undisturbed.weights()
    assert losses(third) == losses(undisturbed)


def losses(run):
    return [(record["current_steps"], record["loss"]) for record in run.log()]
