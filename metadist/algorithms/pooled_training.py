"""What baselines share whose embedding is trained as that of an ordinary classifier over all training classes."""

import hashlib
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.embedding_based import refuse_regression
from metadist.core.algorithm import Algorithm, Outcome
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings
from metadist.errors import ModelError

WEIGHT, BIAS = "pooled_head.weight", "pooled_head.bias"


@settings
class PooledTraining(Algorithm):
    """Trains the embedding f and a linear head over all training classes; episodes come at test alone.

    Objective:  cross entropy of W f(x) + b on a mini-batch, the query set of `task.name: pooled_classes`

    W: [training classes, features] and b start as torch's linear layers do, from a seed that follows from
    the model's own start. Label smoothing and batch norm are those of section `training`.
    """

    model_output: ClassVar[Literal["predictions", "embedding"]] = "embedding"
    trains_on_episodes: ClassVar[bool] = False

    def extra_parameters(self, network: Network, initial: Params) -> Params:
        refuse_regression(self, network)
        random = torch.Generator().manual_seed(_seed_from(initial))
        bound = network.output_size**-0.5
        return {
            WEIGHT: torch.empty(network.train_ways, network.output_size).uniform_(-bound, bound, generator=random),
            BIAS: torch.empty(network.train_ways).uniform_(-bound, bound, generator=random),
        }

    def objective(self, network: Network, meta: Params, support: Examples, query: Examples) -> tuple[Tensor, Outcome]:
        del support
        outputs = F.linear(network.outputs(meta, query.x), meta[WEIGHT], meta[BIAS])
        loss = network.outer_loss_of(outputs, query.y)
        return loss, Outcome([meta], loss, outputs)

    @staticmethod
    def refuse_empty(network: Network, support: Examples) -> None:
        """Raises ModelError where an episode without a support set is to be scored."""
        if not network.training and support.x.shape[0] == 0:
            raise ModelError(
                "evaluation.split must be val or test with task.name: pooled_classes, got train, whose episodes have"
                " no support set to adapt to. To score on training classes, make a pool where they are in val."
            )


def _seed_from(initial: Params) -> int:
    digest = hashlib.sha256()
    for name in sorted(initial):
        digest.update(initial[name].detach().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:4], "little")
