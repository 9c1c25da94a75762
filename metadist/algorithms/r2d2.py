"""R2-D2: ridge regression on an embedding, in closed form."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from metadist.algorithms.embedding_based import EmbeddingBased, memberships
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings
from metadist.errors import ModelError

LOG_REGULARISATION, SCALE = "r2d2/log_regularisation", "r2d2/scale"
WEIGHTS = "fitted/weights"
Positive = Annotated[float, Field(gt=0)]


@settings
class R2D2(EmbeddingBased):
    """R2-D2 (Bertinetto et al. 2019, arXiv:1805.08136, sec. 3.2, eq. 4 to 6), for classification and regression.

    With embeddings X: [examples, features + 1], whose last column is 1, and targets Y (one-hot for classes):
    Head:     W = (X^T X + lambda I)^-1 X^T Y = X^T (X X^T + lambda I)^-1 Y  (Woodbury), whichever is smaller
    Outputs:  alpha f(x) W in classification, f(x) W in regression
    lambda (as its logarithm, so that it stays positive) and alpha are learned.

    Differs from the paper in having no bias beta: one number added to all logits of a softmax changes
    nothing. The authors' code keeps lambda fixed, at 50, and divides X and Y by sqrt(examples), which makes
    it grow with the support set; its column of ones, regularised as any other, is here too.
    """

    regularisation: Positive = 1.0
    """lambda, or what it starts from."""
    learn_regularisation: bool = True
    scale: Positive | None = None
    """What alpha starts from, in classification; left out, 10 (as in the authors' Omniglot runs)."""

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        del initial
        if network.kind != "classification" and self.scale is not None:
            raise ModelError(
                f"algorithm.scale is for logits, got {self.scale} with a task of {network.kind}. Leave it out."
            )
        extra = {}
        if self.learn_regularisation:
            extra[LOG_REGULARISATION] = torch.tensor(math.log(self.regularisation))
        if network.kind == "classification":
            extra[SCALE] = torch.tensor(10.0 if self.scale is None else self.scale)
        return extra

    def fitted(self, network: Network, meta: Params, embedded: Tensor, support: Examples) -> Params:
        classes = network.kind == "classification"
        targets = memberships(network, support, embedded) if classes else support.y
        strength = meta[LOG_REGULARISATION].exp() if self.learn_regularisation else self.regularisation
        return {WEIGHTS: ridge(_with_ones(embedded), targets, strength)}

    def outputs(self, phi: Params, embedded: Tensor) -> Tensor:
        outputs = _with_ones(embedded) @ phi[WEIGHTS]
        return phi[SCALE] * outputs if SCALE in phi else outputs


def ridge(x: Tensor, y: Tensor, strength: Tensor | float) -> Tensor:
    """Weights `[features, targets]` that minimise |x w - y|^2 + strength |w|^2."""
    examples, features = x.shape
    identity = torch.eye(min(examples, features), dtype=x.dtype, device=x.device)
    if examples < features:
        return x.T @ torch.linalg.solve(x @ x.T + strength * identity, y)
    return torch.linalg.solve(x.T @ x + strength * identity, x.T @ y)


def _with_ones(embedded: Tensor) -> Tensor:
    return torch.cat([embedded, torch.ones_like(embedded[:, :1])], dim=1)
