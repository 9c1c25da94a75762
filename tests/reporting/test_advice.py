"""Each rule speaks where its data are there, and holds its tongue where they are not."""

from types import SimpleNamespace

import numpy as np
import pytest

from metadist.reporting.adaptation import Adaptation, Movement
from metadist.reporting.advice import RULES, advise
from metadist.reporting.findings import Findings
from metadist.reporting.gradients import Alignment
from metadist.reporting.layers import Layer
from metadist.reporting.rates import LearnedRates
from metadist.reporting.record import Record

CONFIG = {
    "algorithm": {"name": "maml"},
    "task": {"name": "few_shot"},
    "training": {"steps": 100, "meta_batch_size": 10},
}


def evaluation(accuracy=0.8, ci95=0.01, ece=0.01, alone=0.8, step=100, confident=0.0):
    """Of 600 episodes; the one bin's confidence is off by `confident`."""

    def policy(name, mean):
        last = {
            "inner_step": 1,
            "accuracy": {"mean": mean, "ci95": ci95},
            "loss": {"mean": 1.0, "ci95": 0.1},
            "ece": ece,
        }
        bins = [{"lower": 0.0, "upper": 1.0, "count": 9, "confidence": mean + confident, "accuracy": mean}]
        return {"batch_norm": name, "per_inner_step": [last], "calibration": {"ece": ece, "bins": bins}}

    policies = [policy("transductive", accuracy), policy("support", alone)]
    return {"split": "test", "episodes": 600, "step": step, "batch_norm": "transductive", "policies": policies}


def adaptation(by_step, steps=2, spread=0.01):
    """40 episodes with these mean accuracies; episodes differ by much, their steps by `spread`."""
    random = np.random.default_rng(0)
    level = random.normal(0, 0.1, (40, 1))
    accuracy = np.array(by_step) + level + random.normal(0, spread, (40, len(by_step)))
    return Adaptation([], steps, 1 - accuracy, accuracy, [], np.zeros((40, 1)), "")


def diverging(tasks):
    found = adaptation([0.2, 0.8, 0.8])
    found.loss[:tasks, -1] = np.inf
    return found


def moved(*cka):
    layers = [Movement(Layer(str(n), "Linear", ()), None, {"mean": value, "ci95": 0.01}) for n, value in enumerate(cka)]
    flat = adaptation([0.2, 0.8, 0.8, 0.8, 0.8])
    return Adaptation([], 2, flat.loss, flat.accuracy, layers, flat.embedding, "")


def findings(validated=(), trained=0.8, config=None, step=100, evaluated=None, with_evaluation=True, **computed):
    lines = [{"step": 5 * n, "loss": 1.0, "accuracy": trained} for n in range(1, 21)]
    scores = validated or [0.8] * 9
    record = Record(
        location="runs/x",
        config={section: CONFIG[section] | (config or {}).get(section, {}) for section in CONFIG},
        config_text="",
        trained=lines,
        validated=[{"step": 10 * n + 10, "val_loss": 1 - v, "val_accuracy": v} for n, v in enumerate(scores)],
        evaluation=(evaluated or evaluation()) if with_evaluation else None,
        fingerprint={},
        sessions=[],
        notes=[],
    )
    computed = {"adaptation": adaptation([0.2, 0.8, 0.8, 0.8, 0.8])} | computed
    experiment = SimpleNamespace(source=SimpleNamespace(spec=SimpleNamespace(output_size=5)))
    return Findings(record=record, step=step, experiment=experiment, **computed)


def rates(negative):
    return LearnedRates(["w"], ["rate"], np.zeros((1, 1)), 0.1, negative)


def noise(scale):
    return Alignment(32, np.zeros(3), scale)


CLIMBING = [0.5, 0.55, 0.6, 0.65, 0.7, 0.73, 0.75, 0.77, 0.79]
FALLING = [0.6, 0.7, 0.8, 0.8, 0.79, 0.77, 0.75, 0.74, 0.73]

CASES = {
    "unfinished": ({"step": 60}, "step 60 of 100", {"step": 100}),
    "evaluation_is_old": (
        {"evaluated": evaluation(step=50)},
        "evaluation is of step 50 and the checkpoint of step 100",
        {"evaluated": evaluation(step=100)},
    ),
    "diverged": (
        {"adaptation": diverging(3)},
        "Adapting diverges on 3 of 40 tasks: the loss is not finite after 2 inner steps",
        {"adaptation": diverging(0)},
    ),
    "near_chance": (
        {"evaluated": evaluation(0.21, alone=0.21, ci95=0.015)},
        "cannot be told from chance (20 %)",
        {"evaluated": evaluation(0.25, alone=0.25, ci95=0.015)},
    ),
    "adapting_does_not_help": (
        {"adaptation": adaptation([0.5, 0.5, 0.49])},
        "Adapting does not help on these tasks: -",
        {"adaptation": adaptation([0.5, 0.5, 0.55])},
    ),
    "more_inner_steps": (
        {"adaptation": adaptation([0.2, 0.6, 0.7, 0.75, 0.8])},
        "Accuracy still rises at the last inner step: 4 inner steps instead of 2 give +9.9 ± 0.5 points",
        # Only .4 points better, and then better by much but in a few episodes alone.
        {"adaptation": adaptation([0.2, 0.6, 0.8, 0.8, 0.804])},
        {"adaptation": adaptation([0.2, 0.6, 0.8, 0.8, 0.81], spread=0.2)},
    ),
    "fewer_inner_steps": (
        {"adaptation": adaptation([0.2, 0.8, 0.7])},
        "Adapting goes too far: 1 inner step instead of 2 give +",
        {"adaptation": adaptation([0.2, 0.7, 0.8])},
    ),
    "train_longer": (
        {"validated": CLIMBING},
        "Validation still improves: +7.7 points from the middle third",
        {"validated": FALLING},
        {"validated": CLIMBING[:5]},
        {"validated": [0.8, 0.81] * 4 + [0.8]},
    ),
    "stop_earlier": (
        {"validated": FALLING},
        "Validation was best near step 40 and got worse after",
        {"validated": CLIMBING},
        # A single lucky validation is none of it.
        {"validated": [0.8, 0.8, 0.82, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]},
    ),
    "gap_to_training": (
        {"trained": 0.9},
        "Training tasks are solved 10.0 points better than test tasks",
        {"trained": 0.84},
        {"trained": 0.9, "config": {"task": {"train_ways": 20}}},
    ),
    "policies_differ": (
        {"evaluated": evaluation(alone=0.74)},
        "`transductive` beats `support` by 6.0 points ... expect the latter: 74.0 %",
        {"evaluated": evaluation(alone=0.795)},
    ),
    "poorly_calibrated": (
        {"evaluated": evaluation(ece=0.08, confident=0.08)},
        "off by 8.0 points on average, and the model is too sure of itself",
        {"evaluated": evaluation(ece=0.04, confident=0.04)},
    ),
    "body_is_reused": (
        {"adaptation": moved(0.99, 0.95, 0.3)},
        "Only the last layer learns anew in the inner loop (CKA 0.30; all before it at least 0.95)",
        {"adaptation": moved(0.99, 0.7, 0.3)},
        {"adaptation": moved(0.99, 0.95, 0.9)},
        {"adaptation": moved(0.99, 0.95, 0.3), "config": {"algorithm": {"name": "anil"}}},
    ),
    "meta_batch": (
        {"alignment": noise(50)},
        "about 50 tasks would balance them, and a step has 10",
        {"alignment": noise(15)},
    ),
    "negative_rates": ({"rates": rates(0.2)}, "20 % of the learned inner rates are negative", {"rates": rates(0.0)}),
    "few_episodes": (
        {"evaluated": evaluation(ci95=0.03, alone=0.8)},
        "leave the accuracy uncertain by 3.0 points: `metadist evaluate runs/x --episodes 2400`",
        {"evaluated": evaluation(ci95=0.01)},
    ),
    "untrusted_validation": ({"validated": [None]}, "There was no validation while training", {}),
}


def said(**given):
    if given.get("validated") == [None]:
        found = findings(**{**given, "validated": ()})
        found.record.validated.clear()
    else:
        found = findings(**given)
    return {advice.rule: advice.text for advice in advise(found)}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_speaks_where_its_data_are_there_and_only_there(rule):
    present, text, *absent = CASES[rule]
    spoken = said(**present)[rule]
    for part in text.split(" ... "):
        assert part in spoken
    for given in absent:
        assert rule not in said(**given)


def test_every_rule_has_its_case_and_a_run_without_faults_gets_no_advice():
    assert [rule.__name__.lstrip("_") for rule in RULES] == list(CASES)
    assert said() == {}


def test_a_modest_model_a_scale_below_the_batch_and_tasks_that_cancel_are_told_in_other_words():
    assert "too modest" in said(evaluated=evaluation(ece=0.08, confident=-0.08))["poorly_calibrated"]
    assert "Tasks agree: about 1 of them" in said(alignment=noise(1.0))["meta_batch"]
    assert "no common direction" in said(alignment=noise(None))["meta_batch"]


def test_in_regression_rules_speak_of_the_loss():
    # Gains from 2 to 4 steps of .1 and .3 in turn: mean .2, interval 1.96 * .1 * sqrt(26 / 25) / sqrt(26) = .0392.
    loss = np.array([[3.0, 1.0, 0.5, 0.4, 0.4], [3.0, 1.0, 0.5, 0.4, 0.2]] * 13)
    regression = Adaptation([], 2, loss, np.full_like(loss, np.nan), [], np.zeros((26, 1)), "")
    text = said(adaptation=regression, with_evaluation=False)["more_inner_steps"]
    assert "The loss still falls at the last inner step" in text
    assert "a loss that is 0.2 ± 0.039 lower" in text


def test_without_evaluation_and_checkpoint_only_the_record_is_spoken_of():
    assert list(said(adaptation=None, with_evaluation=False, step=None, validated=CLIMBING)) == ["train_longer"]
