"""An adapted model as a plain `nn.Module`: what is exported, and needs nothing of the run that it came from."""

from typing import cast

import torch
from torch import Tensor, nn

from metadist.adaptation import AdaptedModel
from metadist.core.params import Params


class Predictor(nn.Module):
    """`[examples, *input_shape]` to probabilities `[examples, classes]`, or to values `[examples, targets]`.

    All that adaptation found is inside: parameters, prototypes or ridge weights, the temperature, and the support
    set's batch-norm statistics, frozen. Outputs of the head that no class took are cut off before the softmax.
    """

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        network = model.network
        if network.policy == "support":
            with torch.no_grad():
                network = network.frozen(model.phi, model.support.x)
        self.network = network
        self.algorithm = model.run.experiment.algorithm
        self.support = model.support
        self.classes = len(model.classes_)
        self.temperature = model.temperature
        self.names = list(model.phi)
        for number, value in enumerate(model.phi.values()):
            self.register_buffer(f"phi{number}", value.detach().clone())

    @property
    def phi(self) -> Params:
        """The adapted parameters by name."""
        return {name: cast(Tensor, getattr(self, f"phi{number}")) for number, name in enumerate(self.names)}

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.algorithm.predict(self.network, self.phi, self.support, x)
        return torch.softmax(outputs[:, : self.classes] / self.temperature, 1) if self.classes else outputs
