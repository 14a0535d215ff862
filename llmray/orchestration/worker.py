"""What runs in each Ray Train worker: the training core, and its ends of the board and of Ray.

It knows who it is from Ray, what to do from the board, and where to start from the run directory;
Ray's own checkpoint is never read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode

from llmray import downloads, hub
from llmray.arguments.loading import replace
from llmray.data import access
from llmray.errors import LlmrayError
from llmray.orchestration import prepare_job
from llmray.orchestration.board import Job, Relay
from llmray.train import checkpoint
from llmray.train.parallel import World

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = logging.getLogger("llmray")


def train_loop(config: dict[str, Any]) -> None:
    """Train on this rank; the function that TorchTrainer runs."""
    from llmray import run  # heavy, and the driver imports this module to name the function

    board = config["board"]
    job: Job = ray.get(board.job.remote())
    os.environ.update(job.secrets)
    world = _world(job)
    relay = Relay(board, job.log_level) if world.is_main else None
    if relay is None:
        _be_silent()
    try:
        attempt: int = world.broadcast(
            ray.get(board.begin_attempt.remote()) if world.is_main else 0
        )
        where = world.gather((ray.util.get_node_ip_address(), os.getpid()))
        log.info("attempt %d: %s", attempt, describe_ranks(where))
        arguments = arguments_of_attempt(job.arguments, job.run_dir, attempt)
        with downloads.as_fetched():  # the node was made ready before
            context = run.Context(
                world=world,
                run_dir=job.run_dir,
                prepared=access.place_here(job.prepared, prepare_job.prepared_root()),
                model_dir=_model_dir(arguments),
                stop=relay.reason if relay else lambda: None,
                observers=(relay,) if relay else (),
                report=_reporter(world),
                attempt=attempt,
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


def _world(job: Job) -> World:
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if job.uses_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cores = job.threads or (os.cpu_count() or 1) / context.get_local_world_size()
    torch.set_num_threads(max(1, int(cores)))
    return World(
        context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device
    )


def _model_dir(arguments: RunArguments) -> Path:
    return hub.resolve(arguments.model.model_name_or_path, arguments.model)


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
