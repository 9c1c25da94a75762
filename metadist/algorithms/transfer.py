"""Transfer learning: an ordinary classifier's embedding, and a new head for each task."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from metadist.algorithms.pooled_training import PooledTraining
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings
from metadist.errors import ModelError

WEIGHT, BIAS = "fitted/weight", "fitted/bias"


@settings
class Transfer(PooledTraining):
    """The Baseline of Chen et al. 2019 (arXiv:1904.04232, sec. 3.1): pooled training, then a new head for each task.

    At test:  V_0 = 0, c_0 = 0;  (V, c)_{k+1} = (V, c)_k - inner_lr * grad L_support(V f(x) + c)

    Steps take the whole support set, where the paper takes mini-batches of 4, and are plain gradient
    descent, where the authors' code has momentum (dampened as much) and a weight decay of 0.001; its head starts
    at random, as torch's linear layers do. Of the training images, nothing is cropped, flipped or jittered.
    """

    inner_lr: Annotated[float, Field(gt=0)] = 0.01
    inner_steps: Annotated[int, Field(ge=0)] = 100
    """Steps at test; `evaluation.inner_steps` overrules it. Training has none."""
    fine_tune_body: bool = False
    """Lets the steps change the embedding too, which the paper keeps as it is."""

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        if network.policy == "per_step":
            raise ModelError(
                "training.batch_norm: per_step needs inner steps in training, and Transfer has them at test alone."
                " Use running."
            )
        return super().extra_parameters(network, initial)

    def adapt(self, network: Network, meta: Params, support: Examples, num_steps: int) -> list[Params]:
        self.refuse_empty(network, support)
        like = next(iter(meta.values()))
        phi = {
            WEIGHT: like.new_zeros(network.ways, network.output_size),
            BIAS: like.new_zeros(network.ways),
        }
        if self.fine_tune_body:
            phi |= {name: meta[name] for name in network.parameters.shapes}
        frozen = None if self.fine_tune_body else network.outputs(meta, support.x)

        def loss(phi: Params) -> Tensor:
            embedded = network.outputs(phi, support.x) if frozen is None else frozen
            return network.loss_of(F.linear(embedded, phi[WEIGHT], phi[BIAS]), support.y)

        path = [meta | phi]
        for _ in range(num_steps):
            gradients = torch.func.grad(loss)(phi)
            phi = {name: value - self.inner_lr * gradients[name] for name, value in phi.items()}
            path.append(meta | phi)
        return path

    def losses_along(
        self, network: Network, path: list[Params], support: Examples, query: Examples
    ) -> list[tuple[Tensor, Tensor]]:
        if self.fine_tune_body:
            return super().losses_along(network, path, support, query)
        embedded = network.outputs(path[0], query.x, reference=support.x)
        every = [F.linear(embedded, phi[WEIGHT], phi[BIAS]) for phi in path]
        return [(network.outer_loss_of(outputs, query.y), outputs) for outputs in every]

    def predict(self, network: Network, phi: Params, support: Examples, x: Tensor) -> Tensor:
        return F.linear(network.outputs(phi, x, reference=support.x), phi[WEIGHT], phi[BIAS])
