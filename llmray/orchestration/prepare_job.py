"""Model and data made ready on the nodes, once, before any worker exists.

One node: in the driver. Several: as a task on each that can hold a worker; where they share the
cache the first builds and the others find what it made, where they do not each builds its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from llmray import hub
from llmray.arguments import environment
from llmray.data import prepared
from llmray.errors import ClusterError
from llmray.orchestration import cluster
from llmray.orchestration.plan import Node

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = getLogger("llmray")


@dataclass(frozen=True)
class Environment:
    """What a task needs of the driver's environment."""

    open_vars: Mapping[str, str]
    secrets: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Environment({sorted(self.open_vars)}, {len(self.secrets)} secrets)"


def prepare(
    arguments: RunArguments, nodes: Sequence[Node], driver_node: str, environ: Environment
) -> prepared.PreparedRef:
    """The prepared data set of the run, there on all `nodes`.

    Args:
        arguments: the run.
        nodes: those that can hold a worker.
        driver_node: the id of the node where this process runs.
        environ: variables for the tasks.

    Raises:
        LlmrayError: the model or the data cannot be had.
        ClusterError: nodes came to different data.
    """
    if [node.node_id for node in nodes] == [driver_node]:
        return ready_here(arguments, {})
    refs: list[prepared.PreparedRef] = []
    # one after the other: the first builds, and where the cache is shared the rest only look
    for node in sorted(nodes, key=lambda node: node.node_id != driver_node):
        found = cluster.on_nodes(
            [node],
            ready_here,
            arguments,
            dict(environ.secrets),
            env_vars=environ.open_vars,
            num_cpus=min(1.0, node.resources.get("CPU", 0.0)),
            timeout_s=None,
        )
        refs += found.values()
    if len({ref.key for ref in refs}) > 1:
        raise ClusterError(
            f"The data set comes out differently on {len(refs)} nodes: keys "
            f"{', '.join(sorted({ref.key[:12] for ref in refs}))}. All nodes need the same data "
            "files, model and llmray: put them on shared storage."
        )
    return refs[0]


def ready_here(arguments: RunArguments, secrets: Mapping[str, str]) -> prepared.PreparedRef:
    """Resolve the model and build the prepared data set on this machine."""
    os.environ.update(secrets)
    model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
    return prepared.ensure(arguments, model_dir, root=prepared_root())


def prepared_root() -> Path:
    """Where prepared data sets lie on this machine."""
    return environment.cache_directory(os.environ) / "prepared"
