"""A contender of `benchmarks.inner_loop` in a process of its own, which computes only while it is asked to."""

import multiprocessing
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inner_loop_cases import Case

PEERS_DIRECTORY = Path(__file__).parents[1] / "build/peers"
INSTALL_PEERS = "bash benchmarks/contenders/install.sh"
PEERS = ("learn2learn", "higher", "torchopt")
CONTENDERS = {
    "learn2learn": "learn2learn.prepare",
    "higher": "higher.prepare",
    "torchopt": "torchopt.prepare",
    "torch.func": "torch_func.prepare",
    "metadist, eager": "metadist.prepare_eager",
    "metadist": "metadist.prepare",
}
"""Each one's name, with its function in `benchmarks/contenders/`."""


def is_installed(name: str) -> bool:
    return name not in PEERS or (PEERS_DIRECTORY / name).exists()


@dataclass
class Contender:
    """Use as a context: the process ends with it."""

    name: str
    device: str = "cpu"
    threads: int = 1
    _pipe: Connection = field(init=False, repr=False)
    _process: Any = field(init=False, repr=False)

    def __enter__(self) -> "Contender":
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self.name, self.device, self.threads)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def prepare(self, case: Case) -> tuple[np.ndarray, float]:
        """Makes the case ready; gives the summed meta-gradient and the seconds that the first one took."""
        gradient, seconds = self._ask(case)
        return gradient, seconds

    def time(self, repeats: int) -> float:
        """Seconds that so many meta-gradients of the prepared case take."""
        seconds: float = self._ask(repeats)
        return seconds

    def peak_memory(self) -> int:
        """The most bytes of a CUDA device that the prepared case took at once; 0 on a CPU."""
        found: int = self._ask("memory")
        return found

    def _ask(self, request: object) -> Any:
        self._pipe.send(request)
        reply = self._pipe.recv()
        if isinstance(reply, Exception):
            raise reply
        return reply


def _serve(pipe: Connection, name: str, device: str, threads: int) -> None:
    """Answers cases with their gradients, and numbers of repeats with seconds, until it is ended."""
    import torch

    from benchmarks.operations import clock

    torch.set_num_threads(threads)
    if name in PEERS:
        sys.path.insert(0, str(PEERS_DIRECTORY))
    file, function = CONTENDERS[name].split(".")
    meta_gradient = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if isinstance(request, Case):
                began = time.perf_counter()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                prepare = getattr(import_module(f"benchmarks.contenders.{file}"), function)
                batch = request.batch()
                batch = type(batch)(*(type(part)(*(tensor.to(device) for tensor in part)) for part in batch))
                meta_gradient = prepare(request, request.module().to(device), batch)
                pipe.send((meta_gradient().numpy(force=True), time.perf_counter() - began))
            elif request == "memory":
                pipe.send(torch.cuda.max_memory_allocated() if device == "cuda" else 0)
            else:
                began = clock(device)
                for _ in range(request):
                    meta_gradient()
                pipe.send(clock(device) - began)
        except Exception as error:
            pipe.send(RuntimeError(f"{name}: {error!r}"))
