"""Ray on this machine, for the tests that need it."""

import os
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
    patch.undo()


@pytest.fixture(scope="module")
def local_ray(ray_home: dict[str, str]) -> Iterator[None]:
    """One local Ray for a module's tests; `MetaTrainer` joins what is there."""
    import ray

    # Left out, the address would be that of a cluster that somebody else runs on this machine.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
