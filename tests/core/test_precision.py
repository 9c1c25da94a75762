import numpy as np
import pytest
import torch
from torch import nn

from metadist.algorithms import MAML
from metadist.core.keys import TaskKey
from metadist.core.layers import with_layers_for_the_compiler
from metadist.core.meta_gradient import MetaGradient
from metadist.distributed import adapter
from metadist.distributed.adapter import Adapter
from metadist.distributed.fingerprint import refuse_other
from metadist.errors import ClusterError, FingerprintError
from metadist.experiment import make_experiment
from metadist.sections import TrainingSettings
from tests.builders import Problem, classification, random_episodes, tiny_config

SPEC = classification((1, 6, 6), ways=2, shots=2, queries=3)


def sums(precision, strategy, compile):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(288, 2)]
    problem = Problem(
        MAML(inner_lr=0.1), with_layers_for_the_compiler(nn.Sequential(*layers)), SPEC, dtype=torch.float32
    )
    compute = MetaGradient(
        problem.algorithm, problem.network, problem.layout, strategy=strategy, compile=compile, precision=precision
    )
    batch, keys = random_episodes(SPEC, 4, dtype=torch.float32), [TaskKey(0, "train", 0, task) for task in range(4)]
    return compute.sum_chunk(problem.theta, problem.statistics, batch, np.ones(4, np.float32), keys)


@pytest.mark.parametrize(
    ("strategy", "compile"), [("loop", False), ("vmap", False), pytest.param("loop", True, marks=pytest.mark.long)]
)
def test_bf16_is_near_float32_and_its_sums_are_float32(strategy, compile):
    exact, mixed = (sums(precision, strategy, compile) for precision in ("float32", "bf16-mixed"))
    error = np.linalg.norm(mixed.gradient - exact.gradient) / np.linalg.norm(exact.gradient)
    # A product of bfloat16 has 8 significant bits, a relative 2^-9 = 0.002 of rounding.
    assert 1e-4 < error < 0.05
    assert mixed.gradient.dtype == np.float32
    assert mixed.metrics[0] == pytest.approx(exact.metrics[0], rel=0.05)
    # Were the sums of bfloat16, the 16 lower bits of every number would be zero.
    assert (mixed.gradient.view(np.uint32) & 0xFFFF).any()


def test_the_fingerprint_names_the_precision_and_another_one_is_refused():
    def fingerprint(precision):
        return Adapter(
            make_experiment(tiny_config(training=TrainingSettings(compile=False, precision=precision)))
        ).fingerprint()

    exact, mixed = fingerprint("float32"), fingerprint("bf16-mixed")
    assert mixed["canonical_gradient"] != exact["canonical_gradient"]
    with pytest.raises(FingerprintError, match="dtype 'float32' there, 'bf16-mixed' here"):
        refuse_other(mixed, exact, "an adapter")


def test_a_gpu_without_it_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(adapter, "has_bf16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    experiment = make_experiment(tiny_config(training=TrainingSettings(compile=False, precision="bf16-mixed")))
    with pytest.raises(ClusterError, match=r"Tesla P100 cannot compute in bfloat16\. Use float32"):
        Adapter(experiment).fingerprint()
