"""Training as a Ray job: checked here, packed, submitted through the dashboard's address, its log followed."""

import asyncio
import os
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from metadist.config import Config
from metadist.distributed.placement import check_fits
from metadist.errors import ClusterError, UserError, first_line

CONNECT_TIMEOUT_S = 10.0
RECONNECT_S = 1.0
NOT_PACKED = (
    "/data/",
    "/runs/",
    "/.git/",
    "venv/",
    ".venv/",
    "__pycache__/",
    ".*_cache/",
    ".ray/",
    ".env",
    "auth_token",
    "*.parquet",
    "*.safetensors",
)
"""What stays here, as in a .gitignore, which Ray heeds besides."""


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    address: str
    submission_id: str

    @property
    def how_to_attach(self) -> str:
        return self._command("logs", "--follow")

    @property
    def how_to_stop(self) -> str:
        return self._command("stop")

    def _command(self, *words: str) -> str:
        return shlex.join(["ray", "job", *words, "--address", self.address, self.submission_id])


class Cluster:
    """The job server of one cluster. Raises ClusterError where it does not answer or refuses us."""

    def __init__(self, address: str) -> None:
        _check_answers(address)
        self.address = address
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise _refused(address, error) from None
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"--address: something answers at {address!r}, but no Ray dashboard ({first_line(error)})."
                " Give the dashboard's address (usually port 8265)."
            ) from None

    def check_fits(self, config: Config) -> None:
        """Raises ClusterError where the least number of adapters has no room."""
        try:
            nodes = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")], detail=True)
        except (OSError, RayStateApiException, RuntimeError) as error:
            raise ClusterError(
                f"--address: {self.address!r} does not say which nodes it has ({first_line(error)})."
                " Check the cluster with `ray status` on its head."
            ) from None
        check_fits(config.scaling, [dict(node.resources_total or {}) for node in nodes], False)

    def submit(self, entrypoint: Sequence[str], project: Path) -> Job:
        """Packs `project`, without data, environments and runs, and starts the job."""
        try:
            submission_id = self._client.submit_job(
                entrypoint=shlex.join(entrypoint),
                runtime_env={"working_dir": str(project), "excludes": list(NOT_PACKED)},
            )
        except AuthenticationError as error:
            raise _refused(self.address, error) from None
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"{project} could not be submitted to {self.address!r} ({first_line(error)})."
                " Keep big files out of it with a .rayignore or .gitignore, and see the head's dashboard.log."
            ) from None
        return Job(self.address, submission_id)

    def follow(self, job: Job, show: Callable[[str], None]) -> None:
        """Gives the job's log to `show`, line by line, until the job ends; reconnects where the connection breaks."""
        shown = 0
        while True:
            shown = asyncio.run(self._follow_once(job, show, shown))
            if self.status(job).is_terminal():
                return
            time.sleep(RECONNECT_S)

    async def _follow_once(self, job: Job, show: Callable[[str], None], skip: int) -> int:
        """Shows the log from line `skip`; gives the number of lines that have been shown."""
        seen, rest = 0, ""
        try:
            async for text in self._client.tail_job_logs(job.submission_id):
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    seen += 1
                    if seen > skip:
                        show(line)
        except (aiohttp.ClientError, RuntimeError):
            # Whether the cluster is gone or only this connection, the job's status tells.
            return max(seen, skip)
        if rest and seen >= skip:
            show(rest)
        return max(seen, skip)

    def status(self, job: Job) -> JobStatus:
        return self._details(job).status

    def outcome(self, job: Job) -> tuple[str, int | None, str]:
        """Status, the training process's exit status where it is known, and Ray's message."""
        details = self._details(job)
        return details.status.value, details.driver_exit_code, details.message or ""

    def _details(self, job: Job) -> Any:
        try:
            return self._client.get_job_info(job.submission_id)
        except (OSError, RuntimeError) as error:
            raise ClusterError(
                f"{self.address!r} answers no more ({first_line(error)}); the job may go on without us."
                f" Attach again with:\n  {job.how_to_attach}"
            ) from None


def check_paths(config: Config, config_file: str, project: Path) -> str:
    """The config's path within the project. Raises UserError where the job would miss a file or lose its run."""
    path = Path(config_file).resolve()
    if not path.is_relative_to(project):
        raise UserError(
            f"{config_file} lies outside of {project}, the directory that is packed."
            " Submit from a directory that holds the config."
        )
    storage = config.run.storage_path
    if not _is_absolute(storage):
        raise UserError(
            f"run.storage_path must be absolute or a URI for a job, got {storage!r}: the job runs in a copy of this"
            " directory, which the cluster deletes. For example: --run-dir s3://BUCKET/runs/NAME, or a directory that"
            " every node sees."
        )
    pool = getattr(config.task, "pool", None)
    if isinstance(pool, str | Path) and not _is_absolute(str(pool)):
        raise UserError(
            f"task.pool must be absolute or a URI for a job, got {str(pool)!r}: data is not packed. Put it where every"
            " node sees it, and add --set task.pool=s3://BUCKET/POOL.parquet or its path there."
        )
    return str(path.relative_to(project))


def check_no_token(words: Sequence[str], config_text: str) -> None:
    """Raises UserError where a config or an option holds the cluster's token: both end up in logs."""
    token = _token()
    if token and any(token in text for text in (*words, config_text)):
        raise UserError(
            "the config or an option holds the cluster's token, which the job's log would show to everybody."
            " Take it out, and set RAY_AUTH_TOKEN or ~/.ray/auth_token instead."
        )


def _token() -> str:
    """The token that Ray would send, looked up where Ray does; empty where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else ""


def _is_absolute(location: str) -> bool:
    return "://" in location or location.startswith(("/", "~"))


def _check_answers(address: str) -> None:
    """Raises ClusterError unless somebody listens there: Ray itself would wait without a limit."""
    parts = urlsplit(address)
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        port = None
    if parts.username or parts.password:
        raise ClusterError(
            "--address must not hold a user name or password. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
        )
    if not port or not parts.hostname:
        raise ClusterError(
            f"--address must be the http:// or https:// address of a Ray dashboard, got {address!r}."
            " For example: --address http://127.0.0.1:8265"
        )
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"--address: nothing answers at {address!r} ({error}). Check the address, that the head runs, and on"
            " Kubernetes that `kubectl port-forward` does."
        ) from None


def _refused(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"--address: {address!r} asks for a token, and {'the one given is not right' if _token() else 'none is given'}"
        f" ({first_line(error)}). Set RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN, in a file named by"
        " RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token."
    )
