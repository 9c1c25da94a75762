"""Model-agnostic meta-learning."""

from metadist.algorithms.inner_loop import GradientBased
from metadist.core.settings import settings


@settings
class MAML(GradientBased):
    """MAML (Finn et al. 2017, arXiv:1703.03400, Alg. 1 and 2).

    Inner loop:  phi_0 = theta;  phi_{k+1} = phi_k - inner_lr * grad L_support(phi_k)
    Outer loop:  meta-gradient = d L_query(phi_K) / d theta

    `order: first` is FOMAML (sec. 5.2). Differs from the authors' code in that every parameter adapts,
    batch norm's scale and shift too; there they have no scale and a shift that only the outer loop learns.
    """
