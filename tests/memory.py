"""How much memory a function's tensors take at their peak; the same number in every run."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes that tensors made by `function` hold at once, those kept for its graphs included.

    What was there before is not counted, nor what kernels take for themselves while they run.
    """
    with _LiveBytes() as counter:
        function()
    return counter.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return, each until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # A view, or a tensor written in place, has the storage of an argument.
                if id(storage) not in self.storages | given:
                    self.storages.add(id(storage))
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return outputs

    def _freed(self, storage: int, size: int) -> None:
        self.storages.discard(storage)
        self.live -= size
