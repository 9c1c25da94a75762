"""Tokens of the clusters that metadist starts, and what it says about those of others."""

import http.server
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from metadist.distributed import access
from metadist.errors import ClusterError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", access.INSECURE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_token_is_made_for_its_owner_alone_and_kept(home: Path) -> None:
    old = os.umask(0)
    try:
        access.make_token()
    finally:
        os.umask(old)
    file = home / ".ray/auth_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = file.read_text()
    assert len(token) == 64
    file.chmod(0o644)
    access.make_token()
    assert file.read_text() == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "0123")])
def test_no_token_is_made_where_none_is_wanted_or_one_is_given(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    access.make_token()
    assert not (home / ".ray").exists()


@pytest.mark.ray
@pytest.mark.head
def test_a_local_ray_asks_for_the_token_unless_it_is_told_not_to(home: Path) -> None:
    program = """
import ray
from rich.console import Console
from metadist.distributed.access import lets_anybody_in
from metadist.distributed.cluster import connect
from metadist.sections import ScalingSettings
disconnect = connect(ScalingSettings(num_workers=1), Console(stderr=True))
print(lets_anybody_in(ray.get_runtime_context().gcs_address), ray.get(ray.remote(lambda: "ours").remote()))
disconnect()
"""
    said = {}
    for mode in ({}, {"RAY_AUTH_MODE": "disabled"}):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=os.environ | mode, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said[bool(mode)] = done.stdout.split()
    assert said == {False: ["False", "ours"], True: ["True", "ours"]}
    assert stat.S_IMODE((home / ".ray/auth_token").stat().st_mode) == 0o600


@pytest.fixture
def dashboard() -> Iterator[http.server.HTTPServer]:
    """A server that answers as a dashboard does: with what `status` says."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if "Authorization" not in self.headers else 500)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "refused"), [(200, True), (401, False), (403, False)])
def test_an_open_dashboard_elsewhere_is_refused_unless_told_otherwise(
    dashboard: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, status: int, refused: bool
) -> None:
    dashboard.status = status  # type: ignore[attr-defined]
    address = f"http://127.0.0.1:{dashboard.server_port}"
    access.refuse_open_dashboard(address)
    monkeypatch.setattr(access, "is_this_machine", lambda host: False)
    if refused:
        with pytest.raises(ClusterError, match=f"^{address} is not on this machine and asks for no token"):
            access.refuse_open_dashboard(address)
    else:
        access.refuse_open_dashboard(address)
    monkeypatch.setenv(access.INSECURE_VARIABLE, "1")
    access.refuse_open_dashboard(address)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("head", False),
    ],
)
def test_this_machine_is_the_loopback(host: str, here: bool) -> None:
    assert access.is_this_machine(host) == here
