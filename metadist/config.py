"""Configs: sections of settings, read from YAML, with errors that name key, value, rule, place and remedy."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from metadist.config_file import Document, read_document
from metadist.core.algorithm import Algorithm
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.keys import SPLITS
from metadist.core.outer import OuterSettings
from metadist.core.settings import settings
from metadist.errors import ConfigError
from metadist.extensions import algorithms, models, tasks

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Split = Literal["train", "val", "test"]


@settings
class TrainingSettings:
    """Section `training`."""

    steps: Count = 1000
    meta_batch_size: Count = 32
    """Tasks a step."""
    chunk_size: Count | None = None
    """Tasks adapted in one call; left out, an eighth of the meta-batch. Fixes the bits: never follows the workers."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch_norm: BatchNormPolicy | None = None
    """Must be given where the model has batch norm."""
    strategy: Literal["auto", "vmap", "loop"] = "auto"
    """`auto`: one by one for models with convolutions on a CPU, all tasks of a chunk at once otherwise."""
    compile: Literal["auto"] | bool = "auto"
    """`auto`: compiled for models with convolutions, whose runs are long enough to repay it."""

    @property
    def tasks_per_chunk(self) -> int:
        return self.chunk_size or -(-self.meta_batch_size // 8)


@settings
class EvaluationSettings:
    """Section `evaluation`."""

    split: Split = "test"
    episodes: Count = 600
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    inner_steps: CountOrZero | None = None
    """Inner steps at test; left out, the algorithm's own."""
    every: CountOrZero = 0
    """Steps between evaluations on the validation split while training; 0 for none."""
    val_episodes: Count = 200
    """Episodes of each of those."""


@settings
class ScalingSettings:
    """Section `scaling`, in the words of Ray's ScalingConfig."""

    num_workers: CountOrZero | tuple[Count, Count] = 2
    """Adapters: a number, or (min, max) for as many as the cluster has room for; 0 trains in this process."""
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = field(default_factory=lambda: {"CPU": 1.0})
    use_gpu: bool = False
    """One GPU an adapter, unless resources_per_worker says otherwise."""
    placement_strategy: Literal["PACK", "SPREAD"] = "PACK"
    threads_per_worker: Count = 1
    """torch's threads in every process that computes, with Ray or without: the bits depend on it."""
    address: str | None = None
    """A Ray cluster's address; left out, $RAY_ADDRESS or a new local one."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """How long to wait for the first (or the least number of) adapters."""

    @property
    def worker_limits(self) -> tuple[int, int]:
        """Least and largest number of adapters."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


@settings
class FailureSettings:
    """`run.failure_config`, in the words of Ray's FailureConfig."""

    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How often a lost learner is replaced; -1 for always. Lost adapters are always replaced."""


@settings
class CheckpointSettings:
    """`run.checkpoint_config`, in the words of Ray's CheckpointConfig."""

    num_to_keep: Count = 3
    """The last so many are kept, and the best by validation."""
    checkpoint_frequency: Count = 1000
    """Steps between checkpoints; the last step always has one."""


@settings
class RunSettings:
    """Section `run`, in the words of Ray's RunConfig: the run directory is `storage_path/name`."""

    name: str | None = None
    """Left out, the config file's name."""
    storage_path: str = "runs"
    """A local directory or a URI (s3://, gs://)."""
    failure_config: FailureSettings = field(default_factory=FailureSettings)
    checkpoint_config: CheckpointSettings = field(default_factory=CheckpointSettings)
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""


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
    named = {"task": tasks(), "model": models(), "algorithm": algorithms()}
    problems: list[str] = []
    for key in document.data:
        if key not in named and key not in _FIXED_SECTIONS:
            problems.append(_unknown(document, (key,), [*named, *_FIXED_SECTIONS]))
    sections: dict[str, Any] = {}
    for section, known in named.items():
        sections[section] = _named_section(document, section, known, problems)
    for section, kind in _FIXED_SECTIONS.items():
        data = document.data.get(section)
        sections[section] = _section(document, section, kind, {} if data is None else data, problems)
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
            result[section] = {"name": names[0], **dataclasses.asdict(value)}
        else:
            result[section] = {"name": OWN_OBJECT, "class": type(value).__qualname__}
    for section in _FIXED_SECTIONS:
        result[section] = dataclasses.asdict(getattr(config, section))
    plain: dict[str, Any] = json.loads(json.dumps(result))
    return plain


OWN_OBJECT = "(object of your program)"
"""Stands for the name of a task, model or algorithm that was given in Python and is not an entry point."""

_MAY_DIFFER_ON_RESUME = ("scaling", "run", "evaluation")


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
            if (section, key) == ("training", "steps") and asked["outer"]["schedule"] != "cosine":
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
    low, high = scaling.worker_limits
    if low > high:
        problems.append(("scaling.num_workers", f"is (min, max) and needs min <= max, got ({low}, {high}). Swap them."))
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
    return _section(document, section, known[name], rest, problems)


def _section(document: Document, section: str, kind: type, data: Any, problems: list[str]) -> Any:
    if not isinstance(data, dict):
        problems.append(
            f"{section} must be a section of keys, got {data!r}{document.place((section,))}. Indent its keys."
        )
        return None
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        problems.extend(_explain(document, section, kind, error))
        return None


def _explain(document: Document, section: str, kind: type, error: ValidationError) -> list[str]:
    """One sentence a wrong key, out of pydantic's errors (several for one key where a union is allowed)."""
    rules: dict[tuple[str | int, ...], list[str]] = {}
    for item in error.errors():
        path = document.existing((section, *item["loc"]), item["type"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            valid = ["name"] * (section in ("task", "model", "algorithm")) + _fields_at(kind, path[1:-1])
            rules[path] = [_unknown(document, path, valid)]
        elif item["type"] == "missing":
            rules[path] = [f"{_dotted(path)} must be given{document.place(path[:-1])}. Add it."]
        else:
            rules.setdefault(path, []).append(_rule(item))
    messages = []
    for path, found in rules.items():
        if found[0].startswith(_dotted(path)):
            messages.append(found[0])
            continue
        value = document.value(path)
        messages.append(
            f"{_dotted(path)} must be {' or '.join(dict.fromkeys(found))}, got {_shown(value)}"
            f"{document.place(path)}.{_try(value, found)}"
        )
    return messages


def _rule(item: Any) -> str:
    context = {key: f"{value:g}" if isinstance(value, float) else value for key, value in item.get("ctx", {}).items()}
    simple = {
        "greater_than": "> {gt}",
        "greater_than_equal": ">= {ge}",
        "less_than": "< {lt}",
        "less_than_equal": "<= {le}",
        "finite_number": "a finite number",
        "literal_error": "{expected}",
        "too_long": "a list of {max_length} values",
        "too_short": "a list of at least {min_length} values",
    }
    if item["type"] in simple:
        text = simple[item["type"]].format(**context)
        return f"one of {text}" if item["type"] == "literal_error" else text
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
    kinds |= {"tuple": "a list", "dict": "a section of keys", "dataclass": "a section of keys", "none": "left out"}
    return kinds.get(item["type"].split("_")[0], item["msg"][:1].lower() + item["msg"][1:])


def _try(value: Any, rules: list[str]) -> str:
    if any(rule.startswith("one of") for rule in rules):
        return " Choose one of these."
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if any(rule.startswith(">") for rule in rules):
            return f" Try {-value}." if value < 0 else " Raise it."
        if any(rule.startswith("<") for rule in rules):
            return " Lower it."
        if "a whole number" in rules:
            return f" Try {round(value)}."
        if "text" in rules:
            return f" Write '{value}' in quotes."
    if isinstance(value, str) and any("number" in rule for rule in rules):
        try:
            return f" Write {yaml.safe_load(repr(float(value)))!r} without quotes."
        except ValueError:
            return " Write a number."
    return " Write a value, or leave the key out." if value is None else " Correct it."


def _fields_at(kind: type, path: Sequence[str | int]) -> list[str]:
    for part in path:
        kinds = {f.name: f.type for f in dataclasses.fields(kind)}
        kind = kinds[str(part)]  # type: ignore[assignment]
    return [f.name for f in dataclasses.fields(kind)]


def _unknown(document: Document, path: tuple[str | int, ...], valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(path[-1]), valid, n=1, cutoff=0.5)
    hint = f"Did you mean {_dotted((*path[:-1], near[0]))}?" if near else f"Valid here: {', '.join(valid)}."
    return f"{_dotted(path)} is not a known key{document.place(path)}. {hint}"


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) < 80 else text[:77] + "..."


assert SPLITS == ("train", "val", "test")
