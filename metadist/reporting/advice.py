"""What to try next, in words drawn from the data: one rule a function, all of them here, in the order of their weight.

A rule looks at the findings and gives a sentence, or None where it has nothing to say. Thresholds are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metadist.reporting.findings import Findings
from metadist.scores import Score, mean_and_interval

CLEAR_POINTS, CLEAR_SHARE = 0.5, 0.02
"""Gains are worth a word from half a percentage point of accuracy, or two per cent of the loss."""
CLIMB_POINTS, CLIMB_SHARE = 1.0, 0.03
GAP_POINTS = 5.0
WIDE_POINTS = 1.5
POOR_ECE = 0.05
STILL, MOVED = 0.9, 0.8
"""CKA above which a layer counts as used again as it is, and below which as learned anew."""
NOISY, WASTEFUL = 2.0, 0.125
"""Noise scale over meta-batch size beyond which a larger, or below which a smaller meta-batch is advised."""
LEAST_VALIDATIONS = 6


@dataclass(frozen=True)
class Advice:
    """One sentence and the rule that it comes from."""

    rule: str
    text: str


def advise(findings: Findings) -> list[Advice]:
    """All that the rules have to say."""
    said = [(rule.__name__.lstrip("_"), rule(findings)) for rule in RULES]
    return [Advice(name, text) for name, text in said if text]


def _unfinished(f: Findings) -> str | None:
    steps, done = f.record.setting("training", "steps"), f.step if f.step is not None else f.record.last_step
    if not steps or done >= steps:
        return None
    return (
        f"Training stopped at step {done:,} of {steps:,}. Run the same `metadist train` command again: it goes on from"
        " there."
    )


def _evaluation_is_old(f: Findings) -> str | None:
    evaluation = f.record.evaluation
    if evaluation is None or f.step is None or evaluation["step"] == f.step:
        return None
    return (
        f"The evaluation is of step {evaluation['step']:,} and the checkpoint of step {f.step:,}: evaluate again,"
        f" `metadist evaluate {f.record.location}`."
    )


def _diverged(f: Findings) -> str | None:
    a = f.adaptation
    if a is None or np.isfinite(a.loss[:, a.steps]).all():
        return None
    lost = int((~np.isfinite(a.loss[:, a.steps])).sum())
    return (
        f"Adapting diverges on {lost} of {len(a.loss)} tasks: the loss is not finite after {_steps(a.steps)}. Lower"
        " `algorithm.inner_lr`, or take fewer steps at test, `--set evaluation.inner_steps=1`."
    )


def _near_chance(f: Findings) -> str | None:
    own = _own(f)
    if not own or own["accuracy"] is None or f.experiment is None:
        return None
    ways = f.experiment.source.spec.output_size
    score = own["accuracy"]
    if score["ci95"] is None or score["mean"] - score["ci95"] > 1 / ways:
        return None
    return (
        f"Accuracy cannot be told from chance ({100 / ways:.0f} %): look at the training curve first. Where it is flat,"
        " try another outer.lr (a tenth, ten times) and algorithm.inner_lr, or more steps."
    )


def _adapting_does_not_help(f: Findings) -> str | None:
    a = f.adaptation
    if a is None or not a.steps:
        return None
    gain = _gain(f, 0, a.steps)
    if not np.isfinite(gain["mean"]):
        return None
    if gain["mean"] - gain["ci95"] > 0:
        return None
    return (
        f"Adapting does not help on these tasks: {_difference(f, gain)} after {_steps(a.steps)} against none."
        " Try a smaller `algorithm.inner_lr`; if that is no better, the tasks may be one task, and an ordinary model"
        " will do."
    )


def _more_inner_steps(f: Findings) -> str | None:
    a = f.adaptation
    if a is None or not a.steps or a.loss.shape[1] <= a.steps + 1:
        return None
    last = a.loss.shape[1] - 1
    gain = _gain(f, a.steps, last)
    if not gain["mean"] - gain["ci95"] > 0 or gain["mean"] < _clear(f, a.steps):
        return None
    return (
        f"{_Score(f)} still {'rises' if _accurate(f) else 'falls'} at the last inner step: {_steps(last)} instead of"
        f" {a.steps} give {_difference(f, gain)}. Try more at test, `--set evaluation.inner_steps={last}`."
    )


def _fewer_inner_steps(f: Findings) -> str | None:
    a = f.adaptation
    if a is None or a.steps < 2:
        return None
    scores = _scores(f)[:, : a.steps + 1].mean(0)
    best = int(scores.argmax())
    gain = _gain(f, a.steps, best)
    if best in (0, a.steps) or not gain["mean"] - gain["ci95"] > 0 or gain["mean"] < _clear(f, a.steps):
        return None
    return (
        f"Adapting goes too far: {_steps(best)} instead of {a.steps} give {_difference(f, gain)}. Try"
        f" `--set evaluation.inner_steps={best}`, or a smaller `algorithm.inner_lr`."
    )


def _train_longer(f: Findings) -> str | None:
    scores = _validations(f)
    if len(scores) < LEAST_VALIDATIONS:
        return None
    third = len(scores) // 3
    before, last = scores[-2 * third : -third, 1].mean(), scores[-third:, 1].mean()
    least = CLIMB_POINTS / 100 if _accurate(f) else CLIMB_SHARE * abs(before)
    if last - before < least:
        return None
    steps = f.record.setting("training", "steps")
    change = (
        f"{100 * (last - before):+.1f} points"
        if _accurate(f)
        else f"{100 * (last - before) / abs(before):.0f} % less loss"
    )
    return (
        f"Validation still improves: {change} from the middle third of training to the last. Train longer,"
        f" `--set training.steps={2 * int(steps)}`."
    )


def _stop_earlier(f: Findings) -> str | None:
    scores = _validations(f)
    if len(scores) < LEAST_VALIDATIONS:
        return None
    # Three validations around each, so that a lucky one does not count.
    smooth = np.convolve(scores[:, 1], np.ones(3) / 3, "valid")
    best = int(smooth.argmax())
    least = CLIMB_POINTS / 100 if _accurate(f) else CLIMB_SHARE * abs(smooth[best])
    step = int(scores[best + 1, 0])
    if smooth[best] - smooth[-1] < least or step > 0.7 * scores[-1, 0]:
        return None
    return (
        f"Validation was best near step {step:,} and got worse after: the run overfits its training tasks. Use a"
        f" checkpoint from there (`metadist evaluate {f.record.location} --step ..`), more classes, or a smaller"
        " `outer.lr`."
    )


def _gap_to_training(f: Findings) -> str | None:
    own, trained = _own(f), [line["accuracy"] for line in f.record.trained if line.get("accuracy") is not None]
    if not own or own["accuracy"] is None or len(trained) < 10:
        return None
    # Training episodes may have other ways, and then another chance level.
    if f.record.setting("task", "train_ways") or f.record.setting("task", "name") == "pooled_classes":
        return None
    gap = 100 * (float(np.mean(trained[-len(trained) // 10 :])) - own["accuracy"]["mean"])
    if gap < GAP_POINTS:
        return None
    return (
        f"Training tasks are solved {gap:.1f} points better than {f.record.evaluation['split']} tasks: more training"  # type: ignore[index]
        " classes would help most (`task.rotate_classes` makes four of one), then dropout or `outer.weight_decay`."
    )


def _policies_differ(f: Findings) -> str | None:
    evaluation = f.record.evaluation
    if evaluation is None or len(evaluation["policies"]) < 2:
        return None
    own, alone = (policy["per_inner_step"][-1]["accuracy"] for policy in evaluation["policies"][:2])
    if own is None or evaluation["batch_norm"] != "transductive":
        return None
    # Both are of the same episodes; without their differences the wider of the intervals is a safe one.
    points, width = 100 * (own["mean"] - alone["mean"]), 100 * max(own["ci95"] or 0, alone["ci95"] or 0)
    if points <= width:
        return None
    return (
        f"Batch norm `transductive` beats `support` by {points:.1f} points, because it sees the query examples of a"
        f" task together. In use, where they come one at a time, expect the latter: {100 * alone['mean']:.1f} %."
        " Training with `--set training.batch_norm=support` may close the gap."
    )


def _poorly_calibrated(f: Findings) -> str | None:
    own = _own(f)
    if not own or own["ece"] is None or own["ece"] < POOR_ECE:
        return None
    bins = [b for b in own["calibration"]["bins"] if b["count"]]
    total = sum(b["count"] for b in bins)
    lean = sum(b["count"] * (b["confidence"] - b["accuracy"]) for b in bins) / total
    word = "too sure of itself" if lean > 0 else "too modest"
    remedy = (
        "`--set training.label_smoothing=0.1` or fewer inner steps"
        if lean > 0
        else "more inner steps or a larger `algorithm.inner_lr`"
    )
    return (
        f"Confidences are off by {100 * own['ece']:.1f} points on average, and the model is {word}. Do not read them as"
        f" probabilities; try {remedy}."
    )


def _body_is_reused(f: Findings) -> str | None:
    if f.adaptation is None or f.record.setting("algorithm", "name") not in ("maml", "meta_sgd", "maml_plus_plus"):
        return None
    known = [m.cka["mean"] for m in f.adaptation.movements if m.cka]
    if len(known) < 2 or min(known[:-1]) < STILL or known[-1] > MOVED:
        return None
    return (
        f"Only the last layer learns anew in the inner loop (CKA {known[-1]:.2f}; all before it at least"
        f" {min(known[:-1]):.2f}): features are used again as they are. `algorithm.name: anil` should do as well for"
        " less computing (Raghu et al. 2020)."
    )


def _meta_batch(f: Findings) -> str | None:
    batch = f.record.setting("training", "meta_batch_size")
    if f.alignment is None or not batch:
        return None
    scale = f.alignment.noise_scale
    if scale is None:
        return (
            f"The meta-gradients of {f.alignment.tasks} tasks show no common direction: either training has arrived, or"
            f" it needs a larger meta-batch than {batch} or a falling rate, `--set outer.schedule=cosine`."
        )
    if scale > NOISY * batch:
        return (
            f"Noise between tasks outweighs the signal in a meta-batch: about {scale:,.0f} tasks would balance them,"
            f" and a step has {batch}. Try a larger `training.meta_batch_size`, or a falling rate,"
            " `--set outer.schedule=cosine`."
        )
    if scale < WASTEFUL * batch:
        return (
            f"Tasks agree: about {max(1, round(scale))} of them would already balance noise and signal, and a step has"
            f" {batch}. A smaller `training.meta_batch_size` would give more steps for the same work."
        )
    return None


def _negative_rates(f: Findings) -> str | None:
    if f.rates is None or f.rates.negative < 0.01:
        return None
    return (
        f"{100 * f.rates.negative:.0f} % of the learned inner rates are negative: there the inner loop climbs the"
        " support loss. Li et al. (2017) allow it; a smaller `outer.lr` keeps rates nearer to where they start."
    )


def _few_episodes(f: Findings) -> str | None:
    own = _own(f)
    if not own or own["accuracy"] is None or f.record.evaluation is None:
        return None
    width = own["accuracy"]["ci95"]
    if width is not None and 100 * width < WIDE_POINTS:
        return None
    episodes = f.record.evaluation["episodes"]
    return (
        f"{episodes} episodes leave the accuracy uncertain{f' by {100 * width:.1f} points' if width else ''}:"
        f" `metadist evaluate {f.record.location} --episodes {4 * episodes}` halves that."
    )


def _untrusted_validation(f: Findings) -> str | None:
    if f.record.validated or not f.record.trained:
        return None
    return (
        "There was no validation while training, so nobody knows when to stop. `--set evaluation.every=500` in the next"
        " run keeps the best checkpoint too."
    )


RULES: list[Callable[[Findings], str | None]] = [
    _unfinished,
    _evaluation_is_old,
    _diverged,
    _near_chance,
    _adapting_does_not_help,
    _more_inner_steps,
    _fewer_inner_steps,
    _train_longer,
    _stop_earlier,
    _gap_to_training,
    _policies_differ,
    _poorly_calibrated,
    _body_is_reused,
    _meta_batch,
    _negative_rates,
    _few_episodes,
    _untrusted_validation,
]


def _own(f: Findings) -> dict[str, Any] | None:
    """The last inner step's scores and calibration under the run's own policy, as evaluation.json has them."""
    if f.record.evaluation is None:
        return None
    policy = f.record.evaluation["policies"][0]
    return {**policy["per_inner_step"][-1], "calibration": policy["calibration"]}


def _accurate(f: Findings) -> bool:
    return f.adaptation.is_classification if f.adaptation else f.record.score == "accuracy"


def _Score(f: Findings) -> str:
    return "Accuracy" if _accurate(f) else "The loss"


def _scores(f: Findings) -> np.ndarray:
    """`[episodes, inner steps + 1]`, larger is better."""
    assert f.adaptation is not None
    return f.adaptation.accuracy if _accurate(f) else -f.adaptation.loss


def _gain(f: Findings, before: int, after: int) -> Score:
    """By how much `after` inner steps are better than `before`, paired by episode."""
    scores = _scores(f)
    return mean_and_interval(scores[:, after] - scores[:, before])


def _clear(f: Findings, step: int) -> float:
    return CLEAR_POINTS / 100 if _accurate(f) else CLEAR_SHARE * float(-_scores(f)[:, step].mean())


def _difference(f: Findings, gain: Score) -> str:
    if _accurate(f):
        return f"{100 * gain['mean']:+.1f} ± {100 * gain['ci95']:.1f} points"
    return f"a loss that is {abs(gain['mean']):.3g} ± {gain['ci95']:.2g} {'lower' if gain['mean'] > 0 else 'higher'}"


def _validations(f: Findings) -> np.ndarray:
    """`[validations, 2]`: step, and a score of which more is better."""
    key, sign = ("val_accuracy", 1) if _accurate(f) else ("val_loss", -1)
    pairs = [(line["step"], sign * line[key]) for line in f.record.validated if line.get(key) is not None]
    return np.array(pairs, float).reshape(-1, 2)


def _steps(number: int) -> str:
    return f"{number} inner step{'' if number == 1 else 's'}"
