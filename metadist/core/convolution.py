"""Two-dimensional convolutions for compiled code on a CPU, fast where each task has weights of its own and few images.

Few images are laid out as a matrix of patches, and the convolution is one matrix product (Chellapilla et al. 2006,
"High performance convolutional neural networks for document processing"). Laying out and its transpose, which adds up
what every pixel has in the patches, are each other's derivative, so that a second-order meta-gradient never leaves
them; the compiler joins them with what comes before and behind, and patches are made once for all that needs them.

Where patches would not fit into a core's cache, and would be larger than the outputs, oneDNN convolves. There, too, a
convolution, the gradient by its images and the gradient by its weights are each linear in both of their arguments, and
each one's derivatives are the other two: three functions that are closed under differentiation.

    convolve(x, w)               the gradient by x is to_images(g, w), by w to_weights(x, g)
    to_images(g, w)              the gradient by g is convolve(d, w),  by w to_weights(d, g)
    to_weights(x, g)             the gradient by x is to_images(g, d), by g convolve(x, d)

Images are `[images, height, width, channels]` throughout, weights `[filters, height, width, channels]`: a patch's
channels then lie side by side in memory.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from metadist.core.compiled import held

PATCH_BYTES = 1 << 20
"""The most patches that are multiplied as a matrix: about half of a core's second-level cache."""

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """The sizes that say which pixels a patch holds."""

    images: int
    height: int
    width: int
    channels: int
    kernel: Pair
    stride: Pair
    padding: Pair

    @property
    def output(self) -> Pair:
        """Height and width of the outputs."""
        return _outputs(self.height, self, 0), _outputs(self.width, self, 1)

    @property
    def num_patches(self) -> int:
        return self.images * self.output[0] * self.output[1]

    @property
    def patch_size(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.channels


def _outputs(size: int, geometry: Geometry, axis: int) -> int:
    return (size + 2 * geometry.padding[axis] - geometry.kernel[axis]) // geometry.stride[axis] + 1


# Tables are of NumPy, so that the compiler takes them as they are instead of computing them at every call.
@functools.lru_cache(maxsize=128)
def _pixels_of_patches(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """`[patches of an image * places of a patch]`: the pixel in each place, and whether it is inside the image."""
    y, x = (
        np.arange(outputs)[:, None] * stride + np.arange(kernel) - padding
        for outputs, kernel, stride, padding in zip(
            geometry.output, geometry.kernel, geometry.stride, geometry.padding, strict=True
        )
    )
    y, x = y[:, None, :, None], x[None, :, None, :]
    inside = (y >= 0) & (y < geometry.height) & (x >= 0) & (x < geometry.width)
    return np.where(inside, y * geometry.width + x, 0).reshape(-1), inside.reshape(-1)


@functools.lru_cache(maxsize=128)
def _places_of_pixels(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """`[pixels of an image, places]`: where each pixel lies in its image's patches, and whether it does."""

    def along(axis: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`[pixels, places]` of one axis: the patch, the place in it, and whether there is such a one."""
        kernel, stride = geometry.kernel[axis], geometry.stride[axis]
        pixel, number = np.arange(size)[:, None] + geometry.padding[axis], np.arange(-(-kernel // stride))
        patch, place = pixel // stride - number, pixel % stride + number * stride
        return patch, place, (place < kernel) & (patch >= 0) & (patch < geometry.output[axis])

    row, down, has_row = (part[:, None, :, None] for part in along(0, geometry.height))
    column, right, has_column = (part[None, :, None, :] for part in along(1, geometry.width))
    there = has_row & has_column
    places = ((row * geometry.output[1] + column) * geometry.kernel[0] + down) * geometry.kernel[1] + right
    pixels = geometry.height * geometry.width
    return np.where(there, places, 0).reshape(pixels, -1), there.reshape(pixels, -1)


class _Patches(Function):
    """`x: [images, height, width, channels] -> [patches, patch_size]`, zero outside of the images."""

    @staticmethod
    def forward(x: Tensor, geometry: Geometry) -> Tensor:
        pixels, inside = map(torch.from_numpy, _pixels_of_patches(geometry))
        # Each pixel is copied into many places: it is not to be computed anew for each of them.
        found = held(x).reshape(geometry.images, -1, geometry.channels)[:, pixels]
        return found.where(inside[:, None], 0.0).reshape(geometry.num_patches, geometry.patch_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.geometry = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _Pixels.apply(d, ctx.geometry), None


class _Pixels(Function):
    """`patches: [patches, patch_size] -> [images, height, width, channels]`: each pixel's sum over its places."""

    @staticmethod
    def forward(patches: Tensor, geometry: Geometry) -> Tensor:
        places, there = map(torch.from_numpy, _places_of_pixels(geometry))
        found = patches.reshape(geometry.images, -1, geometry.channels)[:, places]
        summed = found.where(there[:, :, None], 0.0).sum(2)
        return summed.view(geometry.images, geometry.height, geometry.width, geometry.channels)

    setup_context = _Patches.setup_context

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _Patches.apply(d, ctx.geometry), None


class _Bilinear(Function):
    """What the three functions of oneDNN have in common. `like` is a tensor of the result's sizes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs[:-1])
        ctx.geometry = inputs[-1]


class _Convolve(_Bilinear):
    @staticmethod
    def forward(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        y = torch.nn.functional.conv2d(_channels_first(x), _channels_first(w), None, geometry.stride, geometry.padding)
        return _channels_last(y)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        by_x = _ToImages.apply(d, w, x, ctx.geometry) if ctx.needs_input_grad[0] else None
        by_w = _ToWeights.apply(x, d, w, ctx.geometry) if ctx.needs_input_grad[1] else None
        return by_x, by_w, None


class _ToImages(_Bilinear):
    @staticmethod
    def forward(g: Tensor, w: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
        return _by_onednn(g, like, w, geometry, 0)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        g, w, _ = ctx.saved_tensors
        by_g = _Convolve.apply(d, w, ctx.geometry) if ctx.needs_input_grad[0] else None
        by_w = _ToWeights.apply(d, g, w, ctx.geometry) if ctx.needs_input_grad[1] else None
        return by_g, by_w, None, None


class _ToWeights(_Bilinear):
    @staticmethod
    def forward(x: Tensor, g: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
        return _by_onednn(g, x, like, geometry, 1)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, g, _ = ctx.saved_tensors
        by_x = _ToImages.apply(g, d, x, ctx.geometry) if ctx.needs_input_grad[0] else None
        by_g = _Convolve.apply(x, d, ctx.geometry) if ctx.needs_input_grad[1] else None
        return by_x, by_g, None, None


def _by_onednn(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: int) -> Tensor:
    """The gradient by images (0) or weights (1); of the one that is wanted only the sizes matter."""
    mask = [wanted == 0, wanted == 1, False]
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        *map(_channels_first, (g, x, w)), None, geometry.stride, geometry.padding, [1, 1], False, [0, 0], 1, mask
    )
    return _channels_last(gradients[wanted])


def _channels_first(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1)


def convolve(x: Tensor, w: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """`[images, height, width, channels]` by `[filters, height, width, channels]`, differentiable any number of times.

    `stride` and zero `padding` are of height and width. CPU only.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, w = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, w))
    images, height, width, channels = x.shape
    filters, kh, kw, _ = w.shape
    geometry = Geometry(images, height, width, channels, (kh, kw), stride, padding)
    is_large = geometry.num_patches * geometry.patch_size * x.element_size() > PATCH_BYTES
    if is_large and geometry.patch_size > filters:
        y: Tensor = _Convolve.apply(x, w, geometry)
        return y
    patches: Tensor = _Patches.apply(x, geometry)
    return (patches @ w.reshape(filters, -1).t()).view(images, *geometry.output, filters)
