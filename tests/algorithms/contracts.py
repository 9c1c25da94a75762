"""What holds for every algorithm, whatever it computes. Each algorithm's test calls `check_algorithm`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch

from metadist.core.algorithm import Algorithm
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.meta_gradient import score_episodes
from tests.builders import (
    Problem,
    classification,
    random_episodes,
    regression,
    small_conv4,
    smooth_mlp,
    task_of,
)

Make = Callable[..., Algorithm]
MakeProblem = Callable[[Algorithm], tuple[Problem, EpisodeBatch]]


class Beside(NamedTuple):
    """Another value of a hyperparameter that has an effect only beside these others, or from an outer step on."""

    value: Any
    others: Mapping[str, Any] = MappingProxyType({})
    step: int = 0


GRADIENT_BASED: dict[str, Any] = {
    "inner_lr": 0.2,
    "inner_lr_schedule": ((0, 0.3),),
    "inner_steps": 2,
    "order": "first",
    "adapts": "*.weight",
    "inner_optimizer": "adam",
    "inner_momentum": Beside(0.5, {"inner_optimizer": "momentum"}),
    "inner_decay": Beside(0.5, {"inner_optimizer": "rmsprop"}),
    "learn_inner_lr": "per_layer",
}
"""Variations of the hyperparameters that all gradient-based algorithms share."""

SAME_BITS: dict[str, Any] = {"checkpoint_inner_steps": True}


def check_algorithm(
    make: Make,
    variations: Mapping[str, Any],
    *,
    same: Mapping[str, Any] | None = None,
    same_to: float = 0.0,
    exact: bool = True,
    problems: Sequence[MakeProblem] | None = None,
) -> None:
    """The contract of an algorithm that `make(**hyperparameters)` builds.

    `variations` gives every hyperparameter another value than `make` does, and each must show in the
    meta-gradient of one of `problems` (left out: `curves` and `images`); those in `same` must change it by no
    more than `same_to` of its norm, not by a bit unless said. `exact` says that the meta-gradient claims to be
    the gradient of `objective`, so that finite differences must agree.
    """
    same, problems = same or {}, problems or (curves, images)
    _check_that_all_hyperparameters_vary(make, {**variations, **same})
    for problem, batch in (made(make()) for made in problems):
        _check_that_theta_is_untouched(problem, batch)
        _check_that_tasks_do_not_see_each_other(problem, batch)
        _check_that_vmap_equals_the_loop(problem, batch)
        _check_that_types_are_kept(problem, batch)
        if problem.algorithm.trains_on_episodes:  # Other batches have no support set to adapt to.
            _check_that_policies_scored_together_are_those_scored_alone(problem, batch)
    for name, value in variations.items():
        varied = value if isinstance(value, Beside) else Beside(value)
        one, other = make(**varied.others), make(**varied.others, **{name: varied.value})
        _check_that_the_meta_gradient_differs(problems, one, other, name, varied.step)
    for name, value in same.items():
        for problem, batch in (made(make()) for made in problems):
            varied = Problem(make(**{name: value}), problem.module, problem.spec)
            for strategy in ("loop", "vmap"):
                found, expected = (p.sums(batch, strategy=strategy).gradient for p in (varied, problem))
                error = relative_error(found, expected)
                assert error <= same_to, f"{name} = {value} changes the meta-gradient by {error:.1e} ({strategy})"
    if exact:
        for made in problems:
            if made is images:
                check_derivatives_along_directions(*made(make()))
            else:
                check_meta_gradient_by_finite_differences(*made(make()))


def curves(algorithm: Algorithm) -> tuple[Problem, EpisodeBatch]:
    """Two regression tasks for a smooth network."""
    spec = regression(inputs=2, outputs=2, support_size=5, query_size=4)
    return Problem(algorithm, smooth_mlp(spec), spec), random_episodes(spec, 2, seed=1)


def points(algorithm: Algorithm) -> tuple[Problem, EpisodeBatch]:
    """Two tasks of 3 ways in the plane for a smooth network."""
    spec = classification((2,), ways=3, shots=2, queries=2)
    return Problem(algorithm, smooth_mlp(spec), spec), random_episodes(spec, 2, seed=4)


def images(algorithm: Algorithm) -> tuple[Problem, EpisodeBatch]:
    """Two tasks of 3 ways for a Conv-4 as it is: ReLU, max-pool, batch norm."""
    spec = classification((1, 16, 16), ways=3, shots=2, queries=2)
    return Problem(algorithm, small_conv4(spec), spec), random_episodes(spec, 2, seed=2)


def check_meta_gradient_by_finite_differences(problem: Problem, batch: EpisodeBatch) -> float:
    """Every element of the meta-gradient, to 1e-6 of its norm; gives the relative error.

    Central differences err by h^2 f''' / 6 + 1e-16 f / h, about 1e-10 for h = 1e-5.
    """
    gradient = torch.from_numpy(problem.sums(batch).gradient)
    step = 1e-5
    found = torch.stack(
        [
            (problem.objective(problem.theta + move, batch) - problem.objective(problem.theta - move, batch)).detach()
            for move in step * torch.eye(len(problem.theta), dtype=torch.float64)
        ]
    ) / (2 * step)
    error = float(torch.linalg.vector_norm(found - gradient) / torch.linalg.vector_norm(gradient))
    assert error < 1e-6, f"finite differences differ from the meta-gradient by {error:.1e} of its norm"
    return error


def check_derivatives_along_directions(problem: Problem, batch: EpisodeBatch, directions: int = 6) -> float:
    """The meta-gradient along random directions, to 1e-6 of each derivative; gives the largest relative error.

    The step is short enough that no ReLU or max-pool of these episodes changes sides: then the loss is
    smooth between the two points. Round-off is about 1e-16 / h = 1e-9 for h = 1e-7.
    """
    gradient = torch.from_numpy(problem.sums(batch).gradient)
    random = torch.Generator().manual_seed(3)
    step, worst = 1e-7, 0.0
    for _ in range(directions):
        # Signs rather than normal numbers: every parameter moves by as much as any other.
        direction = torch.randint(0, 2, gradient.shape, generator=random).double() * 2 - 1
        ahead, behind = (problem.objective(problem.theta + s * direction, batch) for s in (step, -step))
        expected = float(gradient @ direction)
        worst = max(worst, abs(float(ahead - behind) / (2 * step) - expected) / abs(expected))
    assert worst < 1e-6, f"finite differences differ from the meta-gradient by {worst:.1e} of the derivative"
    return worst


def relative_error(found: np.ndarray | torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _check_that_all_hyperparameters_vary(make: Make, variations: Mapping[str, Any]) -> None:
    algorithm = make()
    kinds = {field.name: field.type for field in dataclasses.fields(algorithm)}
    declared = {name for name, kind in kinds.items() if len(get_args(kind)) != 1 or get_origin(kind) is not Literal}
    assert set(variations) == declared, f"vary each of {sorted(declared)}, got {sorted(variations)}"
    unvaried = [name for name, value in variations.items() if getattr(algorithm, name) == value]
    assert not unvaried, f"these variations are none: {unvaried}"


def _check_that_the_meta_gradient_differs(
    problems: Sequence[MakeProblem], one: Algorithm, other: Algorithm, name: str, step: int
) -> None:
    for made in problems:
        (problem, batch), (varied, _) = made(one), made(other)
        if varied.layout != problem.layout:
            return  # Other meta-parameters: it certainly has another meta-gradient.
        if relative_error(*(p.sums(batch, step=step).gradient for p in (varied, problem))) > 1e-4:
            return
    raise AssertionError(f"{name} is declared and changes nothing: {one} and {other} have equal meta-gradients")


def _check_that_theta_is_untouched(problem: Problem, batch: EpisodeBatch) -> None:
    support = Examples(batch.support.x[0], batch.support.y[0])
    network = problem.network.bind(problem.statistics, training=True)
    meta = problem.layout.unflatten(problem.theta)
    names, before = list(meta), problem.theta.clone()
    problem.algorithm.adapt(network, meta, support, 2)
    problem.sums(batch)
    assert list(meta) == names, "adapt changed the dict of meta-parameters"
    assert torch.equal(problem.theta, before), "theta was changed in place"


def _check_that_tasks_do_not_see_each_other(problem: Problem, batch: EpisodeBatch) -> None:
    swapped = EpisodeBatch(*(Examples(part.x.flip(0), part.y.flip(0)) for part in batch))
    alone = [problem.sums(task_of(batch, task)).gradient for task in range(2)]
    assert relative_error(alone[0], alone[1]) > 1e-3, "the two tasks are one and the same"
    for strategy in ("loop", "vmap"):
        for order in (batch, swapped):
            error = relative_error(problem.sums(order, strategy=strategy).gradient, alone[0] + alone[1])
            assert error < 1e-10, f"{strategy}: a task's meta-gradient depends on the task beside it ({error:.1e})"


def _check_that_vmap_equals_the_loop(problem: Problem, batch: EpisodeBatch) -> None:
    loop, vmap = (problem.sums(batch, strategy=strategy) for strategy in ("loop", "vmap"))
    error = relative_error(vmap.gradient, loop.gradient)
    assert error < 1e-10, f"vmap and loop differ by {error:.1e}"
    np.testing.assert_allclose(vmap.metrics, loop.metrics, rtol=1e-10)


def _check_that_types_are_kept(problem: Problem, batch: EpisodeBatch) -> None:
    exact = problem.sums(batch)
    assert exact.gradient.dtype == np.float64
    single = Problem(problem.algorithm, problem.module, problem.spec, dtype=torch.float32)
    rounded = single.sums(EpisodeBatch(*(Examples(part.x.float(), in_float32(part.y)) for part in batch)))
    assert rounded.gradient.dtype == np.float32
    error = relative_error(rounded.gradient, exact.gradient)
    assert error < 1e-3, f"float32 and float64 differ by {error:.1e}"


def _check_that_policies_scored_together_are_those_scored_alone(problem: Problem, batch: EpisodeBatch) -> None:
    """`transductive` and `support` share the inner loop."""

    def scored(*policies: BatchNormPolicy) -> np.ndarray:
        arguments = (problem.algorithm, problem.network, problem.layout, problem.theta, problem.statistics, batch)
        return score_episodes(*arguments, inner_steps=2, policies=list(policies), strategy="loop").loss

    policies: tuple[BatchNormPolicy, ...] = ("support", "transductive")
    together, alone = scored(*policies), np.concatenate([scored(policy) for policy in policies])
    assert np.array_equal(together, alone), f"losses under {policies} differ from those under each alone"


def in_float32(targets: torch.Tensor) -> torch.Tensor:
    """Targets in float32 where they are values."""
    return targets.float() if targets.is_floating_point() else targets
