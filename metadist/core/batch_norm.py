"""Batch norm has a named policy in few-shot learning, never a silent default.

The policy says whose statistics normalise a set (names of Bronskill et al. 2020, arXiv:2003.03284):

`transductive`  each set by its own statistics, query sets included, as in MAML's own code. A query
                example's prediction then depends on the query examples beside it.
`support`       support and query by the support set's statistics, under the parameters at hand; one
                query example at a time gives the same prediction.
`running`       conventional batch norm: while training as `transductive`, and running averages of the
                query sets' statistics are kept; in evaluation every set is normalised by those averages.
`per_step`      as `running`, with averages of their own after each inner step (MAML++, Antoniou et al. 2019,
                arXiv:1810.09502, sec. 4: "per-step batch normalization running statistics").
"""

import copy
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.core.compiled import is_traced

BatchNormPolicy = Literal["transductive", "support", "running", "per_step"]
Source = Literal["own", "reference", "running"]
"""Whose statistics one forward pass uses: of its whole batch, of the leading rows of it, or the running ones."""


class EpisodicBatchNorm(nn.Module):
    """Batch norm whose statistics come from a stated source, as a pure function of its tensors.

    Stands in for `nn.BatchNorm1d/2d/3d` under the same parameter and buffer names. `x: [examples,
    channels, ...]`. Never writes its buffers; with `record` set it leaves the set's mean, its unbiased
    variance and the number of values behind them in `recorded` for the caller to take.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm, source: Source, reference_size: int, record: bool):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("running_mean", torch.zeros(layer.num_features, device="meta"))
        self.register_buffer("running_var", torch.ones(layer.num_features, device="meta"))
        self.eps = layer.eps
        self.source: Source = source
        self.reference_size = reference_size
        self.record = record
        self.recorded: tuple[Tensor, Tensor, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() if x.dtype == torch.bfloat16 else x  # Means of many values need more than its eight bits.
        if self.source == "running":
            mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
            return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False, eps=self.eps)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        if self.record:
            self.recorded = (x.mean(axes), x.var(axes, unbiased=True), x.numel() // x.shape[1])
        if self.source == "own" and not is_traced():
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        reference = x if self.source == "own" else x[: self.reference_size]
        variance, mean = torch.var_mean(reference, axes, unbiased=False, keepdim=True)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return (x - mean) * scale
        return (x - mean) * (scale * self.weight.view(shape)) + self.bias.view(shape)


def with_statistics_from(module: nn.Module, source: Source, reference_size: int, record: bool = False) -> nn.Module:
    """A copy of `module` without storage, its batch norms replaced by ones with the stated source.

    Only its structure is kept (on torch's meta device): it is called through `functional_call`.
    """
    # `.to("meta")` would part weights that two layers share, and one of them would never be given a value.
    tensors = [*module.parameters(), *module.buffers()]
    skeleton = copy.deepcopy(module, {id(tensor): _without_storage(tensor) for tensor in tensors})
    if isinstance(skeleton, nn.modules.batchnorm._BatchNorm):
        return EpisodicBatchNorm(skeleton, source, reference_size, record)
    for name, child in list(skeleton.named_modules()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            parent, _, attribute = name.rpartition(".")
            setattr(skeleton.get_submodule(parent), attribute, EpisodicBatchNorm(child, source, reference_size, record))
    return skeleton


def with_reference_of(skeleton: nn.Module, reference_size: int) -> nn.Module:
    """A copy of a skeleton whose statistics are those of the first `reference_size` rows."""
    copied = copy.deepcopy(skeleton)
    for layer in copied.modules():
        if isinstance(layer, EpisodicBatchNorm):
            layer.source, layer.reference_size = "reference", reference_size
    return copied


def _without_storage(tensor: Tensor) -> Tensor:
    bare = tensor.detach().to("meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def batch_norms(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The module's batch-norm layers by name, in order."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
