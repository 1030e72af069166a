"""What handwritten collectives stand on: sends and receives between two ranks of a group, cut into chunks, counted.

A message longer than `chunk_bytes` goes as several, so that a chunk that has arrived is reduced while the next is on
its way. Both ends cut by the length alone, and an empty message is not sent at all. Messages between two ranks arrive
in the order in which they were sent. Nothing here reduces or decides who talks to whom: see parallel/algorithms.py.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest

import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group

Span = tuple[int, int]  # [start, stop) of a flat tensor

COLLECTIVE_TAG, POINT_TAG = 1, 2  # a pipeline's send must not meet a collective's receive


def cut(span: Span, parts: int) -> list[Span]:
    """`parts` neighbouring spans, as even as can be; some are empty where there are fewer elements than parts."""
    start, length = span[0], span[1] - span[0]
    bounds = [start + length * i // parts for i in range(parts + 1)]
    return list(pairwise(bounds))


def wait_all(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def pipeline(units: int, depth: int, begin: Callable[[int], list], complete: Callable[[int], None]) -> None:
    """begin(u), wait for it, complete(u), for each u in order, with up to `depth` begun ahead.

    begin(u + depth) may use what complete(u) left: that is how a ring sends on what it has just reduced.
    """
    under_way = deque(begin(unit) for unit in range(min(depth, units)))
    for unit in range(units):
        wait_all(under_way.popleft())
        complete(unit)
        if unit + depth < units:
            under_way.append(begin(unit + depth))


class Wire:
    """Ranks are those of the group. `sent` counts the bytes of this rank's messages since it was made."""

    def __init__(self, group: Group, chunk_bytes: int):
        self.group, self.chunk_bytes, self.sent = group, chunk_bytes, 0
        self.grouped = group.process_group is not None and "nccl" in dist.get_backend(group.process_group)

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def rank(self) -> int:
        return self.group.rank

    def exchange(
        self, send: Tensor | None, to: int, receive: Tensor | None, source: int, tag: int = COLLECTIVE_TAG
    ) -> list[dist.Work]:
        """Begins one message each way (None or empty: none). NCCL gets both as one group, lest two ranks that send
        first wait for each other; gloo gets them bare, since torch's grouping takes longer than a short message."""
        process_group, send, receive = self.group.process_group, _full(send), _full(receive)
        if self.grouped:
            wanted = ((dist.irecv, receive, source), (dist.isend, send, to))
            operations = [
                dist.P2POp(call, tensor, group=process_group, tag=tag, group_peer=peer)
                for call, tensor, peer in wanted
                if tensor is not None
            ]
            works = dist.batch_isend_irecv(operations) if operations else []
        else:
            works = [process_group.recv([receive], source, tag)] if receive is not None else []
            works += [process_group.send([send], to, tag)] if send is not None else []
        if send is not None:
            self.sent += send.numel() * send.element_size()
        return works

    def chunks(self, span: Span, element_size: int) -> list[Span]:
        return cut(span, self.chunk_count(span[1] - span[0], element_size))

    def chunk_count(self, numel: int, element_size: int) -> int:
        return max(1, -(-numel * element_size // self.chunk_bytes))

    def transfer(
        self,
        send: Tensor | None,
        to: int,
        receive: Tensor | None,
        source: int,
        arrived: Callable[[Span], None] = lambda span: None,
    ) -> None:
        """One message each way in chunks, all begun at once; `arrived` is told of each received chunk in order."""
        outgoing = [] if send is None else self.chunks((0, send.numel()), send.element_size())
        incoming = [] if receive is None else self.chunks((0, receive.numel()), receive.element_size())
        pairs = list(zip_longest(outgoing, incoming))

        def begin(unit: int) -> list[dist.Work]:
            out, into = pairs[unit]
            return self.exchange(out and send[slice(*out)], to, into and receive[slice(*into)], source)

        def complete(unit: int) -> None:
            if (into := pairs[unit][1]) is not None:
                arrived(into)

        pipeline(len(pairs), len(pairs), begin, complete)


def _full(x: Tensor | None) -> Tensor | None:
    assert x is None or x.is_contiguous()
    return x if x is not None and x.numel() else None
