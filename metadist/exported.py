"""Exported models: loading them, predicting with them, and what they cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from metadist.core.episode import EpisodeSpec
from metadist.core.threads import torch_threads
from metadist.errors import DataError, UserError, first_line
from metadist.files import parse_json

KEY = "metadist"
"""Under which the description lies in an ONNX file's metadata and in a `.pt2` file's extra files."""


@dataclass(frozen=True)
class ExportedModel:
    """A file that was exported, ready to run on one core."""

    path: str
    described: dict[str, Any]
    run: Callable[[np.ndarray], np.ndarray]
    """float32 `[examples, *input_shape]` to probabilities or values."""

    @property
    def spec(self) -> EpisodeSpec:
        """The shape of one example, for reading files."""
        kind: Literal["classification", "regression"] = self.described["kind"]
        labels = self.described["labels"]
        shape = tuple(self.described["input_shape"])
        return EpisodeSpec(kind=kind, input_shape=shape, output_size=max(1, len(labels)), support_size=1, query_size=1)

    @property
    def is_inverted(self) -> bool:
        """Whether the model is for the negatives of its user's images."""
        return bool(self.described["preprocessing"].get("inverted", False))

    def outputs(self, x: np.ndarray) -> np.ndarray:
        """For uint8 images, negatives already where `is_inverted`, or float vectors; scaled as the file says."""
        scale = self.described["preprocessing"]["scale"] if x.dtype == np.uint8 else 1.0
        return self.run((x.astype(np.float32) * np.float32(scale)).astype(np.float32))

    @property
    def size_bytes(self) -> int:
        return Path(self.path).stat().st_size

    def latency_s(self, x: np.ndarray, times: int = 100) -> float:
        """Median seconds for one example, `x: [1, *input_shape]`, after some to warm up."""
        seconds = []
        for _ in range(times + 10):
            start = time.perf_counter()
            self.outputs(x)
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[10:]))


def load_exported(path: str) -> ExportedModel:
    """Loads a `.onnx` or `.pt2` file that `metadist adapt --out` wrote. Raises UserError."""
    suffix = Path(path).suffix
    if suffix not in (".onnx", ".pt2"):
        raise UserError(f"{path}: must be a .onnx or .pt2 file. Export the model so, with `metadist adapt --out`.")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file. Write one with `metadist adapt --out {path}`.")
    described, run = _load_onnx(path) if suffix == ".onnx" else _load_pt2(path)
    if not described:
        raise UserError(f"{path}: holds no labels of metadist. Export it with `metadist adapt --out`.")
    try:
        description = parse_json(described)
    except ValueError as error:
        raise UserError(f"{path}: what it says of its labels is no JSON ({error}). Export the model again.") from None
    return ExportedModel(path, description, run)


def _load_onnx(path: str) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: needs onnxruntime. Install it: pip install 'metadist[export]'.") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(f"{path}: not a readable ONNX file ({first_line(error)}). Export it again.") from None
    described = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return described, lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def _load_pt2(path: str) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    extra = {KEY: ""}
    try:
        module = torch.export.load(path, extra_files=extra).module()
    except Exception as error:
        raise DataError(f"{path}: not a readable .pt2 file ({first_line(error)}). Export it again.") from None

    def run(x: np.ndarray) -> np.ndarray:
        with torch_threads(1), torch.no_grad():
            outputs: np.ndarray = module(torch.from_numpy(x)).numpy()
            return outputs

    return extra[KEY], run
