"""CAVIA: the inner loop changes a few context parameters, and no weight."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metadist.algorithms.inner_loop import GradientBased
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings
from metadist.errors import ModelError


@settings
class CAVIA(GradientBased):
    """CAVIA (Zintgraf et al. 2019, arXiv:1810.03642, sec. 3).

    Inner loop:  c_0 = 0;  c_{k+1} = c_k - inner_lr * grad_c L_support(theta, c_k)
    Outer loop:  meta-gradient = d L_query(theta, c_K) / d theta

    The context c: [num_context] enters at one layer of the model. At a linear layer it is concatenated to
    the input, h = W x + U c + b (sec. 3.3, regression). At any other layer its output is modulated channel by
    channel, h' = gamma h + beta with (gamma, beta) = A c + a (FiLM; sec. 3.3, images; after batch norm as in
    the authors' code). a starts at gamma = 1 and beta = 0; theirs starts at random.
    """

    adapts: Literal["context"] = Field(default="context", alias="adapt")
    """The context alone."""
    context_layer: str
    """The layer at which the context enters, by its name in the model (Conv-4: block3.norm)."""
    num_context: Annotated[int, Field(ge=1)] = 100

    def prepare(self, module: nn.Module) -> nn.Module:
        names = [name for name, _ in module.named_modules() if name]
        if self.context_layer not in names:
            raise ModelError(
                f"algorithm.context_layer: {self.context_layer!r} is no layer of the model. There are:"
                f" {', '.join(names)}."
            )
        parent, _, attribute = self.context_layer.rpartition(".")
        layer = module.get_submodule(self.context_layer)
        setattr(module.get_submodule(parent), attribute, _WithContext(layer, self.num_context, self.context_layer))
        return module

    def adapted(self, network: Network) -> list[str]:
        return [name for name in network.constants if name == f"{self.context_layer}.context"]

    def start(self, network: Network, meta: Params) -> Params:
        like = next(iter(meta.values()))
        return {name: like.new_zeros(self.num_context) for name in self.adapted(network)}


class _WithContext(nn.Module):
    """A layer into which a context enters; the context is no parameter of the outer loop."""

    def __init__(self, layer: nn.Module, num_context: int, name: str) -> None:
        super().__init__()
        self.layer = layer
        self.is_linear = isinstance(layer, nn.Linear)
        channels = _channels(layer, name)
        self.film = nn.Linear(num_context, channels if self.is_linear else 2 * channels, bias=not self.is_linear)
        if not self.is_linear:
            with torch.no_grad():
                self.film.bias.copy_(torch.cat([torch.ones(channels), torch.zeros(channels)]))
        self.context = nn.Parameter(torch.zeros(num_context), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        entered: Tensor = self.film(self.context.to(h.dtype))
        if self.is_linear:
            return h + entered
        shape = [1, -1] + [1] * (h.dim() - 2)
        gamma, beta = entered.chunk(2)
        return gamma.view(shape) * h + beta.view(shape)


def _channels(layer: nn.Module, name: str) -> int:
    for attribute in ("out_features", "out_channels", "num_features"):
        if isinstance(size := getattr(layer, attribute, None), int):
            return size
    raise ModelError(
        f"algorithm.context_layer: {name!r} ({type(layer).__name__}) does not say how many channels it gives."
        " Use a linear, convolution or batch-norm layer."
    )
