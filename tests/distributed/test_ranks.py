"""What ranks do together, without Ray: the exchange of sums, and ZeRO-1's shares of the optimizer."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from metadist.core.meta_gradient import Sums
from metadist.core.outer import OuterLoop, OuterSettings
from metadist.core.plan import Range
from metadist.distributed.all_reduce import PeerFailedError, share_exactly, share_fast
from metadist.distributed.zero import ShardedOuterLoop

SIZE, RANKS, STEPS = 1003, 2, 6
ASSIGNED = [[Range(0, 2), Range(4, 5)], [Range(2, 4)]]
SUMS = {
    span: Sums(np.float32([value, -value]), np.float32([value / 2]), np.float32([3.0]), np.float32([1.0]))
    for span, value in ((Range(0, 2), 1.0), (Range(2, 4), 10.0), (Range(4, 5), 100.0))
}
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


def exchanges(rank: int) -> dict[str, object]:
    """Three ranges over two ranks, exactly and fast, and with a second rank that failed."""
    own = {span: SUMS[span] for span in ASSIGNED[rank]}
    result: dict[str, object] = {}
    for name, share in (("exact", share_exactly), ("fast", share_fast)):
        result[name] = {
            tuple(k): [part.tolist() for part in v] for k, v in share(ASSIGNED, own, [2, 1, 1, 1], "cpu").items()
        }
        try:
            share(ASSIGNED, own if rank == 0 else None, [2, 1, 1, 1], "cpu")
        except PeerFailedError:
            result[f"{name} failed"] = True
    return result


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
    found.append(exchanges(rank))
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


def test_every_rank_gets_every_ranges_sums_or_one_sum_of_all(found: list[list]) -> None:
    for rank in range(RANKS):
        exchanged = found[rank][-2]
        assert exchanged["exact"] == {
            (0, 2): [[1.0, -1.0], [0.5], [3.0], [1.0]],
            (4, 5): [[100.0, -100.0], [50.0], [3.0], [1.0]],
            (2, 4): [[10.0, -10.0], [5.0], [3.0], [1.0]],
        }
        assert exchanged["fast"] == {(0, 5): [[111.0, -111.0], [55.5], [9.0], [3.0]]}


def test_a_rank_that_failed_is_known_to_all_of_them(found: list[list]) -> None:
    for rank in range(RANKS):
        assert found[rank][-2]["exact failed"]
        assert found[rank][-2]["fast failed"]
