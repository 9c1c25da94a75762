"""Numeric fingerprints: processes that do not compute the same bits do not work on one run."""

from typing import Any

from metadist.errors import FingerprintError


def refuse_other(found: dict[str, Any], expected: dict[str, Any] | None, who: str) -> None:
    """Raises FingerprintError, naming what differs, where `found` is not the run's fingerprint."""
    if expected is None or found == expected:
        return
    different = [f"{key} {expected.get(key)!r} there, {found.get(key)!r} here" for key in found | expected]
    different = [
        text for text, key in zip(different, found | expected, strict=True) if found.get(key) != expected.get(key)
    ]
    raise FingerprintError(
        f"{who} computes other bits than this run did so far: {'; '.join(different)}."
        " Use the same versions and hardware, or resume with --allow-numeric-drift."
    )
