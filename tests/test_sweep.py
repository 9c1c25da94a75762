"""Sweep files: what they say, what is drawn from them, and every mistake by its key, value, rule and line."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from metadist.errors import ConfigError, RunDirectoryError, UserError
from metadist.run_directory import RunDirectory
from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.file import load_sweep
from metadist.sweeps.search_space import Distribution, parse_distribution
from metadist.sweeps.suggestions import make_suggestions
from metadist.sweeps.sweep import Sweep
from metadist.sweeps.warm_start import with_first_points, with_saved_first_points

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


CONDITIONAL = (
    "choice(1, 2)",
    "choice(1, 2)\n  algorithm.inner_optimizer: choice(sgd, momentum, adam)\n"
    "  algorithm.inner_momentum: uniform(0.5, 0.9) if algorithm.inner_optimizer in (momentum, adam)\n"
    "  algorithm.inner_decay: uniform(0.8, 0.9) if algorithm.inner_optimizer == adam",
)
HAS = {"sgd": (False, False), "momentum": (True, False), "adam": (True, True)}
"""Of which of the two keys each optimizer has."""


@pytest.mark.parametrize("searcher", ["random", "tpe", "hyperopt"])
def test_a_key_is_searched_only_where_its_condition_holds(tmp_path: Path, searcher: str) -> None:
    pytest.importorskip({"random": "numpy", "tpe": "optuna"}.get(searcher, searcher))
    more = ("trials: 5", "trials: 20"), ("name: random", f"name: {searcher}")
    sweep = sweep_of(tmp_path, CONDITIONAL, *more)
    suggestions = make_suggestions(sweep)
    points = []
    for number in range(20):
        points.append(suggestions.ask(number, None))
        suggestions.tell(number, points[-1]["algorithm.inner_lr"])
    assert {point["algorithm.inner_optimizer"] for point in points} == set(HAS)
    for point in points:
        found = ("algorithm.inner_momentum" in point, "algorithm.inner_decay" in point)
        assert found == HAS[point["algorithm.inner_optimizer"]]
        # A key that is not searched has the base config's value.
        assert (sweep.config(point).algorithm.inner_momentum is not None) == found[0]
    # A sweep that is resumed asks for the same points.
    again = make_suggestions(sweep)
    for number, point in enumerate(points):
        assert again.ask(number, point) == point
        again.tell(number, point["algorithm.inner_lr"])


def test_conditions_make_a_grid_smaller_and_may_follow_each_other(tmp_path: Path) -> None:
    grid = (
        "loguniform(1e-3, 1)",
        "grid(0.1, 0.2)\n  algorithm.inner_optimizer: grid(sgd, adam)\n"
        "  algorithm.inner_momentum: grid(0.5, 0.9) if algorithm.inner_optimizer == adam\n"
        "  algorithm.inner_decay: grid(0.8, 0.9) if algorithm.inner_momentum == 0.9",
    )
    sweep = sweep_of(tmp_path, grid, ("choice(1, 2)", "grid(1)"), ("random", "grid"))
    # For each rate: sgd; adam with 0.5; adam with 0.9 and two decays.
    assert sweep.num_trials == 2 * (1 + 1 + 2)
    points = [tuple(point.values()) for point in sweep.points()]
    expected = [("sgd", 1), ("adam", 0.5, 1), ("adam", 0.9, 0.8, 1), ("adam", 0.9, 0.9, 1)]
    assert points == [(rate, *rest) for rate in (0.1, 0.2) for rest in expected]


def test_a_sweep_with_conditions_is_written_down_and_known_again(tmp_path: Path) -> None:
    place = ("searcher:", f"run: {{storage_path: {tmp_path}, name: out}}\nsearcher:")
    sweep = sweep_of(tmp_path, CONDITIONAL, place)
    SweepDirectory(sweep).open(resume=False)
    saved = json.loads((tmp_path / "out/sweep.json").read_text())["space"]
    assert {key: Distribution.from_dict(plain) for key, plain in saved.items()} == sweep.space
    SweepDirectory(sweep).open(resume=True)
    other = (CONDITIONAL[0], CONDITIONAL[1].replace("== adam", "== momentum"))
    # Its decay would be one that momentum cannot have: no config at all.
    with pytest.raises(ConfigError, match="inner_decay is for inner_optimizer"):
        sweep_of(tmp_path, other, place)
    wider = (CONDITIONAL[0], CONDITIONAL[1].replace(" in (momentum, adam)", " == adam"))
    with pytest.raises(RunDirectoryError, match="space"):
        SweepDirectory(sweep_of(tmp_path, wider, place)).open(resume=True)


@pytest.mark.parametrize("text", ["uniform(2, 6)", "loguniform(1e-3, 10)"])
def test_a_value_and_its_place_in_an_interval_are_one(text: str) -> None:
    distribution = parse_distribution(text)
    assert distribution.place(distribution.values[0]) == 0
    assert distribution.place(distribution.values[1]) == pytest.approx(1)
    assert distribution.at(0.25) == pytest.approx({"uniform": 3, "loguniform": 1e-2}[distribution.kind])
    assert distribution.place(distribution.at(0.7)) == pytest.approx(0.7)
    assert distribution.at(1.1) == distribution.values[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("budget:", "buget:"), "buget is not a known key (FILE, line 8). Did you mean budget?"),
        (("trials: 5", "trials: five"), "budget.trials must be a whole number, got 'five' (FILE, line 8)."),
        (("trials: 5", "trials: 0"), "budget.trials must be >= 1, got 0 (FILE, line 8)."),
        (("steps: 90", "steps: 95"), "budget.steps must be a multiple of budget.every = 10, got 95 (FILE, line 8)."),
        (
            ("name: asha", "name: ashes"),
            "scheduler.name must be one of 'asha', 'hyperband', 'median', 'pbt', 'pb2' or 'none', got",
        ),
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
        (
            ("choice(1, 2)", "choice(1, 2) if algorithm.order == first"),
            "space.algorithm.inner_steps must depend on a key that stands before it in the space, got algorithm.order"
            " (FILE, line 6). Before it are algorithm.inner_lr.",
        ),
        (
            ("choice(1, 2)", "choice(1, 2) if algorithm.inner_lr == 0.1"),
            "must depend on listed values of algorithm.inner_lr (none that are listed), got 0.1",
        ),
        (
            ("choice(1, 2)", "choice(1, 2) if algorithm.inner_lr is 1"),
            "must have its condition as `if KEY == VALUE` or",
        ),
        (("choice(1, 2)", "choice(1, 2) if (1).real == 1"), "must have its condition as `if KEY == VALUE` or"),
        (
            ("name: asha, reduction_factor: 3", "name: pbt"),
            "space.algorithm.inner_steps cannot change in mid-run, as scheduler.name: pbt would have it (FILE, line",
        ),
        (
            ("name: asha, reduction_factor: 3", "name: pb2, perturb_every: 15"),
            "scheduler.perturb_every must be a multiple of budget.every = 10 and below budget.steps = 90, got 15 (FILE",
        ),
        (
            ("name: asha", "name: asha, perturb_every: 10"),
            "scheduler.perturb_every is for pbt and pb2, got 10 with asha",
        ),
        (
            ("name: asha, reduction_factor: 3}\nsearcher: {name: random", "name: hyperband}\nsearcher: {name: tpe"),
            "searcher.name must be random with scheduler.name: hyperband, whose trials all begin before one has told",
        ),
        (
            ("every: 10}\nscheduler: {name: asha", "every: 10, max_concurrent: 1}\nscheduler: {name: hyperband"),
            "budget.max_concurrent is not for scheduler.name: hyperband, whose trials wait for each other, got 1",
        ),
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


LEARNING = pytest.mark.parametrize(
    ("searcher", "package"), [("tpe", "optuna"), ("gp", "optuna"), ("hyperopt", "hyperopt")]
)


@LEARNING
def test_what_learns_begins_with_the_first_points_and_then_follows_what_it_is_told(
    tmp_path: Path, searcher: str, package: str
) -> None:
    pytest.importorskip(package)
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


@LEARNING
def test_what_learns_keeps_away_from_where_trials_diverge(tmp_path: Path, searcher: str, package: str) -> None:
    pytest.importorskip(package)
    change = ("name: random", f"name: {searcher}"), ("trials: 5", "trials: 30")
    suggestions, diverged = make_suggestions(sweep_of(tmp_path, *change)), []
    for number in range(30):
        rate = suggestions.ask(number, None)["algorithm.inner_lr"]
        diverged.append(rate > 0.1)
        suggestions.tell(number, math.inf if diverged[-1] else abs(math.log(rate / 0.03)))
    # A third of the space, in its logarithm. Of trials that are called failures Optuna learns nothing, and goes there.
    assert any(diverged[:10])
    assert sum(diverged[15:]) <= 5


def test_the_first_points_of_a_sweep_under_way_are_remembered(tmp_path: Path) -> None:
    place = ("searcher:", f"run: {{storage_path: {tmp_path}, name: out}}\nsearcher:")
    sweep = dataclasses.replace(sweep_of(tmp_path, place), first_points=(at(0.2),))
    SweepDirectory(sweep).open(resume=False)
    again = with_saved_first_points(sweep_of(tmp_path, place))
    assert again.first_points == sweep.first_points
    SweepDirectory(again).open(resume=True)
    with pytest.raises(RunDirectoryError, match="first_points"):
        SweepDirectory(sweep_of(tmp_path, place)).open(resume=True)
