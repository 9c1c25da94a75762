"""Exploring: what PBT draws, and where PB2 looks after some generations."""

from collections import Counter

import numpy as np
import pytest

from metadist.sweeps.search_space import parse_distribution
from metadist.tuning.exploration import Bandit, Member, Perturbation, Rates

SPACE = {
    "outer.lr": parse_distribution("loguniform(1e-4, 1e-1)"),
    "algorithm.inner_lr": parse_distribution("uniform(0, 1)"),
}


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_pbt_multiplies_or_draws_anew_and_stays_within_the_space() -> None:
    source = Member(0, 1.0, {"outer.lr": 0.01, "algorithm.inner_lr": 0.9})
    random, explorer = generator(0), Perturbation(SPACE)
    found = [explorer.explore(Member(1, 0.0, source.rates), source, random) for _ in range(1000)]
    lr = Counter(round(rates["outer.lr"], 6) for rates in found)
    # A quarter is drawn anew, half of the rest is 0.8 times, half 1.2 times as large: 375 each, with a sigma of 15.
    assert all(abs(lr[value] - 375) < 60 for value in (0.008, 0.012))
    assert len(lr) > 200
    # 1.2 * 0.9 is beyond the space, and becomes its end.
    inner = Counter(round(rates["algorithm.inner_lr"], 6) for rates in found)
    assert abs(inner[1.0] - 375) < 60
    assert all(SPACE[key].holds(value) for rates in found for key, value in rates.items())


def explored(kind: type[Perturbation], generations: int) -> list[Rates]:
    """Rates that the two worst of eight members were given in the last generation.

    A generation's gain is 1 - 4 (p - 0.5)^2 - (q - 0.3)^2, where p is the outer rate's place and q the inner rate.
    """
    random, explorer = generator(0), kind(SPACE)
    rates = [{key: distribution.sample(random) for key, distribution in SPACE.items()} for _ in range(8)]
    scores = [0.0] * 8
    given: list[Rates] = []
    for generation in range(1, generations + 1):
        for number in range(8):
            p, q = SPACE["outer.lr"].place(rates[number]["outer.lr"]), rates[number]["algorithm.inner_lr"]
            scores[number] += 1 - 4 * (p - 0.5) ** 2 - (q - 0.3) ** 2
        members = [Member(number, scores[number], rates[number]) for number in range(8)]
        explorer.note(10 * generation, members)
        order = sorted(members, key=lambda member: -member.score)
        given = []
        for worst, best in zip(order[-2:], order[:2], strict=True):
            given.append(explorer.explore(worst, best, random))
            rates[worst.number], scores[worst.number] = given[-1], best.score
    return given


def test_pb2_goes_to_the_rates_that_gain_most() -> None:
    pytest.importorskip("sklearn")
    before = np.random.get_state()[1].tolist()
    found = explored(Bandit, 3)
    for rates in found:
        assert SPACE["outer.lr"].place(rates["outer.lr"]) == pytest.approx(0.5, abs=0.05)
        assert rates["algorithm.inner_lr"] == pytest.approx(0.3, abs=0.1)
    # Two members are not sent to the very same place, the draws are repeatable, and nobody else's generator is touched.
    assert found[0] != found[1]
    assert found == explored(Bandit, 3)
    assert np.random.get_state()[1].tolist() == before
    assert explored(Perturbation, 3) != found


def test_pb2_perturbs_until_there_is_a_gain_to_learn_from() -> None:
    pytest.importorskip("sklearn")
    assert explored(Bandit, 1) == explored(Perturbation, 1)
