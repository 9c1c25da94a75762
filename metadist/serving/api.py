"""The HTTP interface: an ASGI application over one run's adapted models."""

import base64
import binascii
import hashlib
import hmac
import os
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from metadist import __version__
from metadist.adaptation import AdaptedModel, LoadedRun
from metadist.errors import DataError, UserError
from metadist.serving.limits import Limits
from metadist.serving.models import AdaptedModels, UnknownModelError
from metadist.tasks.labelled_files import fitted

Numbers = list[Any]
Targets = list[StrictStr] | list[StrictInt] | list[StrictFloat | StrictInt] | list[list[StrictFloat | StrictInt]]
ModelId = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="As `POST /v1/models` gave it.")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Inputs(_Strict):
    """Examples: either `x` or `images`."""

    x: Numbers | None = Field(None, description="Numbers, [examples, *input_shape]; images from 0 to 1.")
    images: list[StrictStr] | None = Field(
        None, description="PNG, JPEG or other files in base64; scaled to the size that the run takes."
    )


class SupportSet(Inputs):
    """What to adapt to, and what to predict at once, if anything."""

    y: Targets = Field(description="One label an example, of your own; numbers in regression.")
    steps: int | None = Field(None, ge=0, description="Inner steps; left out, cross-validation chooses them.")
    query: Inputs | None = None


class Predictions(_Strict):
    """In the order of the examples."""

    predictions: list[Any]
    probabilities: list[list[float]] | None = Field(description="[examples, classes]; null in regression.")


class Model(_Strict):
    """An adapted model's handle, and how far to trust it."""

    model: str = Field(description="Its id; the same support set always has the same.")
    classes: list[Any] = Field(description="In the order of the probabilities; empty in regression.")
    inner_steps: int
    cross_validation: dict[str, Any] | None = Field(description="On the support set; null where it is too small.")
    temperature: float


class AdaptedTo(Model):
    """With predictions for the query examples, if there were any."""

    predictions: list[Any] | None = None
    probabilities: list[list[float]] | None = None


def make_api(run: LoadedRun, models: AdaptedModels, token_sha256: str | None, limits: Limits) -> FastAPI:
    """The application; `token_sha256` is that of the token that callers must give, None for none."""
    app = FastAPI(
        title="metadist",
        version=__version__,
        description="Send a support set, get an adapted model's id and predictions.",
        max_body_size=limits.request_bytes,
    )
    routes = APIRouter(prefix="/v1", dependencies=[Depends(_authentication(token_sha256))])

    @app.exception_handler(UserError)
    def refused(request: Request, error: UserError) -> JSONResponse:
        status = 404 if isinstance(error, UnknownModelError) else 422
        return JSONResponse({"detail": str(error)}, status)

    @app.get("/healthz", include_in_schema=False)
    def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/run", summary="What the run takes")
    def about() -> dict[str, Any]:
        spec = run.spec
        head = run.experiment.algorithm.model_output == "predictions" and spec.kind == "classification"
        return {
            "kind": spec.kind,
            "input_shape": list(spec.input_shape),
            "most_classes": spec.output_size if head else None,
            "step": run.step,
            "limits": vars(limits),
            "process": os.getpid(),
        }

    @routes.post("/models", summary="Adapt to a support set")
    def adapt(support: SupportSet) -> AdaptedTo:
        x = _examples(support, run, limits.support_examples, "support")
        if len(support.y) != len(x):
            raise DataError(f"there are {len(x)} examples and {len(support.y)} in y. Give one target for each.")
        if support.steps is not None and support.steps > limits.inner_steps:
            raise DataError(f"steps must be at most {limits.inner_steps}, got {support.steps}.")
        query = _examples(support.query, run, limits.query_examples, "query") if support.query else None
        id, model = models.adapt(x, support.y, support.steps)
        predictions, probabilities = models.predict(model, query) if query is not None else (None, None)
        return AdaptedTo(**_described(id, model), predictions=predictions, probabilities=probabilities)

    @routes.get("/models/{id}", summary="What is known of a model")
    def describe(id: ModelId) -> Model:
        return Model(**_described(id, models.find(id)))

    @routes.post("/models/{id}/predictions", summary="Predict")
    def predict(id: ModelId, query: Inputs) -> Predictions:
        x = _examples(query, run, limits.query_examples, "query")
        predictions, probabilities = models.predict(models.find(id), x)
        return Predictions(predictions=predictions, probabilities=probabilities)

    app.include_router(routes)
    return app


def _authentication(token_sha256: str | None) -> Any:
    bearer = HTTPBearer(auto_error=False, description="The token that `metadist serve` named at its start.")

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if token_sha256 is None:
            return
        digest = hashlib.sha256(given.credentials.encode()).hexdigest() if given else ""
        if not hmac.compare_digest(digest, token_sha256):
            raise HTTPException(401, "send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    return check


def _described(id: str, model: AdaptedModel) -> dict[str, Any]:
    found = model.cross_validation
    return {
        "model": id,
        "classes": model.classes_.tolist(),
        "inner_steps": model.steps,
        "cross_validation": found.as_dict() if found else None,
        "temperature": model.temperature,
    }


def _examples(given: Inputs, run: LoadedRun, most: int, name: str) -> np.ndarray:
    """uint8 images or float32 numbers. Raises DataError."""
    if (given.x is None) == (given.images is None):
        raise DataError(f"{name} must have either x or images.")
    values = given.x if given.x is not None else given.images
    assert values is not None
    if not 1 <= len(values) <= most:
        raise DataError(f"{name} must have 1 to {most} examples, got {len(values)}.")
    if given.images is not None:
        if len(run.spec.input_shape) != 3:
            raise DataError(f"{name} has images, and this run takes vectors of {run.spec.input_shape[0]}. Give x.")
        return np.stack([_image(text, f"{name} image {number}", run) for number, text in enumerate(given.images)])
    try:
        return np.array(values, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        raise DataError(f"{name}.x must be numbers, as many in each example.") from None


def _image(text: str, where: str, run: LoadedRun) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{where}: not base64.") from None
    return fitted(data, where, run.spec)
