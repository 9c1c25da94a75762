"""torch's threads in a part of a program."""

import pytest
import torch

from metadist.core.threads import torch_threads


def test_the_number_holds_inside_alone_whatever_is_raised_there() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
