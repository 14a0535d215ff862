"""What a run needs against what a cluster has: a placement, or all problems in one message.

Pure: no Ray, no clock, no environment. `cluster` brings the inventory, `train_job` uses the result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    labels: Mapping[str, str] = field(default_factory=dict)


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
class Role:
    """Actors beside the workers: what they are, how many, with what, and where they may lie.

    Attributes:
        name: for messages.
        number: of actors.
        resources: of each; empty for a GPU where the cluster has one, else for a core.
        strategy: how they lie on nodes.
        labels: that their nodes must have, in Ray's notation: `value`, `!value`, `in(a, b)`,
            `!in(a, b)`.
        node_ids: a node for each at which the workers fit too; empty where nodes are still to come.
    """

    name: str
    number: int
    resources: Mapping[str, float] = field(default_factory=dict)
    strategy: Strategy = "PACK"
    labels: Mapping[str, str] = field(default_factory=dict)
    node_ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        actors = "1 actor" if self.number == 1 else f"{self.number} actors"
        return f"{actors} of {self.name} with {_show(self.resources)} each"


@dataclass(frozen=True)
class Placement:
    """How many workers, with what, and how they lie on nodes; `notes` are for the user.

    `roles` are what lies beside them.
    """

    num_workers: int
    resources: dict[str, float]
    strategy: Strategy
    notes: tuple[str, ...] = ()
    roles: tuple[Role, ...] = ()

    def __str__(self) -> str:
        return f"{_workers(self.num_workers)} with {_show(self.resources)} each"

    @property
    def uses_gpu(self) -> bool:
        """Whether a worker holds a GPU or a part of one."""
        return self.resources.get("GPU", 0) > 0


def place(
    arguments: ClusterArguments,
    inventory: Inventory,
    *,
    use_cpu: bool = False,
    roles: Sequence[Role] = (),
) -> Placement:
    """The placement of a run's workers and of the actors beside them.

    Args:
        arguments: of the run.
        inventory: of the cluster.
        use_cpu: on cores though there be GPUs.
        roles: what must find room beside the workers.

    Raises:
        ClusterError: the cluster can never hold them; with what is needed, what is there, and what
            to change.
    """
    if not roles:
        return _place_workers(arguments, inventory, use_cpu)
    asked = [_with_resources(role, inventory, use_cpu) for role in roles]
    for nodes in _orders(inventory.nodes):
        seats = _seated(asked, replace(inventory, nodes=nodes))
        if seats is None:
            continue
        seated, rest = seats
        try:
            found = _place_workers(arguments, rest, use_cpu)
        except ClusterError:
            continue
        notes = (*found.notes, *_roles_wait(seated, inventory))
        return replace(found, notes=notes, roles=seated)
    alone = [problem for role in asked for problem in _role_problems(role, inventory)]
    if alone:
        raise ClusterError("\n".join(alone))
    workers = _place_workers(arguments, inventory, use_cpu)
    if arguments.resources_per_worker is None and not workers.uses_gpu:
        workers = replace(workers, resources={"CPU": 1.0})  # they would do with as little
    raise ClusterError(_no_room(workers, asked, inventory))


def room_beside(placement: Placement, inventory: Inventory, node_ids: Sequence[str]) -> bool:
    """Whether the workers still fit where the actors lie on these nodes, in their roles' order."""
    rest = left_beside(placement.roles, inventory, node_ids)
    words = placement.num_workers, placement.resources, placement.strategy
    return not _problems(*words, replace(rest, limits=inventory.limits))


def left_beside(roles: Sequence[Role], inventory: Inventory, node_ids: Sequence[str]) -> Inventory:
    """What actors leave of a cluster.

    Args:
        roles: of the actors.
        inventory: of the cluster, empty otherwise; a node that is not there came since.
        node_ids: of the actors' nodes, in their roles' order; none where they are not known yet.
    """
    amounts = [role.resources for role in roles for _ in range(role.number)]
    nodes = inventory.nodes
    for node_id, taken in zip(node_ids, amounts, strict=bool(node_ids)):
        nodes = tuple(_without(n, taken) if n.node_id == node_id else n for n in nodes)
    needed, limits = _needed(roles), inventory.limits
    rest = limits if limits is None else _less(limits, needed)
    return Inventory(nodes, _less(inventory.available, needed), rest)


def has_labels(node: Node, wanted: Mapping[str, str]) -> bool:
    """Whether a node has labels that are asked for in Ray's notation; see `Role`."""
    for key, text in wanted.items():
        is_not, rest = text.startswith("!"), text.removeprefix("!")
        values = rest[3:-1].split(",") if rest.startswith("in(") and rest.endswith(")") else [rest]
        is_among = node.labels.get(key) in {value.strip() for value in values}
        if is_among == is_not:
            return False
    return True


def _place_workers(arguments: ClusterArguments, inventory: Inventory, use_cpu: bool) -> Placement:
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
        notes.append(f"{why}: {Placement(num_workers, resources, strategy)} (resources_per_worker)")
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


def _with_resources(role: Role, inventory: Inventory, use_cpu: bool) -> Role:
    if role.resources:
        _check_amounts(role.resources, "reward_resources_per_actor")
        return role
    kind = "CPU" if use_cpu or not _has_gpus(inventory) else "GPU"
    return replace(role, resources={kind: 1.0})


def _orders(nodes: Sequence[Node]) -> Iterator[tuple[Node, ...]]:
    """Nodes in some orders in which actors may be seated: which one leaves room is tried out."""
    sized = sorted(nodes, key=lambda node: (node.resources.get("GPU", 0), _cores(node)))
    yield from (tuple(sized), tuple(reversed(sized)), tuple(nodes), tuple(reversed(nodes)))


def _cores(node: Node) -> float:
    return node.resources.get("CPU", 0.0)


def _seated(
    roles: Sequence[Role], inventory: Inventory
) -> tuple[tuple[Role, ...], Inventory] | None:
    """The roles with a node for each actor, and what they leave; None where one finds no room."""
    nodes, seated = list(inventory.nodes), []
    totals = _needed(roles)
    for role in roles:
        if inventory.limits is not None:  # an autoscaler decides what nodes look like
            seated.append(role)
            continue
        node_ids = _seats(role, nodes)
        if node_ids is None:
            return None
        counts = Counter(node_ids)
        nodes = [_without(n, _times(role.resources, counts[n.node_id])) for n in nodes]
        seated.append(replace(role, node_ids=tuple(node_ids)))
    limits = inventory.limits
    if limits is not None:
        limits = _less(limits, totals)
        if min((limits.get(key, 0.0) for key in totals), default=0.0) < -EPSILON:
            return None
    rest = Inventory(tuple(nodes), _less(inventory.available, totals), limits)
    return tuple(seated), rest


def _seats(role: Role, nodes: Sequence[Node]) -> list[str] | None:
    """A node for each actor of a role, the first ones first; None where there is no room."""
    free = {n.node_id: capacity(n, role.resources) for n in nodes if has_labels(n, role.labels)}
    if role.strategy == "STRICT_PACK":
        free = {node_id: room for node_id, room in free.items() if room >= role.number}
    found: list[str] = []
    if role.strategy in ("PACK", "STRICT_PACK"):
        found = [node_id for node_id, room in free.items() for _ in range(room)]
    else:
        rounds = 1 if role.strategy == "STRICT_SPREAD" else max(free.values(), default=0)
        found = [node_id for turn in range(rounds) for node_id, room in free.items() if room > turn]
    return found[: role.number] if len(found) >= role.number else None


def _times(resources: Mapping[str, float], number: int) -> dict[str, float]:
    return {key: amount * number for key, amount in resources.items()}


def _needed(roles: Sequence[Role]) -> dict[str, float]:
    """What all actors need together."""
    needed: dict[str, float] = {}
    for role in roles:
        for key, amount in _times(role.resources, role.number).items():
            needed[key] = needed.get(key, 0.0) + amount
    return needed


def _less(amounts: Mapping[str, float], taken: Mapping[str, float]) -> dict[str, float]:
    return {key: amounts.get(key, 0.0) - taken.get(key, 0.0) for key in {**amounts, **taken}}


def _without(node: Node, taken: Mapping[str, float]) -> Node:
    return replace(node, resources=_less(node.resources, taken)) if taken else node


def _role_problems(role: Role, inventory: Inventory) -> list[str]:
    """Why a role finds no room in a cluster that holds nothing else."""
    if _seated([role], inventory) is not None:
        return []
    if inventory.limits is not None:
        has: Mapping[str, float] = inventory.limits
        return [
            f"{role} are {_show(_times(role.resources, role.number))}; the cluster grows to "
            f"{_show({key: has.get(key, 0.0) for key in role.resources})}. Lower reward_num_actors "
            "or reward_resources_per_actor, or raise what it may grow to."
        ]
    able = [node for node in inventory.nodes if has_labels(node, role.labels)]
    if not able:
        return [
            f"reward_label_selector={json.dumps(dict(role.labels))}: no node has such labels. "
            f"There are: {_labels(inventory)}. Correct it, or leave it out."
        ]
    among = f" of the {len(able)} with reward_label_selector" if role.labels else ""
    rooms = [capacity(node, role.resources) for node in able]
    if not max(rooms):
        return [
            f"No node{among} can hold one actor of {role.name} with {_show(role.resources)}: the "
            f"largest amounts on a node are {_largest(role.resources, Inventory(tuple(able), {}))}."
            " Lower reward_resources_per_actor to what one node has."
        ]
    fitting = sum(1 for room in rooms if room)
    most = {"STRICT_PACK": max(rooms), "STRICT_SPREAD": fitting}.get(role.strategy, sum(rooms))
    strict = role.strategy.startswith("STRICT")
    said = f"reward_placement_strategy: {role.strategy}, and " if strict else ""
    return [
        f"{role} do not fit on the nodes{among}: {said}{most} of them do. Set reward_num_actors: "
        f"{most}, or lower reward_resources_per_actor."
    ]


def _no_room(workers: Placement, roles: Sequence[Role], inventory: Inventory) -> str:
    """Each finds room alone, but not all together."""
    as_role = Role("workers", workers.num_workers, workers.resources)
    needed, limits = _needed([*roles, as_role]), inventory.limits
    has = {k: limits.get(k, 0.0) if limits else inventory.total(k) for k in needed}
    parts = [str(workers)]
    parts += [str(role) for role in roles]
    return (
        f"The run needs {_show(needed)} for {', '.join(parts)}; the cluster has {_show(has)}, on "
        f"which they do not fit together ({workers.strategy} for workers, {roles[0].strategy} for "
        "reward models). Lower ray_num_workers, resources_per_worker, reward_num_actors or "
        "reward_resources_per_actor, change a placement strategy, or add nodes."
    )


def _labels(inventory: Inventory) -> str:
    own = "ray.io/node-id"  # of every node another
    found = {f"{k}={v}" for n in inventory.nodes for k, v in n.labels.items() if k != own}
    return ", ".join(sorted(found)) or "none"


def _roles_wait(roles: Sequence[Role], inventory: Inventory) -> Iterator[str]:
    """A note where actors must wait for others to end."""
    needed = _needed(roles)
    free = {key: max(0.0, inventory.available.get(key, 0.0)) for key in needed}
    if any(needed[key] > free[key] + EPSILON for key in needed):
        yield (
            f"reward models wait for {_show(needed)}, of which {_show(free)} are free now: others "
            "hold the rest, or nodes start"
        )


def _has_gpus(inventory: Inventory) -> bool:
    return inventory.total("GPU") > 0 or (inventory.limits or {}).get("GPU", 0) > 0


def _check_amounts(resources: Mapping[str, float], name: str = "resources_per_worker") -> None:
    wrong = [key for key, amount in resources.items() if amount <= 0]
    if wrong or not resources:
        raise ClusterError(
            f"{name}={_show(resources)}: amounts above 0 are required. Leave out "
            f'{", ".join(wrong) or "the key"}; {{"GPU": 1}} and {{"CPU": 2}} are examples.'
        )
    gpus = resources.get("GPU", 0)
    if gpus > 1 and gpus != int(gpus):
        raise ClusterError(
            f"{name} has {gpus:g} GPU: above one GPU a whole number is required. "
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
        needed = amount * placement.num_workers
        free = max(0.0, inventory.available.get(key, 0.0))
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
