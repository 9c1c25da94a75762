"""Meta-SGD: the inner loop's rates, and with them its direction, are learned."""

from metadist.algorithms.inner_loop import GradientBased, LearnedRates
from metadist.core.settings import settings


@settings
class MetaSGD(GradientBased):
    """Meta-SGD (Li et al. 2017, arXiv:1707.09835, Alg. 1 and eq. 3).

    Inner loop:  phi = theta - alpha * grad L_support(theta), elementwise, with alpha as large as theta
    Outer loop:  meta-gradient = d L_query(phi) / d (theta, alpha)

    Rates may become negative, as in the paper. They start equal, at `inner_lr`; the paper draws each
    uniformly from [0.005, 0.1].
    """

    learn_inner_lr: LearnedRates = "per_element"
