"""Matching networks: attention over the support set."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from metadist.algorithms.embedding_based import EmbeddingBased, memberships, refuse_regression
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings

SUPPORT, MEMBERS = "fitted/support", "fitted/members"


@settings
class MatchingNet(EmbeddingBased):
    """Matching networks (Vinyals et al. 2016, arXiv:1606.04080, eq. 1 and sec. 2.1.1).

    Attention:    a(x, x_i) = softmax over i of cos(f(x), f(x_i)) / temperature
    Prediction:   P(y = k | x) = sum of a(x, x_i) over the support examples of class k
    Outputs:      log P, so that their cross entropy is the negative log-likelihood

    Differs from the paper in having no full context embeddings (sec. 2.1.2): support and query share one
    f, which sees one example at a time (and the set only through batch norm).
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """1 in the paper. Cosines of features after a ReLU are 0 or more: one of 5 ways then has 40 % at most, e / (e + 4),
    whatever is learned, and learning is slow; lower temperatures are sharper."""

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        del initial
        refuse_regression(self, network)
        return {}

    def fitted(self, network: Network, meta: Params, embedded: Tensor, support: Examples) -> Params:
        del meta
        return {SUPPORT: F.normalize(embedded, dim=1), MEMBERS: memberships(network, support, embedded)}

    def outputs(self, phi: Params, embedded: Tensor) -> Tensor:
        cosines = F.normalize(embedded, dim=1) @ phi[SUPPORT].T
        attention = torch.log_softmax(cosines / self.temperature, dim=1)
        of_class = torch.where(phi[MEMBERS].T > 0, attention[:, None], -torch.inf)
        return torch.logsumexp(of_class, dim=2)
