"""Is a new task like those that a run was meta-trained on? A distance, a calibrated p-value, and words.

Meta-learning helps where tasks are alike. The task's statistics (`task_statistics.py`) are compared with those
of training tasks; validation tasks of the same ways and shots, whose classes were never trained on, say how
large the distance of a task from the same source is. The p-value is that of split conformal prediction
(Vovk et al. 2005, "Algorithmic Learning in a Random World", sec. 4.2; Bates et al. 2023, Ann. Stat. 51, p. 149,
for testing outliers): a task from the source has a p-value of at most a with a probability of at most a.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.adaptation import LoadedRun, load
from metadist.baselines import BASELINES, cross_validated
from metadist.core.episode import Examples
from metadist.core.keys import TaskKey
from metadist.core.threads import torch_threads
from metadist.cross_validation import cross_validate
from metadist.errors import DataError
from metadist.features import features
from metadist.held_out import REFERENCE_SEED, tasks_like
from metadist.task_statistics import UNUSUAL, FeatureSpace, task_statistics

TRAINING_TASKS = 60
VALIDATION_TASKS = 99
EXAMPLES_A_CLASS = 3
"""Of each training class, for its place in feature space."""
REFERENCE_EXAMPLES = 100
NEAR, FAR = 0.05, 0.01
"""p-values above the first are near, up to the second far, between them a stretch."""
NEAREST = 5


@dataclass(frozen=True)
class Similarity:
    """How a task compares with a run's training tasks."""

    verdict: str
    """near, a stretch or far."""
    p_value: float
    """Share of tasks like the training ones that are at least as far, with this one counted in."""
    distance: float
    """Root mean square deviation from training tasks, in their standard deviations."""
    validation_tasks: int
    """That the p-value is calibrated on; its least value is 1 / (1 + this)."""
    deviations: dict[str, float]
    """Of each statistic, in standard deviations of training tasks, signed."""
    nearest: list[tuple[str, float]]
    """Training classes and how far (feature standard deviations) the task's nearest class is from them."""
    accuracy_by_cross_validation: dict[str, float]
    """On the support set, of the adapted model and of predictors without meta-learning; empty where impossible."""
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Neighbourhood:
    """A run's own tasks of given class sizes, to compare others with. Made once for many tasks."""

    run: LoadedRun
    sizes: tuple[int, ...]
    """Examples of each class; in regression, of the whole set."""
    space: FeatureSpace
    mean: dict[str, float]
    deviation: dict[str, float]
    calibration: np.ndarray
    """float64 `[tasks]`: distances of validation tasks."""

    def deviations(self, support: Examples) -> dict[str, float]:
        """Each statistic in standard deviations from training tasks' mean."""
        found = task_statistics(self.run, self.space, support, _ways(self.run, self.sizes))
        return {name: (found[name] - self.mean[name]) / self.deviation[name] for name in self.mean}

    def p_value(self, distance: float) -> float:
        """Of a task at this distance."""
        return float(1 + np.sum(self.calibration >= distance)) / (1 + len(self.calibration))


def distance(deviations: dict[str, float]) -> float:
    """Root mean square of the deviations towards the side that is unlike training."""
    sided = list(_unlike(deviations).values())
    return math.sqrt(sum(value * value for value in sided) / len(sided))


def similarity(run: LoadedRun | str, x: Any, y: Any, *, neighbourhood: Neighbourhood | None = None) -> Similarity:
    """Compares a support set `x: [examples, *input_shape]`, `y: [examples]` of any labels with a run's tasks.

    `neighbourhood` spares making it anew for further tasks of the same class sizes. Raises DataError where the
    data do not fit the run, or the run's source has too few examples to draw tasks of these sizes.
    """
    run = load(run) if isinstance(run, str) else run
    with torch_threads(run.experiment.threads):
        return _compared(run, x, y, neighbourhood)


def _compared(run: LoadedRun, x: Any, y: Any, neighbourhood: Neighbourhood | None) -> Similarity:
    model = run.adapt(x, y, cross_validation=False)
    support, ways = model.support, len(model.classes_)
    sizes = tuple(torch.bincount(support.y).tolist()) if ways else (len(support.x),)
    around = neighbourhood or make_neighbourhood(run, sizes)
    if around.sizes != sizes:
        raise DataError(
            f"the neighbourhood is for class sizes {list(around.sizes)}, and the support set has {list(sizes)}."
            " Make one with make_neighbourhood(run, sizes)."
        )
    deviations = around.deviations(support)
    far = distance(deviations)
    p_value = around.p_value(far)
    verdict = "near" if p_value > NEAR else "a stretch" if p_value > FAR else "far"
    trusted = _cross_validated(run, support, ways)
    return Similarity(
        verdict=verdict,
        p_value=p_value,
        distance=far,
        validation_tasks=len(around.calibration),
        deviations=deviations,
        nearest=_nearest(around, support),
        accuracy_by_cross_validation=trusted,
        advice=_advice(verdict, deviations, trusted),
    )


def make_neighbourhood(run: LoadedRun, sizes: tuple[int, ...]) -> Neighbourhood:
    """Draws the run's own training and validation tasks with classes of these sizes. Raises DataError."""
    space = _feature_space(run)
    ways = _ways(run, sizes)

    def statistics(split: str, number: int) -> list[dict[str, float]]:
        return [task_statistics(run, space, task, ways) for task, _ in tasks_like(run, split, sizes, number)]

    seen = statistics("train", TRAINING_TASKS)
    table = np.array([list(one.values()) for one in seen])
    mean, spread = table.mean(0), table.std(0, ddof=1)
    # A statistic that is the same for all training tasks compares nothing.
    kept = [column for column, size in enumerate(spread) if size > 1e-6 * (1 + abs(mean[column]))]
    names = [list(seen[0])[column] for column in kept]
    around = Neighbourhood(
        run=run,
        sizes=sizes,
        space=space,
        mean=dict(zip(names, mean[kept].tolist(), strict=True)),
        deviation=dict(zip(names, spread[kept].tolist(), strict=True)),
        calibration=np.empty(0),
    )
    distances = [distance(around.deviations(task)) for task, _ in tasks_like(run, "val", sizes, VALIDATION_TASKS)]
    return dataclasses.replace(around, calibration=np.array(distances))


def _ways(run: LoadedRun, sizes: tuple[int, ...]) -> int:
    return len(sizes) if run.spec.kind == "classification" else 0


def _feature_space(run: LoadedRun) -> FeatureSpace:
    """Places training classes, or training tasks where the run's source has no pool of classes."""
    x, names = _training_examples(run)
    chosen = torch.linspace(0, len(x) - 1, min(len(x), REFERENCE_EXAMPLES)).long()
    reference = x[chosen]
    seen = features_in_parts(run, x, reference)
    mean, scale = seen.mean(0), seen.std(0)
    # A feature that is dead in training says nothing, unless it wakes: then by the scale of the others.
    scale = scale.clamp_min(max(float(scale.mean()) * 1e-2, 1e-12))
    centres = ((seen - mean) / scale).view(len(names), -1, seen.shape[1]).mean(1)
    return FeatureSpace(reference, mean, scale, centres, names)


def features_in_parts(run: LoadedRun, x: Tensor, reference: Tensor) -> Tensor:
    """Features of many examples, some at a time."""
    return torch.cat([features(run, part, reference) for part in x.split(500)])


def _training_examples(run: LoadedRun) -> tuple[Tensor, list[str]]:
    """The same number of examples of each training class (or task), one after another, and their names."""
    source: Any = run.experiment.source
    pool = getattr(source, "pool", None)
    if pool is None:
        keys = [TaskKey(REFERENCE_SEED, "train", 0, task) for task in range(TRAINING_TASKS)]
        return source.sample(keys).support.x.flatten(0, 1), [str(key) for key in keys]
    ids = pool.class_ids["train"]
    number = min(EXAMPLES_A_CLASS, int(pool.sizes()[ids].min()))
    rows = (pool.starts[ids][:, None] + np.arange(number)).ravel()
    x = pool.examples[rows].astype(np.float32) / (255 if pool.is_images else 1)
    return torch.from_numpy(x), [pool.classes[index] for index in ids]


def _nearest(around: Neighbourhood, support: Examples) -> list[tuple[str, float]]:
    """Training classes (in regression, tasks) that lie nearest to one of the task's."""
    placed = around.space.place(around.run, support.x)
    if around.run.spec.kind == "classification":
        members = torch.nn.functional.one_hot(support.y).to(placed.dtype)
        centres = members.T @ placed / members.sum(0)[:, None]
    else:
        centres = placed.mean(0, keepdim=True)
    distances = torch.cdist(centres, around.space.centres).min(0).values / math.sqrt(placed.shape[1])
    order = torch.argsort(distances)[:NEAREST].tolist()
    return [(around.space.names[index], float(distances[index])) for index in order]


def _cross_validated(run: LoadedRun, support: Examples, ways: int) -> dict[str, float]:
    if not ways or int(torch.bincount(support.y).min()) < 2:
        return {}
    found = cross_validate(run, support, ways, run.config.inner_steps_at_test, None)
    assert found is not None
    others = {name: cross_validated(predictor, run, support, ways) for name, predictor in BASELINES.items()}
    return {"adapted": found.score} | others


def _unlike(deviations: dict[str, float]) -> dict[str, float]:
    """How far each statistic lies on the side that is unlike training; 0 on the other one."""
    return {
        name: abs(value) if UNUSUAL[name] == 0 else max(0.0, UNUSUAL[name] * value)
        for name, value in deviations.items()
    }


def _advice(verdict: str, deviations: dict[str, float], trusted: dict[str, float]) -> str:
    unlike = _unlike(deviations)
    most = max(unlike, key=lambda name: unlike[name])
    why = f"what is most unlike training is its {most.replace('_', ' ')} ({deviations[most]:+.1f} standard deviations)"
    if verdict == "near":
        return "The task is like those this run was trained on: use the adapted model."
    if not trusted:
        return (
            f"Do not trust the adapted model unchecked: {why}. Give two or more examples of each class, so that it can"
            " be compared with training from scratch."
        )
    best = max(trusted, key=lambda name: trusted[name])
    figures = ", ".join(f"{name} {share:.0%}" for name, share in trusted.items())
    choice = (
        "the adapted model is still the best of these; check it on more examples"
        if best == "adapted"
        else f"prefer {best}"
    )
    return f"{why[0].upper()}{why[1:]}. Cross-validated on the support set: {figures}; {choice}."
