"""MAML with an implicit meta-gradient."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from metadist.algorithms.inner_loop import GradientBased, LearnedRates
from metadist.algorithms.inner_optimizers import initial_state
from metadist.core.algorithm import Outcome
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Layout, Params
from metadist.core.settings import settings


@settings
class IMAML(GradientBased):
    """iMAML (Rajeswaran et al. 2019, arXiv:1909.04630, Alg. 1 and 2, eq. 4 and 6).

    Inner loop:  phi* = argmin over phi of L_support(phi) + lambda / 2 |phi - theta|^2, by `inner_steps` steps
    Outer loop:  meta-gradient = (I + H / (lambda + damping))^-1 grad L_query(phi), H the Hessian of L_support
                 at phi, by `cg_steps` conjugate-gradient steps from 0 with Hessian-vector products

    Memory does not grow with inner steps. The meta-gradient is exact where phi is phi*, `damping` is 0 and
    conjugate gradients have converged. What does not adapt (w, where `adapt` leaves some out) gets the total
    derivative by the implicit function theorem: dL_query/dw - d2L_support/(dw dphi) x / (lambda + damping), with
    x the meta-gradient of what adapts.

    The authors' code differs from their paper: it steps on L_support alone and once towards theta at the end
    (`pull: once`), solves (2 I + H / (lambda + 10)) x = grad L_query (here without the 2), and tests with lambda 0.
    """

    regularisation: Annotated[float, Field(gt=0)] = 2.0
    """The paper's lambda: how strongly phi is held near theta; at test as well, unless `pull` is once."""
    cg_steps: Annotated[int, Field(ge=1)] = 5
    """Conjugate-gradient steps; as many as the Hessian has distinct eigenvalues solve exactly."""
    damping: Annotated[float, Field(ge=0)] = 0.0
    """Added to lambda in the outer loop alone; 0 in the paper, 10 in the authors' code. Where the support loss is not
    convex, I + H / lambda need not be positive definite, and a few conjugate-gradient steps then solve nothing."""
    pull: Literal["every_step", "once"] = "every_step"
    """When phi is held near theta: in every inner step, which solves the paper's inner problem; or, as in the authors'
    code, in one more step after the others, while meta-training alone."""

    # Nothing is differentiated through the inner loop, so these are no settings here.
    order: ClassVar[Literal["first"]] = "first"  # type: ignore[misc]
    learn_inner_lr: ClassVar[LearnedRates] = "no"  # type: ignore[misc]
    checkpoint_inner_steps: ClassVar[bool] = False  # type: ignore[misc]

    def inner_loss(self, network: Network, params: Params, meta: Params, support: Examples, step: int) -> Tensor:
        loss = super().inner_loss(network, params, meta, support, step)
        if self.pull == "once":
            return loss
        distance = sum(((params[name] - meta[name]) ** 2).sum() for name in self.adapted(network))
        return loss + self.regularisation / 2 * distance

    def meta_gradient(
        self, network: Network, meta: Params, support: Examples, query: Examples
    ) -> tuple[Params, Outcome]:
        path = self._path(network, meta, support)
        solution, final = path[-1], network.at(self.inner_steps)
        adapted = self.adapted(network)
        layout = Layout.of(self.start(network, meta))

        def query_loss(params: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            loss, outputs = self.query_loss(final, params, support, query)
            return loss, (loss, outputs)

        def support_gradient(params: Params) -> Tensor:
            def loss(phi: Params) -> Tensor:
                return final.loss(params | phi, support)

            return layout.flatten(torch.func.grad(loss)({name: params[name] for name in adapted}))

        held = self.regularisation + self.damping
        direct, (loss, outputs) = torch.func.grad(query_loss, has_aux=True)(solution)

        def second_derivatives(vector: Tensor) -> Params:
            """`vector` times the Hessian for what adapts, and times the mixed derivatives for the rest."""
            along: Params = torch.func.grad(lambda params: support_gradient(params) @ vector)(solution)
            return along

        def multiply(vector: Tensor) -> Tensor:
            return vector + layout.flatten(second_derivatives(vector)) / held

        x = conjugate_gradients(multiply, layout.flatten(direct), self.cg_steps)
        mixed = second_derivatives(x)
        rest = {name: direct[name] - mixed[name] / held for name in meta if name not in adapted}
        return rest | layout.unflatten(x), Outcome(path, loss, outputs)

    def _path(self, network: Network, meta: Params, support: Examples) -> list[Params]:
        """As `adapt`, with the last parameters alone where nobody asks for those on the way."""
        phi = self.start(network, meta)
        state = initial_state(self.inner_optimizer, phi)
        path = [meta | phi]
        for step in range(self.inner_steps):
            phi, state = self.inner_step(step, network.at(step), phi, state, meta, support)
            path = [*path, meta | phi] if network.policy == "per_step" else [meta | phi]
        return [*path[:-1], meta | self._pulled(phi, meta)] if self.pull == "once" else path

    def _pulled(self, phi: Params, meta: Params) -> Params:
        """One inner step on lambda / 2 |phi - theta|^2 alone."""

        def moved(name: str, value: Tensor) -> Tensor:
            return value - self._rate(meta, name, self.inner_steps) * self.regularisation * (value - meta[name])

        return {name: moved(name, value) for name, value in phi.items()}


def conjugate_gradients(multiply: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> Tensor:
    """x of A x = target for a symmetric A, given as `multiply`, after `steps` steps from 0.

    Hestenes and Stiefel 1952. Always as many steps: once the residual is 0, further ones change nothing.
    """
    x, residual, direction = torch.zeros_like(target), target, target
    squared = residual @ residual
    for _ in range(steps):
        image = multiply(direction)
        length = _ratio(squared, direction @ image)
        x, residual = x + length * direction, residual - length * image
        before, squared = squared, residual @ residual
        direction = residual + _ratio(squared, before) * direction
    return x


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their ratio, and 0 where the denominator is 0: for a positive definite A the residual is 0 there too."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))
