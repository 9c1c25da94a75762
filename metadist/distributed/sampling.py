"""Sampling a chunk's episodes from a source of the user's, which may fail on some of its tasks."""

import traceback

import torch

from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.keys import TaskKey
from metadist.core.task_source import TaskSource, spec_of
from metadist.errors import AdapterError, MetadistError, first_line


def sample_or_name(source: TaskSource, keys: list[TaskKey], where: str) -> EpisodeBatch:
    """One episode a key. Raises the source's error with `where`, and with the first task that raises alone too."""
    try:
        return _sample(source, keys)
    except Exception as error:
        key, alone = _first_that_raises(source, keys)
        task = f"task {key}" if alone else f"tasks {keys[0]} to {keys[-1]}"
        alone = alone or error
        if isinstance(alone, MetadistError):
            raise type(alone)(f"{where}, {task}: {alone}") from None
        raise named(alone, f"{where}, {task}: task source {type(source).__name__}") from alone


def sample_what_can_be(source: TaskSource, keys: list[TaskKey]) -> tuple[EpisodeBatch | None, dict[int, str]]:
    """One episode a key; in the rows of tasks that raise alone too stands another task's episode, and why.

    A task is the same alone and beside others, so whoever samples a chunk finds the same ones.
    """
    try:
        return _sample(source, keys), {}
    except Exception as error:
        if is_out_of_memory(error):
            raise
    rows: list[EpisodeBatch | None] = []
    bad = {}
    for task, key in enumerate(keys):
        try:
            rows.append(_sample(source, [key]))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            bad[task] = f"sampling raised {type(error).__name__}: {first_line(error)}"
            rows.append(None)
    filling = next((row for row in rows if row is not None), None)
    if filling is None:
        return None, bad
    filled = [row or filling for row in rows]
    return EpisodeBatch(
        *(Examples(*map(torch.cat, zip(*part, strict=True))) for part in zip(*filled, strict=True))
    ), bad


def with_rows_replaced(batch: EpisodeBatch, rows: list[int], by: int) -> EpisodeBatch:
    """The batch with one task's episode in the rows of others: a chunk keeps its shape, and nothing bad in it."""
    source = torch.arange(len(batch.support.x))
    source[rows] = by
    return EpisodeBatch(*(Examples(*(tensor[source.to(tensor.device)] for tensor in part)) for part in batch))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error tells of the machine, and nothing of the task."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def named(error: Exception, where: str) -> AdapterError:
    """A foreign exception as one message that says where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return AdapterError(f"{where} raised {type(error).__name__}: {error}{place}. Correct it and resume the run.")


def _sample(source: TaskSource, keys: list[TaskKey]) -> EpisodeBatch:
    batch = source.sample(keys)
    spec_of(source, keys[0].split).check(batch, keys, source)
    return batch


def _first_that_raises(source: TaskSource, keys: list[TaskKey]) -> tuple[TaskKey, Exception | None]:
    for key in keys:
        try:
            _sample(source, [key])
        except Exception as error:
            return key, error
    return keys[0], None
