"""Joining a cluster, its nodes, what they see, and what of the environment reaches workers."""

import logging
import os
import subprocess
import sys

import pytest

from llmray.arguments.cluster import ClusterArguments
from llmray.errors import ClusterError, DataError
from llmray.orchestration import cluster

NICENESS = "RAY_worker_niceness"


def arguments(address):
    return ClusterArguments(ray_init_kwargs={"address": address})


@pytest.fixture(scope="module")
def nodes(ray_address):
    """The nodes of the session's cluster, which this process has joined."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        joined = cluster.connect(arguments(ray_address))
        assert (joined.address, joined.is_ours) == (ray_address, False)
        yield list(cluster.inventory().nodes)
        ray.shutdown()


@pytest.mark.ray
def test_inventory_has_every_node_and_its_cores(nodes):
    addresses = {node.address for node in nodes}
    assert len(addresses) == 3
    assert addresses > {"127.0.0.2", "127.0.0.3"}
    assert [node.resources["CPU"] for node in nodes] == [2.0, 2.0, 2.0]
    assert cluster.inventory().limits is None


@pytest.mark.ray
def test_a_function_runs_once_on_each_node(nodes):
    def where():
        import ray

        return ray.get_runtime_context().get_node_id()

    assert cluster.on_nodes(nodes, where) == {node.node_id: node.node_id for node in nodes}


@pytest.mark.ray
def test_equal_versions_pass_and_a_difference_names_both(nodes, monkeypatch):
    cluster.check_versions(nodes)
    real = cluster.metadata.version
    fake = {"torch": "9.9.9"}
    monkeypatch.setattr(cluster.metadata, "version", lambda name: fake.get(name) or real(name))
    with pytest.raises(ClusterError) as caught:
        cluster.check_versions(nodes)
    text = str(caught.value)
    assert text.count("the driver 9.9.9") == 3
    assert f"node 127.0.0.2 has torch {real('torch')}" in text
    assert "DISABLE_VERSION_CHECK=1" in text
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    cluster.check_versions(nodes)


@pytest.mark.ray
def test_a_path_that_only_the_driver_sees_is_refused(nodes, tmp_path, monkeypatch):
    """/proc/self/cwd is another directory in every process that stands elsewhere."""
    cluster.check_visible(nodes, str(tmp_path), "ray_storage_path")
    assert os.listdir(tmp_path) == []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match=r"ray_storage_path=/proc/self/cwd/x is not seen by 3"):
        cluster.check_visible(nodes, "/proc/self/cwd/x", "ray_storage_path")
    (tmp_path / "model").mkdir()
    cluster.check_exists(nodes, str(tmp_path / "model"), "model_name_or_path")
    cluster.check_exists(nodes, "owner/name-on-a-hub", "model_name_or_path")
    with pytest.raises(ClusterError, match=r"model_name_or_path=.*shared storage \(NFS\)"):
        cluster.check_exists(nodes, "/proc/self/cwd/model", "model_name_or_path")


@pytest.mark.ray
def test_errors_of_a_node_come_back_as_one_message(nodes):
    def user_error():
        raise DataError("row 3 is bad")

    def defect():
        return {}["missing"]

    with pytest.raises(DataError, match="row 3 is bad"):
        cluster.on_nodes(nodes, user_error)
    with pytest.raises(ClusterError, match=r"Node \S+ could not .*missing"):
        cluster.on_nodes(nodes, defect)


@pytest.mark.ray
def test_environment_of_tasks_is_what_was_given(nodes):
    def look():
        return os.environ.get("HF_HOME"), os.environ.get("LEFT_BEHIND")

    found = cluster.on_nodes(nodes[:1], look, env_vars={"HF_HOME": "/models"})
    assert list(found.values()) == [("/models", None)]


CONNECT = """
import sys
from llmray.arguments.cluster import ClusterArguments
from llmray.errors import ClusterError
from llmray.orchestration import cluster
try:
    cluster.connect(ClusterArguments(ray_init_kwargs={"address": sys.argv[1]}))
except ClusterError as error:
    print(error)
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, "asks for a token, and none is here"),
        ({"RAY_AUTH_MODE": "token"}, "asks for a token, and none is here"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses the token that is here"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "refuses the token that is here"),
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token, and RAY_AUTH_MODE=disabled sends none"),
    ],
)
def test_cluster_that_wants_a_token_says_so(ray_address, tmp_path, environ, found):
    kept = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, ray_address],
        env={**kept, "HOME": str(tmp_path), **environ},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert f"The Ray cluster at {ray_address} {found}" in done.stdout, done.stdout + done.stderr
    assert "RAY_AUTH_" in done.stdout
    assert "InvalidAuthToken" not in done.stderr


def test_addresses_that_cannot_work_say_why(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ClusterError, match=r"ray://head:10001 is one of the Ray Client.*ray job"):
        cluster.connect(ClusterArguments(ray_init_kwargs={"address": "ray://head:10001"}))
    with pytest.raises(ClusterError, match=r"http://head:8265 is one of the job API.*ray job"):
        cluster.connect(ClusterArguments(ray_init_kwargs={"address": "http://head:8265"}))


@pytest.mark.parametrize(("address", "niceness"), [("local", "0"), ("auto", None)])
def test_workers_of_a_cluster_of_ones_own_give_way_to_nothing(address, niceness, monkeypatch):
    """A cluster that runs already has its own; "local" starts one here."""
    seen = []

    def init(**options):
        seen.append(os.environ.get(NICENESS))
        raise ConnectionError("far enough")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setenv(NICENESS, "")  # what the call sets is taken back
    monkeypatch.delenv(NICENESS)
    with pytest.raises(ClusterError, match="far enough"):
        cluster.connect(arguments(address))
    assert seen == [niceness]


def test_environment_is_split_into_open_variables_and_secrets():
    environ = {
        "HF_HOME": "/models",
        "HF_TOKEN": "canary-1",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TOKENIZERS_PARALLELISM": "false",
        "https_proxy": "http://proxy:3128",
        "HTTP_PROXY": "http://user:canary-2@proxy:3128",
        "WANDB_PROJECT": "p",
        "WANDB_DISABLED": "true",
        "WANDB_API_KEY": "canary-6",
        "SWANLAB_MODE": "offline",
        "RECORD_VRAM": "1",
        "FORCE_CHECK_IMPORTS": "1",
        "NPU_JIT_COMPILE": "1",
        "ASCEND_RT_VISIBLE_DEVICES": "0",
        "MY_FLAG": "1",
        "MY_API_KEY": "canary-3",
        "SWANLAB_API_KEY": "canary-4",
        "OTHER_SECRET": "canary-5",
        "PATH": "/bin",
        "OMP_NUM_THREADS": "64",
        "CUDA_VISIBLE_DEVICES": "",
        "LLMRAY_PASS_ENV": "MY_FLAG,MY_API_KEY",
    }
    open_vars, secrets = cluster.split_environment(environ)
    assert open_vars == {
        "HF_HOME": "/models",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TOKENIZERS_PARALLELISM": "false",
        "https_proxy": "http://proxy:3128",
        "WANDB_PROJECT": "p",
        "WANDB_DISABLED": "true",
        "SWANLAB_MODE": "offline",
        "RECORD_VRAM": "1",
        "FORCE_CHECK_IMPORTS": "1",
        "NPU_JIT_COMPILE": "1",
        "MY_FLAG": "1",
    }
    assert secrets == {
        "HF_TOKEN": "canary-1",
        "HTTP_PROXY": "http://user:canary-2@proxy:3128",
        "MY_API_KEY": "canary-3",
        "SWANLAB_API_KEY": "canary-4",
        "WANDB_API_KEY": "canary-6",
    }


@pytest.mark.ray
def test_dead_address_is_said_before_anything_starts(ray_home, caplog, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", 0.1)
    with (
        caplog.at_level(logging.CRITICAL),
        pytest.raises(ClusterError, match=r"127.0.0.1:1 cannot be joined: .*`ray start --head`"),
    ):
        cluster.connect(arguments("127.0.0.1:1"))


def test_what_ray_starts_is_out_of_reach_of_signals_to_our_group():
    from ray._private import services

    usual = services.ConsolePopen
    with cluster._in_a_session_of_their_own():
        process = services.ConsolePopen(["sleep", "60"])
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        assert os.getpgid(process.pid) != os.getpgid(0)
    finally:
        process.kill()
        process.wait()
    assert services.ConsolePopen is usual
