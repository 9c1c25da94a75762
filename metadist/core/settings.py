"""The one way settings are declared: frozen, checked dataclasses, in a config file and in Python alike."""

import dataclasses
from typing import Any, TypeVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen keyword-only dataclass whose fields are checked against their annotations.

    Numbers are not read from text and 1 is not True: what is written must be of the field's type. NaN and
    infinity are no numbers.
    """
    make: Any = dataclass(
        frozen=True,
        kw_only=True,
        config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True),
    )
    return make(cls)


def keys_of(kind: type) -> dict[str, str]:
    """The names of a settings class's fields, each with its key in a config where that is another."""
    known = getattr(kind, "__pydantic_fields__", {})
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(known.get(name), "alias", None) or name for name in names}


def as_section(value: Any) -> dict[str, Any]:
    """Settings as the section of a config that makes them."""
    plain = dataclasses.asdict(value)
    return {key: plain[name] for name, key in keys_of(type(value)).items()}
