"""Joining a Ray cluster, or starting a local one."""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import ray
from ray._private import services
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError
from rich.console import Console
from rich.text import Text

from metadist.distributed.access import make_token, refuse_open_head
from metadist.distributed.placement import Node, check_fits, check_learner_fits, resources_per_adapter
from metadist.errors import ClusterError, first_line
from metadist.sections import ScalingSettings

CONNECT_TIMEOUT_S = 10.0
FIRST_REPORT_S = 20.0
POLL_S = 0.2


def connect(scaling: ScalingSettings, console: Console) -> Callable[[], None]:
    """Connects this process to Ray, and checks that the adapters fit; gives what undoes it.

    Joins `scaling.address`, else $RAY_ADDRESS, else starts a local cluster. A Ray that this process is
    already connected to is used as it is and stays. Raises ClusterError.
    """
    if ray.is_initialized():
        _check_fits(scaling)
        return lambda: None
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    # What a dead actor's calls raise, that nobody waits for any more, Ray would print: a loss has its own line.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        if address:
            _check_answers(address)
            refuse_open_head(address)
            console.print(Text(f"Joining the Ray cluster at {address}"))
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            if address == "auto":  # Whose address is known only now.
                _refuse_where_open(ray.get_runtime_context().gcs_address)
        else:
            console.print("Starting a local Ray")
            make_token()
            # "local": left out, Ray would join whatever cluster was last started on this machine.
            with _beyond_our_signals():
                ray.init(
                    address="local",
                    num_cpus=_local_cpus(scaling, console),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    # Ray would run its workers at niceness 15, where whatever else the machine does comes first.
                    _system_config={"worker_niceness": 0},
                )
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        if not address:
            raise ClusterError(
                f"a local Ray did not start ({first_line(error)}). See `metadist doctor`; --workers 0 needs no Ray."
            ) from None
        # Ray reports a missing token as a failed connection.
        raise ClusterError(
            f"scaling.address: somebody answers at {address!r}, but Ray cannot join ({first_line(error)}). If that"
            " cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token); otherwise"
            " check that it is the head's port (usually 6379) and of the same Ray version."
        ) from None
    try:
        _check_fits(scaling)
    except ClusterError:
        ray.shutdown()
        raise
    return ray.shutdown


def _refuse_where_open(address: str) -> None:
    """As `refuse_open_head`, having left the cluster."""
    try:
        refuse_open_head(address)
    except ClusterError:
        ray.shutdown()
        raise


@contextmanager
def _beyond_our_signals() -> Iterator[None]:
    """What Ray starts meanwhile lies in sessions of its own, out of reach of signals to this process's group.

    Ray's GCS and raylet end at SIGTERM. `timeout`, supervisors and Slurm send it to the whole group; the rest of
    the step and the checkpoint need them. They still end with this process, which Ray asks of the kernel.
    """
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


def _check_answers(address: str) -> None:
    """Raises ClusterError unless somebody listens at HOST:PORT: Ray itself would wait for many minutes."""
    host, _, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if "://" in address or not host or not port.isdigit():
        raise ClusterError(
            f"scaling.address must be HOST:PORT of a Ray head (usually port 6379) or 'auto', got {address!r}."
            " To use a Ray dashboard's http:// address, run this command through `ray job submit`."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"scaling.address: nothing answers at {address!r} ({error}). Check the address and that the head runs"
            " (`ray status`), or leave it out for a local Ray."
        ) from None


def _local_cpus(scaling: ScalingSettings, console: Console) -> int:
    """CPUs that a local Ray is told it has: this machine's, or more where more adapters are asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    needed = math.ceil(scaling.worker_limits[0] * resources_per_adapter(scaling).get("CPU", 0))
    if needed > cores:
        console.print(f"[yellow]{scaling.worker_limits[0]} adapters share {cores} cores: no faster than fewer of them.")
    return max(cores, needed)


def _check_fits(scaling: ScalingSettings) -> None:
    """Raises ClusterError where the least number of adapters, or the learner, has no room."""
    nodes = alive_nodes()
    check_fits(scaling, list(nodes.values()), may_grow)
    check_learner_fits(scaling, nodes[ray.get_runtime_context().get_node_id()])


def alive_nodes() -> dict[str, Node]:
    """The cluster's nodes by their ids."""
    return {node["NodeID"]: Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]}


def may_grow() -> bool:
    """Whether nodes may come that are not there yet: an autoscaler reports to the cluster, asked for any or not."""
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    began = time.monotonic()
    # Just after a cluster was started, neither has reported yet.
    while time.monotonic() - began < FIRST_REPORT_S:
        status = GetClusterStatusReply.FromString(gcs.get_cluster_status(timeout_s=CONNECT_TIMEOUT_S))
        if status.autoscaling_state.autoscaler_state_version:
            return True
        # Where there is no autoscaler, Ray's older monitor only says how the nodes are.
        if gcs.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None, timeout=CONNECT_TIMEOUT_S):
            return False
        time.sleep(POLL_S)
    return False
