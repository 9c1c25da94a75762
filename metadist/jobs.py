"""Ray jobs: `metadist train` on a cluster, sent there from the user's own machine.

Ray's client reads the token itself (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token); here it is never
looked at, so that it gets into no command, environment or log.
"""

import asyncio
import logging
import math
import os
import queue
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from requests.exceptions import RequestException

from metadist.config import Config
from metadist.distributed.access import INSECURE_VARIABLE, refuse_open_dashboard
from metadist.distributed.placement import Node, check_fits
from metadist.errors import ClusterError, UserError, first_line

CONNECT_TIMEOUT_S = 10.0
POLL_S = 1.0
EXCLUDES = [
    "/data",
    "/runs",
    "/build",
    "/dist",
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".*_cache",
    ".ray",
    "*.egg-info",
]
"""What no job needs, or must not get, beside what .gitignore and .rayignore name (patterns of gitignore)."""
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class Job:
    """A job on a cluster, and how to get back to it."""

    id: str
    address: str

    @property
    def attach_command(self) -> str:
        return shlex.join(["ray", "job", "logs", "-f", self.id, "--address", self.address])

    @property
    def stop_command(self) -> str:
        return shlex.join(["ray", "job", "stop", self.id, "--address", self.address])


class JobServer:
    """The job server of one cluster. Every method raises ClusterError where it does not answer or refuses us."""

    def __init__(self, address: str | None) -> None:
        """`address` is the dashboard's; left out, $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS."""
        self.address = _checked_address(address)
        _check_answers(self.address)
        refuse_open_dashboard(self.address)
        with _told_errors(self.address), _this_address_alone():
            self._client = JobSubmissionClient(self.address)
        # Ray tells of every file that it leaves out. What goes wrong is raised.
        logging.getLogger("ray").setLevel(logging.ERROR)

    def check_fits(self, config: Config) -> None:
        """Raises ClusterError where the least number of adapters has no room, and no node may come."""
        nodes = self._nodes()
        if config.scaling.worker_limits[1]:
            check_fits(config.scaling, nodes, self._may_grow)

    def submit(self, entrypoint: list[str], directory: Path, metadata: dict[str, str]) -> Job:
        """Packs `directory` and runs the command there, on the cluster's head."""
        with _told_errors(self.address):
            try:
                id = self._client.submit_job(
                    entrypoint=shlex.join(entrypoint),
                    runtime_env={"working_dir": str(directory), "excludes": EXCLUDES} | _as_trusting(),
                    metadata=metadata,
                )
            except ValueError as error:
                raise UserError(
                    f"{directory}: cannot be packed for the cluster ({first_line(error)}). Name what the job does not"
                    " need in a .rayignore file there (patterns as in .gitignore)."
                ) from None
        return Job(id, self.address)

    def follow(self, job: Job, write: Callable[[str], None]) -> None:
        """Gives the job's output as it comes; returns when the job has ended or the cluster hangs up.

        Ctrl-C raises KeyboardInterrupt at once: the connection is another thread's, and nobody waits for it to close.
        """
        output: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(job.id):
                output.put(lines)

        def read() -> None:
            try:
                asyncio.run(tail())
            except BaseException as error:
                output.put(error)
            else:
                output.put(None)

        threading.Thread(target=read, name="job output", daemon=True).start()
        with _told_errors(self.address):
            while (found := output.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                write(found)

    def status(self, job: Job) -> str:
        """SUCCEEDED, FAILED, STOPPED, PENDING or RUNNING."""
        with _told_errors(self.address):
            return str(self._client.get_job_status(job.id).value)

    def wait(self, job: Job) -> tuple[str, int, str]:
        """Status, exit status and Ray's message, once the job has ended."""
        while True:
            with _told_errors(self.address):
                details = self._client.get_job_info(job.id)
            if details.status.is_terminal():
                break
            time.sleep(POLL_S)
        code = details.driver_exit_code
        if details.status == JobStatus.SUCCEEDED:
            code = 0
        elif not code or code < 0:
            code = 1
        return str(details.status.value), int(code), details.message or ""

    def _nodes(self) -> list[Node]:
        found = self._get("/api/v0/nodes?detail=1&limit=10000")["result"]["result"]
        return [Node(node["resources_total"], node["labels"] or {}) for node in found if node["state"] == "ALIVE"]

    def _may_grow(self) -> bool:
        """Whether nodes may come: the monitor of a cluster without autoscaler reports here, an autoscaler does not."""
        return self._get("/api/cluster_status")["clusterStatus"] is None

    def _get(self, path: str) -> dict[str, Any]:
        with _told_errors(self.address):
            # Of the client's own, since Ray's list_nodes() cannot be told an address apart from the environment's.
            response = self._client._do_request("GET", path, timeout=CONNECT_TIMEOUT_S)
            response.raise_for_status()
            data: dict[str, Any] = response.json()["data"]
        return data


def _as_trusting() -> dict[str, Any]:
    """The job joins its cluster as `metadist submit` was told to: open or not."""
    return {"env_vars": {INSECURE_VARIABLE: "1"}} if os.environ.get(INSECURE_VARIABLE) == "1" else {}


def _checked_address(address: str | None) -> str:
    """HTTP or HTTPS, host and port of a dashboard."""
    found = address or next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), None)
    if not found:
        raise ClusterError(
            "--address must be given: the address of the cluster's dashboard, usually http://HEAD:8265"
            " (or set RAY_API_SERVER_ADDRESS)."
        )
    parts = urlsplit(found)
    try:
        port: float | None = parts.port
    except ValueError:
        port = math.nan
    if parts.username or parts.password:
        raise ClusterError(
            "--address must not hold a user or a password: it is shown in commands and logs. For a token set"
            " RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port != port or parts.query or parts.fragment:
        raise ClusterError(
            f"--address must be that of the cluster's dashboard, http://HOST:PORT (usually port 8265), got {found!r}."
            " The head's own port (usually 6379) is for `metadist train --address`."
        )
    return found.rstrip("/")


def _check_answers(address: str) -> None:
    """Ray's client would wait for minutes where packets vanish."""
    parts = urlsplit(address)
    place = (str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80))
    try:
        socket.create_connection(place, timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"--address: nothing answers at {address} ({error}). Check the address, that the head runs with its"
            " dashboard (`ray start --head` has one), and the tunnel or port-forward if there is one."
        ) from None


@contextmanager
def _this_address_alone() -> Iterator[None]:
    """Ray's client lets these variables overrule the address that it is given."""
    kept = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _told_errors(address: str) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"--address: the cluster at {address} asks for a token ({first_line(error)}). Set RAY_AUTH_MODE=token, and"
            " the token in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token."
        ) from None
    except (RequestException, ConnectionError, RuntimeError, OSError) as error:
        raise ClusterError(
            f"--address: the job server at {address} does not do what it is asked ({first_line(error)}). Check that it"
            " is the dashboard of a Ray cluster of this version, and `ray job list`."
        ) from None
