"""Everything a config can name: the package's own lists, and entry points of installed packages and of this project.

A package adds its own in its metadata, for example in pyproject.toml:

    [project.entry-points."metadist.algorithms"]
    my_maml = "my_package.my_maml:MyMAML"

A pyproject.toml in the current directory counts without being installed, so that a project goes to a cluster as it is.
"""

import dataclasses
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from metadist.algorithms import ALGORITHMS
from metadist.errors import ConfigError
from metadist.models import MODELS
from metadist.tasks import TASKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT_FILE = "pyproject.toml"


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
    # One that is installed and here too is the same one.
    for entry in dict.fromkeys([*entry_points(group=group), *_of_this_project(group)]):
        if entry.name in known:
            raise ConfigError(
                f"entry point {entry.name!r} of group {group} ({entry.value}) takes a name that is already used."
                " Rename it in the package that declares it, or uninstall that package."
            )
        known[entry.name] = _load(entry)
    return known


def _of_this_project(group: str) -> list[EntryPoint]:
    path = Path(PROJECT_FILE)
    if not path.is_file():
        return []
    try:
        declared = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("entry-points", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{PROJECT_FILE} in this directory is not valid TOML ({error}). Correct it there.") from None
    entries = [EntryPoint(name, value, group) for name, value in declared.get(group, {}).items()]
    here = str(Path.cwd())
    if entries and here not in sys.path:
        sys.path.insert(0, here)
    return entries


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
