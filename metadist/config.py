"""Configs: sections of settings, read from YAML, with errors that name key, value, rule, place and remedy."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from metadist.config_errors import explain, unknown_key
from metadist.config_file import Document, read_document
from metadist.core.algorithm import Algorithm
from metadist.core.outer import LENGTH_DEPENDENT, OuterSettings
from metadist.core.settings import as_section
from metadist.errors import ConfigError
from metadist.extensions import algorithms, models, tasks
from metadist.replayed_rates import replay_rates
from metadist.sections import (
    EvaluationSettings,
    RunSettings,
    ScalingSettings,
    TrainingSettings,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment. `task`, `model` and `algorithm` are settings of ours or objects of your own."""

    task: Any
    model: Any
    algorithm: Algorithm
    outer: OuterSettings = field(default_factory=OuterSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        problems = impossible(self)
        if problems:
            raise ConfigError("\n".join(f"{key} {rule}" for key, rule in problems))

    @property
    def inner_steps_at_test(self) -> int:
        at_test = self.evaluation.inner_steps
        return self.algorithm.inner_steps if at_test is None else at_test

    @property
    def recomputes_inner_steps(self) -> bool:
        """Whether the algorithm computes inner steps again instead of keeping them."""
        return bool(getattr(self.algorithm, "checkpoint_inner_steps", False))

    @property
    def run_directory(self) -> str:
        return f"{self.run.storage_path.rstrip('/')}/{self.run.name or 'metadist'}"


_FIXED_SECTIONS: dict[str, type] = {
    "outer": OuterSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "scaling": ScalingSettings,
    "run": RunSettings,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML config; `overrides` are `section.key=value` with YAML values. Raises ConfigError.

    All mistakes are reported at once, each with its key, its value and its line.
    """
    document = read_document(str(path))
    for override in overrides:
        document.override(override)
    config = config_from_document(document)
    if config.run.name is None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=Path(path).stem))
    return config


def config_from_document(document: Document) -> Config:
    """Checks a document's sections against their settings."""
    replay_rates(document)
    named = {"task": tasks(), "model": models(), "algorithm": algorithms()}
    problems: list[str] = []
    for key in document.data:
        if key not in named and key not in _FIXED_SECTIONS:
            problems.append(unknown_key(document, (key,), [*named, *_FIXED_SECTIONS]))
    sections: dict[str, Any] = {}
    for section, known in named.items():
        sections[section] = _named_section(document, section, known, problems)
    for section, kind in _FIXED_SECTIONS.items():
        data = document.data.get(section)
        sections[section] = checked_section(document, section, kind, {} if data is None else data, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return Config(**sections)
    except ConfigError:
        config = object.__new__(Config)
        for name, value in sections.items():
            object.__setattr__(config, name, value)
        raise ConfigError(
            "\n".join(f"{key} {document.placed(key, rule)}" for key, rule in impossible(config))
        ) from None


def config_to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as plain values, as config.yaml holds it."""
    result: dict[str, Any] = {}
    for section, known in (("task", tasks()), ("model", models()), ("algorithm", algorithms())):
        value = getattr(config, section)
        names = [name for name, kind in known.items() if type(value) is kind]
        if names:
            result[section] = {"name": names[0], **as_section(value)}
        else:
            result[section] = {"name": OWN_OBJECT, "class": type(value).__qualname__}
    for section in _FIXED_SECTIONS:
        result[section] = dataclasses.asdict(getattr(config, section))
    plain: dict[str, Any] = json.loads(json.dumps(result))
    return plain


OWN_OBJECT = "(object of your program)"
"""Stands for the name of a task, model or algorithm that was given in Python and is not an entry point."""

_MAY_DIFFER_ON_RESUME = ("scaling", "run", "evaluation")
_MAY_DIFFER_WITHIN_TRAINING = (("training", "on_bad_episode"), ("training", "max_bad_episodes"))
"""A run that a bad episode has ended goes on without it: up to there, both policies give the same bits."""


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Keys in which two resolved configs describe different runs: all that touches the bits of a step.

    Scaling, storage and evaluation may differ, and the number of steps where no schedule depends on it.
    """
    found = []
    for section in {**saved, **asked}:
        if section in _MAY_DIFFER_ON_RESUME:
            continue
        for key in {**saved[section], **asked.get(section, {})}:
            before, now = saved[section].get(key), asked.get(section, {}).get(key)
            if before == now:
                continue
            if (section, key) in _MAY_DIFFER_WITHIN_TRAINING:
                continue
            if (section, key) == ("training", "steps") and asked["outer"]["schedule"] not in LENGTH_DEPENDENT:
                continue
            found.append(f"{section}.{key}: {before!r} there, {now!r} here")
    threads = (saved["scaling"]["threads_per_worker"], asked["scaling"]["threads_per_worker"])
    if threads[0] != threads[1]:
        found.append(f"scaling.threads_per_worker: {threads[0]} there, {threads[1]} here")
    return found


def impossible(config: Config) -> list[tuple[str, str]]:
    """Combinations of valid values that make no sense, as (key, rule)."""
    problems = []
    training, outer, scaling = config.training, config.outer, config.scaling
    if training.chunk_size is not None and training.chunk_size > training.meta_batch_size:
        problems.append(
            (
                "training.chunk_size",
                f"must be at most training.meta_batch_size = {training.meta_batch_size},"
                f" got {training.chunk_size}. Lower it.",
            )
        )
    if config.recomputes_inner_steps and training.compile is True:
        problems.append(
            (
                "training.compile",
                "must be false or auto with algorithm.checkpoint_inner_steps, got True: the compiler itself decides"
                " what is kept and what is computed again. Leave it out.",
            )
        )
    if not config.algorithm.meta_learns and outer.weight_decay:
        problems.append(
            (
                "outer.weight_decay",
                f"must be 0 with an algorithm that leaves theta as it is, got {outer.weight_decay}. Leave it out.",
            )
        )
    if outer.optimizer != "sgd" and outer.momentum:
        problems.append(
            (
                "outer.momentum",
                f"is for outer.optimizer: sgd, got {outer.momentum} with {outer.optimizer}. Use outer.betas or sgd.",
            )
        )
    if outer.warmup_steps >= training.steps and outer.warmup_steps:
        problems.append(
            (
                "outer.warmup_steps",
                f"must be below training.steps = {training.steps}, got {outer.warmup_steps}. Lower it.",
            )
        )
    if outer.final_lr > outer.lr:
        problems.append(("outer.final_lr", f"must be at most outer.lr = {outer.lr}, got {outer.final_lr}. Lower it."))
    steps, algorithm = config.evaluation.inner_steps, config.algorithm
    if steps and dataclasses.is_dataclass(algorithm) and "inner_steps" not in {f.name for f in fields(algorithm)}:
        problems.append(
            (
                "evaluation.inner_steps",
                f"is for algorithms with inner steps, got {steps} with {type(algorithm).__name__}, which adapts in one"
                " go. Leave it out.",
            )
        )
    low, high = scaling.worker_limits
    if low > high:
        problems.append(("scaling.num_workers", f"is (min, max) and needs min <= max, got ({low}, {high}). Swap them."))
    if scaling.backend == "train" and low < 1:
        problems.append(
            (
                "scaling.num_workers",
                "must be at least 1 with scaling.backend: train, got 0. Raise it, or use scaling.backend: actors, which"
                " trains in this process with 0.",
            )
        )
    gpus = scaling.resources_per_worker.get("GPU")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        problems.append(
            (
                "scaling.resources_per_worker.GPU",
                f"must be at most 1 or a whole number, got {gpus:g}. No adapter has parts of two; try {int(gpus)}.",
            )
        )
    if scaling.use_gpu and gpus == 0:
        problems.append(
            (
                "scaling.resources_per_worker.GPU",
                "must be above 0 with scaling.use_gpu, got 0. Use a fraction for several adapters a GPU, or leave it"
                " out for one.",
            )
        )
    for key, value, default in (
        ("reduce", scaling.reduce, "exact"),
        ("shard_optimizer", scaling.shard_optimizer, False),
    ):
        if scaling.backend != "train" and value != default:
            problems.append(
                (f"scaling.{key}", f"is for scaling.backend: train, got {value} with {scaling.backend}. Leave it out.")
            )
    if not config.run.storage_path:
        problems.append(("run.storage_path", "must be a directory or a URI, got ''. Use . for the current directory."))
    name = config.run.name
    if name is not None and (not name or name in (".", "..") or not name.isprintable() or set(name) & set("/\\")):
        problems.append(
            ("run.name", f"must be the name of one directory, got {name!r}. Use run.storage_path for paths.")
        )
    return problems


def _named_section(document: Document, section: str, known: dict[str, type], problems: list[str]) -> Any:
    data = document.data.get(section)
    if not isinstance(data, dict) or "name" not in data:
        problems.append(
            f"{section}.name must be given: one of {', '.join(known)}{document.place((section,))}."
            f" Add `{section}: {{name: {next(iter(known))}}}`."
        )
        return None
    name = data["name"]
    if name == OWN_OBJECT:
        problems.append(
            f"{section} was an object of the program that made this run ({data.get('class')}), and a config cannot"
            f" hold it. Use the Python API with `{section}=...`, or make it an entry point metadist.{section}s."
        )
        return None
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Others come from entry points: is their package installed?"
        problems.append(
            f"{section}.name must be one of {', '.join(known)}, got {name!r}{document.place((section, 'name'))}. {hint}"
        )
        return None
    rest = {key: value for key, value in data.items() if key != "name"}
    return checked_section(document, section, known[name], rest, problems)


def checked_section(document: Document, section: str, kind: type, data: Any, problems: list[str]) -> Any:
    """Settings of `kind` out of a section's plain values; None where they are wrong, and why goes to `problems`."""
    if not isinstance(data, dict):
        problems.append(
            f"{section} must be a section of keys, got {data!r}{document.place((section,))}. Indent its keys."
        )
        return None
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        problems.extend(explain(document, section, kind, error))
        return None
