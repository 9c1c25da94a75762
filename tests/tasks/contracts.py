"""What holds for every task source. Each source's test calls `check_task_source`."""

import numpy as np
import torch

from metadist.core.episode import EpisodeBatch
from metadist.core.keys import SPLITS, TaskKey
from metadist.core.task_source import TaskSource, spec_of

KEYS = [TaskKey(run_seed=3, split="train", step=5, task=task) for task in range(6)]


def check_task_source(source: TaskSource, *, splits_have_classes: bool) -> None:
    """The contract of a task source whose examples all differ from each other.

    `splits_have_classes` says that no example of one split may occur in another; otherwise all splits
    have one distribution, as in regression over functions.
    """
    assert isinstance(source, TaskSource)
    _check_that_episodes_fit_the_spec(source)
    _check_that_the_same_key_gives_the_same_episode(source)
    _check_that_other_keys_give_other_episodes(source)
    _check_that_no_example_is_in_support_and_query(source)
    if splits_have_classes:
        _check_that_splits_share_no_example(source)


def bits(batch: EpisodeBatch, task: int) -> list[bytes]:
    """One task's episode."""
    return [tensor[task].numpy().tobytes() for part in batch for tensor in part]


def examples_of(x: torch.Tensor) -> list[bytes]:
    """Each example of a set `[examples, *input_shape]`."""
    return [example.numpy().tobytes() for example in x]


def _check_that_episodes_fit_the_spec(source: TaskSource) -> None:
    for split in SPLITS:
        keys = [key._replace(split=split) for key in KEYS]
        spec_of(source, split).check(source.sample(keys), keys, source)
        spec_of(source, split).check(source.sample(keys[:1]), keys[:1], source)


def _check_that_the_same_key_gives_the_same_episode(source: TaskSource) -> None:
    together = source.sample(KEYS)
    expected = [bits(together, task) for task in range(len(KEYS))]
    np.random.seed(1)
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    groupings = [[[key] for key in KEYS], [KEYS[4:], KEYS[:4]], [KEYS[::-1]], [KEYS[1:2] * 3 + KEYS]]
    for groups in groupings:
        for keys in groups:
            batch = source.sample(keys)
            found = [bits(batch, task) for task in range(len(keys))]
            assert found == [expected[KEYS.index(key)] for key in keys], "an episode depends on the keys beside its own"
    assert torch.equal(before[0], torch.get_rng_state()), "the source draws from torch's global generator"
    assert before[1] == np.random.get_state()[1].tolist(), "the source draws from NumPy's global generator"


def _check_that_other_keys_give_other_episodes(source: TaskSource) -> None:
    first = KEYS[0]
    others = [
        *KEYS[1:],
        first._replace(run_seed=4),
        first._replace(step=6),
        *(first._replace(split=s) for s in SPLITS[1:]),
    ]
    # One by one, since training episodes may have other sizes.
    episodes = [bits(source.sample([key]), 0) for key in (first, *others)]
    for number, key in enumerate(others, start=1):
        assert episodes[0] != episodes[number], f"{first} and {key} give one episode"
    assert len({tuple(episode) for episode in episodes}) == len(episodes), "two keys give one episode"


def _check_that_no_example_is_in_support_and_query(source: TaskSource) -> None:
    batch = source.sample(KEYS)
    for task in range(len(KEYS)):
        support, query = examples_of(batch.support.x[task]), examples_of(batch.query.x[task])
        assert not set(support) & set(query), f"{KEYS[task]}: an example is in support and query"
        assert len(set(support)) == len(support), f"{KEYS[task]}: an example is twice in the support set"
        assert len(set(query)) == len(query), f"{KEYS[task]}: an example is twice in the query set"


def _check_that_splits_share_no_example(source: TaskSource) -> None:
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        keys = [TaskKey(0, split, 0, task) for task in range(60)]
        batch = source.sample(keys)
        for x in (*batch.support.x, *batch.query.x):
            for example in examples_of(x):
                other = seen.setdefault(example, split)
                assert other == split, f"an example is in the splits {other} and {split}"
