"""An inner step whose graph is not kept but computed again: memory that does not grow with activations times steps.

torch.utils.checkpoint works through hooks that torch.func does not support, so this is an
autograd function of our own, which works under `torch.func.grad` and `vmap`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of nested tuples and dicts of tensors, whose backward pass first runs it again.

    `function` must be pure and must take every tensor that it uses as an argument. May be differentiated once, as
    meta-gradients are. Source: Griewank and
    Walther 2000 (ACM TOMS 26:1), with a checkpoint at every step.
    """

    def call(*arguments: Any) -> Any:
        flat, structure = pytree.tree_flatten(arguments)
        outputs: list[Any] = []

        def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
            results, spec = pytree.tree_flatten(function(*pytree.tree_unflatten(list(tensors), structure)))
            outputs[:] = [spec]
            return tuple(results)

        class Recomputed(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
                return plain(*tensors)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
                del output
                ctx.save_for_backward(*inputs)

            @staticmethod
            def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
                tensors = ctx.saved_tensors
                moving = [number for number, tensor in enumerate(tensors) if tensor.is_floating_point()]

                def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
                    every = list(tensors)
                    for number, value in zip(moving, values, strict=True):
                        every[number] = value
                    return plain(*every)

                gradients: list[Tensor | None] = [None] * len(tensors)
                # torch.func.grad records the backward pass, too, for a derivative of it that nobody takes here:
                # unrecorded, a step's graph is gone as soon as it has been passed.
                with torch.no_grad():
                    pull = torch.func.vjp(of_moving, *(tensors[number] for number in moving))[1]
                    for number, gradient in zip(moving, pull(tuple(cotangents)), strict=True):
                        gradients[number] = gradient
                return tuple(gradients)

        results = Recomputed.apply(*flat)
        return pytree.tree_unflatten(list(results), outputs[0])

    return call
