"""What a server takes at most: of one request, and in all."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Each is refused with a status of its own: 413 for bytes, 422 for examples and steps, 503 beyond the queue."""

    request_bytes: int = 16 * 2**20
    support_examples: int = 1000
    query_examples: int = 1000
    """Of one request."""
    inner_steps: int = 100
    seconds: float = 30.0
    """Of one request; 408 beyond."""
    models_in_memory: int = 64
    """Of one replica."""
    models_kept: int = 1000
    """Support sets in the directory; the one that was unused for longest goes first."""
    at_once: int = 4
    """Requests that one replica works on."""
    queue: int = 100
    """Requests that wait for a replica."""
