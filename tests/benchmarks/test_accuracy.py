"""Which configs of the accuracy table are trained once, and evaluated with the ways of each."""

import pytest

from benchmarks.accuracy import ROOT, SUITES, train_alike
from metadist import load_config
from metadist.config import Config


def config(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize("case", [case for suite in SUITES.values() for case in suite.values() if case.trained_as])
def test_a_case_that_is_not_trained_itself_has_a_run_that_trains_alike(case) -> None:
    assert train_alike(config(case.config), config(case.trained_as))


def test_what_trains_otherwise_is_trained() -> None:
    ways = ("omniglot_20w1s_proto_net", "omniglot_5w1s_proto_net")
    one, other = map(config, ways)
    assert not train_alike(one, config(ways[1], "training.seed=1"))
    assert not train_alike(one, config(ways[1], "task.train_ways=20"))
    # Ways at test are those of training, where these are not given.
    assert not train_alike(*(config(name, "task.train_ways=null") for name in ways))
    assert not train_alike(config("omniglot_20w1s_maml"), config("omniglot_5w1s_maml"))
    assert train_alike(one, other)
