"""MAML++: MAML with the changes that make it train stably, each with its own switch."""

import dataclasses
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metadist.algorithms.inner_loop import GradientBased, LearnedRates
from metadist.core.algorithm import Algorithm, Outcome
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings

LOSS_WEIGHTS = "multi_step_loss_weights"
PER_STEP = "per_step"
"""Meta-parameters `per_step/<parameter>: [inner_steps + 1, channels]`, in place of the model's own."""
LEAST_SHARE = 0.03
"""No inner step's loss weighs less than this share of its first weight while weights are annealed (authors' code)."""


@settings
class MAMLPlusPlus(GradientBased):
    """MAML++ (Antoniou et al. 2019, arXiv:1810.09502, sec. 4).

    Outer loop: minimises  sum_k w_k L_query(phi_k),  k = 1 .. K,  where w starts at 1/K each and moves to
    (0, .., 0, 1). Its parts: multi-step loss (MSL), derivative-order annealing (DA, `second_order_from`),
    learned rates per layer and step (LSLR, `learn_inner_lr`), batch-norm scale and shift per step (BNWB,
    `per_step_batch_norm`), batch-norm running statistics per step (BNRS, `training.batch_norm: per_step`),
    cosine annealing (CA, `outer.schedule: cosine`).

    Differs from the authors' code in that weights move with every outer step, not every 500; that a step is
    counted by the updates behind it, so that the query set after K updates has a scale of its own (K + 1 of
    them); and that running statistics are used in evaluation, as the paper says, where their code always
    normalises by the set at hand (`training.batch_norm: transductive`).
    """

    learn_inner_lr: LearnedRates = "per_layer_per_step"
    multi_step_loss: bool = True
    multi_step_loss_steps: Annotated[int, Field(ge=1)] = 7500
    """Outer steps until the last inner step's loss counts alone (15 epochs of 500 in the authors' code)."""
    second_order_from: Annotated[int, Field(ge=0)] = 0
    """Outer step from which the meta-gradient has its second-order terms; before, it is FOMAML's."""
    per_step_batch_norm: bool = True
    """Batch norm's scale and shift are learned for each inner step by the outer loop, and the inner loop leaves
    them alone."""

    @model_validator(mode="after")
    def _refuse_a_loss_without_steps(self) -> "MAMLPlusPlus":
        if self.inner_steps < 1:
            raise ValueError(
                "inner_steps must be >= 1, since MAML++ weighs the losses after each inner step, got 0. Try 5."
            )
        if self.order == "first" and self.second_order_from:
            raise ValueError("second_order_from is for order: second. Leave one of them out.")
        return self

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        per_step = {
            f"{PER_STEP}/{name}": initial[name].expand(self.inner_steps + 1, *initial[name].shape).clone()
            for name in self._norm_parameters(network)
        }
        return super().extra_parameters(network, initial) | per_step

    def adapted(self, network: Network) -> list[str]:
        outer_only = self._norm_parameters(network)
        return [name for name in super().adapted(network) if name not in outer_only]

    def at_step(self, step: int) -> Algorithm:
        return dataclasses.replace(
            self,
            order="first" if step < self.second_order_from else self.order,
            second_order_from=0,
            multi_step_loss=self.multi_step_loss and step < self.multi_step_loss_steps,
        )

    def constants_at(self, step: int) -> Params:
        if not self.multi_step_loss or step >= self.multi_step_loss_steps:
            return super().constants_at(step)
        share, moved = 1 / self.inner_steps, step / self.multi_step_loss_steps
        early = max(share * (1 - moved), share * LEAST_SHARE)
        weights = torch.full((self.inner_steps,), early)
        weights[-1] = 1 - (self.inner_steps - 1) * early
        return super().constants_at(step) | {LOSS_WEIGHTS: weights}

    def adapt(self, network: Network, meta: Params, support: Examples, num_steps: int) -> list[Params]:
        path = super().adapt(network, meta, support, num_steps)
        return [params | self._norms_at(network, meta, step) for step, params in enumerate(path)]

    def inner_loss(self, network: Network, params: Params, meta: Params, support: Examples, step: int) -> Tensor:
        return network.loss(params | self._norms_at(network, meta, step), support)

    def objective(self, network: Network, meta: Params, support: Examples, query: Examples) -> tuple[Tensor, Outcome]:
        if not self.multi_step_loss:
            return super().objective(network, meta, support, query)
        path = self.adapt(network, meta, support, self.inner_steps)
        scores = [
            self.query_loss(network.at(step), path[step], support, query) for step in range(1, self.inner_steps + 1)
        ]
        loss, outputs = scores[-1]
        total = meta[LOSS_WEIGHTS] @ torch.stack([loss for loss, _ in scores])
        return total, Outcome(path, loss, outputs)

    def _norm_parameters(self, network: Network) -> list[str]:
        """Names of batch norm's scales and shifts, where there is one for each step."""
        if not self.per_step_batch_norm:
            return []
        return [name for name in network.parameters.shapes if name.rpartition(".")[0] in network.batch_norms]

    def _norms_at(self, network: Network, meta: Params, step: int) -> Params:
        # At test there may be more steps than in training: they go on with the last step's.
        index = min(step, self.inner_steps)
        return {name: meta[f"{PER_STEP}/{name}"][index] for name in self._norm_parameters(network)}
