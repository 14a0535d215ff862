"""Starts a Ray cluster of several nodes on this machine, until its standard input ends.

python start_cluster.py [--dashboard] CORES ADDRESS[=CACHE]...

CACHE is the LLMRAY_CACHE of that node; others have none of their own. All nodes but the head have
their ADDRESS as the label `place`.
"""

import os
import socket
import sys

from ray.cluster_utils import Cluster


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def main() -> None:
    words = sys.argv[1:]
    has_dashboard = words[0] == "--dashboard"
    cores, *others = words[has_dashboard:]
    options = {"num_cpus": int(cores), "object_store_memory": 100 * 2**20}
    os.environ.pop("LLMRAY_CACHE", None)  # what a node has is its own
    # no process is started for every core before there is a task for it, and none gives way to
    # what else the machine does
    os.environ |= {
        "RAY_worker_niceness": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_num_prestart_python_workers": "0",
        "RAY_enable_worker_prestart": "0",
    }
    cluster = Cluster(
        initialize_head=True,
        # not on 127.0.0.1: drivers take that for the machine's address
        head_node_args={
            **options,
            "include_dashboard": has_dashboard,
            # the usual ones may be another cluster's
            "dashboard_port": free_port(),
            "dashboard_agent_listen_port": free_port(),
        },
    )
    for other in others:
        address, _, cache = other.partition("=")
        own = {"env_vars": {"LLMRAY_CACHE": cache}} if cache else {}
        cluster.add_node(**options, node_ip_address=address, labels={"place": address}, **own)
    cluster.wait_for_nodes(timeout=120)
    print(cluster.address, cluster.head_node.get_session_dir_path(), cluster.webui_url, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
