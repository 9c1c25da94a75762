"""The inner loop that gradient-based algorithms share."""

from collections.abc import Callable

import torch
from torch import Tensor

from metadist.core.params import Params


def gradient_descent(
    loss: Callable[[Params], Tensor], start: Params, inner_lr: float, num_steps: int, *, first_order: bool
) -> list[Params]:
    """Parameters after 0, 1, .., `num_steps` steps of gradient descent on `loss`, a scalar function.

    With `first_order` the inner gradients are constants of the outer differentiation.
    """
    path = [start]
    for _ in range(num_steps):
        phi = path[-1]
        gradient = torch.func.grad(loss)(phi)
        if first_order:
            gradient = {name: value.detach() for name, value in gradient.items()}
        path.append({name: value - inner_lr * gradient[name] for name, value in phi.items()})
    return path
