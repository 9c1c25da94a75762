"""A user's `nn.Module` as a pure function of its parameters, with a loss and a batch-norm policy."""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metadist.core.batch_norm import (
    BatchNormPolicy,
    EpisodicBatchNorm,
    Source,
    batch_norms,
    with_reference_of,
    with_statistics_from,
)
from metadist.core.episode import EpisodeSpec, Examples
from metadist.core.params import Layout, Params
from metadist.errors import ModelError

_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.RReLU)
"""Layers that draw random numbers while training; a class of one's own with dropout inside derives from one of them."""


@dataclass(frozen=True)
class Network:
    """What an algorithm sees of the model: outputs and losses as pure functions of named parameters.

    Nothing here has state: `functional_call` puts the parameters into modules that hold none of their
    own, so every method runs under `torch.func.grad`, `vmap` and `torch.compile`.
    """

    kind: str
    policy: BatchNormPolicy
    training: bool
    """False in evaluation: then running statistics are used where the policy has them, and dropout is off."""
    skeletons: dict[tuple[str, bool], nn.Module]
    """The module's structure by (source of statistics, training)."""
    parameters: Layout
    statistics_layout: Layout
    statistics: Params
    """Running mean and variance of every batch norm, `<layer>.running_mean: [channels]`, with a leading axis over
    inner steps under the policy `per_step`; constants of the loss."""
    constants: Params
    """The module's other buffers (a positional encoding, say), and its parameters with `requires_grad=False`."""
    output_size: int
    """Ways, target dimensions, or the size of the embedding."""
    train_ways: int
    """Classes that training episodes tell apart; target dimensions in regression."""
    test_ways: int
    """Those of evaluation episodes."""
    is_random: bool = False
    """Whether some layer draws random numbers while training."""
    label_smoothing: float = 0.0
    """Of the outer loop's cross entropy while training (Szegedy et al. 2016, arXiv:1512.00567, sec. 7)."""
    inner_step: int = 0
    """How many inner steps the parameters have behind them that the network is called with."""

    @property
    def batch_norms(self) -> list[str]:
        """Names of the batch-norm layers."""
        modules = self.skeletons["own", True].named_modules()
        return [name for name, layer in modules if isinstance(layer, EpisodicBatchNorm)]

    @property
    def own_source(self) -> Source:
        """Whose statistics normalise a set without a reference, as the support set is in the inner loop."""
        return "running" if self.policy in ("running", "per_step") and not self.training else "own"

    def at(self, inner_step: int) -> "Network":
        """This network for parameters after so many inner steps; only the policy `per_step` makes a difference."""
        return dataclasses.replace(self, inner_step=inner_step) if self.policy == "per_step" else self

    @property
    def ways(self) -> int:
        """Classes that the episodes at hand tell apart."""
        return self.train_ways if self.training else self.test_ways

    def outputs(self, params: Params, x: Tensor, reference: Tensor | None = None) -> Tensor:
        """Predictions `[examples, output_size]` (logits in classification) for `x: [examples, *input_shape]`.

        `reference` is the support set's x where `x` is not the support set itself; the policy
        `support` takes its statistics from it.
        """
        model_params = self._model_params(params)
        if self.policy == "support" and reference is not None:
            size = reference.shape[0]
            skeleton = self.skeletons[f"reference {size}", self.training]
            return _widened(functional_call(skeleton, model_params, (torch.cat([reference, x]),))[size:])
        source = self.own_source
        if source == "running":
            model_params |= self._running_statistics()
        return _widened(functional_call(self.skeletons[source, self.training], model_params, (x,)))

    def _model_params(self, params: Params) -> Params:
        """Parameters and constants of the module; an algorithm may put its own values in place of constants."""
        return {name: params.get(name, value) for name, value in self.constants.items()} | {
            name: params[name] for name in self.parameters.shapes
        }

    def _running_statistics(self) -> Params:
        if self.policy != "per_step":
            return self.statistics
        return {name: value[min(self.inner_step, len(value) - 1)] for name, value in self.statistics.items()}

    def loss(self, params: Params, examples: Examples, reference: Tensor | None = None) -> Tensor:
        """Mean cross entropy (classification) or mean squared error (regression), a scalar."""
        return self.loss_of(self.outputs(params, examples.x, reference), examples.y)

    def loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of given outputs, a scalar."""
        if self.kind == "classification":
            return F.cross_entropy(outputs, targets)
        return F.mse_loss(outputs, targets)

    def outer_loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The outer loop's loss of given outputs: as `loss_of`, with label smoothing while training."""
        if self.kind == "classification" and self.training and self.label_smoothing:
            return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
        return self.loss_of(outputs, targets)

    def accuracy_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of examples whose largest logit is the target's, a scalar; NaN in regression."""
        if self.kind == "classification":
            return (outputs.argmax(-1) == targets).to(outputs.dtype).mean()
        return torch.full((), torch.nan, dtype=outputs.dtype, device=outputs.device)

    def set_statistics(self, path: list[Params], x: Tensor) -> Tensor:
        """Flat `[statistics]`: the mean and variance that `x` has in every batch norm under phi, the path's end.

        Under the policy `per_step`, under the parameters after each inner step. In the order of
        `statistics_layout`; empty where the policy keeps no running statistics.
        """
        if self.policy == "running":
            return self.statistics_layout.flatten(self._recorded(path[-1], x))
        if self.policy != "per_step":
            return x.new_zeros(0)
        steps = [self._recorded(params, x) for params in path]
        return self.statistics_layout.flatten(
            {name: torch.stack([recorded[name] for recorded in steps]) for name in self.statistics_layout.shapes}
        )

    def frozen(self, params: Params, x: Tensor) -> "Network":
        """This network for use, its batch norms held at the statistics that the set `x` has under `params`.

        Its outputs for an example depend on no other example, and are those of the policy `support` with the
        reference `x`.
        """
        statistics = self._recorded(params, x, training=False, biased=True)
        return dataclasses.replace(self, policy="running", training=False, statistics=statistics)

    def _recorded(self, params: Params, x: Tensor, *, training: bool = True, biased: bool = False) -> Params:
        module = self.skeletons["record", training]
        functional_call(module, {name: value.detach() for name, value in self._model_params(params).items()}, (x,))
        recorded = {}
        for name, layer in module.named_modules():
            if isinstance(layer, EpisodicBatchNorm):
                assert layer.recorded is not None
                mean, variance, count = layer.recorded
                # What normalises a set is its biased variance; what running averages keep is the unbiased one.
                recorded[f"{name}.running_mean"] = mean
                recorded[f"{name}.running_var"] = variance * (count - 1) / count if biased else variance
                layer.recorded = None
        return recorded

    def bind(
        self,
        statistics: Tensor,
        *,
        training: bool,
        policy: BatchNormPolicy | None = None,
        test_ways: int | None = None,
    ) -> "Network":
        """This network with given running statistics, flat `[statistics]`, for training or for evaluation.

        Its constants move to where the statistics are. `test_ways` is for episodes that have other ways than those
        of the spec.
        """
        return dataclasses.replace(
            self,
            statistics=self.statistics_layout.unflatten(statistics),
            constants={name: value.to(statistics.device) for name, value in self.constants.items()},
            training=training,
            policy=policy or self.policy,
            test_ways=test_ways or self.test_ways,
        )

    def for_support_size(self, size: int) -> "Network":
        """This network for support sets of another size than the spec's; only the policy `support` looks at it."""
        skeletons = dict(self.skeletons)
        for training in (True, False):
            skeletons[f"reference {size}", training] = with_reference_of(self.skeletons["own", training], size)
        return dataclasses.replace(self, skeletons=skeletons)


def make_network(
    module: nn.Module,
    spec: EpisodeSpec,
    policy: BatchNormPolicy,
    *,
    train_spec: EpisodeSpec | None = None,
    embedding: bool = False,
    inner_steps: int = 0,
    label_smoothing: float = 0.0,
) -> Network:
    """Wraps `module`, which is left as it is. Raises ModelError unless it can be meta-trained on episodes of `spec`.

    `train_spec` is the spec of training episodes where it is another. With `embedding` the module gives one
    vector an example, of any size. `inner_steps` is for the policy `per_step`.
    """
    _refuse_always_random_layers(module)
    train_spec = train_spec or spec
    norms = batch_norms(module)
    axes = {"running": (), "per_step": (inner_steps + 1,)}.get(policy)
    statistics: Params = {}
    if axes is not None:
        for name, layer in norms.items():
            statistics[f"{name}.running_mean"] = torch.zeros(*axes, layer.num_features)
            statistics[f"{name}.running_var"] = torch.ones(*axes, layer.num_features)
    sources: dict[str, tuple[Source, int]] = {"own": ("own", 0), "running": ("running", 0), "record": ("own", 0)}
    for size in {spec.support_size, train_spec.support_size}:
        sources[f"reference {size}"] = ("reference", size)
    skeletons = {
        (name, training): with_statistics_from(module, source, size, record=name == "record").train(training)
        for name, (source, size) in sources.items()
        for training in (True, False)
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
        output_size=spec.output_size,
        train_ways=train_spec.output_size,
        test_ways=spec.output_size,
        is_random=any(map(_is_random, module.modules())),
        label_smoothing=label_smoothing,
    )
    output_size = _check_outputs(network, module, spec, None if embedding else spec.output_size)
    _check_outputs(network, module, train_spec, output_size)
    return dataclasses.replace(network, output_size=output_size)


def _widened(outputs: Tensor) -> Tensor:
    """Outputs as the loss takes them: float32 where products were of bfloat16."""
    return outputs.float() if getattr(outputs, "dtype", None) == torch.bfloat16 else outputs


def _trained(module: nn.Module) -> Params:
    """The parameters that are meta-trained; those with `requires_grad=False` are constants, as in torch."""
    trained: Params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if not trained:
        raise ModelError(
            f"model {type(module).__name__} has no parameter with requires_grad=True, so nothing is"
            " meta-trained. Leave some of them trainable."
        )
    return trained


def _is_random(layer: nn.Module) -> bool:
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        return layer.dropout > 0
    return isinstance(layer, _RANDOM_LAYERS) and getattr(layer, "p", 1.0) > 0


def _refuse_always_random_layers(module: nn.Module) -> None:
    for path, layer in module.named_modules():
        if isinstance(layer, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
            raise ModelError(
                f"model {type(module).__name__}: layer {path!r} ({type(layer).__name__}) draws random numbers even in"
                " evaluation, where an episode's score must depend on its key alone. Use nn.MaxPool2d or 3d."
            )


def _check_outputs(network: Network, module: nn.Module, spec: EpisodeSpec, output_size: int | None) -> int:
    """Tries the network on sets of zeros, of the sizes that training will give it; gives its output size."""
    name = type(module).__name__
    params = {path: value.detach() for path, value in _trained(module).items()}
    support = torch.zeros(spec.support_size, *spec.input_shape)
    for example in (support, torch.zeros(spec.query_size, *spec.input_shape)):
        if not len(example):
            continue
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                # An empty support set (of plain mini-batches) has no statistics to normalise by.
                reference = None if example is support or not len(support) else support
                outputs = network.outputs(params, example, reference)
        except Exception as error:
            raise ModelError(
                f"model {name} cannot take inputs of shape {list(example.shape)} that the task gives: {error}."
                " Change the model's sizes or the task's."
            ) from error
        found = list(getattr(outputs, "shape", [type(outputs).__name__]))
        if output_size is None and len(found) == 2:
            output_size = found[1]
        if found != [len(example), output_size]:
            wanted = "one logit a way" if spec.kind == "classification" else "one output a target dimension"
            raise ModelError(
                f"model {name} must map {list(example.shape)} to {[len(example), output_size or 'features']}"
                f" ({wanted if output_size == spec.output_size else 'one embedding an example'}),"
                f" got {found}. Change its last layer."
            )
    for path, value in network.constants.items():
        if value._version:  # Counts writes, whether or not they changed anything.
            raise ModelError(
                f"model {name}: buffer {path!r} is written to when the model is called, and a task's gradient must"
                " depend on its key alone. Use a layer without running state (batch norm's has a policy of its own)."
            )
    assert output_size is not None
    return output_size
