"""Which point a sweep tries next: a fixed list of points, or Optuna's TPE, asked and told."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from metadist.errors import UserError
from metadist.sweeps.search_space import Distribution
from metadist.sweeps.sweep import Point, Sweep

if TYPE_CHECKING:
    import optuna


NEEDED = {"tpe": (), "gp": ("scipy",)}
"""Packages beside Optuna."""


class Suggestions(Protocol):
    """Points in the order of the trials."""

    def ask(self, number: int, tried: Point | None) -> Point:
        """The point of trial `number`; `tried` is what this trial had before the sweep was resumed."""

    def tell(self, number: int, value: float | None) -> None:
        """The last metric of a trial that ended, infinitely bad where it diverged; None where nothing is known."""


def make_suggestions(sweep: Sweep) -> Suggestions:
    """Raises UserError where Optuna is asked for and not installed."""
    if sweep.searcher.name in ("random", "grid"):
        return ListedPoints(sweep.points())
    return OptunaPoints(sweep)


class ListedPoints:
    """The points of a grid or of a random search, which depend on no result."""

    def __init__(self, points: list[Point]) -> None:
        self._points = points

    def ask(self, number: int, tried: Point | None) -> Point:
        return tried or self._points[number]

    def tell(self, number: int, value: float | None) -> None:
        pass


class OptunaPoints:
    """Optuna's samplers, seeded: the same results in the same order give the same points.

    `tpe`: Bergstra et al. 2011 (NeurIPS). `gp`: a Gaussian process with the logarithm of expected improvement
    (Ament et al. 2023, arXiv:2310.20708).
    """

    def __init__(self, sweep: Sweep) -> None:
        name = sweep.searcher.name
        missing = [package for package in ("optuna", *NEEDED[name]) if find_spec(package) is None]
        if missing:
            raise UserError(
                f"searcher.name: {name} needs {missing[0]}, which is not installed."
                " Install it with `pip install 'metadist[tune]'`, or use searcher.name: random."
            )
        import optuna

        samplers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            sampler=samplers[name](seed=sweep.searcher.seed),
            direction=optuna.study.StudyDirection["MAXIMIZE" if sweep.objective.mode == "max" else "MINIMIZE"],
        )
        self._space, self._state = sweep.space, optuna.trial.TrialState
        self._trials: dict[int, optuna.trial.Trial] = {}
        for point in sweep.first_points[: sweep.num_trials]:
            self._study.enqueue_trial({key: self._space[key].encoded(value) for key, value in point.items()})

    def ask(self, number: int, tried: Point | None) -> Point:
        trial, point = self._asked()
        if tried is not None and point != tried:
            # Trials ended in another order than before; what was tried counts, not what would be tried now.
            self._study.tell(trial, state=self._state.FAIL)
            self._study.enqueue_trial({key: self._space[key].encoded(value) for key, value in tried.items()})
            trial, _ = self._asked()
        self._trials[number] = trial
        return tried or point

    def tell(self, number: int, value: float | None) -> None:
        trial = self._trials[number]
        if value is None:
            self._study.tell(trial, state=self._state.FAIL)
        else:
            self._study.tell(trial, value)

    def _asked(self) -> tuple["optuna.trial.Trial", Point]:
        """A trial of Optuna's, asked for one key after another: what is searched depends on the values before."""
        trial = self._study.ask()
        point: Point = {}
        for key, distribution in self._space.items():
            if distribution.applies(point):
                point[key] = distribution.decoded(suggest(trial, key, distribution))
        return trial, point


def suggest(trial: "optuna.trial.Trial", key: str, distribution: Distribution) -> Any:
    """Optuna's number for a key."""
    if distribution.is_listed:
        return trial.suggest_categorical(key, list(range(len(distribution.values))))
    low, high = distribution.values
    if distribution.kind == "randint":
        return trial.suggest_int(key, low, high)
    return trial.suggest_float(key, low, high, log=distribution.kind == "loguniform")


def as_optuna(distribution: Distribution) -> "optuna.distributions.BaseDistribution":
    """Listed values are categories, by their index: Optuna keeps only numbers and text as they are."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if distribution.is_listed:
        return CategoricalDistribution(list(range(len(distribution.values))))
    low, high = distribution.values
    if distribution.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=distribution.kind == "loguniform")
