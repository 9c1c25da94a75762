"""Plain `torch.func`: all tasks at once with `vmap`, but one by one where convolutions make that faster on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.inner_loop_cases import Case
from metadist.core.episode import EpisodeBatch, Examples

Params = dict[str, Tensor]


def prepare(case: Case, module: nn.Module, batch: EpisodeBatch) -> Callable[[], Tensor]:
    theta = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tasks = case.one_by_one(batch)

    def loss(params: Params, examples: Examples) -> Tensor:
        return case.loss(functional_call(module, params, (examples.x,)), examples.y)

    def query_loss(params: Params, support: Examples, query: Examples) -> Tensor:
        for _ in range(case.inner_steps):
            found = grad(loss)(params, support)
            if case.order == "first":
                found = {name: value.detach() for name, value in found.items()}
            params = {name: value - case.inner_lr * found[name] for name, value in params.items()}
        return loss(params, query)

    def all_at_once(params: Params) -> Tensor:
        return vmap(query_loss, in_dims=(None, 0, 0))(params, batch.support, batch.query).sum()

    def meta_gradient() -> Tensor:
        if case.has_convolutions and batch.support.x.device.type == "cpu":
            total: Params = {}
            for support, query in tasks:
                found = grad(query_loss)(theta, support, query)
                total = {name: total[name].add_(value) for name, value in found.items()} if total else found
        else:
            total = grad(all_at_once)(theta)
        return torch.cat([value.reshape(-1) for value in total.values()])

    return meta_gradient
