"""Meta-Curvature: the inner gradient is multiplied by learned matrices."""

import math

import torch
from torch import Tensor

from metadist.algorithms.inner_loop import GradientBased
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings

CURVATURE = "curvature"
"""Meta-parameters `curvature/<parameter>/<mode>`, square matrices of as many rows as the mode has places."""


@settings
class MetaCurvature(GradientBased):
    """Meta-Curvature (Park and Oliva 2019, arXiv:1902.03356, sec. 3).

    Inner loop:  G of shape [out, in, d], d kernel positions:  MC(G) = G x_3 M_f x_2 M_i x_1 M_o,
                 phi_{k+1} = phi_k - inner_lr * MC(grad L_support(phi_k)),
                 on flattened G: (M_o kron M_i kron M_f) vec(G), never built
    Outer loop:  meta-gradient = d L_query(phi_K) / d (theta, M)

    All M start as the identity, so that the first step is MAML's. Matrices have M_o and M_i; vectors
    (biases, batch norm) have M_o as the definition for one mode gives it, where reimplementations often
    learn its diagonal alone. Preferred to WarpGrad (Flennerhag et al. 2020, arXiv:1909.00025), which
    puts layers of its own between those of the user's model: this one takes any model as it is.
    """

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        curvature = {
            f"{CURVATURE}/{name}/{mode}": torch.eye(size)
            for name in self.adapted(network)
            for mode, size in modes(initial[name]).items()
        }
        return super().extra_parameters(network, initial) | curvature

    def transformed(self, meta: Params, gradients: Params) -> Params:
        found = {}
        for name, gradient in gradients.items():
            tensor = gradient.flatten(2) if gradient.dim() > 2 else gradient
            for axis, mode in enumerate(modes(gradient)):
                product = torch.tensordot(meta[f"{CURVATURE}/{name}/{mode}"], tensor, dims=([1], [axis]))
                tensor = product.movedim(0, axis)
            found[name] = tensor.reshape(gradient.shape)
        return found


def modes(parameter: Tensor) -> dict[str, int]:
    """Size of each mode of a parameter `[out, in, *kernel]`; kernel positions are one mode."""
    shape = parameter.shape
    sizes = [*shape[:2], math.prod(shape[2:])] if parameter.dim() > 2 else shape
    return dict(zip(("out", "in", "kernel"), sizes, strict=False))
