"""Model-agnostic meta-learning."""

from typing import Annotated, Literal

from pydantic import Field

from metadist.algorithms.inner_loop import gradient_descent
from metadist.core.algorithm import Algorithm
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings


@settings
class MAML(Algorithm):
    """MAML (Finn et al. 2017, arXiv:1703.03400, Alg. 1 and 2).

    Inner loop:  phi_0 = theta;  phi_{k+1} = phi_k - inner_lr * grad L_support(phi_k)
    Outer loop:  meta-gradient = d L_query(phi_K) / d theta

    Differs from the authors' code in that every parameter adapts, batch norm's scale and shift too;
    there they have no scale and a shift that only the outer loop learns.
    """

    inner_lr: Annotated[float, Field(gt=0)] = 0.01
    """Inner-loop step size; Tune searches it in log space."""
    inner_steps: Annotated[int, Field(ge=0)] = 1
    """Inner steps while meta-training; `evaluation.inner_steps` says how many at test."""
    order: Literal["first", "second"] = "second"
    """"first" drops the Hessian terms of d phi_K / d theta (FOMAML, sec. 5.2)."""

    def adapt(self, network: Network, meta: Params, support: Examples, num_steps: int) -> list[Params]:
        return gradient_descent(
            lambda phi: network.loss(phi, support), meta, self.inner_lr, num_steps, first_order=self.order == "first"
        )
