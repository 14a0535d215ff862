"""Model and data made ready on the nodes, once, before any worker exists.

The driver's node first, if it can hold a worker, in the driver itself. Other nodes then find what
was made, where they share the cache; where they do not, each makes its own as a task.
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
    others = [node for node in nodes if node.node_id != driver_node]
    if len(others) < len(nodes):
        first = ready_here(arguments, {})
    else:
        [first] = _on_nodes(arguments, others[:1], environ)
    if not others:
        return first[1]
    # where the cache is shared they have it now, and the rest need not even look for it
    seen = cluster.on_nodes(others, _has, [str(first[0]), first[1].path])
    rest = _on_nodes(arguments, [node for node in others if not seen[node.node_id]], environ)
    keys = {ref.key for _, ref in [first, *rest]}
    if len(keys) > 1:
        raise ClusterError(
            f"The data set comes out differently on {len(nodes)} nodes: keys "
            f"{', '.join(sorted(key[:12] for key in keys))}. All nodes need the same data files, "
            "model and llmray: put them on shared storage."
        )
    return first[1]


def _on_nodes(
    arguments: RunArguments, nodes: Sequence[Node], environ: Environment
) -> list[tuple[Path, prepared.PreparedRef]]:
    found = cluster.on_nodes(
        nodes,
        ready_here,
        arguments,
        dict(environ.secrets),
        env_vars=environ.open_vars,
        timeout_s=None,
    )
    return list(found.values())


def _has(paths: Sequence[str]) -> bool:
    return all(os.path.isdir(path) for path in paths)


def ready_here(
    arguments: RunArguments, secrets: Mapping[str, str]
) -> tuple[Path, prepared.PreparedRef]:
    """Resolve the model and build the prepared data set on this machine."""
    os.environ.update(secrets)
    model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
    return model_dir, prepared.ensure(arguments, model_dir, root=prepared_root())


def prepared_root() -> Path:
    """Where prepared data sets lie on this machine."""
    return environment.cache_directory(os.environ) / "prepared"
