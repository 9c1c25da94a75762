"""A person's own support set, as the commands that adapt a run read it."""

from typing import TYPE_CHECKING

from metadist.commands.output import progress_console

if TYPE_CHECKING:
    import numpy as np

    from metadist.adaptation import LoadedRun


def read_support(run: "LoadedRun", place: str, invert: bool) -> "tuple[np.ndarray, np.ndarray]":
    """Inputs and their targets; tells where images look like negatives. Raises DataError where there are no targets."""
    from metadist.adaptation import LOOKS_INVERTED
    from metadist.errors import DataError
    from metadist.tasks.labelled_files import read_labelled

    examples = read_labelled(place, run.spec, invert=invert)
    if examples.y is None:
        target = "class" if run.spec.kind == "classification" else "target"
        raise DataError(f"{place}: support examples need targets. Add the column {target!r}, or directories a class.")
    if run.sees_negatives_in(examples.x):
        progress_console().print(LOOKS_INVERTED.format(place=place), style="yellow")
    return examples.x, examples.y
