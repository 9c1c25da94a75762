"""Adapted models by content: the same support set has the same id, and any replica can make its model again.

A model's id is the SHA-256 of theta, the support set and the number of inner steps asked for. Its support set lies
in a directory that all replicas share, so that one that was never asked for it, or that took the place of a dead
one, adapts to it again, to the same bits.
"""

import dataclasses
import hashlib
import json
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metadist.adaptation import AdaptedModel, LoadedRun
from metadist.cross_validation import CrossValidation
from metadist.errors import UserError
from metadist.files import parse_json, writing
from metadist.serving.limits import Limits


class UnknownModelError(UserError):
    """No support set of that id is kept."""


class AdaptedModels:
    """The models of one run. Threads may share it, and processes its directory."""

    def __init__(self, run: LoadedRun, directory: Path, limits: Limits) -> None:
        self._run = run
        self._directory = directory
        self._limits = limits
        self._theta = hashlib.sha256(run.theta.numpy().tobytes() + run.statistics.numpy().tobytes()).digest()
        self._models: OrderedDict[str, AdaptedModel] = OrderedDict()
        self._lock = threading.Lock()
        # A replica has one core: its threads compute one after another.
        self._computing = threading.Lock()
        with writing(str(directory)):
            directory.mkdir(parents=True, exist_ok=True)

    def adapt(self, x: np.ndarray, y: list[Any], steps: int | None) -> tuple[str, AdaptedModel]:
        """The id and the model of a support set; adapts only where that was never done before.

        Raises DataError where the set does not fit the run.
        """
        id = self._id(x, y, steps)
        with suppress(UnknownModelError):
            return id, self.find(id)
        with self._computing:
            model = self._run.adapt(x, np.array(y), steps=steps)
        self._keep(id, x, y, steps, model)
        self._remember(id, model)
        return id, model

    def find(self, id: str) -> AdaptedModel:
        """Raises UnknownModelError."""
        with self._lock:
            model = self._models.get(id)
            if model is not None:
                self._models.move_to_end(id)
        if model is None:
            model = self._restored(id)
            self._remember(id, model)
        with suppress(OSError):  # Another replica may have removed it, as the one unused for longest.
            os.utime(self._place(id))
        return model

    def predict(self, model: AdaptedModel, x: np.ndarray) -> tuple[list[Any], list[list[float]] | None]:
        """Labels (values in regression), and in classification the probability of each class."""
        with self._computing:
            shares = model.predict_proba(x).astype(float).tolist() if len(model.classes_) else None
            return model.predict(x).tolist(), shares

    def _id(self, x: np.ndarray, y: list[Any], steps: int | None) -> str:
        digest = hashlib.sha256(self._theta)
        digest.update(json.dumps([x.dtype.str, x.shape, y, steps]).encode() + b"\0" + np.ascontiguousarray(x).tobytes())
        return digest.hexdigest()

    def _place(self, id: str) -> Path:
        return self._directory / f"{id}.safetensors"

    def _remember(self, id: str, model: AdaptedModel) -> None:
        with self._lock:
            self._models[id] = model
            while len(self._models) > self._limits.models_in_memory:
                self._models.popitem(last=False)

    def _keep(self, id: str, x: np.ndarray, y: list[Any], steps: int | None, model: AdaptedModel) -> None:
        found = model.cross_validation
        asked = {"y": y, "steps": steps}
        chosen = {"steps": model.steps, "temperature": model.temperature}
        kept = {"asked": asked, "chosen": chosen, "cross_validation": found.as_dict() if found else None}
        partial = self._directory / f"{id}.{os.getpid()}-{threading.get_ident()}.partial"
        with writing(str(partial)):
            save_file({"x": np.ascontiguousarray(x)}, partial, {"metadist": json.dumps(kept)})
            partial.replace(self._place(id))
        self._remove_oldest()

    def _remove_oldest(self) -> None:
        ages = []
        for place in self._directory.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # Another replica removes, too.
                ages.append((place.stat().st_mtime_ns, place))
        for _, place in sorted(ages)[: -self._limits.models_kept]:
            place.unlink(missing_ok=True)

    def _restored(self, id: str) -> AdaptedModel:
        place = self._place(id)
        unknown = UnknownModelError(f"no model {id} is kept here. Send its support set again.")
        if len(id) != 64 or set(id) - set("0123456789abcdef") or not place.exists():
            raise unknown
        try:
            with safe_open(place, "numpy") as file:
                x, kept = file.get_tensor("x"), parse_json(file.metadata()["metadist"])
            asked, chosen, found = kept["asked"], kept["chosen"], kept["cross_validation"]
            intact = self._id(x, asked["y"], asked["steps"]) == id
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            place.unlink(missing_ok=True)
            raise unknown
        with self._computing:
            model = self._run.adapt(x, np.array(asked["y"]), steps=chosen["steps"], cross_validation=False)
        trusted = (
            CrossValidation(**found | {"interval": found["interval"] and tuple(found["interval"])}) if found else None
        )
        return dataclasses.replace(model, temperature=chosen["temperature"], cross_validation=trusted)
