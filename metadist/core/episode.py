"""Episodes: what a task source makes and an algorithm learns from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metadist.core.keys import TaskKey
from metadist.errors import EpisodeError


class Examples(NamedTuple):
    """Inputs `x: [..., examples, *input_shape]` and targets `y`.

    Targets are class indices `[..., examples]` (int64) in classification and values
    `[..., examples, output_size]` in regression. A leading axis over tasks is there outside of
    `vmap` and gone inside.
    """

    x: Tensor
    y: Tensor


class EpisodeBatch(NamedTuple):
    """The episodes of one chunk, stacked on a leading task axis."""

    support: Examples
    query: Examples


@dataclass(frozen=True, kw_only=True)
class EpisodeSpec:
    """The fixed shape of every episode of one task source."""

    kind: Literal["classification", "regression"]
    input_shape: tuple[int, ...]
    """Shape of one input: `(channels, height, width)` for images, `(features,)` for vectors."""
    output_size: int
    """Ways in classification, target dimensions in regression."""
    support_size: int
    """Examples in a support set (ways * shots in classification)."""
    query_size: int
    """Examples in a query set (ways * queries in classification)."""

    def check(self, batch: EpisodeBatch, keys: Sequence[TaskKey], source: object) -> None:
        """Raises EpisodeError unless `batch` holds one finite episode of this shape for each key."""
        where = f"task source {type(source).__name__}"
        for name, examples, size in (
            ("support", batch.support, self.support_size),
            ("query", batch.query, self.query_size),
        ):
            _check_tensor(f"{where}: {name}.x", examples.x, (len(keys), size, *self.input_shape), torch.float32)
            if self.kind == "classification":
                _check_tensor(f"{where}: {name}.y", examples.y, (len(keys), size), torch.int64)
                if bool(((examples.y < 0) | (examples.y >= self.output_size)).any()):
                    raise EpisodeError(
                        f"{where}: {name}.y must lie in 0..{self.output_size - 1}, got"
                        f" {int(examples.y.min())}..{int(examples.y.max())}. Number the classes of an episode from 0."
                    )
            else:
                _check_tensor(f"{where}: {name}.y", examples.y, (len(keys), size, self.output_size), torch.float32)
            # One sum tells for all tasks at once; only then is the bad one looked for.
            if not torch.isfinite(examples.x.sum() + examples.y.sum()):
                _raise_for_bad_task(f"{where}: {name}", examples, keys)


def _raise_for_bad_task(name: str, examples: Examples, keys: Sequence[TaskKey]) -> None:
    for task, key in enumerate(keys):
        if not (torch.isfinite(examples.x[task]).all() and torch.isfinite(examples.y[task]).all()):
            raise EpisodeError(f"{name} set of task {key} holds NaN or infinity. Clean the data it is drawn from.")


def _check_tensor(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise EpisodeError(f"{name} must be a torch tensor, got {type(value).__name__}. Use torch.from_numpy.")
    if tuple(value.shape) != shape:
        raise EpisodeError(
            f"{name} must have the shape {list(shape)} that the spec gives, got {list(value.shape)}."
            " Change `spec` or `sample`."
        )
    if value.dtype != dtype:
        raise EpisodeError(f"{name} must be {dtype}, got {value.dtype}. Convert it in `sample`.")
