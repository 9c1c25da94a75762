"""SIGINT and SIGTERM as a question that the training loop asks between steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console


@contextmanager
def interruptible(console: Console) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether to stop. The second signal acts as it would have without us.

    Outside of the main thread, where signals cannot be caught, the function always says no.
    """
    asked = False
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[number])
        console.print("[yellow]Stopping after this step, with a checkpoint. Once more to stop at once.")

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:
        before.clear()
    try:
        yield lambda: asked
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
