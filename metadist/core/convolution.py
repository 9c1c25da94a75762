"""Two-dimensional convolutions on a CPU, fast where each task has weights of its own and only a few images.

A convolution, the gradient by its images and the gradient by its weights are each linear in both of their arguments,
and each one's derivatives are the other two. So three functions are closed under differentiation, and a second-order
meta-gradient never leaves them:

    convolve(x, w)               the gradient by x is to_images(g, w), by w to_weights(x, g)
    to_images(g, w)              the gradient by g is convolve(d, w),  by w to_weights(d, g)
    to_weights(x, g)             the gradient by x is to_images(g, d), by g convolve(x, d)

Few images are laid out as a matrix of patches, and the convolution is one matrix product (Chellapilla et al. 2006,
"High performance convolutional neural networks for document processing"). Where the patches would not fit into a block,
oneDNN convolves, in its channels-last layout; gradients by weights go through patches even then, block by block.

Images are `[images, height, width, channels]` throughout, weights `[filters, height, width, channels]`: a patch's
channels then lie side by side in memory. torch.compile sees three operators and looks no further.
"""

import functools
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

BLOCK_BYTES = 1 << 20
"""Patches made at a time: about what a core's second-level cache holds."""
FEW_CHANNELS = 16
"""Below this many, copying patches takes longer than multiplying them."""

Pair = list[int]


class Geometry(NamedTuple):
    """The sizes that say which pixels a patch holds."""

    images: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the outputs."""
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        return (self.height + 2 * ph - kh) // sh + 1, (self.width + 2 * pw - kw) // sw + 1

    @property
    def num_patches(self) -> int:
        return self.images * self.output[0] * self.output[1]

    @property
    def patch_size(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.channels

    def bytes_as_patches(self, x: Tensor) -> int:
        return self.num_patches * self.patch_size * x.element_size()

    def blocks(self, x: Tensor) -> list[slice]:
        """The images in runs whose patches fit into one block."""
        each = max(1, BLOCK_BYTES * self.images // max(1, self.bytes_as_patches(x)))
        return [slice(start, min(start + each, self.images)) for start in range(0, self.images, each)]


class _Patches:
    """The patches of images of one geometry, in memory that is used again at every call."""

    def __init__(self, geometry: Geometry, dtype: torch.dtype) -> None:
        images, height, width, channels, (kh, kw), (sh, sw), (ph, pw) = geometry
        oh, ow = geometry.output
        padded = torch.zeros(images, height + 2 * ph, width + 2 * pw, channels, dtype=dtype)
        image, row, pixel, _ = padded.stride()
        self.matrix = torch.empty(geometry.num_patches, geometry.patch_size, dtype=dtype)
        """`[patches, patch_size]`."""
        self._inside = padded[:, ph : ph + height, pw : pw + width]
        # A row of a patch lies in one piece.
        self._windows = padded.as_strided((images, oh, ow, kh, kw * channels), (image, row * sh, pixel * sw, row, 1))
        self._target = self.matrix.view(self._windows.shape)

        number, y, x, down, right = torch.meshgrid(*map(torch.arange, (images, oh, ow, kh, kw)), indexing="ij")
        y, x = y * sh + down - ph, x * sw + right - pw
        inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).flatten()
        pixels = ((number * height + y) * width + x).flatten()[inside]
        counts = torch.bincount(pixels, minlength=images * height * width)
        self._entries = torch.arange(len(inside))[inside][torch.argsort(pixels, stable=True)]
        """Places in patches, in the order of the pixels that lie there."""
        self._starts = counts.cumsum(0) - counts

    def of(self, x: Tensor) -> Tensor:
        """`[patches, patch_size]`, until the next call."""
        self._inside.copy_(x)
        self._target.copy_(self._windows)
        return self.matrix

    def summed(self, channels: int) -> Tensor:
        """`[images * height * width, channels]`: every pixel's sum over the places of `matrix` that it lies in."""
        places = self.matrix.view(-1, channels)
        summed: Tensor = torch.nn.functional.embedding_bag(self._entries, places, self._starts, mode="sum")
        return summed


@functools.lru_cache(maxsize=128)
def _patches_of_thread(thread: int, geometry: Geometry, dtype: torch.dtype) -> _Patches:
    del thread
    with torch.inference_mode(False):  # Else it could not be written to outside of inference mode ever after.
        return _Patches(geometry, dtype)


def _patches(geometry: Geometry, dtype: torch.dtype) -> _Patches:
    return _patches_of_thread(threading.get_ident(), geometry, dtype)


def _geometry(images_shape: Any, kernel: Any, stride: Pair, padding: Pair) -> Geometry:
    images, height, width, channels = images_shape
    kh, kw = kernel
    (sh, sw), (ph, pw) = stride, padding
    return Geometry(images, height, width, channels, (kh, kw), (sh, sw), (ph, pw))


def _channels_first(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1).contiguous()


def _convolve(x: Tensor, w: Tensor, stride: Pair, padding: Pair) -> Tensor:
    geometry = _geometry(x.shape, w.shape[1:3], stride, padding)
    if geometry.bytes_as_patches(x) > BLOCK_BYTES:
        return _channels_last(torch.nn.functional.conv2d(_channels_first(x), _channels_first(w), None, stride, padding))
    filters = w.shape[0]
    y = x.new_empty(geometry.images, *geometry.output, filters)
    matrix = _patches(geometry, x.dtype).of(x)
    torch.mm(matrix, w.reshape(filters, -1).t(), out=y.view(-1, filters))
    return y


def _to_images(g: Tensor, w: Tensor, size: Pair, stride: Pair, padding: Pair) -> Tensor:
    shape = (g.shape[0], *size, w.shape[3])
    geometry = _geometry(shape, w.shape[1:3], stride, padding)
    if geometry.bytes_as_patches(g) > BLOCK_BYTES:
        return _channels_last(_by_onednn(g, g.new_empty(1).expand(shape), w, stride, padding, 0))
    filters = w.shape[0]
    patches = _patches(geometry, g.dtype)
    torch.mm(g.reshape(-1, filters), w.reshape(filters, -1), out=patches.matrix)
    return patches.summed(geometry.channels).view(shape)


def _to_weights(x: Tensor, g: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    geometry, filters = _geometry(x.shape, kernel, stride, padding), g.shape[3]
    shape = (filters, *kernel, geometry.channels)
    if geometry.bytes_as_patches(x) > BLOCK_BYTES and geometry.channels < FEW_CHANNELS:
        return _channels_last(_by_onednn(g, x, g.new_empty(1).expand(shape), stride, padding, 1))
    w = x.new_zeros(filters, geometry.patch_size)
    for images in geometry.blocks(x):
        part = geometry._replace(images=images.stop - images.start)
        w.addmm_(g[images].reshape(-1, filters).t(), _patches(part, x.dtype).of(x[images]))
    return w.view(shape)


def _by_onednn(g: Tensor, x: Tensor, w: Tensor, stride: Pair, padding: Pair, wanted: int) -> Tensor:
    mask = [wanted == 0, wanted == 1, False]
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        *map(_channels_first, (g, x, w)), None, stride, padding, [1, 1], False, [0, 0], 1, mask
    )
    return gradients[wanted]


# `torch.library.custom_op` would say this more shortly, and each call would take four times as long.
_library = torch.library.Library("metadist", "DEF")
for _name, _arguments, _function in (
    ("convolve", "Tensor x, Tensor w, int[] stride, int[] padding", _convolve),
    ("to_images", "Tensor g, Tensor w, int[] size, int[] stride, int[] padding", _to_images),
    ("to_weights", "Tensor x, Tensor g, int[] kernel, int[] stride, int[] padding", _to_weights),
):
    _library.define(f"{_name}({_arguments}) -> Tensor")
    _library.impl(_name, _function, "CPU")


@torch.library.register_fake("metadist::convolve")
def _(x: Tensor, w: Tensor, stride: Pair, padding: Pair) -> Tensor:
    geometry = _geometry(x.shape, w.shape[1:3], stride, padding)
    return x.new_empty(geometry.images, *geometry.output, w.shape[0])


@torch.library.register_fake("metadist::to_images")
def _(g: Tensor, w: Tensor, size: Pair, stride: Pair, padding: Pair) -> Tensor:
    del stride, padding
    return g.new_empty(g.shape[0], *size, w.shape[3])


@torch.library.register_fake("metadist::to_weights")
def _(x: Tensor, g: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    del stride, padding
    return x.new_empty(g.shape[3], *kernel, x.shape[3])


class _Bilinear(Function):
    """What the three have in common; of each, `forward` calls the operator."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs[:2])
        ctx.sizes = inputs[2:]


class _Convolve(_Bilinear):
    @staticmethod
    def forward(x: Tensor, w: Tensor, stride: Pair, padding: Pair) -> Tensor:
        result: Tensor = torch.ops.metadist.convolve(x, w, stride, padding)
        return result

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (stride, padding), d = ctx.saved_tensors, ctx.sizes, d.contiguous()
        by_x = _ToImages.apply(d, w, list(x.shape[1:3]), stride, padding) if ctx.needs_input_grad[0] else None
        by_w = _ToWeights.apply(x, d, list(w.shape[1:3]), stride, padding) if ctx.needs_input_grad[1] else None
        return by_x, by_w, None, None


class _ToImages(_Bilinear):
    @staticmethod
    def forward(g: Tensor, w: Tensor, size: Pair, stride: Pair, padding: Pair) -> Tensor:
        result: Tensor = torch.ops.metadist.to_images(g, w, size, stride, padding)
        return result

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (g, w), (_, stride, padding), d = ctx.saved_tensors, ctx.sizes, d.contiguous()
        by_g = _Convolve.apply(d, w, stride, padding) if ctx.needs_input_grad[0] else None
        by_w = _ToWeights.apply(d, g, list(w.shape[1:3]), stride, padding) if ctx.needs_input_grad[1] else None
        return by_g, by_w, None, None, None


class _ToWeights(_Bilinear):
    @staticmethod
    def forward(x: Tensor, g: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
        result: Tensor = torch.ops.metadist.to_weights(x, g, kernel, stride, padding)
        return result

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (x, g), (_, stride, padding), d = ctx.saved_tensors, ctx.sizes, d.contiguous()
        by_x = _ToImages.apply(g, d, list(x.shape[1:3]), stride, padding) if ctx.needs_input_grad[0] else None
        by_g = _Convolve.apply(x, d, stride, padding) if ctx.needs_input_grad[1] else None
        return by_x, by_g, None, None, None


@torch.compiler.allow_in_graph
def convolve(x: Tensor, w: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """`[images, height, width, channels]` by `[filters, height, width, channels]`, differentiable any number of times.

    `stride` and zero `padding` are of height and width. CPU only.
    """
    result: Tensor = _Convolve.apply(x.contiguous(), w.contiguous(), stride, padding)
    return result


class PatchConv2d(nn.Conv2d):
    """`nn.Conv2d` with another way of computing the same: parameters, shapes and results are those of its base."""

    def forward(self, x: Tensor) -> Tensor:
        """`[images, channels, height, width]`; a single image without the first axis goes the way of the base."""
        if x.dim() != 4 or not len(x):
            return super().forward(x)
        y = convolve(x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1), list(self.stride), list(self.padding))
        y = y.permute(0, 3, 1, 2)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def with_patch_convolutions(module: nn.Module) -> nn.Module:
    """`module` with its plain `nn.Conv2d` as PatchConv2d, in place; other convolutions stay as they are."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _is_plain(layer):
            layer.__class__ = PatchConv2d
    return module


def _is_plain(layer: nn.Conv2d) -> bool:
    is_dense = layer.groups == 1 and layer.dilation == (1, 1)
    return is_dense and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
