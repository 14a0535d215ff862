"""Stage ppo on three raylets: where roles lie, and runs that lose some of them."""

import os
import signal
from collections import Counter

import ppo_phases
import pytest
import ray_ppo

from llmray.stop_signals import EXIT_CODES

pytestmark = pytest.mark.ray

OTHER_NODES = ("127.0.0.2", "127.0.0.3")  # of conftest: their addresses are their labels
TWO_ACTORS = {**ray_ppo.KEYS, "reward_num_actors": 2, "reward_batching": "fixed"}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return ray_ppo.make_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def undisturbed_ppo(launch, ray_address, reward_model):
    """A finished run with fixed batches that nothing disturbed, workers and actors on all nodes."""
    run = launch(
        "ppo-undisturbed",
        address=ray_address,
        reward_model=reward_model,
        placement_strategy="PACK",
        reward_placement_strategy="STRICT_SPREAD",
        **TWO_ACTORS,
    )
    assert run.finish() == 0, run.text
    return run


def test_roles_lie_as_asked_and_are_shown(undisturbed_ppo):
    workers, actors = ray_ppo.workers(undisturbed_ppo), ray_ppo.actors(undisturbed_ppo)
    assert len({member["node_id"] for member in workers}) == 1
    assert len({member["node_id"] for member in actors}) == 2
    assert [member["resources"] for member in (*workers, *actors)] == [{"CPU": 1.0}] * 4
    lines = [" ".join(line.split()) for line in undisturbed_ppo.lines]
    for member in (*workers, *actors):
        shown = [member[name] for name in ("role", "name", "address", "pid")]
        assert any(" ".join(map(str, shown)) in line for line in lines)
    idle = [record["idle_reward"] for record in undisturbed_ppo.log() if "beta" in record]
    assert idle
    assert all(0 < share < 1 for share in idle)


PLACES = {
    # on as few nodes as they take, and on as many: more than a strict strategy allows
    "pack": (
        {"reward_num_actors": 3, "reward_placement_strategy": "PACK"},
        {"placement_strategy": "SPREAD"},
        [1, 2],
        {1},
    ),
    "spread": (
        {"reward_num_actors": 4, "reward_placement_strategy": "SPREAD"},
        {"placement_strategy": "PACK"},
        [1, 1, 2],
        {1},
    ),
    # the three nodes would have one each without the labels
    "labels": (
        {
            "reward_num_actors": 3,
            "reward_placement_strategy": "SPREAD",
            "reward_label_selector": {"place": f"in({', '.join(OTHER_NODES)})"},
        },
        {"placement_strategy": "PACK"},
        [1, 2],
        {2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_actors_are_packed_spread_and_kept_to_labels(name, launch, ray_address, reward_model):
    """Of each node two cores, of which each actor and each of two workers takes one."""
    of_actors, of_workers, on_nodes, workers_on_node = PLACES[name]
    run = launch(
        f"ppo-{name}",
        address=ray_address,
        reward_model=reward_model,
        **{**TWO_ACTORS, "max_steps": 1, "save_strategy": "no", **of_actors, **of_workers},
    )
    assert run.finish() == 0, run.text
    actors = Counter(member["node_id"] for member in ray_ppo.actors(run))
    assert sorted(actors.values()) == on_nodes
    assert set(Counter(m["node_id"] for m in ray_ppo.workers(run)).values()) == workers_on_node
    if name == "labels":
        assert {member["address"] for member in ray_ppo.actors(run)} == set(OTHER_NODES)


def test_losing_actors_and_a_worker_changes_nothing(
    undisturbed_ppo, launch, ray_address, reward_model, nothing_runs, tmp_path
):
    """An actor dies, one hangs, a worker dies: batches are fixed, and so are all bits."""
    run = launch(
        "ppo-disturbed",
        address=ray_address,
        before=ppo_phases.words(tmp_path, "rollout", "save"),
        reward_model=reward_model,
        placement_strategy="STRICT_SPREAD",
        reward_placement_strategy="STRICT_PACK",
        **{**TWO_ACTORS, "reward_request_timeout_s": 5},
    )
    go = ray_ppo.arrived(run, tmp_path, "rollout")
    workers, actors = ray_ppo.workers(run), ray_ppo.actors(run)
    assert len({member["node_id"] for member in workers}) == 2
    assert len({member["node_id"] for member in actors}) == 1
    os.kill(actors[0]["pid"], signal.SIGKILL)
    os.kill(actors[1]["pid"], signal.SIGSTOP)
    go()
    run.wait_for(rf"reward model \S+\[1\] \(pid {actors[1]['pid']}\) hangs: it is killed")
    go = ray_ppo.arrived(run, tmp_path, "save")
    for number in range(2):
        run.wait_for(rf"reward model \S+\[{number}\] answers again")
    assert "attempt 2" not in run.text
    os.kill(workers[1]["pid"], signal.SIGKILL)
    go()
    assert run.finish() == 0, run.text
    assert "attempt 2" in run.text
    assert ray_ppo.files(run) == ray_ppo.files(undisturbed_ppo)
    assert ray_ppo.told(run) == ray_ppo.told(undisturbed_ppo)
    nothing_runs()


@pytest.mark.slow
def test_all_gone_for_too_long_fails_with_the_reason(
    launch, ray_address, reward_model, nothing_runs
):
    run = launch(
        "ppo-gone",
        address=ray_address,
        reward_model=reward_model,
        **{**TWO_ACTORS, "reward_timeout_s": 0.5},
    )
    ray_ppo.wait_for_step(run, 1)
    for actor in ray_ppo.actors(run):
        os.kill(actor["pid"], signal.SIGKILL)
    assert run.finish() == 1
    assert "all 2 reward models have been gone for 0.5 s" in run.text
    assert "Traceback" not in run.text
    nothing_runs()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_actor_outlives_its_driver(how, launch, ray_address, reward_model, nothing_runs):
    run = launch(f"ppo-ended-{how}", address=ray_address, reward_model=reward_model, **TWO_ACTORS)
    ray_ppo.wait_for_step(run, 1)
    os.kill(run.process.pid, how)
    code = run.finish()
    assert code == (-how if how == signal.SIGKILL else EXIT_CODES["SIGTERM"]), run.text
    nothing_runs()


def test_more_roles_than_find_room_are_refused_before_anything_is_loaded(
    launch, ray_address, reward_model
):
    keys = {**TWO_ACTORS, "reward_num_actors": 5}
    run = launch("ppo-refused", address=ray_address, reward_model=reward_model, **keys)
    assert run.finish() == 1
    assert 'The run needs {"CPU": 7} for 2 workers with {"CPU": 1} each, 5 actors of' in run.text
    assert 'the cluster has {"CPU": 6}' in run.text
    assert "attempt" not in run.text


def test_a_reward_model_that_does_not_fit_is_told_as_without_ray(
    launch, ray_address, run_keys, nothing_runs
):
    """The policy's model has no value head, and so is no reward model."""
    keys = {**TWO_ACTORS, "reward_model": run_keys["model_name_or_path"]}
    run = launch("ppo-no-head", address=ray_address, **keys)
    assert run.finish() == 1
    assert "value_head" in run.text
    assert "Traceback" not in run.text
    assert "attempt" not in run.text
    nothing_runs()
