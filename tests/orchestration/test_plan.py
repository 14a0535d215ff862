"""Needs against inventory, without Ray: what fits is placed, what cannot fit names both numbers."""

import pytest

from llmray.arguments import reward_sets
from llmray.arguments.cluster import ClusterArguments
from llmray.arguments.loading import load
from llmray.errors import ClusterError
from llmray.orchestration import actors
from llmray.orchestration.plan import (
    Inventory,
    Node,
    Placement,
    Role,
    capacity,
    groups_at_once,
    left_beside,
    place,
    room_beside,
)


def inventory(*nodes, available=None, limits=None):
    built = tuple(Node(f"id{i}", f"10.0.0.{i}", node) for i, node in enumerate(nodes))
    total: dict[str, float] = {}
    for node in nodes:
        for key, amount in node.items():
            total[key] = total.get(key, 0) + amount
    return Inventory(built, total if available is None else available, limits)


def arguments(**keys):
    return ClusterArguments(**keys)


GPU_NODE = {"CPU": 16.0, "GPU": 4.0}
TWO_GPU_NODES = inventory(GPU_NODE, GPU_NODE)


def test_nothing_given_takes_one_gpu_and_says_what_all_would_be():
    placement = place(arguments(), TWO_GPU_NODES)
    assert (placement.num_workers, placement.resources, placement.strategy) == (
        1,
        {"GPU": 1.0},
        "PACK",
    )
    assert placement.uses_gpu
    assert placement.notes == ("uses 1 of 8 GPUs; ray_num_workers: 8 uses all",)


def test_given_number_is_not_commented():
    assert place(arguments(ray_num_workers=2), TWO_GPU_NODES).notes == ()


def test_cluster_without_gpu_shares_its_cores():
    """Three workers on nodes of 4 and 2 cores: with 2 cores each 2 + 1 workers fit, with 3 one."""
    placement = place(arguments(ray_num_workers=3), inventory({"CPU": 4.0}, {"CPU": 2.0}))
    assert placement.resources == {"CPU": 2.0}
    assert not placement.uses_gpu
    assert placement.notes == (
        'the cluster has no GPU: 3 workers with {"CPU": 2} each (resources_per_worker)',
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"ray_num_workers": 16},
            "needs 16 GPU (16 workers with 1 each), the cluster has 8. Set ray_num_workers: 8",
        ),
        (
            {"ray_num_workers": 4, "resources_per_worker": {"GPU": 3}},
            "needs 12 GPU (4 workers with 3 each), the cluster has 8. Set ray_num_workers: 2",
        ),
        (
            {"ray_num_workers": 1, "resources_per_worker": {"GPU": 5}},
            'No node can hold one worker with {"GPU": 5}: the largest amounts on a node are '
            '{"GPU": 4}',
        ),
        (
            {"ray_num_workers": 3, "resources_per_worker": {"GPU": 2.0, "CPU": 9}},
            '3 workers with {"GPU": 2, "CPU": 9} do not fit on the nodes of the cluster: 2 of them',
        ),
        (
            {"ray_num_workers": 5, "placement_strategy": "STRICT_PACK"},
            "the most that fit on one are 4. Set ray_num_workers: 4",
        ),
        (
            {"ray_num_workers": 3, "placement_strategy": "STRICT_SPREAD"},
            "STRICT_SPREAD needs 3 nodes",
        ),
        (
            {"resources_per_worker": {"tpu_chip": 1}},
            "needs 1 tpu_chip (1 worker with 1 each), the cluster has 0",
        ),
        ({"resources_per_worker": {"GPU": 0}}, 'resources_per_worker={"GPU": 0}: amounts above 0'),
        ({"resources_per_worker": {"GPU": 1.5}}, "has 1.5 GPU: above one GPU a whole number"),
    ],
)
def test_what_cannot_fit_is_refused_with_both_numbers(keys, said):
    with pytest.raises(ClusterError) as caught:
        place(arguments(**keys), TWO_GPU_NODES)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("resources", "each", "expected"),
    [
        ({"GPU": 1.0}, {"GPU": 0.25}, 4),
        ({"CPU": 1.0}, {"CPU": 0.1}, 10),  # 1.0 // 0.1 is 9 in floating point
        ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 0.5}, 4),
        ({"CPU": 8.0}, {"CPU": 1.0, "license": 1.0}, 0),
    ],
)
def test_capacity_of_a_node(resources, each, expected):
    assert capacity(Node("id", "ip", resources), each) == expected


@pytest.mark.parametrize("strategy", ["PACK", "SPREAD"])
def test_soft_strategies_take_any_nodes(strategy):
    keys = arguments(ray_num_workers=8, placement_strategy=strategy)
    assert place(keys, TWO_GPU_NODES).strategy == strategy


def test_busy_cluster_is_waited_for_and_said():
    busy = inventory(GPU_NODE, available={"CPU": 16.0, "GPU": 1.0})
    placement = place(arguments(ray_num_workers=2), busy)
    assert placement.notes == (
        "waits for 2 GPU, of which 1 are free now: others hold the rest, or nodes start",
    )


def test_autoscaler_counts_with_what_it_may_grow_to():
    grows = inventory({"CPU": 2.0}, limits={"CPU": 64.0, "GPU": 8.0})
    placement = place(arguments(ray_num_workers=8), grows)
    assert placement.resources == {"GPU": 1.0}
    with pytest.raises(ClusterError, match=r"needs 9 GPU .* the cluster has 8"):
        place(arguments(ray_num_workers=9), grows)


def rewards(number=2, **keys):
    return Role("reward model rm", number, **{"resources": {"CPU": 1.0}, **keys})


THREE_SMALL = inventory({"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 2.0})


def placed(keys, *roles, on=THREE_SMALL, **options):
    return place(arguments(**keys), on, roles=roles, **options)


def test_actors_are_counted_before_the_workers_share_what_is_left():
    """Of 6 cores on 3 nodes 2 are the actors'; a worker alone then has a whole node."""
    found = placed({}, rewards())
    assert (found.num_workers, found.resources) == (1, {"CPU": 2.0})
    [role] = found.roles
    assert len(set(role.node_ids)) == 1  # PACK


def test_actors_without_resources_take_a_gpu_or_a_core():
    [on_gpu] = placed({}, rewards(resources={}), on=TWO_GPU_NODES).roles
    [on_core] = placed({}, rewards(resources={}), on=TWO_GPU_NODES, use_cpu=True).roles
    assert (on_gpu.resources, on_core.resources) == ({"GPU": 1.0}, {"CPU": 1.0})


def test_actors_leave_a_strict_worker_group_its_node():
    """Workers that need both cores of one node twice: actors must share the third node."""
    keys = {
        "ray_num_workers": 2,
        "resources_per_worker": {"CPU": 2},
        "placement_strategy": "STRICT_SPREAD",
    }
    found = placed(keys, rewards())
    [role] = found.roles
    assert len(set(role.node_ids)) == 1
    assert room_beside(found, THREE_SMALL, role.node_ids)
    assert not room_beside(found, THREE_SMALL, ["id0", "id1"])


def test_actors_spread_and_keep_to_their_labels():
    nodes = tuple(
        Node(f"id{i}", f"10.0.0.{i}", {"CPU": 2.0}, {"kind": kind})
        for i, kind in enumerate(("fast", "slow", "slow"))
    )
    on = Inventory(nodes, {"CPU": 6.0})
    [spread] = placed({}, rewards(strategy="SPREAD"), on=on).roles
    [slow] = placed({}, rewards(strategy="STRICT_SPREAD", labels={"kind": "slow"}), on=on).roles
    [other] = placed({}, rewards(labels={"kind": "!in(slow, none)"}), on=on).roles
    assert len(set(spread.node_ids)) == 2
    assert set(slow.node_ids) == {"id1", "id2"}
    assert set(other.node_ids) == {"id0"}


def test_labels_reach_ray_as_it_reads_them():
    """To it the space of "in(a, b)" is a part of a label that no node has."""
    keys = {"model_name_or_path": "m", "dataset": "d", "template": "default", "output_dir": "o"}
    keys |= {"stage": "ppo", "do_train": True, "use_ray": True, "reward_model_type": "full"}
    labels = {"kind": "in(L4, T4)", "zone": "!a", "rack": " b "}
    run = load({**keys, "reward_model": "rm", "reward_label_selector": labels}, environ={})
    [role] = actors.roles_of(reward_sets.of_run(run))
    assert role.labels == {"kind": "in(L4,T4)", "zone": "!a", "rack": "b"}


@pytest.mark.parametrize(
    ("keys", "role", "said"),
    [
        (
            {"ray_num_workers": 5, "resources_per_worker": {"CPU": 1}},
            rewards(),
            'The run needs {"CPU": 7} for 5 workers with {"CPU": 1} each, 2 actors of reward model '
            'rm with {"CPU": 1} each; the cluster has {"CPU": 6}, on which they do not fit',
        ),
        (
            {"ray_num_workers": 9, "resources_per_worker": {"CPU": 1}},
            rewards(),
            "needs 9 CPU (9 workers with 1 each), the cluster has 6. Set ray_num_workers: 6",
        ),
        (
            {},
            rewards(9),
            '9 actors of reward model rm with {"CPU": 1} each do not fit on the nodes: 6 of them',
        ),
        (
            {},
            rewards(resources={"GPU": 0.5}),
            'No node can hold one actor of reward model rm with {"GPU": 0.5}: the largest amounts '
            'on a node are {"GPU": 0}. Lower reward_resources_per_actor',
        ),
        (
            {},
            rewards(4, strategy="STRICT_SPREAD"),
            "reward_placement_strategy: STRICT_SPREAD, and 3 of them do. Set reward_num_actors: 3",
        ),
        (
            {},
            rewards(labels={"kind": "slow"}),
            'reward_label_selector={"kind": "slow"}: no node has such labels. There are: none.',
        ),
        ({}, rewards(resources={"CPU": 0}), 'reward_resources_per_actor={"CPU": 0}: amounts above'),
    ],
)
def test_roles_that_find_no_room_are_named_with_both_numbers(keys, role, said):
    with pytest.raises(ClusterError) as error:
        placed(keys, role)
    assert said in str(error.value)


def test_where_nodes_are_still_to_come_totals_decide():
    grows = inventory({"CPU": 2.0}, limits={"CPU": 8.0})
    found = placed({"resources_per_worker": {"CPU": 4}}, rewards(), on=grows)
    assert found.roles[0].node_ids == ()
    assert any(note.startswith("waits for 4 CPU, of which 0 are free") for note in found.notes)
    with pytest.raises(ClusterError, match=r'are {"CPU": 9}; the cluster grows to {"CPU": 8}'):
        placed({}, rewards(9), on=grows)


@pytest.mark.parametrize(
    ("strategy", "num_workers", "cores", "expected"),
    [
        ("PACK", 1, (2, 2, 2), 6),
        ("PACK", 2, (2, 2, 1), 2),
        ("SPREAD", 4, (2, 2, 2), 1),
        ("STRICT_PACK", 2, (3, 3, 1), 2),
        ("STRICT_SPREAD", 2, (4, 1, 1), 2),  # the big node can be in two groups at most
        ("STRICT_SPREAD", 3, (4, 4, 2), 2),
    ],
)
def test_groups_that_fit_at_once(strategy, num_workers, cores, expected):
    nodes = tuple(Node(str(n), f"10.0.0.{n}", {"CPU": float(c)}) for n, c in enumerate(cores))
    placement = Placement(num_workers, {"CPU": 1.0}, strategy)
    assert groups_at_once(placement, Inventory(nodes, {})) == expected


def test_groups_that_an_autoscaler_makes_room_for():
    grows = Inventory((), {}, limits={"CPU": 64.0, "GPU": 8.0})
    assert groups_at_once(Placement(2, {"GPU": 1.0}, "PACK"), grows) == 4


def test_what_actors_leave_of_a_cluster():
    """Actors on the first node and the second take a core each of theirs, and a GPU of the first.

    An actor on a node that came since takes of what is free, and of what may come.
    """
    found = inventory({"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}, limits={"CPU": 20.0, "GPU": 1.0})
    roles = [Role("a", 1, {"CPU": 1.0, "GPU": 1.0}), Role("b", 2, {"CPU": 1.0})]
    rest = left_beside(roles, found, ["id0", "id1", "new"])
    assert [node.resources for node in rest.nodes] == [{"CPU": 3.0, "GPU": 0.0}, {"CPU": 3.0}]
    assert rest.available == {"CPU": 5.0, "GPU": 0.0}
    assert rest.limits == {"CPU": 17.0, "GPU": 0.0}
    unknown = left_beside(roles, found, [])
    assert (unknown.nodes, unknown.limits) == (found.nodes, rest.limits)
