"""One connection to Ray for several executors, one after another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from metadist.errors import UserError
from metadist.sections import ScalingSettings


@contextmanager
def one_connection(scalings: Sequence[ScalingSettings], console: Console) -> Iterator[None]:
    """Joins or starts a Ray that has room for any of these, where one of them wants adapters; leaves it at the end.

    Executors that start meanwhile use it, and actors that those before them have left. Raises ClusterError, and
    UserError where they name different clusters.
    """
    with_ray = [scaling for scaling in scalings if scaling.worker_limits[1]]
    if not with_ray:
        yield
        return
    addresses = sorted({scaling.address or "(a local Ray)" for scaling in with_ray})
    if len(addresses) > 1:
        raise UserError(
            f"scaling.address must be one and the same for all, got {', '.join(addresses)}. Choose one with --address,"
            " or use --workers 0."
        )
    from metadist.distributed.cluster import connect
    from metadist.distributed.kept_actors import actors_kept

    disconnect = connect(max(with_ray, key=lambda scaling: scaling.worker_limits[0]), console)
    try:
        with actors_kept():
            yield
    finally:
        disconnect()
