"""ZeRO-1: shares of the optimizer on several ranks step theta as one optimizer does."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from metadist.core.outer import OuterLoop, OuterSettings
from metadist.distributed.zero import ShardedOuterLoop

SIZE, RANKS, STEPS = 1003, 2, 6
OUTERS = [
    OuterSettings(lr=0.01, schedule="cosine", clip_norm=0.5),
    OuterSettings(optimizer="sgd", lr=0.05, momentum=0.9),
    OuterSettings(optimizer="sgd", lr=0.05, weight_decay=0.1),
    OuterSettings(optimizer="adamw", lr=0.01, weight_decay=0.1),
]


def steps(loop: OuterLoop, first: int, last: int) -> OuterLoop:
    for step in range(first, last):
        gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        loop.step(step, gradient)
    return loop


def begin(kind: type[OuterLoop], outer: OuterSettings, size: int = SIZE) -> OuterLoop:
    return kind(outer, torch.randn(size, generator=torch.Generator().manual_seed(99)), STEPS)


def on_a_rank(rank: int, store: str) -> None:
    """All steps in shares, and half of them after half of them in one piece; rank 0 writes down what comes out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = []
    for outer in OUTERS:
        whole = steps(begin(ShardedOuterLoop, outer), 0, STEPS)
        half = steps(begin(OuterLoop, outer), 0, STEPS // 2)
        resumed = begin(ShardedOuterLoop, outer)
        resumed.load(half.theta.detach(), half.optimizer_tensors())
        steps(resumed, STEPS // 2, STEPS)
        held = [sum(t.numel() for s in loop.optimizer.optim.state.values() for t in s.values()) for loop in [whole]]
        found.append([(loop.theta.detach(), loop.optimizer_tensors()) for loop in (whole, resumed)] + held)
    # Fewer numbers than one share's alignment: the second rank has none, and theta is stepped all the same.
    tiny = begin(ShardedOuterLoop, OUTERS[0], 5)
    tiny.step(0, torch.ones(5))
    found.append(tiny.theta.detach())
    torch.save(found, f"{store}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list]:
    """What each rank found."""
    store = tmp_path_factory.mktemp("zero") / "store"
    multiprocessing.spawn(on_a_rank, (str(store),), nprocs=RANKS)
    return [torch.load(f"{store}.{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize("index", range(len(OUTERS)))
def test_shares_step_theta_as_one_optimizer_does_to_the_bit(found: list[list], index: int) -> None:
    loop = steps(begin(OuterLoop, OUTERS[index]), 0, STEPS)
    for way in (0, 1):
        for rank in range(RANKS):
            assert torch.equal(found[rank][index][way][0], loop.theta)
        tensors = found[0][index][way][1]
        assert tensors.keys() == loop.optimizer_tensors().keys()
        for name, value in loop.optimizer_tensors().items():
            assert torch.equal(tensors[name], value), name


def test_a_rank_keeps_the_optimizers_state_of_its_share_alone(found: list[list]) -> None:
    # Of 1003 numbers the first share is ceil(1003 / 128) * 64 = 512; Adam keeps two moments and a count of steps.
    assert [found[rank][0][2] for rank in range(RANKS)] == [2 * 512 + 1, 2 * 491 + 1]


def test_theta_smaller_than_a_share_is_stepped_on_every_rank(found: list[list]) -> None:
    tiny = begin(OuterLoop, OUTERS[0], 5)
    tiny.step(0, torch.ones(5))
    assert math.isfinite(float(tiny.theta.detach().sum()))
    for rank in range(RANKS):
        assert torch.equal(found[rank][-1], tiny.theta)
