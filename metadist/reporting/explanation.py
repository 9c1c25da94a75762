"""Why one prediction came out as it did: parts of its input (integrated gradients) and support examples, by captum."""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from metadist.core.episode import Examples
from metadist.distributed.learner import LearnerState
from metadist.experiment import Experiment
from metadist.reporting.adaptation import Adaptation, AdaptedEpisode

PATH_STEPS = 64
"""Points on the straight path from the baseline to the input."""


@dataclass(frozen=True)
class Explanation:
    """Of one query example of one episode, under statistics of the support set where the model has batch norm."""

    episode: AdaptedEpisode = field(repr=False)
    query: int
    """Which of the episode's query examples."""
    predicted: int
    probability: float
    attributions: np.ndarray = field(repr=False)
    """Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365, eq. 1) of the predicted class's
    log-probability, `[*input_shape]`, from the support set's mean example as the baseline."""
    missing: float
    """How far their sum is from the difference that it must be (completeness, prop. 1)."""
    support: np.ndarray
    """`[support examples]`: by how much the log-probability falls where an example is replaced by that mean before
    adapting; below 0 where the example spoke against the prediction."""


def has_captum() -> bool:
    """Whether the extra `report` is installed."""
    from importlib.util import find_spec

    return find_spec("captum") is not None


def explain_one(experiment: Experiment, state: LearnerState, adaptation: Adaptation) -> Explanation | None:
    """Explains the first wrong prediction of the hardest episode; None without captum, or in regression."""
    if not adaptation.is_classification or not has_captum():
        return None
    episode = adaptation.episodes[adaptation.by_difficulty[0]]
    wrong = torch.nonzero(episode.predicted != episode.query.y)
    return explain(experiment, state, episode, int(wrong[0]) if len(wrong) else 0, adaptation.steps)


def explain(
    experiment: Experiment, state: LearnerState, episode: AdaptedEpisode, query: int, steps: int
) -> Explanation:
    """Explains one prediction. Needs captum."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of captum's own imports.
        from captum.attr import FeatureAblation, IntegratedGradients

    algorithm = experiment.algorithm
    # One query example must not depend on those beside it, nor on the points of the path that captum stacks.
    policy = "support" if experiment.network.policy == "transductive" else experiment.network.policy
    network = experiment.network.bind(torch.tensor(state.statistics), training=False, policy=policy)
    meta = experiment.theta.unflatten(torch.tensor(state.theta))
    support, x = episode.support, episode.query.x[query : query + 1]
    mean = support.x.mean(0, keepdim=True)

    def adapted(examples: Examples) -> dict[str, Tensor]:
        with torch.no_grad():
            return algorithm.adapt(network, meta, examples, steps)[-1]

    phi = adapted(support)
    end = network.at(steps)

    def log_probabilities(x: Tensor) -> Tensor:
        return torch.log_softmax(algorithm.predict(end, phi, support, x), -1)

    with torch.no_grad():
        found = log_probabilities(x)[0]
    predicted = int(found.argmax())

    def of_support(stacked: Tensor) -> Tensor:
        examples = Examples(stacked[0], support.y)
        with torch.no_grad():
            outputs = algorithm.predict(end, adapted(examples), examples, x)
        return torch.log_softmax(outputs, -1)[:, predicted]

    gradients, delta = IntegratedGradients(log_probabilities).attribute(
        x, baselines=mean, target=predicted, n_steps=PATH_STEPS, return_convergence_delta=True
    )
    number = torch.arange(len(support.x)).reshape(1, -1, *[1] * (support.x.dim() - 1))
    ablated = FeatureAblation(of_support).attribute(
        support.x[None], baselines=mean[None].expand_as(support.x[None]), feature_mask=number
    )
    mattered = ablated[0].flatten(1)[:, 0]
    return Explanation(
        episode=episode,
        query=query,
        predicted=predicted,
        probability=float(found[predicted].exp()),
        attributions=gradients[0].detach().numpy(),
        missing=float(delta.abs().max()),
        support=mattered.numpy(),
    )
