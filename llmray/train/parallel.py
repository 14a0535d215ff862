"""The process group: who this rank is, and the few collective calls that everything else uses.

Control values (counts, stop flags, small objects) travel over gloo on the host, so none of them
makes a GPU wait; gradients are reduced by torch's own wrapper. Nothing here knows how the ranks
were started: `World.from_environment` covers this process, torchrun and Ray Train.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from logging import getLogger
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from llmray.arguments import environment

log = getLogger("llmray")

T = TypeVar("T")

_ended: list[dist.ProcessGroup | None] = []  # the process group that ended last


@dataclass(frozen=True)
class World:
    """This rank among all ranks; every method but `is_main` is a call that all ranks must make."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | None = None) -> World:
        """A world of this process alone."""
        return cls(0, 1, 0, device or default_device(0))

    @classmethod
    def from_environment(cls, timeout_s: float = 1800.0, *, use_cpu: bool = False) -> World:
        """The world that torchrun or Ray Train describes; starts the process group if needed.

        Args:
            timeout_s: how long a collective call may take, in seconds.
            use_cpu: leave GPUs alone.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cpu") if use_cpu else default_device(local_rank)
        if world_size == 1:
            return cls.single(device)
        if not dist.is_initialized():
            dist.init_process_group(backend(device), timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over ranks, in double precision."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return cast("list[float]", tensor.tolist())

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maxima over ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return cast("list[float]", tensor.tolist())

    def broadcast(self, value: T, source: int = 0) -> T:
        """The picklable `value` of rank `source`, on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        return cast("T", box[0])

    def gather(self, value: T) -> list[T]:
        """The picklable values of all ranks, in rank order, on every rank."""
        return [self.broadcast(value, source) for source in range(self.world_size)]

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` whose gradients are averaged over ranks in backward; itself in a world of one.

        The weights of all ranks must be equal already: loading and seeding make them so, and a
        broadcast of frozen base weights would only cost time.
        """
        if self.world_size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=device_ids, init_sync=False, gradient_as_bucket_view=True
        )

    def close(self) -> None:
        """End the process group if there is one.

        Its object is kept until the next one ends. DDP's reducer would else own it last and free
        it under the GIL, waiting for a thread of gloo's that may wait for the GIL (torch 2.13).
        """
        if dist.is_initialized():
            _ended[:] = [dist.group.WORLD]
            dist.destroy_process_group()


def default_device(local_rank: int) -> torch.device:
    """The CUDA device of this local rank where there is CUDA, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def set_npu_mode(environ: Mapping[str, str]) -> None:
    """Do what NPU_JIT_COMPILE says where torch knows Ascend NPUs; elsewhere say that nothing does.

    Args:
        environ: the environment; ASCEND_RT_VISIBLE_DEVICES is for NPUs alone too.
    """
    npu = getattr(torch, "npu", None)  # torch_npu puts it there
    if npu is not None and npu.is_available():
        npu.set_compile_mode(jit_compile=environment.compiles_on_npu(environ))
        return
    named = [name for name in ("NPU_JIT_COMPILE", "ASCEND_RT_VISIBLE_DEVICES") if environ.get(name)]
    if named:
        log.warning("%s: there is no NPU here, so nothing comes of it", ", ".join(named))


def backend(device: torch.device) -> str:
    """The name of torch's backend whose group carries host and device tensors alike."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
