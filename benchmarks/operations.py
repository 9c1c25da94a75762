"""How many floating-point operations a meta-gradient takes at least, and how many a machine can do."""

import time

import torch
from torch import Tensor, nn

from benchmarks.inner_loop_cases import Case

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


def operations_per_task(case: Case) -> float:
    """Of the linear and convolutional layers in one task's meta-gradient, each multiplication and addition counted.

    A layer's output is linear in its inputs x and in its weights w, so that its output, the gradient by x and the
    gradient by w cost the same f, and so does each of their derivatives. First order: 3 f an example. Second order, for
    support examples: those 3 f, and differentiating them 2 f for each, 9 f in all. The first layer's x is data, and
    needs no gradient: 2 f and 4 f. Other ways of convolving (Winograd's, say) take fewer.
    """
    of_data, of_features = _forward_operations(case)
    of_query = 2 * of_data + 3 * of_features
    of_support = 4 * of_data + 9 * of_features if case.order == "second" else of_query
    return case.inner_steps * case.spec.support_size * of_support + case.spec.query_size * of_query


def _forward_operations(case: Case) -> tuple[int, int]:
    """For one example: of the layers that see the data, and of those that see features."""
    counts = {False: 0, True: 0}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts[inputs[0].requires_grad] += 2 * output[0].numel() * layer.weight[0].numel()

    module = case.module()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    module(torch.zeros(2, *case.spec.input_shape))
    return counts[False], counts[True]


def matrix_rate(device: str = "cpu", repeats: int = 4) -> float:
    """Operations a second in a float32 product of square matrices, with torch's present number of threads."""
    size = MATRIX_SIZE[device]
    a, b = torch.randn(2, size, size, device=device)
    torch.mm(a, b)
    began = clock(device)
    for _ in range(repeats):
        torch.mm(a, b)
    return repeats * 2 * size**3 / (clock(device) - began)


def clock(device: str) -> float:
    """Seconds: of this process's own work on a CPU, so that others who want the core do not count; else by the wall.

    Waits until the device has done what it was asked for.
    """
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
