"""A user's `nn.Module` as a pure function of its parameters, with a loss and a batch-norm policy."""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metadist.core.batch_norm import BatchNormPolicy, EpisodicBatchNorm, Source, batch_norms, with_statistics_from
from metadist.core.episode import EpisodeSpec, Examples
from metadist.core.params import Layout, Params
from metadist.errors import ModelError

_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


@dataclass(frozen=True)
class Network:
    """What an algorithm sees of the model: outputs and losses as pure functions of named parameters.

    Nothing here has state: `functional_call` puts the parameters into modules that hold none of their
    own, so every method runs under `torch.func.grad`, `vmap` and `torch.compile`.
    """

    kind: str
    policy: BatchNormPolicy
    training: bool
    """False in evaluation: then the policy `running` uses the running statistics."""
    skeletons: dict[str, nn.Module]
    parameters: Layout
    statistics_layout: Layout
    statistics: Params
    """Running mean and variance of every batch norm, `<layer>.running_mean: [channels]`; constants of the loss."""
    constants: Params
    """The module's other buffers (a positional encoding, say), and its parameters with `requires_grad=False`."""

    @property
    def _own_source(self) -> Source:
        return "running" if self.policy == "running" and not self.training else "own"

    def outputs(self, params: Params, x: Tensor, reference: Tensor | None = None) -> Tensor:
        """Predictions `[examples, output_size]` (logits in classification) for `x: [examples, *input_shape]`.

        `reference` is the support set's x where `x` is not the support set itself; the policy
        `support` takes its statistics from it.
        """
        model_params = self.constants | {name: params[name] for name in self.parameters.shapes}
        if self.policy == "support" and reference is not None:
            both = torch.cat([reference, x])
            return functional_call(self.skeletons["reference"], model_params, (both,))[reference.shape[0] :]
        source = self._own_source
        if source == "running":
            model_params |= self.statistics
        return functional_call(self.skeletons[source], model_params, (x,))

    def loss(self, params: Params, examples: Examples, reference: Tensor | None = None) -> Tensor:
        """Mean cross entropy (classification) or mean squared error (regression), a scalar."""
        return self.loss_of(self.outputs(params, examples.x, reference), examples.y)

    def loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of given outputs, a scalar."""
        if self.kind == "classification":
            return F.cross_entropy(outputs, targets)
        return F.mse_loss(outputs, targets)

    def accuracy_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of examples whose largest logit is the target's, a scalar; NaN in regression."""
        if self.kind == "classification":
            return (outputs.argmax(-1) == targets).to(outputs.dtype).mean()
        return torch.full((), torch.nan, dtype=outputs.dtype, device=outputs.device)

    def set_statistics(self, params: Params, x: Tensor) -> Tensor:
        """Flat `[statistics]`: the mean and variance that `x` has in every batch norm under `params`.

        In the order of `statistics_layout`; empty where the policy keeps no running statistics.
        """
        if self.policy != "running":
            return x.new_zeros(0)
        module = self.skeletons["record"]
        functional_call(module, self.constants | {name: params[name].detach() for name in self.parameters.shapes}, (x,))
        recorded = {}
        for name, layer in module.named_modules():
            if isinstance(layer, EpisodicBatchNorm):
                assert layer.recorded is not None
                recorded[f"{name}.running_mean"], recorded[f"{name}.running_var"] = layer.recorded
                layer.recorded = None
        return self.statistics_layout.flatten(recorded)

    def bind(self, statistics: Tensor, *, training: bool, policy: BatchNormPolicy | None = None) -> "Network":
        """This network with given running statistics, flat `[statistics]`, for training or for evaluation.

        Its constants move to where the statistics are.
        """
        return dataclasses.replace(
            self,
            statistics=self.statistics_layout.unflatten(statistics),
            constants={name: value.to(statistics.device) for name, value in self.constants.items()},
            training=training,
            policy=policy or self.policy,
        )


def make_network(module: nn.Module, spec: EpisodeSpec, policy: BatchNormPolicy) -> Network:
    """Wraps `module`, which is left as it is. Raises ModelError unless it can be meta-trained on episodes of `spec`."""
    _refuse_random_layers(module)
    norms = batch_norms(module)
    statistics: Params = {}
    if policy == "running":
        for name, layer in norms.items():
            statistics[f"{name}.running_mean"] = torch.zeros(layer.num_features)
            statistics[f"{name}.running_var"] = torch.ones(layer.num_features)
    skeletons = {
        "own": with_statistics_from(module, "own", spec.support_size),
        "reference": with_statistics_from(module, "reference", spec.support_size),
        "running": with_statistics_from(module, "running", spec.support_size),
        "record": with_statistics_from(module, "own", spec.support_size, record=True),
    }
    network = Network(
        kind=spec.kind,
        policy=policy,
        training=True,
        skeletons=skeletons,
        parameters=Layout.of(_trained(module)),
        statistics_layout=Layout.of(statistics),
        statistics=statistics,
        constants={
            name: tensor.detach().clone()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            if not tensor.requires_grad and (isinstance(tensor, nn.Parameter) or name.rpartition(".")[0] not in norms)
        },
    )
    _check_outputs(network, module, spec)
    return network


def _trained(module: nn.Module) -> Params:
    """The parameters that are meta-trained; those with `requires_grad=False` are constants, as in torch."""
    trained: Params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if not trained:
        raise ModelError(
            f"model {type(module).__name__} has no parameter with requires_grad=True, so nothing is"
            " meta-trained. Leave some of them trainable."
        )
    return trained


def _refuse_random_layers(module: nn.Module) -> None:
    for path, layer in module.named_modules():
        if _is_random(layer):
            raise ModelError(
                f"model {type(module).__name__}: layer {path!r} ({type(layer).__name__}) draws random numbers, and a"
                " task's gradient must depend on its key alone. Set its dropout to 0 or remove it."
            )


def _is_random(layer: nn.Module) -> bool:
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        return layer.dropout > 0
    return isinstance(layer, _RANDOM_LAYERS) and getattr(layer, "p", 1.0) > 0


def _check_outputs(network: Network, module: nn.Module, spec: EpisodeSpec) -> None:
    """Tries the network on sets of zeros, of the sizes that training will give it."""
    name = type(module).__name__
    params = {path: value.detach() for path, value in _trained(module).items()}
    support = torch.zeros(spec.support_size, *spec.input_shape)
    for example in (support, torch.zeros(spec.query_size, *spec.input_shape)):
        try:
            with torch.no_grad():
                outputs = network.outputs(params, example, None if example is support else support)
        except Exception as error:
            raise ModelError(
                f"model {name} cannot take inputs of shape {list(example.shape)} that the task gives: {error}."
                " Change the model's sizes or the task's."
            ) from error
        expected, found = [len(example), spec.output_size], list(getattr(outputs, "shape", [type(outputs).__name__]))
        if found != expected:
            raise ModelError(
                f"model {name} must map {list(example.shape)} to {expected}"
                f" ({'one logit a way' if spec.kind == 'classification' else 'one output a target dimension'}),"
                f" got {found}. Change its last layer."
            )
    for path, value in network.constants.items():
        if value._version:  # Counts writes, whether or not they changed anything.
            raise ModelError(
                f"model {name}: buffer {path!r} is written to when the model is called, and a task's gradient must"
                " depend on its key alone. Use a layer without running state (batch norm's has a policy of its own)."
            )
