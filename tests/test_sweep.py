"""Sweep files: what they say, what is drawn from them, and every mistake by its key, value, rule and line."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from metadist.errors import ConfigError, RunDirectoryError, UserError
from metadist.run_directory import RunDirectory
from metadist.search_space import parse_distribution
from metadist.suggestions import make_suggestions
from metadist.sweep import Sweep, load_sweep
from metadist.sweep_directory import SweepDirectory
from metadist.warm_start import with_first_points, with_saved_first_points

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


def ended(folder: Path, name: str, results: list[tuple[dict, int, float]], *changes: tuple[str, str]) -> str:
    """A sweep directory in which trials of these points, last steps and losses have ended."""
    (folder / name).mkdir()
    sweep = sweep_of(
        folder / name, *changes, ("searcher:", f"run: {{storage_path: {folder}, name: {name}_out}}\nsearcher:")
    )
    sweep = dataclasses.replace(sweep, budget=dataclasses.replace(sweep.budget, trials=len(results)))
    directory = SweepDirectory(sweep)
    directory.open(resume=False)
    for number, (point, step, loss) in enumerate(results):
        directory.begin(number, point)
        RunDirectory(str(directory.trial(number))).write_json("reports.json", [{"step": step, "loss": loss}])
        directory.end(number, "finished" if step == 90 else "stopped")
    directory.write_results()
    return str(directory.path)


def at(rate: float, steps: int = 1) -> dict:
    return {"algorithm.inner_lr": rate, "algorithm.inner_steps": steps}


def test_a_warm_start_takes_the_best_of_each_earlier_sweep_in_turn(tmp_path: Path) -> None:
    # A trial that was stopped early is behind those that came further, however good it looked.
    first = ended(
        tmp_path, "first", [(at(0.1), 90, 0.5), (at(0.2), 90, 0.4), (at(0.3), 30, 0.1), (at(0.4, 2), 90, 0.6)]
    )
    second = ended(tmp_path, "second", [(at(0.2), 90, 3.0), (at(0.9), 90, 2.0)])
    sweep = with_first_points(sweep_of(tmp_path), [first, second])
    assert [tuple(point.values()) for point in sweep.first_points] == [(0.2, 1), (0.9, 1), (0.1, 1), (0.4, 2), (0.3, 1)]
    assert sweep.points() == list(sweep.first_points)
    few = with_first_points(sweep_of(tmp_path), [first, second], points_each=1)
    assert few.points()[:2] == [at(0.2), at(0.9)]
    assert few.points()[2:] == sweep_of(tmp_path).points()[:3]


def test_points_outside_of_the_space_are_left_out_and_missing_keys_are_the_base_configs(tmp_path: Path) -> None:
    earlier = ended(
        tmp_path,
        "earlier",
        [({"algorithm.inner_lr": 0.0005}, 90, 0.1), ({"algorithm.inner_lr": 0.2}, 90, 0.2)],
        ("  algorithm.inner_steps: choice(1, 2)\n", ""),
        ("loguniform(1e-3, 1)", "loguniform(1e-4, 1)"),
    )
    assert with_first_points(sweep_of(tmp_path), [earlier]).first_points == (at(0.2),)
    with pytest.raises(UserError, match=r"no point of .* lies in this sweep's space"):
        with_first_points(sweep_of(tmp_path, ("loguniform(1e-3, 1)", "loguniform(0.5, 1)")), [earlier])
    with pytest.raises(UserError, match="holds no ended sweep"):
        with_first_points(sweep_of(tmp_path), [str(tmp_path)])


@pytest.mark.parametrize("searcher", ["tpe", "gp"])
def test_optuna_begins_with_the_first_points_and_then_follows_what_it_is_told(tmp_path: Path, searcher: str) -> None:
    pytest.importorskip("optuna")
    change = ("name: random", f"name: {searcher}"), ("trials: 5", "trials: 14")
    sweep = dataclasses.replace(sweep_of(tmp_path, *change), first_points=(at(0.01), at(0.9, 2)))

    def asked() -> list:
        suggestions = make_suggestions(sweep)
        points = []
        for number in range(14):
            points.append(suggestions.ask(number, None))
            suggestions.tell(number, abs(math.log(points[-1]["algorithm.inner_lr"] / 0.1)))
        return points

    points = asked()
    assert points[:2] == [at(0.01), at(0.9, 2)]
    assert points == asked()
    distances = [abs(math.log(point["algorithm.inner_lr"] / 0.1)) for point in points]
    assert min(distances[2:]) < 0.5


def test_the_first_points_of_a_sweep_under_way_are_remembered(tmp_path: Path) -> None:
    place = ("searcher:", f"run: {{storage_path: {tmp_path}, name: out}}\nsearcher:")
    sweep = dataclasses.replace(sweep_of(tmp_path, place), first_points=(at(0.2),))
    SweepDirectory(sweep).open(resume=False)
    again = with_saved_first_points(sweep_of(tmp_path, place))
    assert again.first_points == sweep.first_points
    SweepDirectory(again).open(resume=True)
    with pytest.raises(RunDirectoryError, match="first_points"):
        SweepDirectory(sweep_of(tmp_path, place)).open(resume=True)
