"""Where workers meet: rank 0's address and a free port, or `master_addr` and `master_port`."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from llmray.errors import ClusterError


@dataclass
class MeetingConfig(TorchConfig):
    """Ray Train's TorchConfig with an address or a port of the user's, None where free."""

    master_addr: str | None = None
    master_port: int | None = None

    @property
    def backend_cls(self) -> type:
        """The backend that Ray Train instantiates."""
        return _MeetingBackend


class _MeetingBackend(_TorchBackend):
    # inherits because Ray Train offers no other way to choose the address

    def on_start(self, worker_group: Any, backend_config: MeetingConfig) -> None:
        wanted = (backend_config.master_addr, backend_config.master_port)
        super().on_start(_Chosen(worker_group, wanted), backend_config)


class _Chosen:
    """A worker group in which the first worker is asked for the address that was chosen."""

    def __init__(self, worker_group: Any, wanted: tuple[str | None, int | None]) -> None:
        self._worker_group = worker_group
        self._wanted = wanted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker_group, name)

    def __len__(self) -> int:
        return len(self._worker_group)

    def execute_single(self, rank: int, function: Any, *args: Any, **kwargs: Any) -> Any:
        """As the group's own; what it finds gives way to what the user chose."""
        found = self._worker_group.execute_single(rank, function, *args, **kwargs)
        if function.__name__ != "get_address_and_port":
            return found
        addr, port = (wanted or own for wanted, own in zip(self._wanted, found, strict=True))
        self._worker_group.execute_single(rank, check_meeting_point, addr, port)
        return addr, port


def check_meeting_point(addr: str, port: int) -> None:
    """Bind the address and port for a moment, on the machine of rank 0.

    Raises:
        ClusterError: the address is not this machine's, or the port is taken.
    """
    try:
        with socket.create_server((addr, port)):
            return
    except OSError as error:
        own, why = ray.util.get_node_ip_address(), os.strerror(error.errno or 0)
        raise ClusterError(
            f"Workers cannot meet at {addr}:{port} ({why}): rank 0 is on {own}. "
            "master_addr must be an address of its machine and master_port free there; leave both "
            "out, and they are chosen."
        ) from error
