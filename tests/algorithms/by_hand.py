"""The meta-gradient of MAML's kind written out with torch.autograd alone, task by task: an independent reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from metadist.core.episode import EpisodeBatch, Examples
from tests.builders import Problem

Weights = list[torch.Tensor]
Net = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
Rate = Callable[[int, int], Any]
"""(inner step, index of the weight) -> its rate; 0 for a weight that does not adapt."""


def tanh_network(weights, x):
    """The smooth network of the builders, from its weights alone."""
    first, first_bias, second, second_bias, last, last_bias = weights
    hidden = torch.tanh(torch.tanh(x @ first.T + first_bias) @ second.T + second_bias)
    return hidden @ last.T + last_bias


def conv4_network(weights, x):
    """Conv-4 with max-pool and batch norm by the statistics of the set at hand, from its weights alone."""
    *blocks, last, last_bias = weights
    for kernel, bias, scale, shift in zip(*(blocks[start::4] for start in range(4)), strict=True):
        x = F.conv2d(x, kernel, bias, padding=1)
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]
        x = F.max_pool2d(torch.relu(x), 2)
    return x.flatten(1) @ last.T + last_bias


def loss_of(network: Net, weights: Weights, examples: Examples) -> torch.Tensor:
    outputs = network(weights, examples.x)
    return (
        F.mse_loss(outputs, examples.y) if outputs.shape == examples.y.shape else F.cross_entropy(outputs, examples.y)
    )


def path_by_hand(
    network: Net, weights: Weights, support: Examples, rate: Rate, inner_steps: int, *, create_graph: bool
) -> list[Weights]:
    """Weights after 0, 1, .., `inner_steps` steps of gradient descent, each with its own rate."""
    path = [weights]
    for step in range(inner_steps):
        gradients = torch.autograd.grad(loss_of(network, path[-1], support), path[-1], create_graph=create_graph)
        path.append([w - rate(step, i) * g for i, (w, g) in enumerate(zip(path[-1], gradients, strict=True))])
    return path


def adapted_by_hand(network, weights, support, inner_lr, inner_steps, *, create_graph):
    return path_by_hand(network, weights, support, lambda step, i: inner_lr, inner_steps, create_graph=create_graph)[-1]


def meta_gradient_by_hand(
    network: Net,
    problem: Problem,
    batch: EpisodeBatch,
    *,
    second_order: bool = True,
    rates: Callable[[dict[str, torch.Tensor]], Rate] | None = None,
    loss_weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Alg. 1 of MAML's paper; `rates` may use meta-parameters, `loss_weights` weigh the query loss of each step."""
    algorithm = problem.algorithm
    names = [name for name, _ in problem.module.named_parameters()]
    total = torch.zeros_like(problem.theta)
    for support_x, support_y, query_x, query_y in zip(*batch.support, *batch.query, strict=True):
        meta = {n: part.clone().requires_grad_() for n, part in problem.layout.unflatten(problem.theta).items()}
        path = path_by_hand(
            network,
            [meta[name] for name in names],
            Examples(support_x, support_y),
            rates(meta) if rates else lambda step, i: algorithm.inner_lr,
            algorithm.inner_steps,
            create_graph=second_order,
        )
        losses = [loss_of(network, phi, Examples(query_x, query_y)) for phi in path[1:] or path]
        weights = [0.0] * (len(losses) - 1) + [1.0] if loss_weights is None else loss_weights
        loss = sum(weight * value for weight, value in zip(weights, losses, strict=True))
        gradients = torch.autograd.grad(loss, list(meta.values()), allow_unused=True, materialize_grads=True)
        total += torch.cat([part.flatten() for part in gradients])
    return total
