"""Checkpoints: safetensors and JSON, a manifest with SHA-256 written last, nothing pickled.

`checkpoints/step_00001000/` holds `theta.safetensors` (each parameter by its name, so that any reader of
the format can use them), `statistics.safetensors`, `optimizer.safetensors`, `state.json` and
`manifest.json`; with `outer.lag` also `previous.safetensors`, theta and statistics of one step earlier as one vector.
A checkpoint without a manifest, or with a file that differs from it, does not count.
"""

import hashlib
import json
import re
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from metadist.core.params import Layout
from metadist.distributed.learner import LearnerState
from metadist.errors import CheckpointError, RunDirectoryError
from metadist.files import parse_json
from metadist.run_directory import RunDirectory

FORMAT = 1
PARTS = ("theta", "statistics", "optimizer", "previous")
"""Files of tensors; the last one is there with `outer.lag` alone."""
LARGEST_JSON = 2**16
"""Bytes of manifest.json, of state.json, and of a header beside its names."""
BYTES_A_NAME = 256
"""Of a header, beside the name itself: dtype, shape, place."""
MAX_OPTIMIZER_TENSORS = 8
"""As large as theta; torch's optimizers have up to four."""
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


class Checkpoints:
    """The checkpoints in one folder of a run directory."""

    def __init__(
        self, directory: RunDirectory, theta: Layout, statistics: Layout, *, folder: str = "checkpoints"
    ) -> None:
        self._directory = directory
        self._folder = folder
        self._layouts = {"theta": theta, "statistics": statistics}

    def steps(self) -> list[int]:
        """Steps of all checkpoints whose manifest is there, in order; they may still turn out to be altered."""
        return [step for step in self._begun() if self._directory.exists(f"{self._place(step)}/manifest.json")]

    def unfinished(self) -> list[str]:
        """Where checkpoints lie that were not written to their end."""
        finished = self.steps()
        return [f"{self._directory.location}/{self._place(step)}" for step in self._begun() if step not in finished]

    def _begun(self) -> list[int]:
        names = self._directory.names(self._folder)
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def save(self, state: LearnerState) -> None:
        """Writes a checkpoint. Raises MetadistError; then no older one has been touched."""
        tensors = {
            "theta": self._named("theta", state.theta),
            "statistics": self._named("statistics", state.statistics),
            "optimizer": state.optimizer,
        }
        if state.previous is not None:
            tensors["previous"] = {"published": state.previous}
        files = {f"{name}.safetensors": save(part) for name, part in tensors.items()}
        files["state.json"] = json.dumps(_state(state.step, tensors)).encode()
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        place = self._place(state.step)
        self._directory.make(place)
        for name, content in files.items():
            self._directory.write(f"{place}/{name}", content)
        self._directory.write(f"{place}/manifest.json", _manifest(digests))

    def load(self, step: int) -> LearnerState:
        """Reads a checkpoint. Raises CheckpointError where anything in it is not as it was written."""
        place = self._place(step)
        where = f"{self._directory.location}/{place}"
        files = self._verified_files(place, where)
        try:
            state = parse_json(files["state.json"])
            parts = PARTS if state == _state(step, PARTS) else PARTS[:-1]
            tensors = {name: load(files[f"{name}.safetensors"]) for name in parts}
        except (KeyError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{where}: not a checkpoint of this version ({error}). Remove it.") from None
        if state != _state(step, tensors):
            raise CheckpointError(f"{where}: state.json is of another format or step. Remove the checkpoint.")
        return LearnerState(
            step=step,
            theta=self._flat("theta", tensors["theta"], where),
            statistics=self._flat("statistics", tensors["statistics"], where),
            optimizer=self._optimizer(tensors["optimizer"], where),
            previous=self._previous(tensors["previous"], where) if "previous" in tensors else None,
        )

    def load_latest(self, warn: Callable[[str], None]) -> LearnerState | None:
        """The newest good checkpoint; damaged ones are passed over with a warning. None where there is none.

        Raises CheckpointError where there are checkpoints and none is good: starting again from nothing
        would hide the loss.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step)
            except CheckpointError as error:
                warn(f"{error} Trying the one before.")
        if steps:
            raise CheckpointError(
                f"{self._directory.location}/{self._folder}: none of {len(steps)} checkpoints is intact."
                " Restore one, or start another run directory."
            )
        return None

    def remove_old(self, keep: int, best: int | None) -> None:
        """Removes all but the last `keep` checkpoints and the best one."""
        for step in self.steps()[:-keep]:
            if step != best:
                # What is left of a half-removed checkpoint does not count.
                self._directory.remove(self._place(step), first="manifest.json")

    def _largest(self, name: str) -> int:
        """Bytes beyond which a file is not even read."""
        part = name.partition(".")[0]
        numbers = {
            "theta": self._layouts["theta"].size,
            "statistics": self._layouts["statistics"].size,
            "optimizer": MAX_OPTIMIZER_TENSORS * self._layouts["theta"].size,
            "previous": self._published_size,
        }
        names = sum(len(name) + BYTES_A_NAME for name in self._layouts.get(part, self._layouts["theta"]).shapes)
        return 4 * numbers.get(part, 0) + names + LARGEST_JSON

    def _verified_files(self, place: str, where: str) -> dict[str, bytes]:
        if self._directory.size(f"{place}/manifest.json") > LARGEST_JSON:
            raise CheckpointError(f"{where}: manifest.json is torn or altered. The checkpoint is not used.")
        content = self._read(place, "manifest.json")
        try:
            digests = parse_json(content)["sha256"]
            # Nothing signs the manifest itself, so it must be what `save` writes, to the byte.
            intact = isinstance(digests, dict) and content == _manifest(digests)
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise CheckpointError(f"{where}: manifest.json is torn or altered. The checkpoint is not used.")
        files = {}
        for name, digest in digests.items():
            if not re.fullmatch(r"[a-z]+\.(safetensors|json)", name):
                raise CheckpointError(f"{where}: manifest.json names the file {name!r}. The checkpoint is not used.")
            if not self._directory.exists(f"{place}/{name}"):
                raise CheckpointError(f"{where}: {name} is missing. The checkpoint is not used.")
            most = self._largest(name)
            if (found := self._directory.size(f"{place}/{name}")) > most:
                raise CheckpointError(
                    f"{where}: {name} is of {found} bytes, where this model's has at most {most}. The checkpoint is not"
                    " used."
                )
            files[name] = self._read(place, name)
            if hashlib.sha256(files[name]).hexdigest() != digest:
                raise CheckpointError(
                    f"{where}: {name} has not the SHA-256 that manifest.json gives: one of them is torn or altered."
                    " The checkpoint is not used."
                )
        return files

    def _read(self, place: str, name: str) -> bytes:
        try:
            return self._directory.read(f"{place}/{name}")
        except RunDirectoryError as error:
            raise CheckpointError(f"{str(error).rpartition('. ')[0]}. The checkpoint is not used.") from None

    def _place(self, step: int) -> str:
        return f"{self._folder}/{checkpoint_name(step)}"

    def _named(self, part: str, vector: np.ndarray) -> dict[str, np.ndarray]:
        named: dict[str, np.ndarray] = {}
        start = 0
        for name, shape in self._layouts[part].shapes.items():
            size = int(np.prod(shape))
            named[name] = vector[start : start + size].reshape(shape)
            start += size
        return named

    @property
    def _published_size(self) -> int:
        return sum(layout.size for layout in self._layouts.values())

    def _previous(self, tensors: dict[str, np.ndarray], where: str) -> np.ndarray:
        found = {name: (value.dtype, value.shape) for name, value in tensors.items()}
        if found != {"published": (np.dtype(np.float32), (self._published_size,))}:
            raise CheckpointError(
                f"{where}: previous does not fit this model: it must be one float32 vector of {self._published_size}"
                " numbers. Use the run's own config."
            )
        return tensors["published"]

    def _optimizer(self, tensors: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
        for name, value in tensors.items():
            if value.dtype != np.float32 or value.shape not in ((), (self._layouts["theta"].size,)):
                raise CheckpointError(
                    f"{where}: optimizer does not fit this model: {name} is {value.dtype} of shape"
                    f" {list(value.shape)}. Use the run's own config."
                )
        return tensors

    def _flat(self, part: str, tensors: dict[str, np.ndarray], where: str) -> np.ndarray:
        shapes = self._layouts[part].shapes
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if found != {name: tuple(shape) for name, shape in shapes.items()}:
            odd = sorted(set(found.items()) ^ {(name, tuple(shape)) for name, shape in shapes.items()})
            raise CheckpointError(
                f"{where}: {part} does not fit this model: {odd[0][0]} has another shape or is not there on both sides."
                " Use the run's own config."
            )
        wrong = next((name for name, value in tensors.items() if value.dtype != np.float32), None)
        if wrong is not None:
            raise CheckpointError(
                f"{where}: {part} does not fit this model: {wrong} is {tensors[wrong].dtype}, not float32. Use the"
                " run's own config."
            )
        flat = [tensors[name].reshape(-1) for name in shapes]
        return np.concatenate(flat) if flat else np.zeros(0, np.float32)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; an error comes up at the next call."""

    def __init__(self, checkpoints: Checkpoints, keep: int) -> None:
        self._checkpoints = checkpoints
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[Any] | None = None

    def save(self, state: LearnerState, best: int | None) -> None:
        """Begins to write; waits only while the one before is still being written."""
        self.wait()
        self._last = self._pool.submit(self._write, state, best)

    def _write(self, state: LearnerState, best: int | None) -> None:
        self._checkpoints.save(state)
        # Later ones are damaged, or the run would have gone on from them: they are not among those to keep.
        later = sum(step > state.step for step in self._checkpoints.steps())
        self._checkpoints.remove_old(self._keep + later, best)

    def wait(self) -> None:
        """Until the last checkpoint is on disk; raises what went wrong with it."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _state(step: int, parts: Container[str]) -> dict[str, Any]:
    """What state.json holds beside so many files of tensors."""
    return {"format": FORMAT, "step": step} | ({"previous": True} if "previous" in parts else {})


def _manifest(digests: dict[str, str]) -> bytes:
    return (json.dumps({"format": FORMAT, "sha256": digests}, indent=2) + "\n").encode()
