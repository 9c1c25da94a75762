"""Sweep files: what they say, what is drawn from them, and every mistake by its key, value, rule and line."""

import math
from pathlib import Path

import numpy as np
import pytest

from metadist.errors import ConfigError, RunDirectoryError, UserError
from metadist.search_space import parse_distribution
from metadist.sweep import Sweep, load_sweep
from metadist.sweep_directory import SweepDirectory

CONFIGS = Path(__file__).parents[1] / "configs"
SWEEP = f"""\
base: {CONFIGS / "sinusoid_maml.yaml"}
overrides:
  scaling.num_workers: 0
space:
  algorithm.inner_lr: loguniform(1e-3, 1)
  algorithm.inner_steps: choice(1, 2)
objective: {{metric: loss}}
budget: {{trials: 5, steps: 90, every: 10}}
scheduler: {{name: asha, reduction_factor: 3}}
searcher: {{name: random, seed: 3}}
"""


def sweep_of(folder: Path, *changes: tuple[str, str]) -> Sweep:
    text = SWEEP
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_sweep(path)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_sweeps_are_valid_and_every_point_of_a_grid_is_a_config(path: Path) -> None:
    sweep = load_sweep(path)
    if sweep.searcher.name == "grid":
        assert len(sweep.points()) == sweep.num_trials == 2**6
        for point in sweep.points():
            sweep.config(point)


def test_a_point_is_the_base_config_with_its_values_and_the_budget(tmp_path: Path) -> None:
    config = sweep_of(tmp_path).config({"algorithm.inner_lr": 0.25, "algorithm.inner_steps": 2})
    assert (config.algorithm.inner_lr, config.algorithm.inner_steps) == (0.25, 2)
    assert (config.training.steps, config.evaluation.every) == (90, 10)
    assert config.run.checkpoint_config.checkpoint_frequency == 10
    assert config.scaling.num_workers == 0
    assert config.training.meta_batch_size == 25  # Of the base.


def test_random_points_follow_from_the_seed_and_lie_in_the_space(tmp_path: Path) -> None:
    points = sweep_of(tmp_path).points()
    assert points == sweep_of(tmp_path).points()
    assert points != sweep_of(tmp_path, ("seed: 3", "seed: 4")).points()
    assert len(points) == 5
    assert all(1e-3 <= point["algorithm.inner_lr"] <= 1 for point in points)
    assert {point["algorithm.inner_steps"] for point in points} <= {1, 2}


def test_distributions_have_their_means() -> None:
    # 4,000 draws: four standard errors of a mean are 4 sigma / 63; sigma of a uniform on [a, b] is (b - a) / sqrt 12.
    random = np.random.Generator(np.random.Philox(0))

    def draws(text: str) -> np.ndarray:
        distribution = parse_distribution(text)
        return np.array([distribution.sample(random) for _ in range(4000)])

    bound = 4 / math.sqrt(12 * 4000)
    assert abs(draws("uniform(2, 6)").mean() - 4) < 4 * bound
    assert abs(np.log10(draws("loguniform(1e-3, 10)")).mean() + 1) < 4 * bound
    # Both ends of randint are included: (1 + 2 + 3) / 3.
    assert set(draws("randint(1, 3)")) == {1, 2, 3}
    assert abs(draws("choice(0, 1)").mean() - 0.5) < 2 * bound


def test_a_grid_is_every_combination_with_the_last_key_fastest(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path, ("loguniform(1e-3, 1)", "grid(0.1, 0.2)"), ("choice(1, 2)", "grid(1, 2)"), ("random", "grid")
    )
    assert [tuple(point.values()) for point in sweep.points()] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("budget:", "buget:"), "buget is not a known key (FILE, line 8). Did you mean budget?"),
        (("trials: 5", "trials: five"), "budget.trials must be a whole number, got 'five' (FILE, line 8)."),
        (("trials: 5", "trials: 0"), "budget.trials must be >= 1, got 0 (FILE, line 8)."),
        (("steps: 90", "steps: 95"), "budget.steps must be a multiple of budget.every = 10, got 95 (FILE, line 8)."),
        (("name: asha", "name: ashes"), "scheduler.name must be one of 'asha', 'median' or 'none', got 'ashes'"),
        (
            ("loguniform(1e-3, 1)", "loguniform(0, 1)"),
            "space.algorithm.inner_lr must have low > 0, since it is uniform in the logarithm, got 'loguniform(0, 1)'"
            " (FILE, line 5). Raise it, or use uniform.",
        ),
        (("loguniform(1e-3, 1)", "uniform(1, 0.1)"), "must have low < high, got 'uniform(1, 0.1)' (FILE, line 5)."),
        (("loguniform(1e-3, 1)", "uniform(.inf, 1)"), "two finite numbers"),
        (("loguniform(1e-3, 1)", "loguniformly(1, 2)"), "Did you mean loguniform?"),
        (("loguniform(1e-3, 1)", "0.1"), "A fixed value belongs under overrides."),
        (("loguniform(1e-3, 1)", "__import__('os').getpid()"), "space.algorithm.inner_lr has no known distribution"),
        (("choice(1, 2)", "choice(1, 1)"), "with at least one value and none twice"),
        (("choice(1, 2)", "choice(1, two)"), "space.algorithm.inner_steps must hold values that the base config can"),
        (("choice(1, 2)", "grid(1, 2)"), "must not be grid(..) with searcher.name: random (FILE, line 6)."),
        (("name: random", "name: grid"), "space.algorithm.inner_lr must list its values for searcher.name: grid"),
        (("algorithm.inner_steps:", "algorithm.inner_stepz:"), "Did you mean algorithm.inner_steps?"),
        (("scaling.num_workers: 0", "training.steps: 7"), "overrides.training.steps follows from the section budget"),
        (("scaling.num_workers: 0", "outer.lr: -1"), "outer.lr must be > 0, got -1"),
        (("base: ", "base: nowhere"), "no such config file"),
    ],
)
def test_a_mistake_is_told_by_key_value_rule_and_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        sweep_of(tmp_path, change)
    assert said in str(error.value).replace(str(tmp_path / "mine.yaml"), "FILE")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        sweep_of(tmp_path, ("trials: 5", "trials: 0"), ("choice(1, 2)", "choice()"), ("seed: 3", "seeds: 3"))
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "budget.trials",
        "searcher.seeds",
        "space.algorithm.inner_steps",
    ]


def test_a_sweep_directory_is_taken_up_by_resume_alone_and_by_the_same_sweep_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(tmp_path)
    with pytest.raises(RunDirectoryError, match="no sweep to go on with"):
        SweepDirectory(sweep).open(resume=True)
    SweepDirectory(sweep).open(resume=False)
    with pytest.raises(UserError, match="--resume"):
        SweepDirectory(sweep).open(resume=False)
    SweepDirectory(sweep).open(resume=True)
    with pytest.raises(RunDirectoryError, match="another sweep: searcher differ"):
        SweepDirectory(sweep_of(tmp_path, ("seed: 3", "seed: 4"))).open(resume=True)
