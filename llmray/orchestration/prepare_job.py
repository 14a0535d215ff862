"""Model and data made ready on the nodes, once, before any worker exists.

The driver's node first, if it can hold a worker, in the driver itself. Other nodes then find what
was made, where they share the cache; where they do not, each makes its own as a task, and a node
that does not see the data files gets what was made sent. With `data_shared_file_system: true` the
shards of the one build are made by tasks on all nodes.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmray import hub, store
from llmray.arguments import environment
from llmray.data import access, intact, prepared
from llmray.data.access import StreamRef
from llmray.data.differences import differences
from llmray.errors import ClusterError, LlmrayError
from llmray.orchestration import cluster
from llmray.orchestration.plan import Node

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = getLogger("llmray")

Ref = prepared.PreparedRef | StreamRef


@dataclass(frozen=True)
class Environment:
    """What a task needs of the driver's environment."""

    open_vars: Mapping[str, str]
    secrets: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Environment({sorted(self.open_vars)}, {len(self.secrets)} secrets)"


def prepare(
    arguments: RunArguments, nodes: Sequence[Node], driver_node: str, environ: Environment
) -> Ref:
    """The prepared data set of the run, there on all `nodes`; a stream is only looked at.

    Args:
        arguments: the run.
        nodes: those that can hold a worker.
        driver_node: the id of the node where this process runs.
        environ: variables for the tasks.

    Raises:
        LlmrayError: the model or the data cannot be had.
        ClusterError: nodes came to different data.
    """
    token = uuid.uuid4().hex  # with overwrite_cache each store is built anew once for it
    others = [node for node in nodes if node.node_id != driver_node]
    shares = arguments.data.data_shared_file_system and not arguments.data.streaming
    if shares and others:
        return _prepare_together(arguments, nodes, others, environ)
    if len(others) < len(nodes):
        start = [node for node in nodes if node.node_id == driver_node]
        first = ready_here(arguments, {}, run_token=token)
    else:
        start, others = others[:1], others[1:]
        [first] = _on_nodes(arguments, start, environ, token)
    place = start[0].address
    if not others:
        return first[1]
    if isinstance(first[1], StreamRef):
        found = _on_nodes(arguments, others, environ, token)
        _compare(first[1], place, [ref for _, ref in found], others)
        return first[1]
    # where the cache is shared they have it now, and the rest need not even look for it
    place_given = arguments.data.tokenized_path
    anew = token if arguments.data.overwrite_cache else None
    seen = cluster.on_nodes(
        others, _has, str(first[0]), first[1], place_given, anew, **_with(environ)
    )
    rest = [node for node in others if not seen[node.node_id]]
    is_here = start[0].node_id == driver_node
    blind = _blind(arguments, rest, environ) if is_here else []
    rest = [node for node in rest if node not in blind]
    found = _on_nodes(arguments, rest, environ, token)
    _compare(first[1], place, [ref for _, ref in found], rest)
    _say_rows([first[1], *(ref for _, ref in found)], [*start, *rest])
    for node in blind:
        _send(first[1], node, environ, place_given)
    return first[1]


def _prepare_together(
    arguments: RunArguments, nodes: Sequence[Node], others: Sequence[Node], environ: Environment
) -> prepared.PreparedRef:
    """One build for the cluster, whose shards are made by tasks on all `nodes`."""
    place = arguments.data.tokenized_path
    shared = store.parent(place) if place else str(prepared_root())
    Path(shared).mkdir(parents=True, exist_ok=True)
    key = "tokenized_path" if place else "LLMRAY_CACHE"
    cluster.check_visible(others, shared, key, environ.open_vars)
    _, ref = ready_here(arguments, {}, build_shards=_Spread(nodes, environ))
    assert isinstance(ref, prepared.PreparedRef), "streams are not built"
    seen = cluster.on_nodes(others, _sees_intact, ref.path, timeout_s=None, **_with(environ))
    if not all(seen.values()):
        raise ClusterError(
            f"data_shared_file_system=true, but {ref.path} is not seen by all nodes. Required: one "
            "file system on all of them. Mount it, or set data_shared_file_system: false."
        )
    return ref


@dataclass(frozen=True)
class _Spread:
    """Builds the shards of a plan by tasks, dealt over nodes."""

    nodes: Sequence[Node]
    environ: Environment

    def __call__(self, plan: prepared.Plan) -> Iterator[prepared.ShardReport]:
        """The reports, as they come.

        Raises:
            LlmrayError: what a task raised.
            ClusterError: a task was lost more often than Ray repeats it.
        """
        shared = ray.put(plan)
        task = ray.remote(_build_shard)
        waiting = [
            task.options(
                num_cpus=1,
                max_retries=3,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=True),
                runtime_env={"env_vars": dict(self.environ.open_vars)},
            ).remote(shared, index)
            for index, node in zip(range(len(plan.shards)), self._turns(), strict=False)
        ]
        shards: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        while waiting:
            [done], waiting = ray.wait(waiting, num_returns=1)
            report, address = _result(done)
            shards[address] += report.is_new
            rows[address] += report.counts["read"] if report.is_new else 0
            yield report
        said = [f"{count} on {address}" for address, count in sorted(shards.items()) if count]
        log.info(
            "data: %d shard(s), %d rows prepared by the cluster: %s; %d shard(s) were there",
            shards.total(),
            rows.total(),
            ", ".join(said) or "none",
            len(plan.shards) - shards.total(),
        )

    def _turns(self) -> Iterator[Node]:
        able = [node for node in self.nodes if node.resources.get("CPU", 0) >= 1]
        while True:
            yield from able or self.nodes


def _result(done: Any) -> tuple[prepared.ShardReport, str]:
    try:
        report, address = ray.get(done)
    except RayTaskError as error:
        if isinstance(error.cause, LlmrayError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ClusterError(
            f"A task that prepared data was lost: {type(error).__name__}. Required: nodes that "
            "stay. Run again; finished shards are kept."
        ) from error
    return report, address


def _build_shard(plan: prepared.Plan, index: int) -> tuple[prepared.ShardReport, str]:
    return prepared.build_shard(plan, index), ray.util.get_node_ip_address()


def _compare(first: Ref, place: str, refs: Sequence[Ref], nodes: Sequence[Node]) -> None:
    """Fail where a node came to other data than the first one at `place`; says what differs."""
    wrong = []
    for ref, node in zip(refs, nodes, strict=True):
        if ref.key != first.key:
            there, here = f"on {place}", f"on {node.address}"
            found = differences(first.fingerprint, ref.fingerprint, there, here, ref.files)
            wrong += found
    if wrong:
        raise ClusterError(
            f"The data set does not come out the same on all nodes: {'; '.join(wrong)}. Required: "
            "the same data files, model and llmray on each. Copy them, or share storage."
        )


def _say_rows(refs: Sequence[Ref], nodes: Sequence[Node]) -> None:
    """Say how many rows each node tokenized for itself."""
    pairs = zip(refs, nodes, strict=True)
    built = [
        f"{ref.num_built} rows on {node.address}"
        for ref, node in pairs
        if isinstance(ref, prepared.PreparedRef) and ref.num_built
    ]
    if built:
        log.info("data: prepared on each node that needs it: %s", ", ".join(built))


def _blind(arguments: RunArguments, nodes: Sequence[Node], environ: Environment) -> list[Node]:
    """Those of the nodes that do not see the data sets' files."""
    seen = cluster.on_nodes(nodes, _sees, arguments, **_with(environ))
    return [node for node in nodes if not seen[node.node_id]]


def _sees(arguments: RunArguments) -> bool:
    return prepared.has_sources(arguments, root=prepared_root())


def _send(ref: prepared.PreparedRef, node: Node, environ: Environment, place: str | None) -> None:
    """Copy prepared data from here to a node, file by file, committed there as it is here."""
    names = [*store.read_manifest(ref.path).files, store.MANIFEST]
    for name in names:
        content = ray.put(Path(ref.path, name).read_bytes())
        words = (place, ref.key, name, content)
        cluster.on_nodes([node], _receive, *words, env_vars=environ.open_vars, timeout_s=None)
    size = sum(Path(ref.path, name).stat().st_size for name in names)
    log.info(
        "node %s does not see the data files: %d files of prepared data were sent, %.1f MB",
        node.address,
        len(names),
        size / 1e6,
    )


def _receive(place: str | None, key: str, name: str, content: bytes) -> None:
    """Write one file of prepared data; its manifest comes last, and is the commit.

    Raises:
        StoreError: it cannot be written, or did not come as it was sent.
    """
    folder = Path(place) if place else prepared_root() / key
    store.write_atomic(folder / name, content)
    if name == store.MANIFEST:
        intact.check(str(folder), prepared_root())


def _on_nodes(
    arguments: RunArguments, nodes: Sequence[Node], environ: Environment, token: str
) -> list[tuple[Path, Ref]]:
    found = cluster.on_nodes(
        nodes,
        ready_here,
        arguments,
        dict(environ.secrets),
        token,
        env_vars=environ.open_vars,
        timeout_s=None,
    )
    return list(found.values())


def _has(
    model_dir: str, ref: prepared.PreparedRef, tokenized_path: str | None, anew: str | None
) -> bool:
    """Whether this node has the model and, in its own store, the prepared data; that of run `anew`.

    Raises:
        StoreError: the data is damaged.
    """
    place = tokenized_path or store.join(str(prepared_root()), ref.key)
    if not os.path.isdir(model_dir) or not store.is_committed(place):
        return False
    token = store.read_manifest(place).metadata.get("run_token")
    return (anew is None or token == anew) and _sees_intact(place)


def _sees_intact(place: str) -> bool:
    """Whether prepared data is seen from this node, where its bytes are then looked at once.

    Raises:
        StoreError: it is damaged.
    """
    if not os.path.isdir(place):
        return False
    intact.check(place, prepared_root())
    return True


def _with(environ: Environment) -> dict[str, Any]:
    """How tasks that look into a node's store are called."""
    return {"env_vars": environ.open_vars}


def ready_here(
    arguments: RunArguments,
    secrets: Mapping[str, str],
    run_token: str | None = None,
    *,
    build_shards: prepared.BuildShards | None = None,
) -> tuple[Path, Ref]:
    """Resolve model and adapters, and build the prepared data set on this machine."""
    os.environ.update(secrets)
    model_dir = hub.resolve_all(arguments.model, arguments.rlhf)
    root = prepared_root()
    ref = access.ready(
        arguments, model_dir, root=root, run_token=run_token, build_shards=build_shards
    )
    return model_dir, ref


def prepared_root() -> Path:
    """Where prepared data sets lie on this machine."""
    return environment.prepared_directory(os.environ)
