"""The outer loop's step: clipping, optimizer, learning-rate schedule, on one flat vector."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metadist.core.schedule import Changes, check_order, rate_at
from metadist.core.settings import settings
from metadist.errors import NonFiniteError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]

LENGTH_DEPENDENT = ("cosine", "linear")
"""Schedules under which a run of other length has other rates in the steps that both have."""


@settings
class OuterSettings:
    """Section `outer`: torch's optimizers under their own names and defaults."""

    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: Positive = 1e-3
    lr_schedule: Changes | None = None
    """What `lr` becomes from given steps on: pairs of [step, rate]. `from RUN`, with the directory of a run or of a
    sweep, stands for all its rates, outer and inner, from the first step to the last."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam and AdamW."""
    eps: Positive = 1e-8
    """Adam and AdamW."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD."""
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "linear", "step"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly to `lr`."""
    final_lr: NonNegative = 0.0
    """Where `cosine` and `linear` end."""
    decay_every: Annotated[int, Field(ge=1)] = 10_000
    """`step`: after so many steps the rate is multiplied by `decay_factor`."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    lag: Literal[0, 1] = 0
    """1: a step's meta-gradients are taken at theta as it was one step earlier, so that adapters never wait for the
    learner. The bits are those of any number of adapters, as ever, and other than without."""
    clip_norm: Positive | None = None
    """The meta-gradient's largest 2-norm."""
    clip_value: Positive | None = None
    """The largest absolute value of each of its elements (MAML's code uses 10 on miniImageNet)."""

    @model_validator(mode="after")
    def _refuse_disorder(self) -> "OuterSettings":
        check_order("lr_schedule", self.lr_schedule)
        return self

    def lr_at(self, step: int, num_steps: int) -> float:
        """The rate of step `step` (from 0) in a run of `num_steps`."""
        lr = rate_at(step, self.lr, self.lr_schedule)
        if step < self.warmup_steps:
            return lr * (step + 1) / self.warmup_steps
        done = step - self.warmup_steps
        share = min(1.0, done / max(1, num_steps - self.warmup_steps))
        if self.schedule == "cosine":
            # Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts.
            return self.final_lr + (lr - self.final_lr) * (1 + math.cos(math.pi * share)) / 2
        if self.schedule == "linear":
            return self.final_lr + (lr - self.final_lr) * (1 - share)
        if self.schedule == "step":
            return lr * self.decay_factor ** (done // self.decay_every)
        return lr

    @property
    def schedule_depends_on_length(self) -> bool:
        """Whether a run of other length has other rates in the steps that both have."""
        return self.schedule in LENGTH_DEPENDENT


class OuterLoop:
    """Steps theta, a float32 vector, against its mean meta-gradient."""

    def __init__(self, outer: OuterSettings, theta: Tensor, num_steps: int) -> None:
        self.settings = outer
        self.num_steps = num_steps
        self.theta = torch.nn.Parameter(theta.clone())
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        kind, settings = self._optimizer_settings()
        return kind([self.theta], **settings)

    def _optimizer_settings(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The optimizer's class, and its arguments beside the parameters."""
        outer = self.settings
        common = {"lr": outer.lr, "weight_decay": outer.weight_decay, "foreach": False}
        if outer.optimizer == "sgd":
            return torch.optim.SGD, common | {"momentum": outer.momentum}
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[outer.optimizer]
        return kind, common | {"betas": outer.betas, "eps": outer.eps}

    def step(self, step: int, gradient: Tensor) -> dict[str, float]:
        """One update; gives the rate and the gradient's norm before clipping. Raises NonFiniteError."""
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"step {step}: the meta-gradient's norm is {norm:g}. Lower algorithm.inner_lr or outer.lr."
            )
        outer = self.settings
        if outer.clip_value is not None:
            gradient = gradient.clamp(-outer.clip_value, outer.clip_value)
        if outer.clip_norm is not None:
            clipped = float(torch.linalg.vector_norm(gradient))
            if clipped > outer.clip_norm:
                gradient = gradient * (outer.clip_norm / clipped)
        lr = outer.lr_at(step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._update(gradient)
        return {"outer_lr": lr, "gradient_norm": norm}

    def _update(self, gradient: Tensor) -> None:
        self.theta.grad = gradient
        self.optimizer.step()
        self.theta.grad = None

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by name: `exp_avg: [theta]`, `step: []` and so on; empty before the first step."""
        state = self.optimizer.state_dict()["state"].get(0, {})
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def load(self, theta: Tensor, optimizer: dict[str, Tensor]) -> None:
        """Goes on from a saved theta and `optimizer_tensors()`."""
        with torch.no_grad():
            self.theta.copy_(theta)
        if optimizer:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": {0: dict(optimizer)}, "param_groups": groups})
