"""Max-pooling for compiled code, in windows that do not overlap: comparisons that the compiler joins with other loops.

Which value of its window is the largest is kept as a number; spreading gradients to those places, and picking what lies
there, are each other's derivatives.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from metadist.core.compiled import held


def max_pool(x: Tensor, size: int) -> Tensor:
    """`[images, height, width, channels]`, by windows of `size` x `size`; rows and columns beyond them do not count.

    Of equal values the first one counts, and NaN before all others, as in torch.
    """
    pooled: Tensor = _MaxPool.apply(x, size)[0]
    return pooled


class _MaxPool(Function):
    """The largest value of each window, and its place: `down * size + right`."""

    @staticmethod
    def forward(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        first, *rest = _places_of_windows(x, size)
        largest, place = first, torch.zeros_like(first, dtype=torch.int32)
        for number, value in enumerate(rest, start=1):
            is_larger = (value > largest) | (value != value)  # NaN; `isnan` is slow in compiled code.
            largest, place = torch.where(is_larger, value, largest), torch.where(is_larger, number, place)
        return largest, held(place)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.size = inputs
        ctx.sizes = x.shape[1:3]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, d: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(d, *ctx.saved_tensors, ctx.size, ctx.sizes), None


class _Spread(Function):
    """`d` at each window's place, and zero elsewhere."""

    @staticmethod
    def forward(d: Tensor, place: Tensor, size: int, sizes: tuple[int, int]) -> Tensor:
        numbers = torch.arange(size * size, dtype=torch.int32).view(size, 1, size, 1)
        spread = torch.where(place[:, :, None, :, None] == numbers, d[:, :, None, :, None], 0.0)
        height, width = d.shape[1] * size, d.shape[2] * size
        spread = spread.reshape(d.shape[0], height, width, d.shape[3])
        return F.pad(spread, (0, 0, 0, sizes[1] - width, 0, sizes[0] - height))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        _, place, ctx.size, ctx.sizes = inputs
        ctx.save_for_backward(place)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        return _Pick.apply(d, *ctx.saved_tensors, ctx.size), None, None, None


class _Pick(Function):
    """The value at each window's place."""

    @staticmethod
    def forward(x: Tensor, place: Tensor, size: int) -> Tensor:
        picked, *rest = _places_of_windows(x, size)
        for number, value in enumerate(rest, start=1):
            picked = torch.where(place == number, value, picked)
        return picked

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x, place, ctx.size = inputs
        ctx.sizes = x.shape[1:3]
        ctx.save_for_backward(place)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(d, *ctx.saved_tensors, ctx.size, ctx.sizes), None, None


def _places_of_windows(x: Tensor, size: int) -> Iterator[Tensor]:
    """What lies in each place of all windows, `[images, windows down, windows right, channels]`, in reading order."""
    height, width = x.shape[1] // size, x.shape[2] // size
    windows = x[:, : height * size, : width * size].unflatten(2, (width, size)).unflatten(1, (height, size))
    return (windows[:, :, down, :, right] for down in range(size) for right in range(size))
