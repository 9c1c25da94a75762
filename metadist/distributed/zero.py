"""ZeRO-1 (Rajbhandari et al. 2020, arXiv:1910.02054, sec. 5.1): each rank keeps the optimizer's state of its share."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from metadist.core.outer import OuterLoop

ALIGNMENT = 64
"""Shares begin at multiples of it: torch's vector instructions then see the same groups of numbers as in one piece, so
that the bits are the same."""


class ShardedOuterLoop(OuterLoop):
    """Steps this rank's share of theta and receives the others'. Each method is called on all ranks at once."""

    def _make_optimizer(self) -> torch.optim.Optimizer:
        kind, settings = self._optimizer_settings()
        shares = ALIGNMENT * dist.get_world_size()
        self._share = ALIGNMENT * -(-self.theta.numel() // shares)
        # Views of theta: what the optimizer writes into a share, it writes into theta.
        self._shares = [torch.nn.Parameter(part) for part in self._split(self.theta.detach())]
        return ZeroRedundancyOptimizer(self._shares, optimizer_class=kind, **settings)

    def _split(self, vector: Tensor) -> tuple[Tensor, ...]:
        return vector.split(self._share)

    def _update(self, gradient: Tensor) -> None:
        for share, part in zip(self._shares, self._split(gradient), strict=True):
            share.grad = part
        self.optimizer.step()
        self.optimizer.zero_grad()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As without shares, on rank 0; empty on the others."""
        assert isinstance(self.optimizer, ZeroRedundancyOptimizer)
        self.optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() != 0:
            return {}
        state = self.optimizer.state_dict()["state"]
        states = [state[share] for share in range(len(self._shares)) if share in state]
        # The number of steps is one for all; whatever has a length has that of its share.
        return {
            name: torch.cat([part[name] for part in states]) if value.dim() else value
            for name, value in (states[0] if states else {}).items()
            if isinstance(value, Tensor)
        }

    def load(self, theta: Tensor, optimizer: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.theta.copy_(theta)
        if optimizer:
            split = {
                name: self._split(value) if value.dim() else [value] * len(self._shares)
                for name, value in optimizer.items()
            }
            states = {i: {name: parts[i] for name, parts in split.items()} for i in range(len(self._shares))}
            # The class's own state_dict() would gather all ranks' state, of which nothing is needed here.
            groups = torch.optim.Optimizer.state_dict(self.optimizer)["param_groups"]
            self.optimizer.load_state_dict({"state": states, "param_groups": groups})
