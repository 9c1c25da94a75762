"""Ray on this machine, for the tests that need it."""

import os
import socket
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment in which Ray writes nothing into the user's home and asks for no token."""
    values = {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path_factory.mktemp("home"))}
    values["RAY_USAGE_STATS_ENABLED"] = "0"
    # At Ray's own 15 its workers would wait for whatever else the machine does: the other half of the tests, say.
    values["RAY_worker_niceness"] = "0"
    patch = pytest.MonkeyPatch()
    for name, value in values.items():
        patch.setenv(name, value)
    patch.delenv("RAY_ADDRESS", raising=False)
    yield os.environ | values
    import ray

    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="session")
def metrics_port() -> int:
    """Where the local Ray exports metrics."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def local_ray(ray_home: dict[str, str], metrics_port: int) -> Iterator[None]:
    """One local Ray, which stays for the modules after this one; `MetaTrainer` joins what is there.

    Within a module, a run takes the actors of the one before it. A fixture that needs another Ray ends this one with
    `ray.shutdown()`.
    """
    import ray

    if not ray.is_initialized():
        # Left out, the address would be that of a cluster that somebody else runs on this machine.
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            _metrics_export_port=metrics_port,
        )
    from metadist.distributed.kept_actors import actors_kept

    with actors_kept():
        yield
