"""Named tensors as one flat vector, and back: theta travels, is summed and is stepped as a vector."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in the flat vector; the order is that of `shapes`."""

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector `[size]` of all tensors, in the layout's order."""
        if not self.shapes:
            return torch.zeros(0)
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def unflatten(self, vector: Tensor) -> Params:
        """Views into `vector: [size]`, differentiable, of the vector's own dtype."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = torch.split(vector, sizes) if sizes else ()
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
