"""What a run needs against what a cluster has: a placement, or all problems in one message.

Pure: no Ray, no clock, no environment. `cluster` brings the inventory, `train_job` uses the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmray.arguments.cluster import ClusterArguments
from llmray.errors import ClusterError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
EPSILON = 1e-6  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Node:
    """A living node: its id, its address, and the resources it has in all."""

    node_id: str
    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Inventory:
    """What a cluster has; `limits` is what an autoscaler may grow it to, None if it has none."""

    nodes: tuple[Node, ...]
    available: Mapping[str, float]
    limits: Mapping[str, float] | None = None

    def total(self, resource: str) -> float:
        """The amount of a resource on all nodes together."""
        return sum(node.resources.get(resource, 0.0) for node in self.nodes)


@dataclass(frozen=True)
class Placement:
    """How many workers, with what, and how they lie on nodes; `notes` are for the user."""

    num_workers: int
    resources: dict[str, float]
    strategy: Strategy
    notes: tuple[str, ...] = ()

    @property
    def uses_gpu(self) -> bool:
        """Whether a worker holds a GPU or a part of one."""
        return self.resources.get("GPU", 0) > 0


def place(arguments: ClusterArguments, inventory: Inventory, *, use_cpu: bool = False) -> Placement:
    """The placement of a run's workers; with `use_cpu` on cores though there be GPUs.

    Raises:
        ClusterError: the cluster can never hold them; with what is needed, what is there, and what
            to change.
    """
    num_workers = arguments.ray_num_workers or 1
    strategy: Strategy = arguments.placement_strategy or "PACK"
    notes = []
    if arguments.resources_per_worker is not None:
        resources = {key: float(value) for key, value in arguments.resources_per_worker.items()}
        _check_amounts(resources)
    elif not use_cpu and _has_gpus(inventory):
        resources = {"GPU": 1.0}
    else:
        resources = {"CPU": _cpu_share(inventory, num_workers, strategy)}
        why = "use_cpu=true" if use_cpu else "the cluster has no GPU"
        notes.append(
            f"{why}: {_workers(num_workers)} with {_show(resources)} each (resources_per_worker)"
        )
    problems = _problems(num_workers, resources, strategy, inventory)
    if problems:
        raise ClusterError("\n".join(problems))
    placement = Placement(num_workers, resources, strategy)
    if arguments.ray_num_workers is None:
        notes += _unused(placement, inventory)
    notes += _waits(placement, inventory)
    return Placement(num_workers, resources, strategy, tuple(notes))


def capacity(node: Node, resources: Mapping[str, float]) -> int:
    """How many workers with `resources` fit on a node that is otherwise empty."""
    return min(
        int((node.resources.get(key, 0.0) + EPSILON) // amount) for key, amount in resources.items()
    )


def groups_at_once(placement: Placement, inventory: Inventory) -> int:
    """How many groups of workers with one placement fit on a cluster that is otherwise empty."""
    num_workers = placement.num_workers
    if inventory.limits is not None:
        amounts = placement.resources.items()
        most = [int((inventory.limits.get(k, 0.0) + EPSILON) // v) for k, v in amounts]
        return min(most) // num_workers
    fitting = [capacity(node, placement.resources) for node in inventory.nodes]
    if placement.strategy == "STRICT_PACK":
        return sum(number // num_workers for number in fitting)
    count = sum(fitting) // num_workers
    if placement.strategy == "STRICT_SPREAD":  # each group takes one place of so many nodes
        while sum(min(number, count) for number in fitting) < count * num_workers:
            count -= 1
    return count


def _has_gpus(inventory: Inventory) -> bool:
    return inventory.total("GPU") > 0 or (inventory.limits or {}).get("GPU", 0) > 0


def _check_amounts(resources: Mapping[str, float]) -> None:
    wrong = [key for key, amount in resources.items() if amount <= 0]
    if wrong or not resources:
        raise ClusterError(
            f"resources_per_worker={_show(resources)}: amounts above 0 are required. Leave out "
            f'{", ".join(wrong) or "the key"}; {{"GPU": 1}} and {{"CPU": 2}} are examples.'
        )
    gpus = resources.get("GPU", 0)
    if gpus > 1 and gpus != int(gpus):
        raise ClusterError(
            f"resources_per_worker has {gpus:g} GPU: above one GPU a whole number is required. "
            f"Set GPU to {int(gpus)} or {int(gpus) + 1}, or to a fraction below 1."
        )


def _cpu_share(inventory: Inventory, num_workers: int, strategy: Strategy) -> float:
    """The most cores that every worker can have."""
    largest = max((int(node.resources.get("CPU", 0)) for node in inventory.nodes), default=1)
    for cpus in range(largest, 1, -1):
        if not _problems(num_workers, {"CPU": float(cpus)}, strategy, inventory):
            return float(cpus)
    return 1.0


def _problems(
    num_workers: int, resources: Mapping[str, float], strategy: Strategy, inventory: Inventory
) -> list[str]:
    short = _too_little(num_workers, resources, inventory)
    if short or inventory.limits is not None:
        return short  # an autoscaler decides what nodes look like
    capacities = [capacity(node, resources) for node in inventory.nodes]
    biggest, fitting = max(capacities, default=0), sum(1 for number in capacities if number)
    each, many = _show(resources), _workers(num_workers)
    if biggest == 0:
        return [
            f"No node can hold one worker with {each}: the largest amounts on a node are "
            f"{_largest(resources, inventory)}. Lower resources_per_worker to what one node has."
        ]
    if strategy == "STRICT_PACK" and biggest < num_workers:
        return [
            f"placement_strategy: STRICT_PACK puts {many} with {each} on one node; the most that "
            f"fit on one are {biggest}. Set ray_num_workers: {biggest}, or placement_strategy: "
            "PACK."
        ]
    if strategy == "STRICT_SPREAD" and fitting < num_workers:
        return [
            f"placement_strategy: STRICT_SPREAD needs {num_workers} nodes for {many} with {each}; "
            f"the cluster has {fitting} such nodes of {len(capacities)}. Set ray_num_workers: "
            f"{fitting}, or placement_strategy: SPREAD."
        ]
    if sum(capacities) < num_workers:
        return [
            f"{many} with {each} do not fit on the nodes of the cluster: "
            f"{sum(capacities)} of them do. Set ray_num_workers: {sum(capacities)}, or lower "
            "resources_per_worker."
        ]
    return []


def _too_little(
    num_workers: int, resources: Mapping[str, float], inventory: Inventory
) -> list[str]:
    found = []
    for key, amount in resources.items():
        has = inventory.limits.get(key, 0.0) if inventory.limits else inventory.total(key)
        needed = amount * num_workers
        if needed > has + EPSILON:
            fit = int((has + EPSILON) // amount)
            advice = f"Set ray_num_workers: {fit}, lower" if fit else "Lower"
            found.append(
                f"The run needs {needed:g} {key} ({_workers(num_workers)} with {amount:g} each), "
                f"the cluster has {has:g}. {advice} resources_per_worker, or add nodes."
            )
    return found


def _unused(placement: Placement, inventory: Inventory) -> list[str]:
    number = sum(capacity(node, placement.resources) for node in inventory.nodes)
    key = "GPU" if placement.uses_gpu else next(iter(placement.resources))
    used = placement.resources[key] * placement.num_workers
    if number <= placement.num_workers:
        return []
    kind = "GPUs" if key == "GPU" else key
    return [f"uses {used:g} of {inventory.total(key):g} {kind}; ray_num_workers: {number} uses all"]


def _waits(placement: Placement, inventory: Inventory) -> list[str]:
    busy = []
    for key, amount in placement.resources.items():
        needed, free = amount * placement.num_workers, inventory.available.get(key, 0.0)
        if needed > free + EPSILON:
            busy.append(f"{needed:g} {key}, of which {free:g} are free now")
    return [f"waits for {'; '.join(busy)}: others hold the rest, or nodes start"] if busy else []


def _largest(resources: Mapping[str, float], inventory: Inventory) -> str:
    largest = {
        key: max((node.resources.get(key, 0.0) for node in inventory.nodes), default=0.0)
        for key in resources
    }
    return _show(largest)


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


def _show(resources: Mapping[str, float]) -> str:
    whole = {key: int(v) if v == int(v) else v for key, v in resources.items()}
    return json.dumps(whole)
