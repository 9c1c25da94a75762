"""What the report computes again agrees with the run's own evaluation, and its map with a reference."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import metadist
from metadist.reporting.adaptation import principal_components


@pytest.mark.parametrize("name", ["sinusoid", "image"])
def test_scores_are_those_of_the_runs_evaluation_on_the_same_episodes(name, request, tmp_path):
    run, report = (request.getfixturevalue(f"{name}_{kind}") for kind in ("run", "report"))
    shutil.copytree(run, tmp_path / "copy")
    evaluation = metadist.evaluate(str(tmp_path / "copy"), episodes=12, num_workers=0)
    own, found = evaluation.policies[0], report.findings.adaptation
    for ours, theirs in ((found.loss, own.episode_loss), (found.accuracy, own.episode_accuracy)):
        assert ours.shape[1] == 2 * (theirs.shape[1] - 1) + 1  # As many inner steps again are tried.
        np.testing.assert_allclose(ours[:, : theirs.shape[1]], theirs, rtol=2e-4, atol=1e-5)


def test_the_change_of_a_layer_is_that_of_the_inner_steps_by_hand(sinusoid_report):
    findings = sinusoid_report.findings
    experiment, adaptation = findings.experiment, findings.adaptation

    theta = load_file(f"{findings.record.location}/checkpoints/step_{findings.step:08d}/theta.safetensors")
    changes = {layer: [] for layer in ("1", "3", "5")}
    for episode in adaptation.episodes:
        phi = {name: value.clone().requires_grad_() for name, value in theta.items() if "/" not in name}
        start = dict(phi)
        for step in range(2):
            hidden = episode.support.x
            for layer in ("1", "3"):
                hidden = torch.relu(hidden @ phi[f"{layer}.weight"].T + phi[f"{layer}.bias"])
            loss = (hidden @ phi["5.weight"].T + phi["5.bias"] - episode.support.y).square().mean()
            gradients = torch.autograd.grad(loss, list(phi.values()))
            phi = {
                name: value - theta[f"inner_lr/{name}"][step] * gradient
                for (name, value), gradient in zip(phi.items(), gradients, strict=True)
            }
        for layer, found in changes.items():
            names = [f"{layer}.weight", f"{layer}.bias"]
            moved = sum(float((phi[name] - start[name]).detach().square().sum()) for name in names)
            found.append(math.sqrt(moved / sum(float(start[name].detach().square().sum()) for name in names)))
    assert [m.layer.name for m in adaptation.movements] == list(changes)
    for movement in adaptation.movements:
        assert movement.change["mean"] == pytest.approx(np.mean(changes[movement.layer.name]), rel=1e-4)
    assert experiment.algorithm.inner_steps == 2


def test_learned_rates_are_those_of_theta(sinusoid_report):
    rates = sinusoid_report.findings.rates
    assert (rates.values.shape, rates.columns, rates.start) == ((6, 2), ["step 1", "step 2"], 0.02)
    assert rates.parameters == ["1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"]
    assert rates.negative == (rates.values < 0).mean()
    assert not np.allclose(rates.values, 0.02)


def test_the_hardest_come_first_by_accuracy_and_then_by_loss(image_report):
    adaptation = image_report.findings.adaptation
    places = [(adaptation.episodes[n].accuracy, -adaptation.episodes[n].loss) for n in adaptation.by_difficulty]
    assert places == sorted(places)
    assert image_report.findings.shown == [*adaptation.by_difficulty[:3], *adaptation.by_difficulty[:-4:-1]]


def test_the_map_keeps_distances_in_a_plane_and_tells_how_much_it_shows():
    # Points on a plane in 40 dimensions, with standard deviations 3 and 1: all of the variance is shown.
    random = np.random.default_rng(0)
    plane = random.standard_normal((30, 2)) * (3, 1)
    basis = np.linalg.qr(random.standard_normal((40, 2)))[0]
    places, shares = principal_components(plane @ basis.T + random.standard_normal(40))

    def distances(points):
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    np.testing.assert_allclose(distances(places), distances(plane), atol=1e-9)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] > shares[1]
    assert principal_components(np.ones((3, 4)))[1].tolist() == [0, 0]
