"""What runs in each Ray Train worker: the training core, and its ends of the board and of Ray.

It knows who it is from Ray, what to do from the board, and where to start from the run directory;
Ray's own checkpoint is never read.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointUploadMode

from llmray import downloads, hub, store
from llmray.arguments.loading import replace
from llmray.data import access
from llmray.errors import LlmrayError
from llmray.model import mapped
from llmray.orchestration import prepare_job, reward_actor, roles
from llmray.orchestration.board import Job, Relay
from llmray.orchestration.trial_board import CLOSED, TrialRelay, wait_for_offer
from llmray.rl.rewards import Elsewhere
from llmray.train import checkpoint
from llmray.train.parallel import World

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = logging.getLogger("llmray")

POLICY = "policy, reference, rollouts"  # what workers do in stage ppo


def train_loop(config: dict[str, Any]) -> None:
    """Train on this rank; the function that TorchTrainer runs."""
    board = config["board"]
    job: Job = ray.get(board.job.remote())
    _train(board, job, _world(job.threads, uses_gpu=job.uses_gpu))


def train_trials(config: dict[str, Any]) -> None:
    """Train one trial after another on this rank, as the board of a slot gives them."""
    from llmray import run  # noqa: F401  # imported before a trial is asked for, and then kept

    board = config["board"]
    world = _world(config["threads"], uses_gpu=config["uses_gpu"])
    while True:
        number = world.broadcast(wait_for_offer(board) if world.is_main else 0)
        if number == CLOSED:
            return
        job: Job = ray.get(board.job.remote())
        try:
            _train(board, job, world)
        except LlmrayError:
            if world.world_size > 1:
                raise  # other ranks may wait for this one in a collective call
        finally:
            ray.get(board.count_loads.remote(ray.util.get_node_ip_address(), mapped.take()))
        gc.collect()  # models refer to themselves
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        if world.is_main:
            ray.get(board.is_over.remote(number))


def _train(board: ActorHandle, job: Job, world: World) -> None:
    """Do the board's job on this rank; what goes wrong for the user's reasons is told there."""
    from llmray import run  # heavy, and the driver imports this module to name the function

    os.environ.update(job.secrets)
    relay = _relay(board, job) if world.is_main else None
    if relay is None:
        _be_silent()
    try:
        attempt: int = world.broadcast(
            ray.get(board.begin_attempt.remote()) if world.is_main else 0
        )
        where = world.gather((ray.util.get_node_ip_address(), os.getpid()))
        log.info("attempt %d: %s", attempt, describe_ranks(where))
        if job.arguments.finetuning.stage == "ppo":
            _show_roles(job, attempt, world)
        arguments = arguments_of_attempt(job.arguments, job.run_dir, attempt)
        with downloads.as_fetched():  # the node was made ready before
            context = run.Context(
                world=world,
                run_dir=job.run_dir,
                prepared=access.place_here(job.prepared, prepare_job.prepared_root()),
                model_dir=_model_dir(arguments),
                stop=relay.reason if relay else lambda: None,
                observers=(relay,) if relay else (),
                report=_reporter(world) if job.metric is None else None,
                rewards=_rewards(job, board),
                attempt=attempt,
                group=job.group,
                num_sharing=job.num_trials,
            )
            result = (job.core or run.run)(arguments, context)
        if world.is_main:
            ray.get(board.finish.remote(result.stopped))
    except LlmrayError as error:
        ray.get(board.fail.remote(world.rank, error))
        raise
    finally:
        if relay is not None:
            relay.close()


def _relay(board: ActorHandle, job: Job) -> Relay:
    if job.metric is None:
        return Relay(board, job.log_level)
    return TrialRelay(board, job.log_level, job.metric)


def arguments_of_attempt(arguments: RunArguments, run_dir: str, attempt: int) -> RunArguments:
    """The arguments of this attempt: after a failure it goes on from this run's newest commit."""
    requested = arguments.training.resume_from_checkpoint
    if attempt == 1 or requested is None:
        return arguments
    newest = checkpoint.newest_step(run_dir)
    if isinstance(requested, str) and (
        newest is None or newest <= checkpoint.named_step(requested)
    ):
        return arguments  # nothing was committed since: start where the first attempt did
    return replace(arguments, resume_from_checkpoint=None)


def describe_ranks(where: list[tuple[str, int]]) -> str:
    """Which rank is which process on which node, for a line of the log."""
    nodes: dict[str, list[str]] = {}
    for rank, (address, pid) in enumerate(where):
        nodes.setdefault(address, []).append(f"rank {rank} (pid {pid})")
    return "; ".join(f"{', '.join(ranks)} on {address}" for address, ranks in nodes.items())


def _world(threads: float | None, *, uses_gpu: bool) -> World:
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if uses_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cores = threads or (os.cpu_count() or 1) / context.get_local_world_size()
    torch.set_num_threads(max(1, int(cores)))
    return World(
        context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device
    )


def _model_dir(arguments: RunArguments) -> Path:
    return hub.resolve(arguments.model.model_name_or_path, arguments.model)


def _show_roles(job: Job, attempt: int, world: World) -> None:
    """Say who runs where, and write it into the run directory; a collective call."""
    node_ids = world.gather(ray.get_runtime_context().get_node_id())
    where = world.gather((ray.util.get_node_ip_address(), os.getpid()))
    if not world.is_main:
        return
    members = [
        roles.Member(POLICY, f"rank {rank}", address, node_id, pid, job.holds)
        for rank, (node_id, (address, pid)) in enumerate(zip(node_ids, where, strict=True))
    ]
    members += reward_actor.members(job.arguments, job.seats)
    for line in roles.lines(members):
        log.info("  %s", line)
    store.write_atomic(store.join(job.run_dir, roles.FILE), roles.as_json(attempt, members))


def _rewards(job: Job, board: ActorHandle) -> Elsewhere:
    """Reward models are actors; functions are where the driver was started, or in this worker."""
    here = job.folder if os.path.isdir(job.folder) else os.getcwd()
    return Elsewhere(reward_actor.handles(job.seats, board), reward_actor.on_evict, Path(here))


def _reporter(world: World) -> Callable[[dict[str, float], str | None], None]:
    def report(metrics: dict[str, float], path: str | None) -> None:
        """Tell Ray Train; a barrier of all ranks. The checkpoint stays where it is."""
        told = None
        if path is not None and world.is_main:
            told = ray.train.Checkpoint(path)
        ray.train.report(
            metrics, checkpoint=told, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
        )

    return report


def _be_silent() -> None:
    """Rank 0 speaks for all; the others only of errors, into Ray's log of the worker."""
    log.setLevel(logging.ERROR)
