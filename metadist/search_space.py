"""Search spaces: what stands behind a key in a sweep, such as `loguniform(1e-3, 1)`, and drawing values from it."""

import difflib
import math
import re
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


@dataclass(frozen=True)
class Distribution:
    """Values that one key may take. `values` are the listed ones, or the two ends of an interval."""

    kind: Kind
    values: tuple[Any, ...]

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
    """Reads `name(arguments)`, the arguments written as in YAML. Raises ConfigError with the rule alone."""
    call = _CALL.fullmatch(text) if isinstance(text, str) else None
    if call is None:
        raise ConfigError(f"must be one of {'; '.join(ARGUMENTS.values())}. A fixed value belongs under overrides")
    name, arguments = call.groups()
    if name not in ARGUMENTS:
        near = difflib.get_close_matches(name, ARGUMENTS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Write one of {'; '.join(ARGUMENTS.values())}"
        raise ConfigError(f"has no known distribution. {hint}")
    try:
        # The brackets make it one YAML value: nothing is ever evaluated.
        values = parse_document(f"values: [{arguments}]", "").data["values"]
    except (ConfigError, KeyError):
        raise ConfigError(
            f"must be {ARGUMENTS[name]}, its arguments written as in YAML. Check brackets and quotes"
        ) from None
    distribution = Distribution(name, tuple(_frozen(value) for value in values))
    problem = _problem(distribution)
    if problem:
        raise ConfigError(problem)
    return distribution


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


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
