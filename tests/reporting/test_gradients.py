"""Cosines between meta-gradients and the noise scale."""

import numpy as np
import pytest

from metadist.reporting.gradients import alignment_of


def test_cosines_and_noise_scale_of_two_tasks_by_hand():
    # g1 = (3, 0), g2 = (3, 4): cosine 9 / (3 * 5). Unbiased: |G|^2 = g1.g2 = 9; covariance = |g1 - g2|^2 / 2 = 8.
    found = alignment_of(np.array([[3.0, 0.0], [3.0, 4.0]], np.float32))
    assert found.cosines.tolist() == [pytest.approx(0.6)]
    assert found.noise_scale == pytest.approx(8 / 9)


def test_the_noise_scale_finds_the_noise_that_was_put_in():
    # Mean (1, 0, ..), unit noise in each of 50 dimensions: tr(covariance) / |mean|^2 = 50. The estimate of |mean|^2 has
    # a standard deviation of 2 / sqrt(2000) = 4.5 %.
    random = np.random.default_rng(0)
    gradients = random.standard_normal((2000, 50)) + np.eye(50)[0]
    assert alignment_of(gradients).noise_scale == pytest.approx(50, rel=0.15)


def test_opposed_gradients_have_no_noise_scale_and_gradients_of_zero_a_cosine_of_zero():
    opposed = alignment_of(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    assert (opposed.mean_cosine, opposed.noise_scale) == (-1, None)
    assert alignment_of(np.array([[1.0, 0.0], [0.0, 0.0]])).cosines.tolist() == [0]
