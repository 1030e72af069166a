"""Where the states of an optimizer lie: on the device of the parameters, or in host memory, from where pages of them
come to the device one after another (the purpose of QLoRA's paged optimizers, Dettmers et al. 2023, section 3, here
with explicit copies in place of unified memory).

The states of all parameters follow each other, each parameter's from the start of a block. A page is a range of blocks,
whatever parameters they belong to. On GPUs host memory is pinned, and a second stream brings the next page and takes
back the last one while this one is computed. On a CPU the copies are copies, and show that nothing depends on them.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

BLOCK = 256  # numbers that share an absmax
PAGE = 4 * 2**20  # bytes
RESIDENT = 2
WHOLE = ("exp_avg", "exp_avg_sq")  # one number a number
SCALES = ("absmax", "absmax_sq")  # one a block


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` numbers of p from `start` on; their states are in blocks of `size` numbers, from `block` on."""

    p: nn.Parameter
    start: int
    count: int
    block: int
    size: int

    @property
    def end(self) -> int:
        """The block after the last."""
        return self.block + ceil(self.count / self.size)

    def of(self, x: Tensor) -> Tensor:
        """The piece of a tensor in the shape of p."""
        return x.reshape(-1)[self.start : self.start + self.count]


def block_bytes(quantised: bool) -> int:
    """Of states: two codes a number and two absmax a block; or a number alone, twice in float32."""
    return 2 * BLOCK + 2 * 4 if quantised else 2 * 4


def lay_out(parameters: list[nn.Parameter], size: int, blocks: int) -> list[list[Piece]]:
    """Pages of at most so many blocks. Parameters without numbers have no piece."""
    pages: list[list[Piece]] = []
    line = 0  # blocks so far
    for p in parameters:
        start = 0
        while start < p.numel():
            if line % blocks == 0:
                pages.append([])
            count = min(p.numel() - start, (blocks - line % blocks) * size)
            pages[-1].append(Piece(p, start, count, line, size))
            start, line = start + count, pages[-1][-1].end
    return pages


class States:
    """Of some parameters on one device. `state` is the optimizer's: what it has of them already is taken over, and
    its tensors become parts of those here. `codes` are the two maps of 8-bit states, None for float32."""

    def __init__(
        self, parameters: list[nn.Parameter], state: MutableMapping[nn.Parameter, dict[str, Tensor]],
        codes: tuple[Tensor, Tensor] | None, *, paged: bool, page: int, resident: int,
    ):  # fmt: skip
        device = parameters[0].device
        size = 1 if codes is None else BLOCK
        self.layout = lay_out(parameters, size, page // block_bytes(codes is not None))
        self.codes = None if codes is None else tuple(map_.to(device, copy=True) for map_ in codes)
        blocks = self.layout[-1][-1].end if self.layout else 0
        paged, cuda = paged and codes is not None, device.type == "cuda"
        place = {"device": "cpu" if paged else device, "pin_memory": paged and cuda}
        self.held = _make(blocks, codes is not None, place)
        if codes is not None:  # numbers that pad a block are 0 for good
            self.held["exp_avg"].fill_(int((codes[0] == 0).nonzero()))
        self._take_over(parameters, state, size)
        self.side = torch.cuda.Stream(device) if paged and cuda else None
        most = max((each[-1].end - each[0].block for each in self.layout), default=0)
        self.slots = [
            _make(most, codes is not None, {"device": device}) for _ in range(min(resident, len(self.layout)) * paged)
        ]
        if self.side is not None:  # else a slot that is let go could be handed out while a copy still reads it
            for x in (x for slot in self.slots for x in slot.values()):
                x.record_stream(self.side)

    def _take_over(self, parameters, state, size: int) -> None:
        first = 0
        for p in parameters:
            old, blocks = state[p], ceil(p.numel() / size)
            mine = {"step": old["step"] if "step" in old else torch.zeros((), dtype=torch.float32, device="cpu")}
            for name, x in self.held.items():
                part = x[first : first + blocks]
                mine[name] = part.view(-1)[: p.numel()].view(p.shape) if name in WHOLE else part
                if name in old:
                    mine[name].copy_(old[name])
            state[p], first = mine, first + blocks

    def pages(self) -> Iterator[tuple[list[Piece], Mapping[str, Tensor]]]:
        """The pages with a parameter that has a gradient, each with its states on the device, to be changed in place.

        What is changed is kept when the next page is asked for.
        """
        wanted = [page for page in self.layout if any(piece.p.grad is not None for piece in page)]
        if not self.slots:
            yield from ((page, self._part(page)) for page in wanted)
            return
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        arrived = {}
        for number in range(-len(self.slots) + 1, len(wanted)):
            if (ahead := number + len(self.slots) - 1) < len(wanted):
                arrived[ahead] = self._copy(wanted[ahead], ahead, back=False)
            if number < 0:
                continue
            if self.side is not None:
                torch.cuda.current_stream(self.side.device).wait_event(arrived.pop(number))
            yield wanted[number], self._slot(wanted[number], number)
            self._copy(wanted[number], number, back=True)

    def _part(self, page: list[Piece]) -> dict[str, Tensor]:
        return {name: x[page[0].block : page[-1].end] for name, x in self.held.items()}

    def _slot(self, page: list[Piece], number: int) -> dict[str, Tensor]:
        blocks = page[-1].end - page[0].block
        return {name: x[:blocks] for name, x in self.slots[number % len(self.slots)].items()}

    def _copy(self, page: list[Piece], number: int, *, back: bool) -> torch.cuda.Event | None:
        """Between the host and the slot. On the second stream everything keeps its order: a slot is filled after what
        was in it has been taken back. The event is the end of the copies."""
        host, slot = self._part(page), self._slot(page, number)
        if self.side is None:
            for name in host:
                (host if back else slot)[name].copy_((slot if back else host)[name])
            return None
        if back:
            self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        with torch.cuda.stream(self.side):
            for name in host:
                (host if back else slot)[name].copy_((slot if back else host)[name], non_blocking=True)
            return self.side.record_event()

    def settle(self) -> None:
        """Waits until what is on its way to the host is there."""
        if self.side is not None:
            self.side.synchronize()


def _make(blocks: int, quantised: bool, place: dict) -> dict[str, Tensor]:
    """Zeros of so many blocks."""
    if not quantised:
        return {name: torch.zeros(blocks, 1, **place) for name in WHOLE}
    whole = {name: torch.zeros(blocks, BLOCK, dtype=torch.uint8, **place) for name in WHOLE}
    return whole | {name: torch.zeros(blocks, **place) for name in SCALES}
