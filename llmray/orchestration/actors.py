"""Reward models of a run, in the driver: placed, made before the workers, ended with the run.

Each has a placement group of its own, so that the room of a dead actor is kept for its next life. A
hung one is killed once, whichever ranks say so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llmray import hub
from llmray.errors import LlmrayError, RewardError
from llmray.orchestration import cluster
from llmray.orchestration.plan import (
    Inventory,
    Node,
    Placement,
    Role,
    capacity,
    has_labels,
    room_beside,
)
from llmray.orchestration.reward_actor import Pong, RewardActor, Seat, as_ours, policy_files
from llmray.rl.reward_function import FunctionReward
from llmray.rl.rewards import kind_of, names_of

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments
    from llmray.orchestration.prepare_job import Environment

log = getLogger("llmray")


@dataclass
class Actors:
    """The actors of a run, in the driver.

    Attributes:
        seats: of all reward models.
        groups: their placement groups.
    """

    seats: list[Seat] = field(default_factory=list)
    groups: list[PlacementGroup] = field(default_factory=list)
    _killed: set[tuple[str, int]] = field(default_factory=set)

    def kill_hung(self, title: str, pid: int) -> None:
        """Kill an actor, unless that life of it was killed before; Ray starts it anew."""
        if (title, pid) in self._killed:
            return
        self._killed.add((title, pid))
        log.warning("reward model %s (pid %d) hangs: it is killed and starts anew", title, pid)
        for seat in self.seats:
            if seat.title == title:
                with suppress(RayError):  # it died by itself
                    ray.kill(seat.actor, no_restart=False)

    def close(self) -> None:
        """End all; they end with the driver too, whatever becomes of it."""
        for seat in self.seats:
            with suppress(RayError):
                ray.kill(seat.actor)
        for group in self.groups:
            with suppress(RayError):
                remove_placement_group(group)
        self.seats, self.groups = [], []


def roles_of(arguments: RunArguments) -> list[Role]:
    """The actors that a run needs beside its workers, one role for each reward model."""
    if arguments.finetuning.stage != "ppo":
        return []
    rlhf = arguments.rlhf
    pairs = zip(rlhf.reward_models, names_of(rlhf.reward_models), strict=True)
    return [
        Role(
            f"reward model {short}",
            rlhf.reward_num_actors or 1,
            {key: float(v) for key, v in (rlhf.reward_resources_per_actor or {}).items()},
            rlhf.reward_placement_strategy or "PACK",
            rlhf.reward_label_selector or {},
        )
        for name, short in pairs
        if kind_of(name) == "model"
    ]


def model_names(arguments: RunArguments) -> list[str]:
    """The rewards of a run that are models, in the order of its roles."""
    return [name for name in arguments.rlhf.reward_models if kind_of(name) == "model"]


def check(arguments: RunArguments, placement: Placement, inventory: Inventory, folder: str) -> None:
    """Look for rewards where they are needed, before anything is loaded.

    Args:
        arguments: the run.
        placement: of its roles.
        inventory: of the cluster.
        folder: of this process, where modules of functions are.

    Raises:
        LlmrayError: a node has no such model, or no such function.
    """
    if arguments.finetuning.stage != "ppo":
        return
    here = ray.get_runtime_context().get_node_id()
    for name, role in zip(model_names(arguments), placement.roles, strict=True):
        nodes = [n for n in inventory.nodes if capacity(n, role.resources)]
        nodes = [n for n in nodes if n.node_id != here and has_labels(n, role.labels)]
        cluster.check_versions([n for n in nodes if not capacity(n, placement.resources)])
        for path in (name, *arguments.rlhf.reward_model_adapters):
            cluster.check_exists(nodes, path, "reward_model")
    workers = [n for n in inventory.nodes if capacity(n, placement.resources)]
    for name in arguments.rlhf.reward_models:
        if kind_of(name) == "function":
            cluster.on_nodes(workers, _find_function, name, folder)


def _find_function(name: str, folder: str) -> None:
    place = folder if os.path.isdir(folder) else os.getcwd()
    FunctionReward.named(name, Path(place))


def reserve(placement: Placement, inventory: Inventory) -> list[tuple[PlacementGroup, list[str]]]:
    """Hold the resources of all roles; returns a placement group and the nodes of each.

    Ray chooses the nodes. Where its choice leaves no room for the workers, the plan's is taken.
    """
    held = [_hold(role) for role in placement.roles]
    chosen = [node_id for _, node_ids in held for node_id in node_ids]
    grows = inventory.limits is not None
    if not placement.roles or grows or room_beside(placement, inventory, chosen):
        return held
    for group, _ in held:
        remove_placement_group(group)
    log.info("reward models lie as planned: where Ray put them, the workers would find no room")
    return [_hold(role, pinned=True) for role in placement.roles]


def _hold(role: Role, *, pinned: bool = False) -> tuple[PlacementGroup, list[str]]:
    labels = [dict(role.labels)] * role.number
    if pinned:
        labels = [{"ray.io/node-id": node_id} for node_id in role.node_ids]
    group = placement_group(
        [dict(role.resources)] * role.number,
        strategy="PACK" if pinned else role.strategy,
        bundle_label_selector=labels,
    )
    try:
        ray.get(group.ready())
    except BaseException:
        remove_placement_group(group)
        raise
    where = placement_group_table(group)["bundles_to_node_id"]
    return group, [where[index] for index in range(role.number)]


def start(
    arguments: RunArguments,
    placement: Placement,
    inventory: Inventory,
    board: str,
    environ: Environment,
) -> Actors:
    """Make the actors of a run and wait until their models are loaded.

    Args:
        arguments: the run.
        placement: with its roles.
        inventory: of the cluster.
        board: the name of the board, which has the job.
        environ: of tasks and actors.

    Raises:
        LlmrayError: a reward model is not there, or does not fit.
    """
    made = Actors()
    try:
        for name, role, (group, node_ids) in zip(
            model_names(arguments), placement.roles, reserve(placement, inventory), strict=True
        ):
            made.groups.append(group)
            _fetch(arguments, name, [n for n in inventory.nodes if n.node_id in node_ids], environ)
            made.seats += _seats(name, role, group, board, environ)
        made.seats = [replace(seat, pong=_first_answer(seat)) for seat in made.seats]
    except BaseException:
        made.close()
        raise
    return made


def _seats(
    name: str, role: Role, group: PlacementGroup, board: str, environ: Environment
) -> list[Seat]:
    resources = dict(role.resources)
    cores, gpus = resources.get("CPU"), resources.get("GPU", 0.0)
    others = {k: v for k, v in resources.items() if k not in ("CPU", "GPU", "memory")}
    threads = None if cores is None else max(1, int(cores))
    kind = ray.remote(
        num_cpus=cores or 0,
        num_gpus=gpus,
        memory=resources.get("memory"),
        resources=others,
        max_restarts=-1,
        max_task_retries=0,
        runtime_env={"env_vars": dict(environ.open_vars)},
    )(RewardActor)
    seats = []
    for number in range(role.number):
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        actor = kind.options(scheduling_strategy=where).remote(board, name, threads, gpus > 0)
        seats.append(Seat(name, number, actor, resources, Pong("", "", 0)))
    return seats


def _first_answer(seat: Seat) -> Pong:
    try:
        answer: Pong = ray.get(seat.actor.ping.remote())
    except RayTaskError as error:
        if isinstance(error.cause, LlmrayError):
            raise error.cause from None
        raise
    except RayError as error:
        raise RewardError(
            f"the actor of reward model {seat.title} ended while it was loaded: "
            f"{as_ours(seat.title, error)}. Required: memory and the files of its model. Raise "
            "reward_resources_per_actor, or see the logs in /tmp/ray/session_latest/logs of its "
            "node."
        ) from error
    return answer


def _fetch(arguments: RunArguments, name: str, nodes: Sequence[Node], environ: Environment) -> None:
    """Have the files of a reward model on nodes before its actors load them, once on each."""
    words = (arguments, name, dict(environ.secrets))
    cluster.on_nodes(nodes, _fetch_here, *words, env_vars=environ.open_vars, timeout_s=None)


def _fetch_here(arguments: RunArguments, name: str, secrets: dict[str, str]) -> None:
    """Resolve what a reward model is made of on this machine."""
    from llmray import reinforcement

    os.environ.update(secrets)
    base = policy_files(arguments)
    asked = reinforcement.of_reward_model(name, arguments, str(base))
    hub.resolve_all(asked.model, asked.rlhf)
