"""What algorithms share that leave the model as it is and work on its embeddings."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings
from metadist.errors import ModelError


@settings
class EmbeddingBased(Algorithm):
    """Embeds the support set, fits a head to it in one go, and applies the head to embedded queries.

    What is fitted stands in phi under names with a `/`, which no parameter of a module has.
    """

    model_output: ClassVar[Literal["predictions", "embedding"]] = "embedding"
    # Without an annotation, and so no setting: there is nothing to choose.
    inner_steps = 0

    def adapt(self, network: Network, meta: Params, support: Examples, num_steps: int) -> list[Params]:
        del num_steps
        return [meta | self.fitted(network, meta, network.outputs(meta, support.x), support)]

    def predict(self, network: Network, phi: Params, support: Examples, x: Tensor) -> Tensor:
        return self.outputs(phi, network.outputs(phi, x, reference=support.x))

    @abstractmethod
    def fitted(self, network: Network, meta: Params, embedded: Tensor, support: Examples) -> Params:
        """The head for a support set that is embedded as `[examples, features]`."""

    @abstractmethod
    def outputs(self, phi: Params, embedded: Tensor) -> Tensor:
        """Outputs `[examples, ways]` (or target dimensions) of the fitted head for embedded queries."""


def memberships(network: Network, support: Examples, like: Tensor) -> Tensor:
    """One-hot targets `[examples, ways]`, of the dtype of `like`."""
    # A comparison instead of torch's one_hot, which looks at the values and so cannot be batched.
    return (support.y[:, None] == torch.arange(network.ways, device=support.y.device)).to(like.dtype)


def refuse_regression(algorithm: Algorithm, network: Network) -> None:
    """Raises ModelError unless the task is one of classification."""
    if network.kind != "classification":
        raise ModelError(
            f"algorithm {type(algorithm).__name__} compares examples with those of each class, and the task is one of"
            f" {network.kind}. Use algorithm.name: r2d2 (ridge regression on an embedding) or maml."
        )
