"""Numeric fingerprints: processes that do not compute the same bits do not work on one run."""

from typing import Any

from metadist.errors import FingerprintError


def refuse_other(found: dict[str, Any], expected: dict[str, Any] | None, who: str) -> None:
    """Raises FingerprintError, naming what differs, where `found` is not the run's fingerprint."""
    if expected is None or found == expected:
        return
    keys = [key for key in found | expected if found.get(key) != expected.get(key)]
    different = [f"{key} {expected.get(key)!r} there, {found.get(key)!r} here" for key in keys]
    if keys == ["canonical_gradient"]:
        raise FingerprintError(
            f"{who} gets another meta-gradient than this run did ({different[0]}) with the same versions and hardware."
            " Has the data changed (task.pool), or the code of a task, model or algorithm? Bring them back, or"
            " resume with --allow-numeric-drift."
        )
    raise FingerprintError(
        f"{who} computes other bits than this run did so far: {'; '.join(different)}."
        " Use the same versions and hardware, or resume with --allow-numeric-drift."
    )
