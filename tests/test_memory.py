import pytest
import torch

from tests.memory import peak_bytes

SIZE = 1000 * 4
"""Bytes of 1000 float32 numbers."""


def repeated_sine(x, times):
    for _ in range(times):
        x = torch.sin(x)
    return x.sum()


@pytest.mark.parametrize("times", [2, 20])
def test_tensors_that_are_let_go_count_no_longer(times):
    # Each sine needs its argument and its result at once; the first argument was there before. Two steps need
    # two results at once, and so do twenty.
    x = torch.ones(1000)
    assert peak_bytes(lambda: repeated_sine(x, times)) == 2 * SIZE


def test_tensors_that_a_graph_keeps_do_count():
    # Backward needs every sine's argument: `times` results in all, but for the first argument, there before.
    x = torch.ones(1000)
    few, many = (peak_bytes(lambda times=times: torch.func.grad(repeated_sine)(x, times)) for times in (10, 20))
    assert many - few >= 10 * SIZE


def test_views_and_writes_in_place_take_nothing():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x.view(10, 100).t().mul_(2.0)) == 0
