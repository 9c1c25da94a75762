"""Layers of a model as a report shows them, and what they compute: representations, and how alike two of them are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from metadist.core.network import Network
from metadist.core.params import Params


@dataclass(frozen=True)
class Layer:
    """A part of the model that has parameters."""

    name: str
    kind: str
    parameters: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name, or the class and the name where that is a mere number."""
        return f"{self.kind} {self.name}" if self.name.isdecimal() else self.name


def layers_of(network: Network) -> list[Layer]:
    """The children with parameters of the first module that has more than one of them, in order."""
    module, prefix = network.skeletons["own", False], ""
    while True:
        children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
        if len(children) != 1 or not list(children[0][1].children()):
            break
        prefix, module = f"{prefix}{children[0][0]}.", children[0][1]
    # Constants adapt too in some algorithms (CAVIA's context).
    names = [*network.parameters.shapes, *network.constants]
    found = []
    for name, child in children:
        own = tuple(each for each in names if each.startswith(f"{prefix}{name}."))
        if own:
            found.append(Layer(f"{prefix}{name}", type(child).__name__, own))
    return found


def representations(
    network: Network, params: Params, x: Tensor, layers: list[Layer], reference: Tensor | None = None
) -> dict[str, Tensor]:
    """What each layer gives for `x`, flattened to `[examples, features]`, by its name.

    Layers that give something else than one tensor with a row an example are left out.
    """
    found: dict[str, Tensor] = {}
    with _watched(network, layers, found):
        network.outputs(params, x, reference)
    return {name: value[-len(x) :].flatten(1) for name, value in found.items()}


@contextmanager
def _watched(network: Network, layers: list[Layer], found: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            if isinstance(output, Tensor) and output.dim() >= 2:
                found[name] = output.detach()

        return hook

    handles = [
        skeleton.get_submodule(layer.name).register_forward_hook(keep(layer.name))
        for skeleton in network.skeletons.values()
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


LEAST_EXAMPLES = 4
"""The unbiased estimate divides by n - 3."""


def hsic(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion with linear kernels, of rows `[n, features]`.

    HSIC_1 of Song et al. 2012 (JMLR 13, eq. 4), as in Nguyen et al. 2021 (arXiv:2010.15327, eq. 3): with few
    examples and many features the biased one of Kornblith et al. 2019 calls everything alike. Needs n >= 4.
    """
    n = len(x)
    k, other = (rows.double() @ rows.double().T for rows in (x, y))
    k.fill_diagonal_(0)
    other.fill_diagonal_(0)
    trace = (k * other).sum()
    sums = k.sum() * other.sum() / ((n - 1) * (n - 2))
    cross = 2 * (k.sum(0) @ other.sum(0)) / (n - 2)
    return float((trace + sums - cross) / (n * (n - 3)))
