"""learn2learn: a clone of the module for each task, adapted in place of its tensors."""

import sys
import types
from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor, nn

from benchmarks.contenders.gradients import summed
from benchmarks.inner_loop_cases import Case
from metadist.core.episode import EpisodeBatch


def _without_its_other_parts() -> None:
    """Its MAML is plain Python; importing all of it would need gym, torchvision and compiled files."""
    found = find_spec("learn2learn")
    if found is None or not found.submodule_search_locations:
        raise ImportError("learn2learn is not installed")
    (root,) = found.submodule_search_locations
    for name in ("learn2learn", "learn2learn.algorithms"):
        package = types.ModuleType(name)
        package.__path__ = [f"{root}/{'/'.join(name.split('.')[1:])}"]
        sys.modules[name] = package


def prepare(case: Case, module: nn.Module, batch: EpisodeBatch) -> Callable[[], Tensor]:
    _without_its_other_parts()
    from learn2learn.algorithms.maml import MAML

    maml = MAML(module, lr=case.inner_lr, first_order=case.order == "first")
    tasks = case.one_by_one(batch)

    def meta_gradient() -> Tensor:
        maml.zero_grad()
        for support, query in tasks:
            learner = maml.clone()
            for _ in range(case.inner_steps):
                learner.adapt(case.loss(learner(support.x), support.y))
            case.loss(learner(query.x), query.y).backward()
        return summed(module)

    return meta_gradient
