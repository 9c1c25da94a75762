"""Search spaces: what stands behind a key in a sweep, such as `loguniform(1e-3, 1)`, and drawing values from it."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from metadist.config_file import parse_document
from metadist.errors import ConfigError

Kind = Literal["uniform", "loguniform", "randint", "choice", "grid"]
ARGUMENTS: dict[Kind, str] = {
    "uniform": "uniform(low, high)",
    "loguniform": "loguniform(low, high)",
    "randint": "randint(low, high), both included",
    "choice": "choice(a, b, ..)",
    "grid": "grid(a, b, ..)",
}
_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)
_CONDITIONAL = re.compile(r"(.*\))\s+if\b(.*)", re.DOTALL)
_CONDITION = re.compile(r"\s*([\w.]+)\s*(?:==\s*(.+)|\bin\s*\((.+)\))\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """Of a key that is searched only where another one has one of these values."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Distribution:
    """Values that one key may take. `values` are the listed ones, or the two ends of an interval."""

    kind: Kind
    values: tuple[Any, ...]
    condition: Condition | None = None

    def applies(self, point: Mapping[str, Any]) -> bool:
        """Whether the key is searched where those before it have the values in `point`."""
        condition = self.condition
        return condition is None or (condition.key in point and point[condition.key] in condition.values)

    @property
    def is_listed(self) -> bool:
        return self.kind in ("choice", "grid")

    def holds(self, value: Any) -> bool:
        """Whether a value is one that the key may take."""
        if self.is_listed:
            return value in self.values
        low, high = self.values
        return _is_number(value, whole=self.kind == "randint") and bool(low <= value <= high)

    def encoded(self, value: Any) -> Any:
        """A number for a value: of a list its index, since its values may be anything."""
        return self.values.index(value) if self.is_listed else value

    def decoded(self, number: Any) -> Any:
        """The value of a number."""
        return self.values[number] if self.is_listed else number

    def place(self, value: Any) -> float:
        """Where a value lies, from 0, the low end, to 1; of a list, its index over the last one."""
        if self.is_listed:
            return float(self.values.index(value) / max(1, len(self.values) - 1))
        low, high = self.values
        if self.kind == "loguniform":
            return math.log(value / low) / math.log(high / low)
        return float((value - low) / (high - low))

    def at(self, place: float) -> float:
        """The value at a place of an interval of real numbers."""
        low, high = self.values
        value = low * (high / low) ** place if self.kind == "loguniform" else low + place * (high - low)
        return float(min(max(value, low), high))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a sweep's file holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Distribution":
        """What `as_dict` gave, after JSON has made lists of its tuples."""
        condition = plain["condition"]
        found = None if condition is None else Condition(condition["key"], as_tuples(condition["values"]))
        return cls(plain["kind"], as_tuples(plain["values"]), found)

    def sample(self, random: np.random.Generator) -> Any:
        """One value, drawn; of a list, each is as likely."""
        if self.is_listed:
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(random.integers(low, high, endpoint=True))
        if self.kind == "uniform":
            return float(random.uniform(low, high))
        # exp(log(low)) may be a bit below low.
        return float(np.clip(math.exp(random.uniform(math.log(low), math.log(high))), low, high))


def parse_distribution(text: Any) -> Distribution:
    """Reads `name(arguments)`, the arguments written as in YAML, perhaps with `if KEY == VALUE` or `if KEY in (A, B)`.

    Raises ConfigError with the rule alone.
    """
    conditional = _CONDITIONAL.fullmatch(text) if isinstance(text, str) else None
    if conditional is not None:
        return dataclasses.replace(parse_distribution(conditional[1]), condition=_condition(conditional[2]))
    call = _CALL.fullmatch(text) if isinstance(text, str) else None
    if call is None:
        raise ConfigError(f"must be one of {'; '.join(ARGUMENTS.values())}. A fixed value belongs under overrides")
    name, arguments = call.groups()
    if name not in ARGUMENTS:
        near = difflib.get_close_matches(name, ARGUMENTS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Write one of {'; '.join(ARGUMENTS.values())}"
        raise ConfigError(f"has no known distribution. {hint}")
    try:
        distribution = Distribution(name, _listed(arguments))
    except (ConfigError, KeyError):
        raise ConfigError(
            f"must be {ARGUMENTS[name]}, its arguments written as in YAML. Check brackets and quotes"
        ) from None
    problem = _problem(distribution)
    if problem:
        raise ConfigError(problem)
    return distribution


def _condition(text: str) -> Condition:
    parts = _CONDITION.fullmatch(text)
    if parts is not None:
        key, value, values = parts.groups()
        with suppress(ConfigError, KeyError):
            return Condition(key, _listed(value or values))
    raise ConfigError(
        "must have its condition as `if KEY == VALUE` or `if KEY in (A, B)`, values written as in YAML. Check its"
        " brackets and quotes"
    )


def _listed(arguments: str) -> tuple[Any, ...]:
    """The brackets make it one YAML value: nothing is ever evaluated."""
    values: tuple[Any, ...] = as_tuples(parse_document(f"values: [{arguments}]", "").data["values"])
    return values


def as_tuples(value: Any) -> Any:
    """A value of a space: its lists are tuples, which JSON and YAML do not have."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


def _problem(distribution: Distribution) -> str | None:
    kind, values = distribution.kind, distribution.values
    usage = ARGUMENTS[kind]
    if distribution.is_listed:
        if len({repr(value) for value in values}) != len(values) or not values:
            return f"must be {usage}, with at least one value and none twice. Correct the list"
        return None
    whole = kind == "randint"
    if len(values) != 2 or not all(_is_number(value, whole) for value in values):
        return f"must be {usage}, two {'whole' if whole else 'finite'} numbers. Correct its arguments"
    low, high = values
    if not low < high:
        return (
            f"must have low < high. {f'Write {kind}({high}, {low})' if high < low else 'Use overrides for one value'}"
        )
    if kind == "loguniform" and low <= 0:
        return "must have low > 0, since it is uniform in the logarithm. Raise it, or use uniform"
    return None


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) if whole else math.isfinite(value)
