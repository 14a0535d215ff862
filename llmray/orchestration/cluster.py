"""The cluster: joining or starting it, its nodes, their versions, what they see, the environment.

The one place that decides `ray.init`, its authentication, and which environment variables workers
get. What of the cluster a run takes is for `plan`.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._private.state import state
from ray.exceptions import AuthenticationError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import llmray
from llmray import store, temporary
from llmray.arguments import environment
from llmray.arguments.cluster import ClusterArguments
from llmray.errors import ClusterError, LlmrayError
from llmray.orchestration.plan import Inventory, Node

log = getLogger("llmray")

T = TypeVar("T")

PACKAGES = ("ray", "torch", "transformers")
ANSWER_S = 10.0  # a head that is being started; Ray itself would try for forty seconds
NODE_TIMEOUT_S = 120.0  # a node's first task starts a Python process and imports

# what the driver's environment gives to workers; the rest stays here
PASSED_PROXIES = frozenset(("http_proxy", "https_proxy", "no_proxy", "all_proxy"))
PASSED_NAMES = frozenset(
    (
        "TOKENIZERS_PARALLELISM",
        "TP_SOCKET_IFNAME",
        "USE_MODELSCOPE_HUB",
        "USE_OPENMIND_HUB",
        "MODELSCOPE_CACHE",
        "LLMRAY_CACHE",
        "LLMRAY_DEBUG",
        "LLAMAFACTORY_VERBOSITY",
        "DISABLE_VERSION_CHECK",
        "FORCE_CHECK_IMPORTS",
        "NPU_JIT_COMPILE",
        "RECORD_VRAM",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "CUDA_DEVICE_MAX_CONNECTIONS",
    )
)
SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)S?($|_)", re.I)
SECRET_VALUE = re.compile(r"://[^/@]+:[^/@]+@")  # a user and a password in an address


@dataclass(frozen=True)
class Joined:
    """The cluster that this process is a driver of: its address, and whether it started it."""

    address: str
    is_ours: bool

    def __str__(self) -> str:
        if self.is_ours:
            return "Ray: started a local cluster on this machine (RAY_ADDRESS names another)"
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        return f"Ray: joined the cluster at {self.address}, {nodes} node(s)"


def connect(arguments: ClusterArguments) -> Joined:
    """Join the cluster that the arguments or the environment name, else start one here.

    Raises:
        ClusterError: there is no cluster at that address, or it cannot be joined.
    """
    debug = environment.debug(os.environ)
    wanted = dict(arguments.ray_init_kwargs or {})
    address = wanted.pop("address", None) or os.environ.get("RAY_ADDRESS")
    if address and "://" in address:
        what = "the job API" if address.startswith("http") else "the Ray Client"
        raise ClusterError(
            f"The cluster's address {address} is one of {what}, over which training cannot be "
            "steered. Submit the run instead: ray job submit --address http://HEAD:8265 -- "
            "llmray train RUN.yaml; or name the address HEAD:6379 on a machine of the cluster."
        )
    if "runtime_env" in wanted:
        # the user's runtime environment is combined with that of a submitted job
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    options = {
        "include_dashboard": False,
        "log_to_driver": debug,
        "logging_level": "INFO" if debug else "CRITICAL",
        **wanted,
    }
    _authenticate(address)
    if address in (None, "local"):
        # Ray would start workers at the priority 15, behind whatever else this machine does
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        with _in_a_session_of_their_own():
            info = ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, OSError, AuthenticationError) as error:
        raise ClusterError(_cannot_connect(address, error)) from error
    started = address in (None, "local") and _started_here()
    return Joined(str(info.address_info["gcs_address"]), started)


def inventory() -> Inventory:
    """The living nodes, their resources, and what is free of them."""
    nodes = tuple(
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            {k: v for k, v in node["Resources"].items() if not k.startswith("node:")},
            dict(node["Labels"]),
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    # remove when ray has a public call: the autoscaler's configuration, as Ray Train reads it
    limits = state.get_max_resources_from_cluster_config()
    return Inventory(nodes, ray.available_resources(), limits or None)


def on_nodes(
    nodes: Sequence[Node],
    function: Callable[..., T],
    *args: Any,
    env_vars: Mapping[str, str] | None = None,
    num_cpus: float = 0,
    timeout_s: float | None = NODE_TIMEOUT_S,
) -> dict[str, T]:
    """The results of `function(*args)` run once on each node, by node id.

    Raises:
        LlmrayError: what the function raised, on the first node that failed.
        ClusterError: a node could not run it.
    """
    task = ray.remote(function)
    refs = [
        task.options(
            num_cpus=num_cpus,
            max_retries=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            runtime_env={"env_vars": dict(env_vars or {})},
        ).remote(*args)
        for node in nodes
    ]
    results = {}
    for node, ref in zip(nodes, refs, strict=True):
        try:
            results[node.node_id] = ray.get(ref, timeout=timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, LlmrayError):
                raise error.cause from None
            raise ClusterError(_node_failed(node, str(error.cause or error))) from error
        except RayError as error:
            raise ClusterError(_node_failed(node, f"{type(error).__name__} {error}")) from error
    return results


def check_versions(nodes: Sequence[Node], env_vars: Mapping[str, str] | None = None) -> None:
    """Compare what decides a run's numbers on these nodes with this process.

    Here as below `env_vars` are those of the run's other tasks, which then share a process.

    Raises:
        ClusterError: names every node that differs, and both versions.
    """
    if not nodes:
        return
    if environment.version_check_disabled(os.environ):
        log.warning("DISABLE_VERSION_CHECK is set: versions on the nodes are not compared")
        return
    here = versions()
    wrong = []
    by_id = {node.node_id: node for node in nodes}
    for node_id, there in on_nodes(nodes, versions, env_vars=env_vars).items():
        wrong += [
            f"node {by_id[node_id].address} has {name} {there.get(name)}, the driver {version}"
            for name, version in here.items()
            if there.get(name) != version
        ]
    if wrong:
        raise ClusterError(
            "Versions differ: "
            + "; ".join(wrong)
            + ". All nodes need the same environment. Install the driver's there, or set "
            "DISABLE_VERSION_CHECK=1 to go on at your own risk."
        )


def versions() -> dict[str, str]:
    """Versions of this process: Python, ray, torch, transformers, and llmray with its code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "(not installed)"
    root = Path(llmray.__file__).parent
    code = 0
    for file in sorted(root.rglob("*.py")):
        code = zlib.crc32(file.relative_to(root).as_posix().encode() + file.read_bytes(), code)
    found["llmray"] = f"{llmray.__version__} (code {code:08x})"
    return found


def check_visible(
    nodes: Sequence[Node], directory: str, key: str, env_vars: Mapping[str, str] | None = None
) -> None:
    """Write a file into `directory` here and read it on all nodes.

    Raises:
        ClusterError: names the nodes that do not see it; `key` is what set the directory.
    """
    if store.is_uri(directory) or not nodes:
        return
    probe = store.join(directory, temporary.new_name("probe"))  # another run may look, too
    content = os.urandom(16).hex()
    store.write_atomic(probe, content)
    try:
        seen = on_nodes(nodes, _reads, probe, content, env_vars=env_vars)
    finally:
        Path(probe).unlink(missing_ok=True)
    _refuse_unseen(nodes, seen, directory, key)


def check_exists(
    nodes: Sequence[Node], path: str, key: str, env_vars: Mapping[str, str] | None = None
) -> None:
    """Look for something that is here on all nodes; a name that is no path passes.

    Raises:
        ClusterError: names the nodes that do not have it.
    """
    if not nodes or not os.path.exists(path):
        return
    seen = on_nodes(nodes, os.path.exists, path, env_vars=env_vars)
    _refuse_unseen(nodes, seen, path, key)


def split_environment(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The variables that workers get: those for their runtime environment, and the secrets."""
    added = environment.passed_on(environ)
    open_vars: dict[str, str] = {}
    secrets = environment.secrets(environ)
    for name, value in environ.items():
        is_named = name in PASSED_NAMES or name in added or name.lower() in PASSED_PROXIES
        if not (is_named or name.startswith(environment.PASSED_PREFIXES)):
            continue
        is_secret = SECRET_NAME.search(name) or SECRET_VALUE.search(value)
        # a node that has a cache of its own keeps it
        passed_as = environment.DRIVER_CACHE if name == "LLMRAY_CACHE" else name
        (secrets if is_secret else open_vars)[passed_as] = value
    return open_vars, secrets


def _authenticate(address: str | None) -> None:
    """Use the token of this machine for a cluster that asks for one.

    Ray does so itself for clusters that it finds or starts; for an address it wants RAY_AUTH_MODE,
    and a wrong guess, or a wrong token, fails late and unclearly.
    """
    if not address or address in ("auto", "local"):
        return
    from ray._private.authentication import authentication_token_setup as setup

    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "token" and not _has_token():
        raise ClusterError(_refused(address))
    try:
        _wait_for_answer(address)
        try:
            _call(address)
        except AuthenticationError:
            if mode or not _has_token():
                raise
            setup._enable_token_auth()
            _call(address)
    except (RayError, ValueError, RuntimeError, ConnectionError) as error:
        raise ClusterError(_cannot_connect(address, error)) from error


def _wait_for_answer(address: str) -> None:
    """Wait until something listens at HOST:PORT; what is no such address is for Ray to refuse.

    Raises:
        ConnectionError: nothing does for `ANSWER_S`.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S):
                return
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(f"nothing listens there ({error})") from error
        time.sleep(0.2)


def _call(address: str) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    with _silent_stderr():  # Ray's C++ part writes what the exception says
        GcsClient(address=address)


def _has_token() -> bool:
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cannot_connect(address: str | None, error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, AuthenticationError):
        return _refused(address)
    if address in (None, "local"):
        return (
            f"A local Ray cluster could not be started: {text}. Mend that, name a running cluster "
            "by RAY_ADDRESS, or set use_ray: false."
        )
    return (
        f"The Ray cluster at {address} cannot be joined: {text}. Start it (`ray start --head`), "
        "mend RAY_ADDRESS or ray_init_kwargs.address, or leave both out for a local one."
    )


def _refused(address: str | None) -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return (
            f"The Ray cluster at {address} asks for a token, and RAY_AUTH_MODE=disabled sends "
            "none. Unset RAY_AUTH_MODE."
        )
    met = "refuses the token that is" if _has_token() else "asks for a token, and none is"
    return (
        f"The Ray cluster at {address} {met} here. Set RAY_AUTH_TOKEN, or copy the cluster's "
        "~/.ray/auth_token to this machine (`ray get-auth-token` on the cluster shows it)."
    )


@contextmanager
def _in_a_session_of_their_own() -> Iterator[None]:
    """Let processes that Ray starts in the block be out of reach of signals to this one's group.

    Ctrl-C in a terminal and `timeout` send theirs to the whole group. A cluster of our own would
    end at once, and with it what is to be saved; as it is, the kernel ends it with this process.
    Remove when ray.init can be asked for this.
    """
    from ray._private import services, utils

    started = services.ConsolePopen
    if utils.detect_fate_sharing_support():  # elsewhere Ray ends them by their group
        services.ConsolePopen = partial(started, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = started


def _started_here() -> bool:
    node = ray._private.worker._global_node  # remove when RayContext says so itself
    return node is not None and node.is_head()


def _node_failed(node: Node, text: str) -> str:
    line = " ".join(text.split())[:500]
    return (
        f"Node {node.address} could not do its part before training: {line}. Every node needs "
        "llmray's environment and must answer; mend it, or take it out of the cluster."
    )


def _reads(path: str, content: str) -> bool:
    return os.path.isfile(path) and Path(path).read_text() == content


def _refuse_unseen(nodes: Sequence[Node], seen: Mapping[str, bool], path: str, key: str) -> None:
    blind = [node.address for node in nodes if not seen[node.node_id]]
    if blind:
        raise ClusterError(
            f"{key}={path} is not seen by {len(blind)} of {len(nodes)} nodes ({', '.join(blind)}). "
            "All nodes must see it: put it on shared storage (NFS), or name a URI such as "
            "s3://bucket/folder."
        )
