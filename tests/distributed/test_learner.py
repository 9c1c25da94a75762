import dataclasses
import math

import numpy as np
import pytest
import torch

from metadist.core.meta_gradient import Sums
from metadist.core.outer import OuterSettings
from metadist.core.plan import Plan, Range, plan_step
from metadist.distributed.adapter import Adapter
from metadist.distributed.learner import Learner
from metadist.errors import ClusterError, NonFiniteError
from metadist.experiment import make_experiment
from metadist.models import MLP
from metadist.sections import TrainingSettings
from tests.builders import tiny_config

STEPS = 6
OUTERS = [
    OuterSettings(lr=0.01),
    OuterSettings(optimizer="sgd", lr=0.05, momentum=0.9, schedule="cosine"),
    OuterSettings(optimizer="adamw", lr=0.01, weight_decay=0.1, schedule="step", decay_every=2, warmup_steps=2),
    OuterSettings(lr=0.01, lag=1),
]


@pytest.fixture(scope="module")
def experiment():
    training = TrainingSettings(meta_batch_size=11, chunk_size=3, seed=5, compile=False, batch_norm="running")
    return make_experiment(tiny_config(model=MLP(hidden=(4,), batch_norm=True), training=training))


def go_on(experiment, learner, first, last, workers=1):
    """Steps `first .. last - 1` with their real sums, in the ranges of so many workers."""
    adapter, reports = Adapter(experiment), []
    for step in range(first, last):
        plan = plan_step(experiment.run_seed, step, 11, 3)
        sums = {span: adapter.sum_range(plan, span, learner.publish()) for span in plan.ranges(workers)}
        reports.append(learner.step(plan, sums))
    return reports


def bits(state):
    arrays = {"theta": state.theta, "published": state.published, **state.optimizer}
    return state.step, {name: value.tobytes() for name, value in arrays.items()}


def give(learner, gradient, step=0, num_tasks=1, metrics=(0.0, 0.0)):
    """One step on given sums, without an adapter."""
    statistics = np.zeros_like(learner.state().statistics)
    sums = Sums(np.float32(gradient), statistics, np.float32(metrics))
    # One chunk, with a place to spare.
    return learner.step(Plan(5, "train", step, num_tasks, num_tasks + 1), {Range(0, 1): sums})


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_learner_restored_from_a_state_goes_on_with_equal_bits(experiment, outer, stop):
    whole = Learner(experiment, outer, STEPS)
    reports = go_on(experiment, whole, 0, STEPS)

    first = Learner(experiment, outer, STEPS)
    go_on(experiment, first, 0, stop)
    second = Learner(experiment, outer, STEPS)
    second.restore(first.state())
    assert bits(second.state()) == bits(first.state())
    assert go_on(experiment, second, stop, STEPS)[-1] | {"accuracy": 0} == reports[-1] | {"accuracy": 0}
    assert bits(second.state()) == bits(whole.state())


def test_any_number_of_workers_gives_equal_bits(experiment):
    states = []
    for workers in (1, 2, 3, 64):
        learner = Learner(experiment, OUTERS[0], STEPS)
        go_on(experiment, learner, 0, 3, workers)
        states.append(bits(learner.state()))
    assert states[1:] == states[:1] * 3


def test_a_state_is_a_copy_that_later_steps_leave_alone(experiment):
    learner = Learner(experiment, OUTERS[0], STEPS)
    go_on(experiment, learner, 0, 2)
    state = learner.state()
    before = bits(state)
    assert set(state.optimizer) == {"step", "exp_avg", "exp_avg_sq"}
    go_on(experiment, learner, 2, 4)
    assert bits(state) == before
    other = Learner(experiment, OUTERS[0], STEPS)
    other.restore(state)
    go_on(experiment, other, 2, 4)
    assert bits(state) == before


def test_what_is_published_is_theta_and_then_the_statistics(experiment):
    learner = Learner(experiment, OUTERS[0], STEPS)
    expected = np.concatenate([experiment.initial_theta, experiment.initial_statistics])
    assert learner.publish().tobytes() == expected.tobytes()
    go_on(experiment, learner, 0, 1)
    state = learner.state()
    assert learner.publish().tobytes() == np.concatenate([state.theta, state.statistics]).tobytes()
    assert (state.theta != experiment.initial_theta).any()
    assert (state.statistics != experiment.initial_statistics).any()


def test_with_a_lag_a_steps_gradients_are_taken_at_theta_of_one_step_earlier(experiment):
    # By hand: theta_1 and theta_2 both come of gradients at theta_0, theta_3 of those at theta_1.
    learner, adapter = Learner(experiment, OuterSettings(optimizer="sgd", lr=0.1, lag=1), STEPS), Adapter(experiment)
    thetas = [np.concatenate([experiment.initial_theta, experiment.initial_statistics])]
    for step in range(4):
        plan = plan_step(experiment.run_seed, step, 11, 3)
        sums = adapter.sum_range(plan, Range(0, plan.num_chunks), thetas[max(0, step - 1)])
        assert learner.publish().tobytes() == thetas[max(0, step - 1)].tobytes()
        learner.step(plan, {Range(0, plan.num_chunks): sums})
        size = experiment.theta.size
        by_hand = thetas[-1][:size] - np.float32(0.1) * (sums.gradient / np.float32(11))
        np.testing.assert_allclose(learner.newest()[:size], by_hand, rtol=1e-5, atol=1e-7)
        thetas.append(learner.newest())


def test_a_step_divides_the_sums_by_the_number_of_tasks(experiment):
    # Plain gradient descent with rate 0.5 on the mean gradient 6 / 3: 0.5 * 2 less in every element.
    learner = Learner(experiment, OuterSettings(optimizer="sgd", lr=0.5), STEPS)
    report = give(learner, np.full(experiment.theta.size, 6.0), num_tasks=3, metrics=(12.0, 1.5))
    np.testing.assert_allclose(learner.state().theta, experiment.initial_theta - 1, rtol=1e-6)
    norm = 2 * math.sqrt(experiment.theta.size)
    expected = {"loss": 4.0, "accuracy": 0.5, "outer_lr": 0.5, "gradient_norm": pytest.approx(norm, rel=1e-6)}
    assert report == expected


def test_two_learners_start_from_their_experiment_and_not_from_each_other(experiment):
    before = experiment.initial_theta.tobytes(), experiment.initial_statistics.tobytes()
    go_on(experiment, Learner(experiment, OUTERS[0], STEPS), 0, 2)
    assert (experiment.initial_theta.tobytes(), experiment.initial_statistics.tobytes()) == before


def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(experiment):
    learner = Learner(experiment, OUTERS[0], STEPS)
    go_on(experiment, learner, 0, 1)
    before = bits(learner.state())
    with pytest.raises(NonFiniteError, match="step 1: the meta-gradient's norm is nan"):
        give(learner, np.full(experiment.theta.size, math.nan), step=1)
    assert bits(learner.state()) == before


def test_a_plan_of_another_step_is_refused(experiment):
    learner = Learner(experiment, OUTERS[0], STEPS)
    with pytest.raises(AssertionError, match="at step 0, not 1"):
        give(learner, np.ones(experiment.theta.size), step=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_learner_that_is_to_be_on_a_gpu_is_refused_where_there_is_none(experiment):
    with pytest.raises(ClusterError, match=r"scaling.learner_gpus is above 0, but torch sees no CUDA device"):
        Learner(dataclasses.replace(experiment, learner_device="cuda"), OUTERS[0], STEPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_learner_on_a_gpu_agrees_with_one_on_the_cpu_and_goes_on_from_its_state(experiment):
    on_gpu = Learner(dataclasses.replace(experiment, learner_device="cuda"), OUTERS[0], STEPS)
    on_cpu = Learner(experiment, OUTERS[0], STEPS)
    for learner in (on_gpu, on_cpu):
        go_on(experiment, learner, 0, 2)
    np.testing.assert_allclose(on_gpu.publish(), on_cpu.publish(), rtol=1e-5, atol=1e-7)
    again = Learner(dataclasses.replace(experiment, learner_device="cuda"), OUTERS[0], STEPS)
    again.restore(on_gpu.state())
    for learner in (on_gpu, again):
        go_on(experiment, learner, 2, STEPS)
    np.testing.assert_array_equal(again.publish(), on_gpu.publish())
