"""What the contenders that accumulate into `.grad` have in common."""

import torch
from torch import Tensor, nn


def summed(module: nn.Module) -> Tensor:
    """The accumulated gradients as one flat tensor."""
    return torch.cat([parameter.grad.reshape(-1) for parameter in module.parameters()])
