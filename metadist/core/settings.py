"""The one way settings are declared: frozen, checked dataclasses, in a config file and in Python alike."""

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
