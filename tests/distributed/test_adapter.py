import dataclasses
import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from metadist.algorithms import MAML
from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.meta_gradient import MetaGradient
from metadist.core.plan import Plan, Range
from metadist.core.reduction import reduce_tree
from metadist.distributed.adapter import Adapter
from metadist.errors import AdapterError, EpisodeError, NonFiniteError
from metadist.experiment import make_experiment
from metadist.models import MLP
from metadist.sections import ScalingSettings, TrainingSettings
from metadist.tasks import Sinusoid
from tests.builders import regression, tiny_config

TASKS = 11
STRATEGIES = pytest.mark.parametrize("strategy", ["vmap", "loop"])


def experiment_of(strategy="vmap", **sections):
    training = sections.pop("training", {})
    fixed = {"meta_batch_size": TASKS, "chunk_size": 3, "seed": 5, "strategy": strategy, "compile": False}
    return make_experiment(tiny_config(training=TrainingSettings(**{**fixed, **training}), **sections))


def with_running_batch_norm(strategy):
    training = {"batch_norm": "running"}
    return experiment_of(strategy, model=MLP(hidden=(4,), batch_norm=True), training=training)


def published(experiment):
    return np.concatenate([experiment.initial_theta, experiment.initial_statistics])


def plan(chunk_size=3, step=4):
    return Plan(5, "train", step, TASKS, chunk_size)


def sums_of(experiment, plan, spans=None):
    """The whole plan's sums, computed in the given ranges by an adapter each."""
    whole = Range(0, plan.num_chunks)
    parts = {span: Adapter(experiment).sum_range(plan, span, published(experiment)) for span in spans or [whole]}
    return reduce_tree(whole, parts.get, lambda left, right: left + right)


def bits(sums):
    return [part.tobytes() for part in sums]


@dataclasses.dataclass(frozen=True)
class Changed:
    """Sinusoids, some tasks of which are changed."""

    tasks: tuple[int, ...]
    factor: float = 1.0
    error: Exception | None = None

    @property
    def spec(self):
        return Sinusoid(shots=3, queries=4).spec

    def sample(self, keys):
        batch = Sinusoid(shots=3, queries=4).sample(keys)
        factor = torch.ones(len(keys), 1, 1)
        for row, key in enumerate(keys):
            if key.task in self.tasks:
                if self.error is not None:
                    raise self.error
                factor[row] = self.factor
        return EpisodeBatch(*(Examples(part.x, part.y * factor) for part in batch))


@pytest.mark.parametrize("make", [experiment_of, with_running_batch_norm])
@STRATEGIES
@pytest.mark.parametrize(
    "cuts", [(0, 2, 4), (0, 1, 2, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)], ids=lambda cuts: "-".join(map(str, cuts))
)
def test_any_division_into_ranges_gives_equal_bits(make, strategy, cuts):
    experiment = make(strategy)
    spans = [Range(*cut) for cut in pairwise(cuts)]
    assert bits(sums_of(experiment, plan(), spans)) == bits(sums_of(experiment, plan()))


@STRATEGIES
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 11, 16])
def test_tasks_that_fill_the_last_chunk_do_not_count(strategy, chunk_size):
    # 11 tasks, each alone, added in float64; chunks of 2, 3, 4 and 16 are filled up with 1, 1, 1 and 5 others.
    experiment = with_running_batch_norm(strategy)
    compute = MetaGradient(experiment.algorithm, experiment.network, experiment.theta, strategy="loop", compile=False)
    theta, statistics = torch.from_numpy(experiment.initial_theta), torch.from_numpy(experiment.initial_statistics)
    alone = []
    for key in plan(TASKS).keys(0):
        parts = compute.sum_chunk(theta, statistics, experiment.source.sample([key]), np.ones(1), [key])
        alone.append([part.astype(np.float64) for part in parts])
    expected = [np.sum(parts, axis=0) for parts in zip(*alone, strict=True)]
    found = sums_of(experiment, plan(chunk_size))
    assert found.statistics.shape == (8,)
    for part, by_hand in zip(found, expected, strict=True):
        assert part.dtype == np.float32
        np.testing.assert_allclose(part, by_hand, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(by_hand)))


@STRATEGIES
def test_filling_tasks_change_no_bit_even_where_their_loss_is_infinite(strategy):
    # Chunk 3 holds the tasks 9, 10 and, to fill it, 11. 0 times infinity would be NaN.
    experiment = experiment_of(strategy)
    poisoned = dataclasses.replace(experiment, source=Changed(tasks=(11,), factor=1e30))
    assert plan().weights(3).tolist() == [1, 1, 0]
    assert bits(sums_of(poisoned, plan())) == bits(sums_of(experiment, plan()))


@STRATEGIES
@pytest.mark.parametrize(("task", "chunk"), [(0, 0), (7, 2), (10, 3)])
def test_an_infinite_loss_names_step_chunk_and_task(strategy, task, chunk):
    experiment = dataclasses.replace(experiment_of(strategy), source=Changed(tasks=(task,), factor=1e30))
    message = rf"step 4, chunk {chunk}, task source Changed, task train.*/task={task}: query loss is (inf|nan)\. Lower"
    with pytest.raises(NonFiniteError, match=message):
        sums_of(experiment, plan())


class RootOfAParameter(nn.Module):
    """sqrt(w) at w = 0: a finite value whose slope is infinite."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.w.sqrt()


@STRATEGIES
def test_an_infinite_gradient_of_a_finite_loss_names_its_task(strategy):
    experiment = experiment_of(strategy, model=RootOfAParameter(), algorithm=MAML(inner_steps=0))
    with pytest.raises(
        NonFiniteError, match=r"chunk 0, task source .*task=0: query loss is [\d.]+, its meta-gradient is not"
    ):
        sums_of(experiment, plan())


class Steep(nn.Module):
    """a w for every example, with a = 2e20."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return 2e20 * self.w.expand(len(x), 1)


class FarAway:
    """Every target is 5e17."""

    spec = regression(inputs=1, outputs=1, support_size=2, query_size=2)

    def sample(self, keys):
        part = Examples(torch.ones(len(keys), 2, 1), torch.full((len(keys), 2, 1), 5e17))
        return EpisodeBatch(part, part)


@STRATEGIES
def test_a_sum_that_overflows_though_each_gradient_is_finite_names_its_tasks(strategy):
    # At w = 0 the loss is c^2 = 2.5e35 and its gradient -2 a c = -2e38, both below 3.4e38; two gradients are not.
    experiment = experiment_of(strategy, task=FarAway(), model=Steep(), algorithm=MAML(inner_steps=0))
    with pytest.raises(
        NonFiniteError, match=r"chunk 0, task source FarAway, tasks .*task=0 to .*task=2: the sum .* overflows float32"
    ):
        sums_of(experiment, plan())


@STRATEGIES
def test_an_error_of_the_task_source_names_step_chunk_key_file_and_line(strategy):
    source = Changed(tasks=(7,), error=ZeroDivisionError("no such sinusoid"))
    experiment = dataclasses.replace(experiment_of(strategy), source=source)
    with pytest.raises(AdapterError) as caught:
        sums_of(experiment, plan())
    lines, first = inspect.getsourcelines(Changed.sample)
    line = first + next(number for number, text in enumerate(lines) if "raise self.error" in text)
    assert str(caught.value) == (
        "step 4, chunk 2, task train/seed=5/step=4/task=7: task source Changed raised"
        f" ZeroDivisionError: no such sinusoid ({__file__}, line {line}). Correct it and resume the run."
    )
    assert caught.value.__cause__ is source.error


class Breaks(nn.Module):
    """Refuses inputs beyond 3, as a fifth of all are; the zeros of the check at the start are not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        if x.max() > 3:
            raise KeyError("too far out")
        return self.layer(x)


def test_an_error_of_the_model_names_step_chunk_keys_file_and_line():
    with pytest.raises(AdapterError) as caught:
        sums_of(experiment_of("loop", model=Breaks()), plan())
    assert "(tasks train/seed=5/step=4/task=" in str(caught.value)
    assert "adapting raised KeyError: 'too far out'" in str(caught.value)
    assert f"{__file__}, line " in str(caught.value)


def test_an_episode_that_does_not_fit_its_spec_is_said_to_be_so():
    experiment = dataclasses.replace(experiment_of(), source=Changed(tasks=(7,), factor=float("nan")))
    with pytest.raises(EpisodeError, match=r"source Changed: support set of task train/seed=5/step=4/task=7 holds NaN"):
        sums_of(experiment, plan())


@STRATEGIES
def test_scores_are_those_of_the_plans_tasks_in_order_however_divided(strategy):
    experiment = with_running_batch_norm(strategy)
    adapter, policies = Adapter(experiment), ["running", "support"]

    def scores(plan, *cut):
        return adapter.score_range(plan, Range(*cut), published(experiment), 3, policies)

    whole = scores(plan(), 0, 4)
    assert whole.loss.shape == whole.accuracy.shape == (2, TASKS, 4)
    parts = [scores(plan(), 0, 1), scores(plan(), 1, 2), scores(plan(), 2, 4)]
    assert np.concatenate([part.loss for part in parts], axis=1).tobytes() == whole.loss.tobytes()
    np.testing.assert_allclose(scores(plan(chunk_size=1), 0, TASKS).loss, whole.loss, rtol=1e-5)
    assert len(np.unique(whole.loss)) == whole.loss.size, "policies, tasks and steps all differ"


def test_what_is_published_is_read_only_and_stays_as_it_is():
    experiment = experiment_of()
    vector = published(experiment)
    before = vector.tobytes()
    vector.flags.writeable = False
    Adapter(experiment).sum_range(plan(), Range(0, 4), vector)
    assert vector.tobytes() == before


def test_equal_adapters_have_equal_fingerprints_and_others_do_not():
    first = Adapter(experiment_of()).fingerprint()
    assert Adapter(experiment_of()).fingerprint() == first
    different = Adapter(experiment_of(algorithm=MAML(inner_lr=0.06, inner_steps=2))).fingerprint()
    assert {name for name in first if first[name] != different[name]} == {"canonical_gradient"}
    loop = Adapter(experiment_of("loop")).fingerprint()
    assert {name for name in first if first[name] != loop[name]} >= {"strategy"}


def test_an_adapter_sets_its_own_number_of_threads():
    try:
        Adapter(experiment_of(scaling=ScalingSettings(num_workers=0, threads_per_worker=2)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Counted:
    """Sinusoids, and the keys that were asked for."""

    asked: list = dataclasses.field(default_factory=list)
    source: object = Sinusoid(shots=3, queries=4)

    @property
    def spec(self):
        return self.source.spec

    def sample(self, keys):
        self.asked.extend(keys)
        return self.source.sample(keys)


def test_episodes_sampled_ahead_are_those_of_their_range_alone_and_are_not_sampled_again():
    experiment = experiment_of(task=Counted())
    adapter, asked = Adapter(experiment), experiment.source.asked
    adapter.sample_ahead(plan(), Range(0, 2))
    ahead = adapter.sum_range(plan(), Range(0, 2), published(experiment))
    assert asked == [*plan().keys(0), *plan().keys(1)]
    assert bits(ahead) == bits(Adapter(experiment).sum_range(plan(), Range(0, 2), published(experiment)))
    # What was sampled for another step is of no use.
    adapter.sample_ahead(plan(step=5), Range(0, 2))
    again = adapter.sum_range(plan(), Range(0, 2), published(experiment))
    assert bits(again) == bits(ahead)


def test_what_raises_while_sampling_ahead_raises_again_where_it_is_asked_for():
    experiment = experiment_of(task=Changed((4,), error=ZeroDivisionError("no such sinusoid")))
    adapter = Adapter(experiment)
    with pytest.raises(AdapterError):
        adapter.sample_ahead(plan(), Range(0, 2))
    with pytest.raises(AdapterError, match=r"step 4, chunk 1"):
        adapter.sum_range(plan(), Range(0, 2), published(experiment))
