"""Many clients at once on `metadist serve`: answers that are right, refusals, a replica killed, and how long it takes.

    metadist serve RUN --port 8000
    python -m benchmarks.serving RUN http://127.0.0.1:8000 ~/.metadist/serve_token [--kill]

Good requests adapt to tasks of the run's test classes or predict with what was adapted before; every answer is compared
with the one that this process computes. Bad ones are of every kind of `BAD`. With --kill a replica on this machine is
killed half-way.
"""

import argparse
import base64
import http.client
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import metadist
from metadist.core.keys import TaskKey
from metadist.serving.limits import Limits
from metadist.serving.models import AdaptedModels

ADAPT = "adapt"
TRIES, PAUSE_S = 40, 0.5
"""Of a good request, while a replica is being replaced."""
REFUSALS = {
    "torn JSON": 422,
    "no such field": 422,
    "neither x nor images": 422,
    "wrong shape": 422,
    "ragged": 422,
    "not a number": 422,
    "fewer targets": 422,
    "too many examples": 422,
    "no image": 422,
    "too many bytes": 413,
    "unknown model": 404,
    "path for an id": 404,
    "no token": 401,
    "wrong token": 401,
}
"""Kinds of bad requests, and the status that each must have."""


@dataclass(frozen=True)
class Request:
    """One of them, and what must come back."""

    kind: str
    path: str
    body: bytes
    token: str | None
    status: int = 200
    predictions: list[Any] | None = None
    probabilities: np.ndarray | None = None


@dataclass
class Outcome:
    """Of all requests together."""

    right: int = 0
    refused: int = 0
    repeated: int = 0
    """Good requests that had an error first, and were sent again."""
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of good requests that were answered at the first try."""


def send(url: str, request: Request) -> tuple[int, bytes]:
    """Status and body; status 0 where the connection broke without an answer."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
    headers = {"Content-Type": "application/json"}
    if request.token is not None:
        headers["Authorization"] = f"Bearer {request.token}"
    try:
        try:
            connection.request("POST" if request.body else "GET", request.path, request.body or None, headers)
        except (BrokenPipeError, ConnectionResetError):
            # The server has answered and hung up before it had all of it.
            if request.status != 413:
                return 0, b""
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 413 if request.status == 413 else 0, b""
    finally:
        connection.close()


def storm(url: str, requests: list[Request], clients: int, half_way: Callable[[], None]) -> Outcome:
    """Sends all of them; `half_way` is called once, when half are out.

    Models are adapted once before, so that whoever asks for one by its id finds it.
    """
    outcome, lock, numbers = Outcome(), threading.Lock(), itertools.count()
    for body in {request.body: request for request in requests if request.kind == ADAPT}.values():
        _one(url, body, Outcome(), lock)

    def client() -> None:
        while (number := next(numbers)) < len(requests):
            if number == len(requests) // 2:
                half_way()
            _one(url, requests[number], outcome, lock)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def _one(url: str, request: Request, outcome: Outcome, lock: threading.Lock) -> None:
    for attempt in range(TRIES):
        began = time.perf_counter()
        status, body = send(url, request)
        seconds = time.perf_counter() - began
        # A dead replica's requests end with an error, and none of them without one.
        if status in (0, 500, 502, 503, 504, 408):
            time.sleep(PAUSE_S)
            continue
        with lock:
            said = _judged(request, status, body)
            if said is not None:
                outcome.wrong.append(said)
            elif request.status != 200:
                outcome.refused += 1
            else:
                outcome.right += 1
                outcome.repeated += attempt > 0
                outcome.seconds += [seconds] if attempt == 0 else []
        return
    with lock:
        outcome.wrong.append(f"{request.kind}: no answer but errors, {TRIES} times (last status {status})")


def _judged(request: Request, status: int, body: bytes) -> str | None:
    if status != request.status:
        return f"{request.kind}: status {status} instead of {request.status}: {body[:200]!r}"
    if request.predictions is None:
        return None
    answer = json.loads(body)
    if answer["predictions"] != request.predictions:
        return f"{request.kind}: predicted {answer['predictions']} instead of {request.predictions}"
    if not np.allclose(answer["probabilities"], request.probabilities, rtol=0, atol=1e-6):
        return f"{request.kind}: other probabilities"
    return None


def make_requests(run: metadist.LoadedRun, token: str, number: int, bad: int, tasks: int, most: int) -> list[Request]:
    """`bad` of them bad, the others good, in a fixed random order; `most` is the server's limit of bytes."""
    good = [request for task in range(tasks) for request in _good(run, token, task)]
    wrong = _bad(run, token, most)
    requests = [good[index % len(good)] for index in range(number - bad)]
    requests += [wrong[index % len(wrong)] for index in range(bad)]
    order = np.random.default_rng(0).permutation(number)
    return [requests[index] for index in order]


def _good(run: metadist.LoadedRun, token: str, task: int) -> list[Request]:
    """Adapting, adapting with a query, and the query for the model of that id."""
    support, query = run.experiment.source.sample([TaskKey(0, "test", 0, task)])
    x, labels = support.x[0].numpy(), [f"class {label}" for label in support.y[0].tolist()]
    asked = query.x[0, :10].numpy()
    with tempfile.TemporaryDirectory() as directory:
        id, model = AdaptedModels(run, Path(directory), Limits()).adapt(x, labels, None)
    expected = {"predictions": model.predict(asked).tolist(), "probabilities": model.predict_proba(asked)}
    body: dict[str, Any] = {"x": x.tolist(), "y": labels}
    more = {"x": asked.tolist()}
    return [
        _post(ADAPT, "/v1/models", body, token),
        _post("adapt and predict", "/v1/models", body | {"query": more}, token, **expected),
        _post("predict", f"/v1/models/{id}/predictions", more, token, **expected),
    ]


def _post(kind: str, path: str, body: Any, token: str | None, status: int = 200, **expected: Any) -> Request:
    return Request(kind, path, json.dumps(body).encode(), token, status, **expected)


def _bad(run: metadist.LoadedRun, token: str, most: int) -> list[Request]:
    x = np.zeros((2, *run.spec.input_shape)).tolist()
    y = ["a", "b"]
    unknown = f"/v1/models/{'0' * 64}/predictions"
    bodies: dict[str, tuple[str, Any]] = {
        "no such field": ("/v1/models", {"x": x, "y": y, "z": 1}),
        "neither x nor images": ("/v1/models", {"y": y}),
        "wrong shape": ("/v1/models", {"x": [[1, 2, 3]] * 2, "y": y}),
        "ragged": ("/v1/models", {"x": [x[0], [1]], "y": y}),
        "not a number": ("/v1/models", {"x": ["one", "two"], "y": y}),
        "fewer targets": ("/v1/models", {"x": x, "y": y[:1]}),
        "too many examples": ("/v1/models", {"x": [0] * 1001, "y": ["a"] * 1001}),
        "no image": ("/v1/models", {"images": [base64.b64encode(b"GIF").decode()] * 2, "y": y}),
        "too many bytes": ("/v1/models", {"x": "0" * most, "y": y}),
        "unknown model": (unknown, {"x": x}),
        "path for an id": ("/v1/models/..%2f..%2fetc%2fpasswd/predictions", {"x": x}),
        "no token": ("/v1/models", {"x": x, "y": y}),
        "wrong token": ("/v1/models", {"x": x, "y": y}),
    }
    tokens = {"no token": None, "wrong token": token[::-1]}
    found = [_post(kind, path, body, tokens.get(kind, token), REFUSALS[kind]) for kind, (path, body) in bodies.items()]
    return [*found, Request("torn JSON", "/v1/models", b'{"x": [[1, 2', token, REFUSALS["torn JSON"])]


def process_of(url: str, token: str) -> int:
    """The process id of the replica that answers."""
    status, body = send(url, Request("about", "/v1/run", b"", token))
    assert status == 200, body
    return int(json.loads(body)["process"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("url")
    parser.add_argument("token_file")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--bad", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=16, help="the server's limit")
    parser.add_argument("--kill", action="store_true")
    asked = parser.parse_args()
    token = Path(asked.token_file).expanduser().read_text().strip()
    most = asked.megabytes * 2**20
    requests = make_requests(metadist.load(asked.run), token, asked.requests, asked.bad, asked.tasks, most)

    def half_way() -> None:
        if asked.kill:
            os.kill(process_of(asked.url, token), signal.SIGKILL)

    sys.stdout.write(told(storm(asked.url, requests, asked.clients, half_way)) + "\n")


def told(outcome: Outcome) -> str:
    """The outcome in words."""
    median, p95 = np.percentile(outcome.seconds, (50, 95))
    counted = Counter(said.partition(":")[0] for said in outcome.wrong)
    return (
        f"{outcome.right} right, {outcome.refused} refused as they must be, {len(outcome.wrong)} wrong {dict(counted)},"
        f" {outcome.repeated} sent again after an error; median {1000 * median:.0f} ms, p95 {1000 * p95:.0f} ms"
    )


if __name__ == "__main__":
    main()
