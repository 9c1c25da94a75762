"""What a run's model sees in an example: the input of its last layer, or its embedding."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metadist.adaptation import LoadedRun


def features(run: "LoadedRun", x: Tensor, reference: Tensor) -> Tensor:
    """Features `[examples, features]` of `x: [examples, *input_shape]` at theta.

    Batch norm takes its statistics from `reference`, so that features of several sets can be compared, or
    where the run has running ones, from these.
    """
    experiment = run.experiment
    policy = "support" if experiment.network.policy == "transductive" else experiment.network.policy
    network = experiment.network.for_support_size(len(reference)).bind(run.statistics, training=False, policy=policy)
    theta = experiment.theta.unflatten(run.theta)
    if experiment.algorithm.model_output == "embedding":
        with torch.no_grad():
            return network.outputs(theta, x, reference)
    last_layer = next(reversed(network.parameters.shapes)).rpartition(".")[0]
    seen: list[Tensor] = []

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        del module
        seen.append(inputs[0])

    with ExitStack() as hooks, torch.no_grad():
        for skeleton in network.skeletons.values():
            hooks.enter_context(skeleton.get_submodule(last_layer).register_forward_pre_hook(keep))
        network.outputs(theta, x, reference)
    return seen[-1].flatten(1)[-len(x) :]
