"""higher: a stateless copy of the module and a differentiable optimizer for each task."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.contenders.gradients import summed
from benchmarks.inner_loop_cases import Case
from metadist.core.episode import EpisodeBatch


def prepare(case: Case, module: nn.Module, batch: EpisodeBatch) -> Callable[[], Tensor]:
    import higher

    optimizer = torch.optim.SGD(module.parameters(), lr=case.inner_lr)
    tasks = case.one_by_one(batch)
    is_second = case.order == "second"

    def meta_gradient() -> Tensor:
        module.zero_grad()
        for support, query in tasks:
            with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False, track_higher_grads=is_second) as (
                adapted,
                inner,
            ):
                for _ in range(case.inner_steps):
                    inner.step(case.loss(adapted(support.x), support.y))
                loss = case.loss(adapted(query.x), query.y)
                if is_second:
                    loss.backward()
                    continue
                # The first-order meta-gradient is that at phi, which nothing links to theta here.
                found = torch.autograd.grad(loss, list(adapted.parameters()))
                for parameter, gradient in zip(module.parameters(), found, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return summed(module)

    return meta_gradient
