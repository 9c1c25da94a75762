"""Attributions add up to what they explain, and support examples matter by as much as leaving them out shows."""

import pytest
import torch
from safetensors.numpy import load_file

from metadist.core.episode import Examples
from metadist.distributed.learner import LearnerState
from metadist.reporting.explanation import explain

pytest.importorskip("captum", reason="captum is not installed (pip install 'metadist[report]')")


@pytest.fixture(scope="module")
def explained(image_report):
    findings = image_report.findings
    experiment = findings.experiment
    tensors = load_file(f"{findings.record.location}/checkpoints/step_{findings.step:08d}/theta.safetensors")
    meta = {name: torch.tensor(tensors[name]) for name in experiment.theta.shapes}
    state = LearnerState(findings.step, experiment.theta.flatten(meta).numpy(), experiment.initial_statistics)
    episode = findings.adaptation.episodes[0]

    def log_probabilities(support, x):
        """One query example alone, normalised by the support set's statistics."""
        network = experiment.network.bind(torch.zeros(0), training=False, policy="support")
        with torch.no_grad():
            phi = experiment.algorithm.adapt(network, meta, support, 2)[-1]
            return torch.log_softmax(network.outputs(phi, x, support.x), -1)[0]

    def gained(x):
        """How far the predicted class is from what it is for the mean of the support set."""
        at_input = log_probabilities(episode.support, x)
        at_baseline = log_probabilities(episode.support, episode.support.x.mean(0, keepdim=True))
        return float((at_input - at_baseline)[at_input.argmax()])

    # The query example that there is the most to explain of.
    query = max(range(len(episode.query.x)), key=lambda number: abs(gained(episode.query.x[number : number + 1])))
    return explain(experiment, state, episode, query, 2), episode, log_probabilities


def test_attributions_add_up_to_the_difference_from_the_baseline(explained):
    found, episode, log_probabilities = explained
    x = episode.query.x[found.query : found.query + 1]
    at_input = log_probabilities(episode.support, x)
    at_baseline = log_probabilities(episode.support, episode.support.x.mean(0, keepdim=True))
    assert found.predicted == int(at_input.argmax())
    assert found.probability == pytest.approx(float(at_input.max().exp()), rel=1e-5)
    difference = float(at_input[found.predicted] - at_baseline[found.predicted])
    assert abs(difference) > 0.05
    assert float(found.attributions.sum()) == pytest.approx(difference, abs=0.05 * abs(difference))
    assert found.missing == pytest.approx(abs(found.attributions.sum() - difference), abs=1e-4)


def test_a_support_example_matters_by_what_its_replacement_costs(explained):
    found, episode, log_probabilities = explained
    x, support = episode.query.x[found.query : found.query + 1], episode.support
    whole = log_probabilities(support, x)[found.predicted]
    for number, value in enumerate(found.support):
        changed = support.x.clone()
        changed[number] = support.x.mean(0)
        costs = whole - log_probabilities(Examples(changed, support.y), x)[found.predicted]
        assert value == pytest.approx(float(costs), abs=1e-5)
    assert abs(found.support).max() > 0.01


def test_the_episode_is_left_as_it_was(image_report):
    first = image_report.findings.adaptation.episodes[0]
    again = image_report.findings.experiment.source.sample([first.key])
    assert torch.equal(first.support.x, again.support.x[0])
    assert torch.equal(first.query.x, again.query.x[0])
