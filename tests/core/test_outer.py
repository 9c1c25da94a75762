import math

import pytest
import torch

from metadist.core.outer import OuterLoop, OuterSettings
from metadist.errors import NonFiniteError

SIZES = (5, 19, 32)
"""Of the separate parameters that the flat vector stands for: odd ones, so that no block of a vector unit fits."""
SIZE = sum(SIZES)
STEPS = 7

OPTIMIZERS = [
    (OuterSettings(optimizer="sgd", lr=0.1), torch.optim.SGD, {}),
    (
        OuterSettings(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
        torch.optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.01},
    ),
    (OuterSettings(optimizer="adam", lr=0.1), torch.optim.Adam, {}),
    (
        OuterSettings(optimizer="adam", lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.01),
        torch.optim.Adam,
        {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.01},
    ),
    (OuterSettings(optimizer="adamw", lr=0.1), torch.optim.AdamW, {"weight_decay": 0.0}),
    (
        OuterSettings(optimizer="adamw", lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2),
        torch.optim.AdamW,
        {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
    ),
]


def vectors(count):
    return list(torch.randn(count, SIZE, generator=torch.Generator().manual_seed(0)))


def loop_with(gradients, outer, num_steps=STEPS, start=None):
    loop = OuterLoop(outer, torch.zeros(len(gradients[0])) if start is None else start, num_steps)
    reports = [loop.step(step, gradient) for step, gradient in enumerate(gradients)]
    return loop.theta.detach(), reports


def moved(gradient, **settings):
    """What one step of plain gradient descent with rate 1 subtracts: the gradient as it was clipped."""
    theta, reports = loop_with([torch.tensor(gradient)], OuterSettings(optimizer="sgd", lr=1.0, **settings))
    return (-theta).tolist(), reports[0]["gradient_norm"]


@pytest.mark.parametrize(("outer", "kind", "options"), OPTIMIZERS)
def test_steps_on_the_flat_vector_are_torchs_own_on_separate_parameters(outer, kind, options):
    start, *gradients = vectors(STEPS + 1)
    theta, _ = loop_with(gradients, outer, start=start)

    parameters = [torch.nn.Parameter(part.clone()) for part in start.split(SIZES)]
    optimizer = kind(parameters, lr=0.1, **options)
    for gradient in gradients:
        for parameter, part in zip(parameters, gradient.split(SIZES), strict=True):
            parameter.grad = part.clone()
        optimizer.step()
    assert torch.equal(theta, torch.cat([parameter.detach() for parameter in parameters]))


@pytest.mark.parametrize(
    "change", [{"betas": (0.8, 0.999)}, {"betas": (0.9, 0.9)}, {"eps": 0.1}, {"weight_decay": 0.1}, {"lr": 0.2}]
)
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_each_setting_of_adam_changes_theta(optimizer, change):
    start, *gradients = vectors(4)
    plain, _ = loop_with(gradients, OuterSettings(optimizer=optimizer, lr=0.1), start=start)
    other, _ = loop_with(gradients, OuterSettings(**{"optimizer": optimizer, "lr": 0.1, **change}), start=start)
    assert not torch.equal(plain, other)


def test_the_constant_schedule_is_constant():
    outer = OuterSettings(lr=0.3)
    assert {outer.lr_at(step, 10) for step in range(10)} == {0.3}
    assert not outer.schedule_depends_on_length


def test_the_cosine_schedule_has_its_closed_form():
    # final + (lr - final) (1 + cos(pi t / T)) / 2 with T = 8: full at 0, 3/4 + sqrt(2)/8 .. at T/4, the mean at T/2.
    outer = OuterSettings(schedule="cosine", lr=0.5, final_lr=0.1)
    rates = [outer.lr_at(step, 8) for step in range(9)]
    quarter = 0.1 + 0.4 * (1 + math.sqrt(0.5)) / 2
    assert rates[0] == 0.5
    assert rates[2] == pytest.approx(quarter, rel=1e-12)
    assert rates[4] == pytest.approx(0.3, rel=1e-12)
    assert rates[6] == pytest.approx(0.6 - quarter, rel=1e-12)
    assert rates[8] == pytest.approx(0.1, rel=1e-12)
    assert outer.lr_at(50, 8) == pytest.approx(0.1, rel=1e-12)
    assert outer.schedule_depends_on_length


def test_the_linear_schedule_falls_by_equal_parts():
    outer = OuterSettings(schedule="linear", lr=0.5, final_lr=0.1)
    assert [outer.lr_at(step, 4) for step in range(6)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1], rel=1e-12)
    assert outer.schedule_depends_on_length


def test_the_step_schedule_multiplies_after_so_many_steps():
    outer = OuterSettings(schedule="step", lr=0.8, decay_every=3, decay_factor=0.25)
    # 0.8 (1/4)^floor(step / 3); powers of two, so exact.
    assert [outer.lr_at(step, 9) for step in range(9)] == [0.8] * 3 + [0.2] * 3 + [0.05] * 3


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step"])
def test_warm_up_rises_linearly_and_the_schedule_begins_after_it(schedule):
    outer = OuterSettings(schedule=schedule, lr=0.8, warmup_steps=4, decay_every=3, decay_factor=0.5)
    after = OuterSettings(schedule=schedule, lr=0.8, decay_every=3, decay_factor=0.5)
    assert [outer.lr_at(step, 20) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8], rel=1e-12)
    # The last 16 of 20 steps are those of a run of 16.
    assert [outer.lr_at(4 + step, 20) for step in range(16)] == [after.lr_at(step, 16) for step in range(16)]


def test_each_step_takes_its_own_rate():
    # Plain gradient descent on the constant gradient 1 subtracts the sum of the rates: 0.5 + 1 + 1 + 0.5.
    outer = OuterSettings(optimizer="sgd", lr=1.0, schedule="step", warmup_steps=2, decay_every=1, decay_factor=0.5)
    theta, reports = loop_with([torch.ones(3)] * 4, outer)
    assert [report["outer_lr"] for report in reports] == [0.5, 1.0, 1.0, 0.5]
    assert theta.tolist() == [-3.0] * 3


def test_a_gradient_beyond_the_norm_is_scaled_to_it():
    # |(3, 4)| = 5, so 2 / 5 of it.
    after, norm = moved([3.0, 4.0], clip_norm=2.0)
    assert after == pytest.approx([1.2, 1.6], rel=1e-6)
    assert norm == 5.0


def test_a_gradient_within_the_limits_is_left_as_it_is():
    assert moved([3.0, -4.0], clip_norm=5.0, clip_value=4.0) == ([3.0, -4.0], 5.0)


def test_elements_beyond_the_value_are_cut_to_it_on_both_sides():
    assert moved([3.0, -4.0, 0.5], clip_value=2.0)[0] == [2.0, -2.0, 0.5]


def test_elements_are_cut_before_the_norm_is_taken():
    # (30, -4) -> (3, -3): norm sqrt(18), within 5. The norm first would have given 5 (30, -4) / |(30, -4)|.
    after, norm = moved([30.0, -4.0], clip_value=3.0, clip_norm=5.0)
    assert after == [3.0, -3.0]
    assert norm == pytest.approx(math.sqrt(916), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [{}, {"clip_value": 1.0}, {"clip_norm": 1.0}])
def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(bad, clip):
    loop = OuterLoop(OuterSettings(lr=0.1, **clip), torch.ones(4), STEPS)
    loop.step(0, torch.ones(4))
    theta = loop.theta.detach().clone()
    state = {name: value.clone() for name, value in loop.optimizer_tensors().items()}
    with pytest.raises(NonFiniteError, match="step 1: the meta-gradient's norm is"):
        loop.step(1, torch.tensor([1.0, bad, 1.0, 1.0]))
    assert torch.equal(loop.theta, theta)
    assert {name: value.tolist() for name, value in state.items()} == {
        name: value.tolist() for name, value in loop.optimizer_tensors().items()
    }


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("outer", [outer for outer, _, _ in OPTIMIZERS])
def test_a_loop_that_was_saved_and_loaded_goes_on_with_equal_bits(outer, schedule):
    settings = OuterSettings(
        **{name: getattr(outer, name) for name in ("optimizer", "lr", "betas", "eps", "momentum", "weight_decay")},
        schedule=schedule,
        warmup_steps=2,
    )
    start, *gradients = vectors(STEPS + 1)
    whole, _ = loop_with(gradients, settings, start=start)

    first = OuterLoop(settings, start, STEPS)
    for step in range(3):
        first.step(step, gradients[step])
    saved = {name: value.clone() for name, value in first.optimizer_tensors().items()}
    second = OuterLoop(settings, torch.zeros_like(start), STEPS)
    second.load(first.theta.detach().clone(), saved)
    for step in range(3, STEPS):
        second.step(step, gradients[step])
    assert torch.equal(second.theta, whole)


def test_loading_without_the_optimizers_state_would_show():
    # The test above is not empty: Adam that forgets its moments goes another way.
    start, *gradients = vectors(STEPS + 1)
    whole, _ = loop_with(gradients, OuterSettings(lr=0.1), start=start)
    first, _ = loop_with(gradients[:3], OuterSettings(lr=0.1), start=start)
    second = OuterLoop(OuterSettings(lr=0.1), first, STEPS)
    for step in range(3, STEPS):
        second.step(step, gradients[step])
    assert not torch.equal(second.theta, whole)


def test_the_start_is_copied():
    start = torch.ones(3)
    OuterLoop(OuterSettings(lr=0.1), start, STEPS).step(0, torch.ones(3))
    assert start.tolist() == [1.0, 1.0, 1.0]
