"""Everything a config can name: the package's own lists and the entry points of installed packages.

A package adds its own in its metadata, for example in setup.cfg:

    [options.entry_points]
    metadist.algorithms =
        my_maml = my_package.my_maml:MyMAML
"""

import dataclasses
from importlib.metadata import EntryPoint, entry_points

from metadist.algorithms import ALGORITHMS
from metadist.errors import ConfigError
from metadist.models import MODELS
from metadist.tasks import TASKS


def tasks() -> dict[str, type]:
    """Task sources by name (group `metadist.tasks`)."""
    return _with_entry_points("metadist.tasks", TASKS)


def models() -> dict[str, type]:
    """Models by name (group `metadist.models`)."""
    return _with_entry_points("metadist.models", MODELS)


def algorithms() -> dict[str, type]:
    """Algorithms by name (group `metadist.algorithms`)."""
    return _with_entry_points("metadist.algorithms", ALGORITHMS)


def _with_entry_points(group: str, ours: dict[str, type]) -> dict[str, type]:
    known = dict(ours)
    for entry in entry_points(group=group):
        if entry.name in known:
            raise ConfigError(
                f"entry point {entry.name!r} of group {group} ({entry.value}) takes a name that is already used."
                " Rename it in the package that declares it, or uninstall that package."
            )
        known[entry.name] = _load(entry)
    return known


def _load(entry: EntryPoint) -> type:
    where = f"entry point {entry.name!r} of group {entry.group} ({entry.value})"
    try:
        loaded = entry.load()
    except Exception as error:
        # What a foreign module raises while it is imported can be anything.
        raise ConfigError(
            f"{where} cannot be loaded: {type(error).__name__}: {error}. Correct or uninstall the package that"
            " declares it."
        ) from error
    if not (isinstance(loaded, type) and dataclasses.is_dataclass(loaded)):
        raise ConfigError(
            f"{where} must be a dataclass of settings, got {loaded!r}. Decorate it with @metadist.settings."
        )
    return loaded
