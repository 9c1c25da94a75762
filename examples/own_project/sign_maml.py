"""An algorithm of one's own."""

import torch

from metadist import Algorithm, settings


@settings
class SignMAML(Algorithm):
    """Inner steps along the sign of the gradient (Fan et al. 2021, arXiv:2109.07497).

    Inner loop:  phi_{k+1} = phi_k - inner_lr * sign(grad L_support(phi_k))
    """

    inner_lr: float = 0.01
    inner_steps: int = 5

    def adapt(self, network, meta, support, num_steps):
        path = [meta]
        for _ in range(num_steps):
            gradient = torch.func.grad(lambda phi: network.loss(phi, support))(path[-1])
            path.append({name: p - self.inner_lr * gradient[name].sign() for name, p in path[-1].items()})
        return path
