"""A head with a job server and two more nodes, in a process of its own: token authentication is a whole process's.

Prints the dashboard's address once it is up; a line on stdin kills the last node, the end of stdin everything.
"""

import socket
import sys

from ray.cluster_utils import Cluster


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = {"object_store_memory": 100 * 2**20}
    ports = store | {"dashboard_agent_listen_port": 0}
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port, **ports}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
        tell(f"http://{cluster.head_node.webui_url}")
        for _ in sys.stdin:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            tell("killed")
    finally:
        cluster.shutdown()


main()
