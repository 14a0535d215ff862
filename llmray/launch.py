"""Starts one process a GPU through torchrun, for runs without Ray on several devices.

LLaMA-Factory's users expect `train` to use every visible GPU, and to be steered by FORCE_TORCHRUN,
NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. torchrun's agent runs in this
process: a signal reaches all ranks, and the exit code is theirs.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmray.arguments import environment
from llmray.errors import ArgumentsError, ClusterError

log = logging.getLogger("llmray")

# A stop waits for the step under way and a save; torchrun's own limit of 30 s would cut it short.
SHUTDOWN_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Ranks:
    """How many processes on how many machines, and where they meet (None: on this one)."""

    num_processes: int
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None


def plan(ray_enabled: bool, environ: Mapping[str, str], *, use_cpu: bool = False) -> Ranks | None:
    """The ranks to start, or None where this process is to do the work itself.

    Args:
        ray_enabled: whether the run goes to Ray, which starts its own workers.
        environ: the process's environment variables.
        use_cpu: leave GPUs alone.

    Raises:
        ArgumentsError: the variables contradict each other or are no numbers.
    """
    if "WORLD_SIZE" in environ or "TORCHELASTIC_RUN_ID" in environ:
        return None  # torchrun started us
    forced = environment.flag(environ, "FORCE_TORCHRUN")
    if ray_enabled:
        if forced:
            raise ArgumentsError(
                "FORCE_TORCHRUN=1 asks for torchrun and the run file for Ray. "
                "Unset FORCE_TORCHRUN, or set use_ray: false."
            )
        return None
    num_nodes = environment.count(environ, "NNODES", 1)
    num_devices = 0 if use_cpu else _visible_gpus()
    num_processes = environment.count(environ, "NPROC_PER_NODE", max(1, num_devices))
    if not forced and num_nodes * num_processes == 1:
        return None
    return _meeting(num_processes, num_nodes, environ)


def torchrun(ranks: Ranks, command: Sequence[str]) -> int:
    """Run `python COMMAND` as all ranks of this machine; returns the exit code of the run.

    Raises:
        ClusterError: the machines of the run did not find each other.
    """
    import torch.distributed as dist
    from torch.distributed import run as agent
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    log.info(
        "torchrun: %d process(es) on this machine, %d machine(s); use_ray: true spreads further",
        ranks.num_processes,
        ranks.num_nodes,
    )
    _prepare_environment(ranks)
    try:
        agent.run(agent.parse_args([*_flags(ranks), *command]))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        return _first_failure(error.failures)
    except (RendezvousError, dist.DistError) as error:
        where = f"{ranks.master_addr}:{ranks.master_port}"
        raise ClusterError(
            f"The {ranks.num_nodes} machines did not meet at MASTER_ADDR:MASTER_PORT {where} "
            f"({error}). Start the command on all of them, with NODE_RANK 0 on {ranks.master_addr}."
        ) from error
    finally:
        _kill_children()
    return 0


def _meeting(num_processes: int, num_nodes: int, environ: Mapping[str, str]) -> Ranks:
    node_rank = environment.count(environ, "NODE_RANK", 0, least=0)
    if node_rank >= num_nodes:
        raise ArgumentsError(
            f"NODE_RANK={node_rank} with NNODES={num_nodes}: machines are numbered from 0. "
            f"Set NODE_RANK to at most {num_nodes - 1}."
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if num_nodes > 1 and missing:
        raise ArgumentsError(
            f"NNODES={num_nodes}, but {' and '.join(missing)} not set. All machines need the "
            "address and a free port of the one with NODE_RANK 0."
        )
    port = environment.count(environ, "MASTER_PORT", 0) or None
    return Ranks(num_processes, num_nodes, node_rank, environ.get("MASTER_ADDR"), port)


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _flags(ranks: Ranks) -> list[str]:
    flags = {
        "nproc-per-node": ranks.num_processes,
        "nnodes": ranks.num_nodes,
        "node-rank": ranks.node_rank,
        "shutdown-timeout": SHUTDOWN_TIMEOUT_S,
        "master-addr": ranks.master_addr,
        "master-port": ranks.master_port,
    }
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def _prepare_environment(ranks: Ranks) -> None:
    share = max(1, (os.cpu_count() or 1) // ranks.num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    os.environ.update(environment.allocator(os.environ))
    # The ranks and this module say what happened; the agent's own lines would repeat it at length.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


def _first_failure(failures: Mapping[int, object]) -> int:
    """Exit code of the rank that failed first; one that a signal killed could not speak."""
    from torch.distributed.elastic.multiprocessing import ProcessFailure

    known = [failure for failure in failures.values() if isinstance(failure, ProcessFailure)]
    first = min(known, key=lambda failure: failure.timestamp)
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        log.error(
            "process %d was killed by %s; the others were ended. Too little memory is the usual "
            "reason for SIGKILL: lower per_device_train_batch_size or cutoff_len.",
            first.pid,
            name,
        )
        return 1
    return first.exitcode


def _kill_children() -> None:
    """Kill ranks that outlived the agent, which a signal in the middle of a stop can leave."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    if not listing.exists():  # not Linux
        return
    for pid in map(int, listing.read_text().split()):
        os.kill(pid, signal.SIGKILL)
