"""Prototypical networks: the nearest class mean in a learned space."""

from torch import Tensor

from metadist.algorithms.embedding_based import EmbeddingBased, memberships, refuse_regression
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings

PROTOTYPES = "fitted/prototypes"


@settings
class ProtoNet(EmbeddingBased):
    """Prototypical networks (Snell et al. 2017, arXiv:1703.05175, eq. 1 and 2, Alg. 1).

    Prototypes:  c_k = mean of f(x_i) over the support examples of class k
    Logits:      -|f(x) - c_k|^2, the squared Euclidean distance (a Bregman divergence, sec. 2.3)

    Differs from the authors' code in batch norm alone: there a training episode's support and query sets
    are normalised together, here each by its own statistics or by the support set's (`training.batch_norm`).
    The paper's cosine distance, which it finds worse, is left out.
    """

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        del initial
        refuse_regression(self, network)
        return {}

    def fitted(self, network: Network, meta: Params, embedded: Tensor, support: Examples) -> Params:
        del meta
        members = memberships(network, support, embedded)
        return {PROTOTYPES: members.T @ embedded / members.sum(0)[:, None]}

    def outputs(self, phi: Params, embedded: Tensor) -> Tensor:
        prototypes = phi[PROTOTYPES]
        squares = embedded.square().sum(1)[:, None] + prototypes.square().sum(1)
        return 2 * embedded @ prototypes.T - squares
