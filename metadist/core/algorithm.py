"""The interface of every algorithm: it maps a support set to a predictor."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params


class Outcome(NamedTuple):
    """What became of one task at theta."""

    path: list[Params]
    """Parameters after 0, 1, .. inner steps; the last ones are phi."""
    loss: Tensor
    """The query loss under phi, a scalar."""
    outputs: Tensor
    """The adapted model's outputs on the query set, `[examples, output_size]`."""


class Algorithm(ABC):
    """Base of all algorithms: frozen dataclasses of hyperparameters with pure methods.

    Every method is written for one task, without a task axis, and is batched by `vmap`. Most algorithms
    have only `adapt`; those whose meta-gradient is not the gradient of the query loss have their own.
    """

    __slots__ = ()

    inner_steps: int
    """Inner steps while meta-training; 0 for algorithms that adapt in one go."""

    model_output: ClassVar[Literal["predictions", "embedding"]] = "predictions"
    """What the model is built to give: one output a way (or target), or an embedding that `predict` works on."""

    meta_learns: ClassVar[bool] = True
    """False where theta stays as the seed drew it."""

    trains_on_episodes: ClassVar[bool] = True
    """False where training tasks are plain mini-batches without a support set."""

    def prepare(self, module: nn.Module) -> nn.Module:
        """The model as the algorithm needs it: itself, unless layers are to be put around some of its own.

        May change `module`, which is a copy. Raises ModelError where the algorithm does not fit it.
        """
        return module

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        """Initial values of the meta-parameters beside the model's own (learned rates, say); none by default.

        `initial` holds the model's. Raises ModelError where the algorithm does not fit the model.
        """
        del network, initial
        return {}

    def at_step(self, step: int) -> "Algorithm":
        """The algorithm as it is at an outer step: itself, unless one of its settings changes on the way.

        There may be few different ones in a run, since each is compiled by itself.
        """
        del step
        return self

    def constants_at(self, step: int) -> Params:
        """Tensors beside the meta-parameters that change with the outer step (annealed weights); none by default.

        While training they stand in `meta` under their names, as constants of the meta-gradient. One that is among
        the extra parameters too is kept there as it was in the last step, for evaluation.
        """
        del step
        return {}

    @abstractmethod
    def adapt(self, network: Network, meta: Params, support: Examples, num_steps: int) -> list[Params]:
        """The parameters after 0, 1, .., `num_steps` inner steps on one support set; the last ones are phi.

        `meta` holds the model's parameters and the extra ones; it is never changed. An algorithm without
        inner steps gives a list of one. It sees no query set, so evaluation adapts once for batch-norm policies that
        differ there alone (`transductive`, `support`): it must give no `reference` and not ask for the policy.
        """

    def predict(self, network: Network, phi: Params, support: Examples, x: Tensor) -> Tensor:
        """Outputs `[examples, output_size]` of the adapted model for a query set's `x`."""
        return network.outputs(phi, x, reference=support.x)

    def query_loss(self, network: Network, phi: Params, support: Examples, query: Examples) -> tuple[Tensor, Tensor]:
        """The adapted model's loss on a query set, a scalar, and its outputs there."""
        outputs = self.predict(network, phi, support, query.x)
        return network.outer_loss_of(outputs, query.y), outputs

    def losses_along(
        self, network: Network, path: list[Params], support: Examples, query: Examples
    ) -> list[tuple[Tensor, Tensor]]:
        """`query_loss` after each inner step, for evaluation; to be overridden where steps can share work."""
        return [self.query_loss(network.at(step), phi, support, query) for step, phi in enumerate(path)]

    def objective(self, network: Network, meta: Params, support: Examples, query: Examples) -> tuple[Tensor, Outcome]:
        """What the outer loop minimises on one task, a scalar: the query loss after `inner_steps` steps."""
        path = self.adapt(network, meta, support, self.inner_steps)
        loss, outputs = self.query_loss(network.at(self.inner_steps), path[-1], support, query)
        return loss, Outcome(path, loss, outputs)

    def meta_gradient(
        self, network: Network, meta: Params, support: Examples, query: Examples
    ) -> tuple[Params, Outcome]:
        """One task's meta-gradient, by the names of `meta`: the gradient of `objective`, unless a paper has another."""
        gradient, outcome = torch.func.grad(self.objective, argnums=1, has_aux=True)(network, meta, support, query)
        return gradient, outcome
