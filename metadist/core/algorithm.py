"""The interface of every algorithm: it maps a support set to a predictor."""

from abc import ABC, abstractmethod

from torch import Tensor

from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params


class Algorithm(ABC):
    """Base of all algorithms: frozen dataclasses of hyperparameters with pure methods.

    Every method is written for one task, without a task axis, and is batched by `vmap`.
    """

    __slots__ = ()

    inner_steps: int

    def extra_parameters(self, model: Params) -> Params:
        """Initial values of the meta-parameters beside the model's own (learned rates, say); none by default."""
        del model
        return {}

    @abstractmethod
    def adapt(self, network: Network, meta: Params, support: Examples, num_steps: int) -> list[Params]:
        """The parameters after 0, 1, .., `num_steps` inner steps on one support set; the last ones are phi.

        `meta` holds the model's parameters and the extra ones; it is never changed.
        """

    def predict(self, network: Network, phi: Params, support: Examples, x: Tensor) -> Tensor:
        """Outputs `[examples, output_size]` of the adapted model for a query set's `x`."""
        return network.outputs(phi, x, reference=support.x)

    def query_loss(self, network: Network, phi: Params, support: Examples, query: Examples) -> tuple[Tensor, Tensor]:
        """The adapted model's loss on a query set, a scalar, and its outputs there.

        The meta-gradient is the gradient of this loss with respect to the meta-parameters.
        """
        outputs = self.predict(network, phi, support, query.x)
        return network.loss_of(outputs, query.y), outputs
