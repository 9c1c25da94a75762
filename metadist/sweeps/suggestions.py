"""Which point a sweep tries next: a fixed list of points, or what Optuna or HyperOpt suggest, asked and told."""

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from metadist.errors import UserError
from metadist.sweeps.search_space import Distribution
from metadist.sweeps.sweep import Point, Sweep

if TYPE_CHECKING:
    import optuna

NEEDED = {"tpe": ("optuna",), "gp": ("optuna", "scipy"), "hyperopt": ("hyperopt",)}
"""Packages of a searcher."""
STARTUP = 10
"""Trials of HyperOpt's that are drawn at random, as many as Optuna's: its own 20 are most of a sweep."""


class Suggestions(Protocol):
    """Points in the order of the trials."""

    def ask(self, number: int, tried: Point | None) -> Point:
        """The point of trial `number`; `tried` is what this trial had before the sweep was resumed."""

    def tell(self, number: int, value: float | None) -> None:
        """The last metric of a trial that ended, infinitely bad where it diverged; None where nothing is known."""


def make_suggestions(sweep: Sweep) -> Suggestions:
    """Raises UserError where the searcher's packages are not installed."""
    name = sweep.searcher.name
    if not sweep.searcher.learns:
        return ListedPoints(sweep.points())
    missing = [package for package in NEEDED[name] if find_spec(package) is None]
    if missing:
        raise UserError(
            f"searcher.name: {name} needs {missing[0]}, which is not installed."
            " Install it with `pip install 'metadist[tune]'`, or use searcher.name: random."
        )
    return HyperOptPoints(sweep) if name == "hyperopt" else OptunaPoints(sweep)


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
        import optuna

        samplers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            sampler=samplers[sweep.searcher.name](seed=sweep.searcher.seed),
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


class HyperOptPoints:
    """HyperOpt's tree of Parzen estimators (Bergstra et al. 2013, ICML), seeded.

    Each key is drawn by itself, and one whose condition does not hold is struck out before HyperOpt hears of the
    trial, as keys that are not drawn are in its own documents.
    """

    def __init__(self, sweep: Sweep) -> None:
        import hyperopt

        self._hyperopt = hyperopt
        self._space = sweep.space
        self._domain = hyperopt.Domain(
            lambda point: 0.0, {key: as_hyperopt(key, of) for key, of in sweep.space.items()}
        )
        self._trials = hyperopt.Trials()
        self._random = np.random.default_rng(sweep.searcher.seed)
        self._sign = -1.0 if sweep.objective.mode == "max" else 1.0
        self._first_points = list(sweep.first_points)
        self._documents: dict[int, dict[str, Any]] = {}

    def ask(self, number: int, tried: Point | None) -> Point:
        (new_id,) = self._trials.new_trial_ids(1)
        # Drawn for every trial: after a resume, too, the next one has the seed that it would have had.
        seed = int(self._random.integers(2**31))
        self._trials.refresh()
        (document,) = self._hyperopt.tpe.suggest(
            [new_id], self._domain, self._trials, seed, n_startup_jobs=STARTUP, verbose=False
        )
        drawn = document["misc"]["vals"]
        if self._first_points:
            point = self._first_points.pop(0)
        else:
            point = {}
            for key, distribution in self._space.items():
                if distribution.applies(point):
                    point[key] = from_hyperopt(distribution, drawn[key][0])
        point = tried or point
        numbers = {key: [self._space[key].encoded(value)] for key, value in point.items()}
        document["misc"]["vals"] = {key: numbers.get(key, []) for key in self._space}
        document["misc"]["idxs"] = {key: [new_id] if key in point else [] for key in self._space}
        self._trials.insert_trial_docs([document])
        self._trials.refresh()
        self._documents[number] = self._trials.trials[-1]
        return point

    def tell(self, number: int, value: float | None) -> None:
        document = self._documents[number]
        if value is None:
            document["state"] = self._hyperopt.JOB_STATE_ERROR
        else:
            document["state"] = self._hyperopt.JOB_STATE_DONE
            document["result"] = {"loss": self._sign * value, "status": self._hyperopt.STATUS_OK}
        self._trials.refresh()


def as_hyperopt(key: str, distribution: Distribution) -> Any:
    """HyperOpt's node for a key; listed values are categories, by their index."""
    from hyperopt import hp

    if distribution.is_listed:
        return hp.choice(key, list(range(len(distribution.values))))
    low, high = distribution.values
    if distribution.kind == "randint":
        return hp.randint(key, low, high + 1)
    if distribution.kind == "loguniform":
        return hp.loguniform(key, math.log(low), math.log(high))
    return hp.uniform(key, low, high)


def from_hyperopt(distribution: Distribution, drawn: Any) -> Any:
    """The value of what HyperOpt drew."""
    if distribution.is_listed or distribution.kind == "randint":
        return distribution.decoded(int(drawn))
    # exp(log(low)) may be a bit below low.
    return float(np.clip(drawn, *distribution.values))


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
