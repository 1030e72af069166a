"""Collectives as sends and receives: ring, recursive halving and doubling, binomial tree, pairwise, hierarchical.

    W  ranks of the group        P  the largest power of two that is not above W        S  bytes of the whole tensor

A reduced number is computed by one rank and sent to the others, never computed twice: so all ranks end with the same
bits, in every run. Sources: Thakur, Rabenseifner, Gropp 2005 (halving and doubling, ring, trees); Hensgen, Finkel,
Manber 1988 (barrier). All tensors here are flat. What each algorithm costs is in parallel/costs.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from parallel.compression import Codec, Residuals
from parallel.wire import Span, Wire, cut, pipeline, wait_all

Finish = Callable[[Tensor], None]  # what is done once with a part that is wholly reduced


@dataclass(frozen=True, slots=True)
class Reduction:
    """Sum, mean or maximum over W ranks. Partial sums have the tensor's dtype on each hop: 16-bit floats are added in
    float32 and rounded once a hop; `pairwise` adds all in float32 and rounds once."""

    op: str
    W: int

    def combine(self, into: Tensor, other: Tensor) -> None:
        if self.op == "max":
            torch.maximum(into, other, out=into)
        else:
            into.add_(other)

    def finish(self, x: Tensor) -> None:
        if self.op == "mean":
            x.div_(self.W)


def nothing(x: Tensor) -> None:
    pass


# Ring: the ranks in a circle, each sends to the next. A step is (part sent, part received, whether that is reduced).


def reduce_steps(W: int, me: int) -> list[tuple[int, int, bool]]:
    """After them, rank r has part r of all."""
    return [((me - step - 1) % W, (me - step - 2) % W, True) for step in range(W - 1)]


def gather_steps(W: int, me: int) -> list[tuple[int, int, bool]]:
    return [((me - step) % W, (me - step - 1) % W, False) for step in range(W - 1)]


def ring(wire: Wire, x: Tensor, parts: list[Span], ranks: Sequence[int], steps, reduction: Reduction | None = None,
         finish: Finish = nothing) -> None:  # fmt: skip
    """Works `steps` off in place, chunk by chunk: what was reduced is on its way while the next chunk arrives.

    Ring reduce-scatter and all-gather send (W-1)/W S per rank each, all-reduce is one behind the other.
    """
    me = ranks.index(wire.rank)
    following, previous = ranks[(me + 1) % len(ranks)], ranks[me - 1]
    longest = max(stop - start for start, stop in parts)
    C = wire.chunk_count(longest, x.element_size())
    chunks = [cut(part, C) for part in parts]
    reducing = sum(reduces for _, _, reduces in steps)
    arriving = x.new_empty(C, -(-longest // C) if reducing else 0)  # a row for each chunk under way

    def places(unit: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is sent, where the received belongs, and the row where it waits to be reduced."""
        sent, received, reduces = steps[unit // C]
        into = x[slice(*chunks[received][unit % C])]
        return x[slice(*chunks[sent][unit % C])], into, arriving[unit % C, : into.numel()] if reduces else None

    def begin(unit: int) -> list:
        send, into, row = places(unit)
        return wire.exchange(send, following, into if row is None else row, previous)

    def complete(unit: int) -> None:
        _, into, row = places(unit)
        if row is not None:
            reduction.combine(into, row)
            if unit // C == reducing - 1:
                finish(into)

    pipeline(len(steps) * C, C, begin, complete)


def ring_all_reduce(wire: Wire, x: Tensor, ranks: Sequence[int], reduction: Reduction, finish: Finish) -> None:
    W, me = len(ranks), ranks.index(wire.rank)
    if W == 1:
        finish(x)
    else:
        ring(wire, x, cut((0, x.numel()), W), ranks, reduce_steps(W, me) + gather_steps(W, me), reduction, finish)


def hierarchical_all_reduce(wire: Wire, x: Tensor, per_node: int, reduction: Reduction) -> None:
    """Reduce-scatter inside each node of `per_node` neighbouring ranks, all-reduce of those parts between the nodes,
    all-gather inside: 2(N-1)/N S/per_node bytes leave a node per rank, N nodes, instead of 2(W-1)/W S."""
    node, place = divmod(wire.rank, per_node)
    inside = range(node * per_node, (node + 1) * per_node)
    between = range(place, wire.size, per_node)
    parts = cut((0, x.numel()), per_node)
    ring(wire, x, parts, inside, reduce_steps(per_node, place), reduction)
    ring_all_reduce(wire, x[slice(*parts[place])], between, reduction, reduction.finish)
    ring(wire, x, parts, inside, gather_steps(per_node, place))


# Recursive halving and doubling: partners at distance P/2, P/4, ..., 1 and back.


def largest_power_of_two(W: int) -> int:
    return 1 << (W.bit_length() - 1)


def halving(wire: Wire, x: Tensor, parts: list[Span], reduction: Reduction) -> None:
    """Reduce-scatter: each round sends the half that is the partner's. Rank r < len(parts) = P ends with part r."""
    low, high = 0, len(parts)
    buffer = x.new_empty(-(-x.numel() // 2) + len(parts))
    while high - low > 1:
        middle = (low + high) // 2
        distance = middle - low
        first, second = (low, middle), (middle, high)
        kept, given = (second, first) if wire.rank & distance else (first, second)
        into, send = of_parts(x, parts, kept), of_parts(x, parts, given)
        received = buffer[: into.numel()]

        def reduce(span: Span, into: Tensor = into, received: Tensor = received) -> None:
            reduction.combine(into[slice(*span)], received[slice(*span)])

        partner = wire.rank ^ distance
        wire.transfer(send, partner, received, partner, reduce)
        low, high = kept


def doubling(wire: Wire, x: Tensor, parts: list[Span]) -> None:
    """All-gather: the mirror image of halving."""
    distance = 1
    while distance < len(parts):
        low = wire.rank & ~(distance - 1)
        partner = wire.rank ^ distance
        theirs = low ^ distance
        wire.transfer(of_parts(x, parts, (low, low + distance)), partner,
                      of_parts(x, parts, (theirs, theirs + distance)), partner)  # fmt: skip
        distance *= 2


def of_parts(x: Tensor, parts: list[Span], which: Span) -> Tensor:
    return x[parts[which[0]][0] : parts[which[1] - 1][1]]


def halving_all_reduce(wire: Wire, x: Tensor, reduction: Reduction) -> None:
    """2(W-1)/W S per rank on average in 2 log2 P rounds. Where W is no power of two, the W - P last ranks give their
    tensor to one of the first, which sends the result back."""
    P, me = largest_power_of_two(wire.size), wire.rank
    if me >= P:
        wire.transfer(x, me - P, None, me - P)
        wire.transfer(None, me - P, x, me - P)
        return
    has_guest = me + P < wire.size
    if has_guest:
        receive_and_reduce(wire, x, me + P, reduction)
    parts = cut((0, x.numel()), P)
    halving(wire, x, parts, reduction)
    reduction.finish(x[slice(*parts[me])])
    doubling(wire, x, parts)
    if has_guest:
        wire.transfer(x, me + P, None, me + P)


def receive_and_reduce(wire: Wire, x: Tensor, source: int, reduction: Reduction) -> None:
    received = torch.empty_like(x)

    def reduce(span: Span) -> None:
        reduction.combine(x[slice(*span)], received[slice(*span)])

    wire.transfer(None, source, received, source, reduce)


# Binomial tree: v is the rank counted from the root. The parent of v has v's lowest 1 bit cleared.


def tree_relatives(v: int, W: int) -> tuple[int | None, list[int]]:
    """(parent, children), the child with the largest subtree first."""
    lowest = v & -v if v else 1 << (W - 1).bit_length()
    distances = [1 << bit for bit in reversed(range(lowest.bit_length() - 1))]
    return (v - lowest if v else None), [v + distance for distance in distances if v + distance < W]


def ring_relatives(v: int, W: int) -> tuple[int | None, list[int]]:
    return (v - 1 if v else None), ([v + 1] if v + 1 < W else [])


def relay(wire: Wire, x: Tensor, source: int, relatives: Callable) -> None:
    """Broadcast: each chunk goes on to the children as soon as it is here."""
    W = wire.size
    parent, children = relatives((wire.rank - source) % W, W)
    chunks = [x[slice(*span)] for span in wire.chunks((0, x.numel()), x.element_size())]
    arriving = []
    if parent is not None:
        parent = (parent + source) % W
        arriving = [wire.exchange(None, parent, chunk, parent) for chunk in chunks]
    leaving = []
    for number, chunk in enumerate(chunks):
        if parent is not None:
            wait_all(arriving[number])
        for child in children:
            leaving += wire.exchange(chunk, (child + source) % W, None, 0)
    wait_all(leaving)


def tree_all_reduce(wire: Wire, x: Tensor, reduction: Reduction) -> None:
    """Up to rank 0 and down again: 2 log2 W rounds of few messages, which is what a small tensor needs."""
    parent, children = tree_relatives(wire.rank, wire.size)
    for child in reversed(children):  # the smallest subtree is done first
        receive_and_reduce(wire, x, child, reduction)
    if parent is None:
        reduction.finish(x)
    else:
        wire.transfer(x, parent, None, parent)
    relay(wire, x, 0, tree_relatives)


# Pairwise: in step k rank r sends to r + k and receives from r - k.


def pairwise_reduce_scatter(
    wire: Wire, x: Tensor, parts: list[Span], reduction: Reduction, codec: Codec, residuals: Residuals | None
) -> Tensor:
    """This rank's part, reduced in the codec's dtype (float32 for 16-bit tensors): every rank's numbers are encoded
    once and added once, in a fixed order. `residuals` keep what encoding loses."""
    W, me = wire.size, wire.rank
    C = wire.chunk_count(max(stop - start for start, stop in parts), x.element_size())
    chunks = [cut(part, C) for part in parts]
    residual = residuals and residuals.get("sent", x)
    mine, start = x[slice(*parts[me])].to(codec.dtype, copy=True), parts[me][0]
    under_way: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(unit: int) -> list:
        step, c = unit // C + 1, unit % C
        to, source = (me + step) % W, (me - step) % W
        span = slice(*chunks[to][c])
        send = codec.encode(x[span], None if residual is None else residual[span])
        length = chunks[me][c][1] - chunks[me][c][0]
        under_way[unit] = send, torch.empty(codec.nbytes(length), dtype=torch.uint8, device=x.device)
        return wire.exchange(send, to, under_way[unit][1], source)

    def complete(unit: int) -> None:
        first, last = chunks[me][unit % C]
        received = under_way.pop(unit)[1]
        if last > first:
            reduction.combine(mine[first - start : last - start], codec.decode(received, last - first))

    pipeline((W - 1) * C, max(C, W - 1), begin, complete)
    reduction.finish(mine)
    return mine


def pairwise_all_reduce(wire: Wire, x: Tensor, reduction: Reduction, codec: Codec, residuals: Residuals | None) -> None:
    """Pairwise reduce-scatter, then a ring all-gather of the encoded parts, the owner's own included: all decode the
    same bytes."""
    W, me = wire.size, wire.rank
    parts = cut((0, x.numel()), W)
    mine = pairwise_reduce_scatter(wire, x, parts, reduction, codec, residuals)
    if codec.sent == x.dtype:
        x[slice(*parts[me])] = mine
        ring(wire, x, parts, range(W), gather_steps(W, me))
        return
    places = list(pairwise(accumulate((codec.nbytes(stop - start) for start, stop in parts), initial=0)))
    gathered = torch.empty(places[-1][1], dtype=torch.uint8, device=x.device)
    gathered[slice(*places[me])] = codec.encode(mine, residuals and residuals.get("reduced", mine))
    ring(wire, gathered, places, range(W), gather_steps(W, me))
    for part, place in zip(parts, places, strict=True):
        if part[1] > part[0]:
            x[slice(*part)] = codec.decode(gathered[slice(*place)], part[1] - part[0])


def all_to_all(wire: Wire, x: Tensor, out: Tensor, send: list[int], receive: list[int]) -> None:
    W, me = wire.size, wire.rank
    outgoing, incoming = x.split(send), out.split(receive)
    works = []
    for step in range(1, W):
        to, source = (me + step) % W, (me - step) % W
        works += wire.exchange(outgoing[to], to, incoming[source], source)
    incoming[me].copy_(outgoing[me])
    wait_all(works)


def barrier(wire: Wire, token: Tensor) -> None:
    """Dissemination: after round k everybody has heard, perhaps through others, of the 2^(k+1) - 1 ranks before it."""
    distance = 1
    while distance < wire.size:
        to, source = (wire.rank + distance) % wire.size, (wire.rank - distance) % wire.size
        heard = torch.empty_like(token)
        wait_all(wire.exchange(token, to, heard, source))
        heard.item()  # a stream that waits is not enough
        distance *= 2
