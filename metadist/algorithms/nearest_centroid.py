"""Nearest centroid on an ordinary classifier's embedding."""

from torch import Tensor
from torch.nn.functional import normalize

from metadist.algorithms.pooled_training import PooledTraining
from metadist.algorithms.proto_net import ProtoNet
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings


@settings
class NearestCentroid(PooledTraining, ProtoNet):
    """SimpleShot with L2N (Wang et al. 2019, arXiv:1911.04623, sec. 3): pooled training, then nothing is learned.

    Centroids:  c_k = mean of f(x_i) / |f(x_i)| over the support examples of class k
    Logits:     -|f(x) / |f(x)| - c_k|^2, which lie in [-4, 0] and so say little of confidence

    The paper's centring (CL2N), which first subtracts the training examples' mean embedding, is left out:
    no task knows that mean. Of the training images, nothing is cropped, flipped or jittered.
    """

    def fitted(self, network: Network, meta: Params, embedded: Tensor, support: Examples) -> Params:
        self.refuse_empty(network, support)
        return ProtoNet.fitted(self, network, meta, normalize(embedded), support)

    def outputs(self, phi: Params, embedded: Tensor) -> Tensor:
        return ProtoNet.outputs(self, phi, normalize(embedded))
