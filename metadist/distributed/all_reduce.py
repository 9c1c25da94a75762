"""What the ranks of the second backend give each other: the sums of their ranges, over torch.distributed.

Every rank takes part in each exchange, also one that failed: it says so in the last number that it
sends, so that no rank waits for one that will not come.
"""

import numpy as np
import torch
import torch.distributed as dist

from metadist.core.meta_gradient import Sums
from metadist.core.plan import Range


class PeerFailedError(Exception):
    """Another rank could not compute its ranges; the error itself is with that rank."""


def share_exactly(assigned: list[list[Range]], own: dict[Range, Sums] | None, sizes: list[int], device: str) -> dict:
    """The sums of every range, on every rank, to be reduced there in tree order: the bits of any other executor.

    `assigned` are the ranges of each rank, `own` this rank's sums in that order (None where it failed), `sizes` the
    lengths of the parts of a sum. Each rank receives as many sums as there are ranges. Raises PeerFailedError.
    """
    size, rows = sum(sizes), max(map(len, assigned))
    sent = np.zeros(rows * size + 1, np.float32)
    for row, sums in enumerate((own or {}).values()):
        sent[row * size : (row + 1) * size] = np.concatenate(sums)
    sent[-1] = own is None
    mine = torch.from_numpy(sent).to(device)
    everyone = [torch.empty_like(mine) for _ in assigned]
    dist.all_gather(everyone, mine)
    received = [tensor.numpy(force=True) for tensor in everyone]
    _raise_if_failed(float(sum(part[-1] for part in received)))
    return {
        span: _parts(part[row * size : (row + 1) * size], sizes)
        for spans, part in zip(assigned, received, strict=True)
        for row, span in enumerate(spans)
    }


def share_fast(assigned: list[list[Range]], own: dict[Range, Sums] | None, sizes: list[int], device: str) -> dict:
    """One sum over all ranges, on every rank, by an all-reduce; arguments as for `share_exactly`.

    Moves one sum whatever the number of ranges, in an order that is the number of ranks' and the library's: its
    last bits are not those of the tree. Raises PeerFailedError.
    """
    sent = np.zeros(sum(sizes) + 1, np.float32)
    for sums in (own or {}).values():
        sent[:-1] += np.concatenate(sums)
    sent[-1] = own is None
    total = torch.from_numpy(sent).to(device)
    dist.all_reduce(total)
    received = total.numpy(force=True)
    _raise_if_failed(float(received[-1]))
    num_chunks = max(span.stop for spans in assigned for span in spans)
    return {Range(0, num_chunks): _parts(received[:-1], sizes)}


def _parts(vector: np.ndarray, sizes: list[int]) -> Sums:
    return Sums(*np.split(vector, np.cumsum(sizes)[:-1]))


def _raise_if_failed(failed: float) -> None:
    if failed:
        raise PeerFailedError
