"""Exports an adapted model: ONNX, torch.export's `.pt2`, or safetensors beside JSON."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from metadist.adaptation import AdaptedModel
from metadist.errors import MetadistError, UserError
from metadist.exported import KEY, load_exported
from metadist.files import replacing, writing
from metadist.predictor import Predictor

TOLERANCE = 1e-5
"""How far the exported model's outputs may lie from torch's, on the support set."""


def export_model(model: AdaptedModel, out: str, *, inverted: bool = False) -> dict[str, Any]:
    """Writes a model to `out`: `NAME.onnx`, `NAME.pt2`, or a directory for safetensors; gives its description.

    The batch size is free, and labels and preprocessing are inside; `inverted` says that the model was adapted to the
    negatives of its user's images, which those to predict are then turned into as well. An ONNX or `.pt2` file is run
    before it takes its place, on the support set as a whole and one example at a time. Raises MetadistError where its
    outputs differ from torch's by more than TOLERANCE.
    """
    path = Path(out)
    if path.suffix not in (".onnx", ".pt2", ""):
        raise UserError(f"--out must end in .onnx or .pt2, or be a directory's name, got {out!r}. Rename it.")
    predictor, described = Predictor(model).eval(), describe(model, inverted=inverted)
    if path.suffix == "":
        _write_tensors(predictor, described, path)
        return described
    x = model.support.x
    program = torch.export.export(
        predictor, (_at_least_two(x),), dynamic_shapes=({0: torch.export.Dim("examples", min=1)},)
    )
    write = _write_onnx if path.suffix == ".onnx" else _write_pt2
    with replacing(path) as partial:
        named = partial.with_name(f"{path.stem}.partial{path.suffix}")
        try:
            write(program, described, named)
            _check(predictor, load_exported(str(named)).run, x, out)
            named.replace(partial)
        finally:
            named.unlink(missing_ok=True)
    return described


def describe(model: AdaptedModel, *, inverted: bool = False) -> dict[str, Any]:
    """What a program has to know to use the model, as plain values."""
    spec, config = model.run.spec, model.run.config
    is_images = len(spec.input_shape) == 3
    found = model.cross_validation
    return {
        "format": 1,
        "kind": spec.kind,
        "labels": model.classes_.tolist(),
        "input_shape": list(spec.input_shape),
        "preprocessing": {
            "color": {1: "grey", 3: "rgb"}.get(spec.input_shape[0]) if is_images else None,
            "height": spec.input_shape[1] if is_images else None,
            "width": spec.input_shape[2] if is_images else None,
            "resample": "lanczos" if is_images else None,
            "inverted": inverted,
            "scale": 1 / 255 if is_images else 1.0,
            "mean": 0.0,
        },
        "output": "probabilities" if len(model.classes_) else "values",
        "temperature": model.temperature,
        "algorithm": type(config.algorithm).__name__,
        "batch_norm": (
            None
            if not model.network.batch_norms
            else "support statistics, frozen"
            if model.network.policy == "support"
            else model.network.policy
        ),
        "inner_steps": model.steps,
        "cross_validation": found.as_dict() if found else None,
        "run": {"directory": model.run.location, "step": model.run.step},
    }


def _at_least_two(x: torch.Tensor) -> torch.Tensor:
    """torch.export takes a size of 1 for a constant."""
    return x if len(x) > 1 else x.repeat(2, *[1] * (x.dim() - 1))


def _write_onnx(program: Any, described: dict[str, Any], path: Path) -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}. Install it: pip install 'metadist[export]'.") from None
    with _quiet():
        exported = torch.onnx.export(
            program, input_names=["x"], output_names=[described["output"]], dynamo=True, verbose=False
        )
    assert exported is not None
    exported.model.metadata_props[KEY] = json.dumps(described)
    exported.save(str(path), external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of optional packages and of their own deprecations, about which a user can do nothing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write_pt2(program: Any, described: dict[str, Any], path: Path) -> None:
    with _quiet():
        torch.export.save(program, path, extra_files={KEY: json.dumps(described)})


def _write_tensors(predictor: Predictor, described: dict[str, Any], path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in predictor.phi.items()}
    tensors |= {name: value.contiguous() for name, value in predictor.network.statistics.items()}
    with writing(str(path)):
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "model.safetensors")
        (path / "model.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _check(predictor: Predictor, run: Any, x: torch.Tensor, out: str) -> None:
    with torch.no_grad():
        expected = predictor(x).numpy()
    alone = np.concatenate([run(x[place : place + 1].numpy()) for place in range(len(x))])
    worst = max(float(np.abs(found - expected).max()) for found in (run(x.numpy()), alone))
    if not worst <= TOLERANCE:
        raise MetadistError(
            f"{out}: the exported model differs from torch's by {worst:.2g}, more than {TOLERANCE}. Nothing was"
            " written. Please report it, with the run's config."
        )
