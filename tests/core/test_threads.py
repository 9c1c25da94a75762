"""torch's threads in a part of a program."""

import pytest
import torch

from metadist.core.threads import torch_threads


def divide_by_zero_with(threads: int) -> None:
    with torch_threads(threads):
        assert torch.get_num_threads() == threads
        raise ZeroDivisionError


def test_the_number_holds_inside_alone_whatever_is_raised_there() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        divide_by_zero_with(before + 2)
    assert torch.get_num_threads() == before
