"""From a config to the objects that compute: the one place where settings become a task source, a network, a theta."""

import copy
import os
import shutil
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from metadist.config import Config
from metadist.core.algorithm import Algorithm
from metadist.core.batch_norm import batch_norms
from metadist.core.keys import TaskKey
from metadist.core.layers import with_layers_for_the_compiler
from metadist.core.meta_gradient import Precision, Strategy
from metadist.core.network import Network, make_network
from metadist.core.params import Layout
from metadist.core.task_source import TaskSource, spec_of
from metadist.errors import ConfigError, MetadistError, ModelError, first_line


@dataclass(frozen=True)
class Experiment:
    """Everything that stays the same throughout a run. Adapters get it once, its arrays shared on a node."""

    source: TaskSource
    algorithm: Algorithm
    network: Network
    theta: Layout
    initial_theta: np.ndarray
    """float32 `[theta]`, drawn from the run's seed."""
    initial_statistics: np.ndarray
    """float32 `[statistics]`: running means 0 and variances 1; empty unless the policy is `running`."""
    run_seed: int
    chunk_size: int
    strategy: Strategy
    compile: bool
    device: str
    learner_device: str
    threads: int
    precision: Precision
    skips_bad_episodes: bool


def make_experiment(config: Config, source: TaskSource | None = None) -> Experiment:
    """Opens the task source, unless one is given, and builds the model.

    Raises UserError where they do not fit each other.
    """
    source = open_task(config.task) if source is None else source
    module = _make_module(config, source)
    training = config.training
    if batch_norms(module) and training.batch_norm is None:
        raise ConfigError(
            "training.batch_norm must be given, since the model has batch norm: transductive (as MAML), support,"
            " running or per_step. It decides what every accuracy means, so there is no default. As in MAML's own code:"
            " --set training.batch_norm=transductive."
        )
    embedding = config.algorithm.model_output == "embedding"
    spec, train_spec = source.spec, spec_of(source, "train")
    if config.algorithm.trains_on_episodes and not train_spec.support_size:
        raise ConfigError(
            f"algorithm {type(config.algorithm).__name__} adapts to training episodes, and this task's have no support"
            " set. Use task.name: few_shot, or an algorithm that trains on mini-batches (transfer)."
        )
    if not config.algorithm.trains_on_episodes and train_spec.support_size:
        raise ConfigError(
            f"algorithm {type(config.algorithm).__name__} trains on mini-batches over all training classes, and the"
            " task gives training episodes with a support set. Use task.name: pooled_classes."
        )
    if spec.output_size != train_spec.output_size and not embedding:
        raise ConfigError(
            f"training episodes have {train_spec.output_size} ways and test episodes {spec.output_size}, but"
            f" {type(config.algorithm).__name__} trains one output a way. Leave task.train_ways out, or use an"
            " algorithm that works on embeddings (proto_net)."
        )
    has_convolutions = any(isinstance(layer, nn.modules.conv._ConvNd) for layer in module.modules())
    device = "cuda" if config.scaling.use_gpu else "cpu"
    strategy = _strategy(training.strategy, has_convolutions, device)
    if strategy == "loop" and device == "cpu":
        module = with_layers_for_the_compiler(module)
    network = make_network(
        module,
        spec,
        training.batch_norm or "transductive",
        train_spec=train_spec,
        embedding=embedding,
        inner_steps=config.algorithm.inner_steps,
        label_smoothing=training.label_smoothing,
    )
    named = dict(module.named_parameters())
    model_params = {name: named[name].detach() for name in network.parameters.shapes}
    extra = config.algorithm.extra_parameters(network, model_params)
    taken = sorted(set(extra) & set(model_params))
    if taken:
        raise ModelError(f"algorithm and model both have a parameter {taken[0]!r}. Rename the algorithm's.")
    theta = Layout.of(model_params | extra)
    return Experiment(
        source=source,
        algorithm=config.algorithm,
        network=network,
        theta=theta,
        initial_theta=theta.flatten(model_params | extra).numpy().astype(np.float32),
        initial_statistics=network.statistics_layout.flatten(network.statistics).numpy(),
        run_seed=training.seed,
        chunk_size=training.tasks_per_chunk,
        strategy=strategy,
        compile=_compiled(config, has_convolutions, device),
        device=device,
        learner_device="cuda" if config.scaling.learner_gpus else "cpu",
        threads=config.scaling.threads_per_worker,
        precision=training.precision,
        skips_bad_episodes=training.on_bad_episode == "skip",
    )


def open_task(task: Any) -> TaskSource:
    """The source of a `task` section: what its `open()` gives, or the object itself where it has none."""
    source = task.open() if hasattr(task, "open") else task
    if not isinstance(source, TaskSource):
        raise ConfigError(
            f"task {type(task).__name__} is no task source: it needs `spec` and `sample(keys)`,"
            " or `open()` that returns such an object. See metadist/core/task_source.py."
        )
    return source


def check_splits(source: TaskSource, run_seed: int, splits: list[str]) -> None:
    """Samples one episode of each split that a run will use, so that a wrong one fails before the first step."""
    for split in splits:
        keys = [TaskKey(run_seed, split, 0, 0)]
        spec_of(source, split).check(source.sample(keys), keys, source)


def _make_module(config: Config, source: TaskSource) -> nn.Module:
    """The model with its initial weights, which depend on the run's seed alone."""
    model = config.model
    if isinstance(model, nn.Module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            return config.algorithm.prepare(copy.deepcopy(model))
    if not hasattr(model, "build"):
        raise ConfigError(
            f"model {type(model).__name__} is neither a torch nn.Module nor an object with `build(spec)` that"
            " returns one. See metadist/models/mlp.py."
        )
    embedding = config.algorithm.model_output == "embedding"
    if embedding and not hasattr(model, "embed"):
        raise ModelError(
            f"{type(config.algorithm).__name__} works on an embedding, and model {type(model).__name__} has no"
            " `embed(spec)` that returns an nn.Module without the last layer. Add it; see metadist/models/mlp.py."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        try:
            module = model.embed(source.spec) if embedding else model.build(source.spec)
        except MetadistError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ModelError(
                f"model {type(model).__name__} cannot be built for this task: {type(error).__name__}:"
                f" {first_line(error)} ({place.filename}, line {place.lineno}). Correct section `model`, or the code"
                " of a model of your own."
            ) from error
        if not isinstance(module, nn.Module):
            raise ModelError(f"model {type(model).__name__}: build(spec) must return an nn.Module, got {module!r}.")
        return config.algorithm.prepare(module)


def cxx_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU; None where there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _compiled(config: Config, has_convolutions: bool, device: str) -> bool:
    """What `training.compile` says, or its documented rule for `auto`."""
    if config.training.compile != "auto":
        return config.training.compile
    if config.recomputes_inner_steps:
        return False
    return has_convolutions and (device == "cuda" or cxx_compiler() is not None)


def _strategy(asked: str, has_convolutions: bool, device: str) -> Strategy:
    """The documented rule of `training.strategy: auto`.

    On a CPU, convolutions over per-task weights run slower batched than one by one.
    """
    if asked == "auto":
        return "loop" if has_convolutions and device == "cpu" else "vmap"
    return "vmap" if asked == "vmap" else "loop"
