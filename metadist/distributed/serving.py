"""The HTTP server on Ray Serve: replicas of one run's adapted models behind one address."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from rich.console import Console

from metadist.adaptation import load
from metadist.distributed.cluster import connect
from metadist.errors import ClusterError, first_line
from metadist.sections import ScalingSettings
from metadist.serving.limits import Limits

APPLICATION = "metadist"


@dataclass(frozen=True)
class ServerSettings:
    """What is served, where, and to whom."""

    run_dir: str
    step: int | None
    models_directory: str
    """Shared by all replicas."""
    host: str
    port: int
    token_sha256: str | None
    """Of the token that callers must give; None for none."""
    replicas: int
    address: str | None
    """Of a Ray cluster; None for a local one."""
    limits: Limits


def start(settings: ServerSettings, console: Console) -> Callable[[], None]:
    """Starts the server; returns once it answers, with what stops it. Raises ClusterError."""
    disconnect = connect(ScalingSettings(num_workers=settings.replicas, address=settings.address), console)

    def stop() -> None:
        serve.shutdown()
        disconnect()

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    options = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=settings.limits.seconds)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=quiet)
        serve.run(_application(settings), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except (RuntimeError, ValueError, OSError, RayError) as error:
        stop()
        raise ClusterError(
            f"the server did not start on {settings.host}:{settings.port} ({first_line(error)}). Is the port free?"
        ) from None
    return stop


def _application(settings: ServerSettings) -> Any:
    def make_replica() -> Any:
        # Imported where it runs: FastAPI comes with the extra `serve`.
        from metadist.serving.api import make_api
        from metadist.serving.models import AdaptedModels

        torch.set_num_threads(1)
        run = load(settings.run_dir, step=settings.step)
        models = AdaptedModels(run, Path(settings.models_directory), settings.limits)
        return make_api(run, models, settings.token_sha256, settings.limits)

    deployment = serve.deployment(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.limits.at_once,
        max_queued_requests=settings.limits.queue,
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.limits.seconds,
    )(serve.ingress(make_replica)())
    return deployment.bind()
