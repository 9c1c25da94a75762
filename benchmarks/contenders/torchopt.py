"""TorchOpt: its differentiable optimizer on the module, whose state is put back after each task."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.contenders.gradients import summed
from benchmarks.inner_loop_cases import Case
from metadist.core.episode import EpisodeBatch, Examples


def prepare(case: Case, module: nn.Module, batch: EpisodeBatch) -> Callable[[], Tensor]:
    import torchopt

    tasks = case.one_by_one(batch)
    if case.order == "first":
        return _first_order(case, module, tasks, torchopt.sgd(lr=case.inner_lr))

    theta = list(module.parameters())
    optimizer = torchopt.MetaSGD(module, lr=case.inner_lr)

    def meta_gradient() -> Tensor:
        for parameter in theta:
            parameter.grad = None
        start = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
        optimizer_start = torchopt.extract_state_dict(optimizer, by="reference")
        for support, query in tasks:
            for _ in range(case.inner_steps):
                optimizer.step(case.loss(module(support.x), support.y))
            case.loss(module(query.x), query.y).backward()
            torchopt.recover_state_dict(module, start)
            torchopt.recover_state_dict(optimizer, optimizer_start)
        return summed(module)

    return meta_gradient


def _first_order(
    case: Case, module: nn.Module, tasks: list[tuple[Examples, Examples]], optimizer: object
) -> Callable[[], Tensor]:
    """Its functional optimizer: that of modules always differentiates through the inner loop."""
    import torchopt

    theta = dict(module.named_parameters())
    state = optimizer.init(theta)

    def meta_gradient() -> Tensor:
        module.zero_grad()
        for support, query in tasks:
            phi, inner = theta, state
            for _ in range(case.inner_steps):
                loss = case.loss(functional_call(module, phi, (support.x,)), support.y)
                found = dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))
                updates, inner = optimizer.update(found, inner, inplace=False)
                phi = torchopt.apply_updates(phi, updates, inplace=False)
            case.loss(functional_call(module, phi, (query.x,)), query.y).backward()
        return summed(module)

    return meta_gradient
