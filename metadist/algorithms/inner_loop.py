"""The inner loop that gradient-based algorithms share."""

import fnmatch
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metadist.algorithms.inner_optimizers import (
    USES_MOMENTUM,
    USES_SQUARES,
    InnerOptimizer,
    directions,
    initial_state,
)
from metadist.algorithms.recompute import recomputed
from metadist.core.algorithm import Algorithm
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.schedule import Changes, check_order, rate_at
from metadist.core.settings import settings
from metadist.errors import ModelError

RATE = "inner_lr"
"""Meta-parameter of a learned rate: `inner_lr` where all share one, else `inner_lr/<parameter>`."""
RATE_FACTOR = "inner_lr_factor"
"""What all rates are multiplied by where they follow a schedule. Nobody learns it; it stands among the meta-parameters
so that a checkpoint says what rates its theta was made with."""

_pattern = torch.compiler.assume_constant_result(fnmatch.translate)
"""A pattern as a regular expression. torch.compile cannot look into it, and needs to be told that it has no effects."""

Step = Callable[[Params, Params, Params, Examples], tuple[Params, Params]]
LearnedRates = Literal["no", "shared", "per_layer", "per_layer_per_step", "per_element"]


@settings
class GradientBased(Algorithm):
    """Adapts by gradient steps on the support loss; the base of the algorithms that do.

    Inner loop:  phi_0 = theta;  phi_{k+1} = phi_k - rate_k * direction(grad L_support(phi_k))
    """

    inner_lr: Annotated[float, Field(gt=0)] = 0.01
    """Inner-loop step size; Tune searches it in log space. Where rates are learned, what they start from."""
    inner_lr_schedule: Changes | None = None
    """What `inner_lr` becomes from given outer steps on: pairs of [step, rate]. Learned rates are multiplied by what
    that is of `inner_lr`. Evaluation takes the rate of the last step made."""
    inner_steps: Annotated[int, Field(ge=0)] = 1
    """Inner steps while meta-training; `evaluation.inner_steps` says how many at test."""
    order: Literal["first", "second"] = "second"
    """"first" takes inner gradients for constants: it drops the Hessian terms of d phi_K / d theta."""
    adapts: str | tuple[str, ...] = Field(default="*", alias="adapt")
    """Which parameters the inner loop changes: patterns of their names (`block1.*`), `head` for the last layer,
    `body` for all others. The rest is learned by the outer loop alone."""
    inner_optimizer: InnerOptimizer = "sgd"
    inner_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the average of gradients, for momentum and adam; left out, 0.9."""
    inner_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the average of squared gradients; left out, 0.99 for rmsprop and 0.999 for adam."""
    learn_inner_lr: LearnedRates = "no"
    """Rates as meta-parameters: one for all, one a tensor, one a tensor and inner step, or one a number."""
    checkpoint_inner_steps: bool = False
    """Keeps only the parameters after each inner step and computes its graph again when it is needed: less memory,
    more time, the same bits (for MAML; to rounding where one parameter enters several steps, as a learned rate)."""

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> "GradientBased":
        if self.inner_momentum is not None and self.inner_optimizer not in USES_MOMENTUM:
            raise ValueError(
                f"inner_momentum is for inner_optimizer: momentum or adam, not {self.inner_optimizer}. Leave it out."
            )
        if self.inner_decay is not None and self.inner_optimizer not in USES_SQUARES:
            raise ValueError(
                f"inner_decay is for inner_optimizer: rmsprop or adam, not {self.inner_optimizer}. Leave it out."
            )
        check_order("inner_lr_schedule", self.inner_lr_schedule)
        return self

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        return self._learned_rates(network, initial) | self._rate_factor(0)

    def constants_at(self, step: int) -> Params:
        return self._rate_factor(step)

    def _rate_factor(self, step: int) -> Params:
        if self.inner_lr_schedule is None:
            return {}
        return {RATE_FACTOR: torch.tensor(rate_at(step, self.inner_lr, self.inner_lr_schedule) / self.inner_lr)}

    def _learned_rates(self, network: Network, initial: Params) -> Params:
        start = self.start(network, initial)
        rate = torch.tensor(self.inner_lr)
        if self.learn_inner_lr == "shared":
            return {RATE: rate}
        steps = (max(1, self.inner_steps),) if self.learn_inner_lr == "per_layer_per_step" else ()
        if self.learn_inner_lr in ("per_layer", "per_layer_per_step"):
            return {f"{RATE}/{name}": rate.expand(steps).clone() for name in start}
        if self.learn_inner_lr == "per_element":
            return {f"{RATE}/{name}": torch.full_like(value, self.inner_lr) for name, value in start.items()}
        return {}

    def adapted(self, network: Network) -> list[str]:
        """Names of the parameters that the inner loop changes. Raises ModelError where a pattern matches none."""
        names = list(network.parameters.shapes)
        head = names[-1].rpartition(".")[0]
        groups = {
            "head": [name for name in names if name.rpartition(".")[0] == head],
            "body": [name for name in names if name.rpartition(".")[0] != head],
        }
        found: set[str] = set()
        for pattern in (self.adapts,) if isinstance(self.adapts, str) else self.adapts:
            matches = groups.get(pattern) or [name for name in names if re.match(_pattern(pattern), name)]
            if not matches:
                raise ModelError(
                    f"algorithm.adapt: {pattern!r} matches no parameter of the model. Use head, body or a pattern"
                    f" of these names: {', '.join(names)}."
                )
            found.update(matches)
        return [name for name in names if name in found]

    def adapt(self, network: Network, meta: Params, support: Examples, num_steps: int) -> list[Params]:
        phi = self.start(network, meta)
        state = initial_state(self.inner_optimizer, phi)
        path = [meta | phi]
        for step in range(num_steps):
            one_step: Step = partial(self.inner_step, step, network.at(step))
            run = recomputed(one_step) if self.checkpoint_inner_steps else one_step
            phi, state = run(phi, state, meta, support)
            path.append(meta | phi)
        return path

    def start(self, network: Network, meta: Params) -> Params:
        """What the inner loop changes, before its first step."""
        return {name: meta[name] for name in self.adapted(network)}

    def inner_step(
        self, step: int, network: Network, phi: Params, state: Params, meta: Params, support: Examples
    ) -> tuple[Params, Params]:
        """The adapted parameters and the inner optimizer's state after inner step `step`, counted from 0."""
        gradients: Params = torch.func.grad(lambda phi: self.inner_loss(network, meta | phi, meta, support, step))(phi)
        if self.order == "first":
            gradients = {name: value.detach() for name, value in gradients.items()}
        momentum, decay = self.inner_momentum, self.inner_decay
        found, state = directions(
            self.inner_optimizer,
            self.transformed(meta, gradients),
            state,
            step,
            USES_MOMENTUM.get(self.inner_optimizer, 0.0) if momentum is None else momentum,
            USES_SQUARES.get(self.inner_optimizer, 0.0) if decay is None else decay,
        )
        return {name: value - self._rate(meta, name, step) * found[name] for name, value in phi.items()}, state

    def inner_loss(self, network: Network, params: Params, meta: Params, support: Examples, step: int) -> Tensor:
        """What an inner step descends, a scalar: the support loss under `params`."""
        del meta, step
        return network.loss(params, support)

    def transformed(self, meta: Params, gradients: Params) -> Params:
        """Inner gradients as the inner optimizer gets them: as they are, unless a paper preconditions them."""
        del meta
        return gradients

    def _rate(self, meta: Params, name: str, step: int) -> Tensor | float:
        rate = self._own_rate(meta, name, step)
        # Detached: its meta-gradient is 0.
        return rate if self.inner_lr_schedule is None else rate * meta[RATE_FACTOR].detach()

    def _own_rate(self, meta: Params, name: str, step: int) -> Tensor | float:
        if self.learn_inner_lr == "no":
            return self.inner_lr
        if self.learn_inner_lr == "shared":
            return meta[RATE]
        rate = meta[f"{RATE}/{name}"]
        # At test there may be more steps than in training: they go on with the last step's rate.
        return rate[min(step, len(rate) - 1)] if self.learn_inner_lr == "per_layer_per_step" else rate
