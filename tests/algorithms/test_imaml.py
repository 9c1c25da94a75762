import numpy as np
import pytest
import torch
from torch import nn

from metadist.algorithms import IMAML, MAML
from metadist.algorithms.imaml import conjugate_gradients
from metadist.core.episode import Examples
from tests.algorithms.contracts import GRADIENT_BASED, check_algorithm, images, relative_error
from tests.builders import Problem, classification, random_episodes, regression, small_conv4, smooth_mlp
from tests.memory import peak_bytes

NOT_HERE = ("order", "learn_inner_lr", "checkpoint_inner_steps")
VARIATIONS = {name: value for name, value in GRADIENT_BASED.items() if name not in NOT_HERE} | {
    "regularisation": 1.0,
    "cg_steps": 2,
    "damping": 10.0,
    "pull": "once",
}


def make(**changes):
    return IMAML(**{"inner_lr": 0.1, "inner_steps": 3, "regularisation": 2.0, "cg_steps": 5, **changes})


def test_imaml_fulfils_the_contract():
    # Three inner steps do not solve the inner problem, so finite differences of its loss do not agree.
    check_algorithm(make, VARIATIONS, exact=False)


@pytest.mark.parametrize("name", NOT_HERE)
def test_options_of_a_graph_through_the_inner_loop_are_refused(name):
    with pytest.raises(ValueError, match=name):
        make(**{name: "first"})


def anisotropic(algorithm):
    """Linear regression on 3 features whose scales are 1, 2 and 4: the Hessian is far from a multiple of I."""
    spec = regression(inputs=3, outputs=1, support_size=6, query_size=5)
    batch = random_episodes(spec, 1, seed=4)
    batch.support.x[0] *= torch.tensor([1.0, 2.0, 4.0])
    torch.manual_seed(0)
    return Problem(algorithm, nn.Sequential(nn.Linear(3, 1, bias=False)), spec), batch


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_implicit_gradient_is_that_of_the_inner_problems_solution_on_a_quadratic(strategy):
    # L_s(w) = |X w - y|^2 / 6 with gradient H w - b, H = X'X / 3, b = X'y / 3. The inner problem is solved by
    # phi* = (H + 2 I)^-1 (b + 2 theta), so d phi* / d theta = 2 (H + 2 I)^-1, and the meta-gradient is that times
    # grad L_q(phi*) = 2 Xq' (Xq phi* - yq) / 5. Three conjugate-gradient steps are exact in three dimensions.
    problem, batch = anisotropic(make(inner_lr=0.05, inner_steps=600, cg_steps=3))
    (x, y), (query_x, query_y) = ((part.x[0], part.y[0, :, 0]) for part in batch)
    hessian = x.T @ x / 3
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert eigenvalues[-1] > 5 * eigenvalues[0]
    regular = hessian + 2 * torch.eye(3, dtype=torch.float64)
    solution = torch.linalg.solve(regular, x.T @ y / 3 + 2 * problem.theta)
    expected = 2 * torch.linalg.solve(regular, 2 * query_x.T @ (query_x @ solution - query_y) / 5)
    found = problem.sums(batch, strategy=strategy)
    assert relative_error(found.gradient, expected) < 1e-10
    assert found.metrics[0] == pytest.approx(float(((query_x @ solution - query_y) ** 2).mean()), rel=1e-10)


def test_fewer_conjugate_gradient_steps_come_less_close():
    gradients = []
    for cg_steps in (1, 2, 3, 20):
        problem, batch = anisotropic(make(inner_lr=0.05, inner_steps=600, cg_steps=cg_steps))
        gradients.append(problem.sums(batch).gradient)
    errors = [relative_error(gradient, gradients[-1]) for gradient in gradients[:-1]]
    assert errors[0] > 3 * errors[1] > 1e-4 > 1e-10 > errors[2]


@pytest.mark.parametrize("adapts", ["*", "head", "body"])
def test_implicit_gradient_is_that_of_finite_differences_of_the_solved_inner_problem(adapts):
    # The inner problem is solved to round-off, so the query loss there is a function of theta that can be
    # differenced, of the parameters that adapt and of those that do not. Errors: h^2 / 6 + 1e-15 / h, h = 1e-4.
    spec = regression(inputs=2, outputs=2, support_size=5, query_size=4)
    algorithm = make(inner_lr=0.5, inner_steps=45, regularisation=1.0, cg_steps=25, adapts=adapts)
    problem, batch = Problem(algorithm, smooth_mlp(spec, units=3), spec), random_episodes(spec, 1, seed=1)
    step = 1e-4
    found = []
    for move in step * torch.eye(len(problem.theta), dtype=torch.float64):
        losses = [problem.objective(problem.theta + sign * move, batch) for sign in (1, -1)]
        found.append(float(losses[0] - losses[1]) / (2 * step))
    assert relative_error(problem.sums(batch).gradient, np.array(found)) < 1e-6


@pytest.mark.parametrize(
    ("damping", "cg_steps", "pull"), [(0.0, 80, "every_step"), (10.0, 20, "every_step"), (10.0, 20, "once")]
)
def test_at_an_inexact_solution_it_is_the_dense_linear_solve_of_eq_6(damping, cg_steps, pull):
    # Batch norm, max-pool, cross entropy, two steps of Adam: whatever phi is, x solves (I + H / held) x = g.
    changes = {"inner_steps": 2, "inner_optimizer": "adam", "cg_steps": cg_steps, "damping": damping, "pull": pull}
    problem, batch = images(make(**changes))
    network = problem.network.bind(problem.statistics, training=True)
    layout, algorithm = problem.layout, problem.algorithm
    expected = torch.zeros_like(problem.theta)
    for task in range(2):
        support, query = (Examples(part.x[task], part.y[task]) for part in batch)
        phi = layout.flatten(algorithm.adapt(network, layout.unflatten(problem.theta), support, 2)[-1]).detach()
        if pull == "once":  # Rate 0.1, lambda 2; `adapt` itself, as at test, does not pull.
            phi = phi - 0.1 * 2 * (phi - problem.theta)
        hessian = torch.autograd.functional.hessian(lambda v, s=support: network.loss(layout.unflatten(v), s), phi)
        leaf = phi.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network.loss(layout.unflatten(leaf), query), leaf)
        expected += torch.linalg.solve(torch.eye(len(phi), dtype=torch.float64) + hessian / (2 + damping), gradient)
    for strategy in ("loop", "vmap"):
        assert relative_error(problem.sums(batch, strategy=strategy).gradient, expected) < 1e-6


def test_pulled_once_it_adapts_on_the_support_loss_alone_as_maml_does():
    problem, batch = images(make(pull="once"))
    network = problem.network.bind(problem.statistics, training=False)
    meta = problem.layout.unflatten(problem.theta)
    support = Examples(batch.support.x[0], batch.support.y[0])
    expected = MAML(inner_lr=0.1).adapt(network, meta, support, 3)
    torch.testing.assert_close(problem.algorithm.adapt(network, meta, support, 3), expected, rtol=0, atol=0)


def test_a_converged_residual_of_zero_stays_zero():
    # For A = 2 I one step solves exactly: 6 / 2 and 8 / 2, with a residual of exactly 0 in those that follow.
    target = torch.tensor([6.0, 8.0])
    assert torch.equal(conjugate_gradients(lambda v: 2 * v, target, 10), target / 2)
    assert torch.equal(conjugate_gradients(lambda v: 2 * v, torch.zeros(2), 3), torch.zeros(2))


@pytest.mark.parametrize("policy", ["transductive", "support", "running", "per_step"])
def test_path_has_the_parameters_after_each_step_only_where_the_batch_norm_policy_asks(policy):
    spec = classification((1, 16, 16), ways=3, shots=2, queries=2)
    problem, batch = Problem(make(), small_conv4(spec), spec, policy=policy), random_episodes(spec, 1)
    network = problem.network.bind(problem.statistics, training=True)
    meta = problem.layout.unflatten(problem.theta)
    support, query = (Examples(part.x[0], part.y[0]) for part in batch)
    path = problem.algorithm.meta_gradient(network, meta, support, query)[1].path
    every = problem.algorithm.adapt(network, meta, support, 3)
    assert len(path) == (4 if policy == "per_step" else 1)
    torch.testing.assert_close(path, every if policy == "per_step" else every[-1:], rtol=0, atol=0)


def test_peak_memory_does_not_grow_with_inner_steps():
    spec = classification((1, 28, 28), ways=5, shots=1, queries=1)
    module = small_conv4(spec, filters=64, downsample="stride")
    batch = random_episodes(spec, 1, dtype=torch.float32)
    peaks = []
    for steps in (5, 50):
        problem = Problem(make(inner_steps=steps), module, spec, dtype=torch.float32)
        problem.sums(batch)
        peaks.append(peak_bytes(lambda problem=problem: problem.sums(batch)))
    assert peaks[0] > 4 * problem.layout.size, "not even one gradient was counted"
    assert peaks[1] <= 1.2 * peaks[0]


@pytest.mark.parametrize(
    ("strategy", "middle", "cg_steps"),
    [pytest.param("vmap", nn.BatchNorm1d(3), 1, marks=pytest.mark.long), ("loop", nn.Tanh(), 2)],
)
def test_compiled_equals_eager(strategy, middle, cg_steps):
    # As small as it can be: compiling takes seconds.
    spec = regression(inputs=1, outputs=1, support_size=4, query_size=3)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 3), middle, nn.Linear(3, 1))
    problem = Problem(make(inner_steps=1, cg_steps=cg_steps), module, spec, dtype=torch.float32)
    batch = random_episodes(spec, 3, dtype=torch.float32)
    compiled, eager = (problem.sums(batch, strategy=strategy, compile=compile) for compile in (True, False))
    assert relative_error(compiled.gradient, eager.gradient) < 1e-4
    np.testing.assert_allclose(compiled.metrics[0], eager.metrics[0], rtol=1e-5)
