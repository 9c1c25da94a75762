"""What `benchmarks.inner_loop` compares is the same computation, and its count of operations is right."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import metadist, torch_func
from benchmarks.inner_loop_cases import CASES, Case
from benchmarks.operations import operations_per_task

MLPS = [key for key in CASES if key.startswith("mlp_25_tasks_5")]


def few_tasks(key: str, tasks: int) -> Case:
    return dataclasses.replace(CASES[key], tasks=tasks)


@pytest.mark.parametrize("key", MLPS)
def test_operations_of_an_mlp_are_those_that_torch_counts(key: str) -> None:
    case = few_tasks(key, 1)
    meta_gradient = torch_func.prepare(case, case.module(), case.batch())
    with FlopCounterMode(display=False) as counted:
        meta_gradient()
    assert operations_per_task(case) == counted.get_total_flops()


@pytest.mark.parametrize("key", ["strided", "max_pool"])
def test_operations_of_convolutions_are_at_most_those_that_torch_counts(key: str) -> None:
    # torch's own second derivative of a convolution multiplies some zeros of the padding and between strides.
    case = few_tasks(key, 1)
    meta_gradient = torch_func.prepare(case, case.module(), case.batch())
    with FlopCounterMode(display=False) as counted:
        meta_gradient()
    assert 0.94 <= operations_per_task(case) / counted.get_total_flops() <= 1


@pytest.mark.parametrize("key", [*MLPS, "strided"])
def test_contenders_compute_the_same_meta_gradient(key: str) -> None:
    case = few_tasks(key, 3)
    expected, found = (
        prepare(case, case.module(), case.batch())() for prepare in (torch_func.prepare, metadist.prepare_eager)
    )
    assert torch.linalg.vector_norm(found - expected) <= 1e-4 * torch.linalg.vector_norm(expected)
