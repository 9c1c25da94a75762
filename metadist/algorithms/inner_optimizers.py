"""Inner-loop optimizers as pure, differentiable functions of gradients and their own state.

torch's optimizers step in place, so nothing can be differentiated through them.
"""

from typing import Literal

import torch
from torch import Tensor

from metadist.core.params import Params

InnerOptimizer = Literal["sgd", "momentum", "rmsprop", "adam"]
EPS = 1e-8
"""Added under the root, squared, rather than to it: the root then has a derivative where a gradient is 0."""

USES_MOMENTUM: dict[str, float] = {"momentum": 0.9, "adam": 0.9}
"""Optimizers with an average of gradients, and its usual decay."""
USES_SQUARES: dict[str, float] = {"rmsprop": 0.99, "adam": 0.999}
"""Optimizers with an average of squared gradients, and its usual decay."""


def initial_state(optimizer: InnerOptimizer, params: Params) -> Params:
    """The state before the first step: zeros, `mean/<name>` and `square/<name>`."""
    kinds = ["mean"] * (optimizer in USES_MOMENTUM) + ["square"] * (optimizer in USES_SQUARES)
    return {f"{kind}/{name}": torch.zeros_like(value) for kind in kinds for name, value in params.items()}


def directions(
    optimizer: InnerOptimizer, gradients: Params, state: Params, step: int, momentum: float, decay: float
) -> tuple[Params, Params]:
    """What is subtracted, times the rate, at inner step `step` (from 0), and the state after it.

    momentum: v' = momentum v + g, subtracts v' (Polyak 1964, as torch.optim.SGD).
    rmsprop:  s' = decay s + (1 - decay) g^2, subtracts g / sqrt(s') (Tieleman and Hinton 2012).
    adam:     with both averages, corrected for their start at 0 (Kingma and Ba 2015, Alg. 1).
    """
    after: Params = {}
    found: Params = {}
    for name, gradient in gradients.items():
        numerator: Tensor = gradient
        if optimizer in USES_MOMENTUM:
            share = 1 - momentum if optimizer == "adam" else 1.0
            numerator = after[f"mean/{name}"] = momentum * state[f"mean/{name}"] + share * gradient
        if optimizer in USES_SQUARES:
            square = after[f"square/{name}"] = decay * state[f"square/{name}"] + (1 - decay) * gradient**2
            if optimizer == "adam":
                numerator = numerator / (1 - momentum ** (step + 1))
                square = square / (1 - decay ** (step + 1))
            numerator = numerator / torch.sqrt(square + EPS**2)
        found[name] = numerator
    return found, after
