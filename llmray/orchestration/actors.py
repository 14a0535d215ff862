"""Reward models of a run or a sweep, in the driver: placed, made before workers, ended with it.

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
from llmray.arguments import reward_sets
from llmray.arguments.reward_sets import RewardSet
from llmray.arguments.rlhf import kind_of
from llmray.errors import LlmrayError, RewardError
from llmray.orchestration import cluster
from llmray.orchestration.board import Job
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

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments
    from llmray.orchestration.prepare_job import Environment

log = getLogger("llmray")


@dataclass
class Actors:
    """The actors of a run or a sweep, in the driver.

    Attributes:
        seats: of all reward models.
        groups: their placement groups.
        node_ids: of the nodes of all actors, in the order of their roles.
    """

    seats: list[Seat] = field(default_factory=list)
    groups: list[PlacementGroup] = field(default_factory=list)
    node_ids: list[str] = field(default_factory=list)
    _killed: set[tuple[str, int]] = field(default_factory=set)

    def seats_of(self, run: RunArguments) -> tuple[Seat, ...]:
        """Those of a run's reward models.

        Raises:
            RewardError: there are none of one of them.
        """
        keys = {one.key: one for one in reward_sets.of_run(run)}
        for key in keys.keys() - {seat.of for seat in self.seats}:
            raise RewardError(
                f"No actors were made of reward model {keys[key].name} as this trial asks for it. "
                "All that a sweep may need are required before its first trial. List the values of "
                "its keys with choice or grid."
            )
        return tuple(seat for seat in self.seats if seat.of in keys)

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


def roles_of(sets: Sequence[RewardSet]) -> list[Role]:
    """The actors that are needed beside workers, one role for each reward model."""
    return [
        Role(
            f"reward model {one.short}{one.apart}",
            rlhf.reward_num_actors or 1,
            {key: float(v) for key, v in (rlhf.reward_resources_per_actor or {}).items()},
            rlhf.reward_placement_strategy or "PACK",
            # Ray takes the space in "in(a, b)" for a part of the label
            {key: "".join(v.split()) for key, v in (rlhf.reward_label_selector or {}).items()},
        )
        for one in sets
        for rlhf in (one.run.rlhf,)
    ]


def check(
    runs: Sequence[RunArguments],
    sets: Sequence[RewardSet],
    placement: Placement,
    inventory: Inventory,
    folder: str,
) -> None:
    """Look for rewards where they are needed, before anything is loaded.

    Args:
        runs: those that ask for rewards.
        sets: their reward models.
        placement: of workers, and of the roles of `sets`.
        inventory: of the cluster.
        folder: of this process, where modules of functions are.

    Raises:
        LlmrayError: a node has no such model, or no such function.
    """
    here = ray.get_runtime_context().get_node_id()
    for one, role in zip(sets, placement.roles, strict=True):
        nodes = [n for n in inventory.nodes if capacity(n, role.resources)]
        nodes = [n for n in nodes if n.node_id != here and has_labels(n, role.labels)]
        cluster.check_versions([n for n in nodes if not capacity(n, placement.resources)])
        for path in (one.name, *one.run.rlhf.reward_model_adapters):
            cluster.check_exists(nodes, path, "reward_model")
    workers = [n for n in inventory.nodes if capacity(n, placement.resources)]
    asking = [run for run in runs if run.finetuning.stage == "ppo"]
    names = dict.fromkeys(name for run in asking for name in run.rlhf.reward_models)
    for name in names:
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
    sets: Sequence[RewardSet],
    placement: Placement,
    inventory: Inventory,
    board: str,
    environ: Environment,
) -> Actors:
    """Make the actors of reward models and wait until these are loaded.

    Args:
        sets: the reward models.
        placement: with the roles of `sets`.
        inventory: of the cluster.
        board: the name of a board, which gets what they are made from.
        environ: of tasks and actors.

    Raises:
        LlmrayError: a reward model is not there, or does not fit.
    """
    made = Actors()
    try:
        held = reserve(placement, inventory)
        made.groups = [group for group, _ in held]
        made.node_ids = [node_id for _, node_ids in held for node_id in node_ids]
        for one, role, (group, node_ids) in zip(sets, placement.roles, held, strict=True):
            nodes = [n for n in inventory.nodes if n.node_id in node_ids]
            _fetch(one.run, one.name, nodes, environ)
            ray.get(ray.get_actor(board).give_to.remote(one.key, _job(one, environ)))
            made.seats += _seats(one, role, group, board, environ)
        made.seats = [replace(seat, pong=_first_answer(seat)) for seat in made.seats]
    except BaseException:
        made.close()
        raise
    return made


def _job(one: RewardSet, environ: Environment) -> Job:
    """What actors need to know."""
    return Job(
        arguments=one.run,
        run_dir="",
        prepared=None,
        threads=None,
        uses_gpu=False,
        secrets=dict(environ.secrets),
        core=None,
    )


def _seats(
    one: RewardSet, role: Role, group: PlacementGroup, board: str, environ: Environment
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
        words = (board, one.key, one.name, threads, gpus > 0)
        actor = kind.options(scheduling_strategy=where).remote(*words)
        unseen = Pong("", "", 0)
        seats.append(Seat(one.name, number, actor, resources, unseen, one.key, one.apart))
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
    from llmray.rl import reward_files  # imports torch

    os.environ.update(secrets)
    base = policy_files(arguments)
    asked = reward_files.run_file(name, arguments, str(base))
    hub.resolve_all(asked.model, asked.rlhf)
