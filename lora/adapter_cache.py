"""Many adapters for one model: all of them in the host's memory, those in use in pages on the device.

A page has room for `page_rank` ranks of an adapter in every layer. One of rank 20 takes two pages of 16, wherever they
are free, and the last one is partly filled; page 5 of one layer belongs to whom page 5 of the others does. So adapters
of all ranks share one memory that never falls to pieces (unified paging, S-LoRA, Sheng et al. 2023, section 5.1, where
the KV cache lies in the same pages). Missing adapters take the pages of those that were not used for longest.

Refused with a ValueError: names that are taken or unknown, layers that there are not, factors that do not fit or are
not finite in the pages' dtype, adapters larger than all pages, and more pages than running batches leave.

Shapes: P pages, R ranks of a page, N pages of an adapter, I inputs, O outputs, r rank.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """One layer of an adapter: x A' B' * scale is added to what the layer computes."""

    A_rI: Tensor
    B_Or: Tensor
    scale: float


class Cut(NamedTuple):
    """The same on the host, in pages; zeros fill up the last one, whose ranks[-1] says how much of it counts."""

    A_NRI: Tensor
    B_NOR: Tensor
    scale: float
    ranks: tuple[int, ...]


class Pool:
    """The pages of one layer on the device, as `cuda.ops.lora_bgmv` takes them; `ranks` and `scales` once more on the
    host, where reading them does not wait for the device. An empty page is of rank 0."""

    def __init__(self, pages: int, page_rank: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device):
        inputs, outputs = size
        self.A_PRI = torch.zeros(pages, page_rank, inputs, dtype=dtype, device=device)
        self.B_POR = torch.zeros(pages, outputs, page_rank, dtype=dtype, device=device)
        self.scales_P = torch.zeros(pages, dtype=torch.promote_types(torch.float32, dtype), device=device)
        self.ranks_P = torch.zeros(pages, dtype=torch.int32, device=device)
        self.scales, self.ranks = [0.0] * pages, [0] * pages

    def write(self, page: int, cut: Cut | None, number: int) -> int:
        """The page becomes the adapter's page `number`, an empty one where it has none; returns the bytes copied.

        Copies wait on the device's stream behind what still reads the page, the host waits for nothing.
        """
        filled = cut is not None and number < len(cut.ranks)
        self.ranks[page], self.scales[page] = (cut.ranks[number], cut.scale) if filled else (0, 0.0)
        self.ranks_P[page], self.scales_P[page] = self.ranks[page], self.scales[page]
        if not filled:
            return 0
        self.A_PRI[page].copy_(cut.A_NRI[number], non_blocking=True)
        self.B_POR[page].copy_(cut.B_NOR[number], non_blocking=True)
        return self.page_bytes

    @property
    def page_bytes(self) -> int:
        return (self.A_PRI[0].numel() + self.B_POR[0].numel()) * self.A_PRI.element_size()


@dataclass
class Counts:
    """Since the cache was made; an adapter counts once in each `acquire`."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_moved: int = 0


class AdapterCache:
    """`sizes` {layer: (I, O)} are the layers that an adapter may have; a layer's pool is made for the first that has
    it. `pools` {layer: Pool}.

    acquire -> pages_of -> release: what a batch has acquired stays where it is until the batch releases it.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        *,
        pages: int,
        page_rank: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if pages < 1 or page_rank < 1:
            raise ValueError(f"pages {pages} and page_rank {page_rank}: expected at least 1 of each")
        self.sizes, self.pages, self.page_rank = dict(sizes), pages, page_rank
        self.dtype, self.device = dtype, torch.device(device)
        self.pools: dict[str, Pool] = {}
        self.stored: dict[str, dict[str, Cut]] = {}
        self.resident: dict[str, tuple[int, ...]] = {}  # {adapter: its pages}, the least recently used first
        self.free = list(reversed(range(pages)))
        self.held: Counter[str] = Counter()  # by how many batches
        self.counts = Counts()

    # ---- the host's store --------------------------------------------------------------------------------------------

    def add(self, name: str, layers: Mapping[str, Factors]) -> None:
        """Keeps a copy on the host, in the pages' dtype, pinned where the device is a GPU."""
        self.check_new(name)
        if faults := self.faults(layers):
            raise ValueError(f"adapter {name!r}: {'; '.join(faults)}")
        cuts = {layer: self._cut(factors) for layer, factors in layers.items()}
        if bad := [
            layer for layer, cut in cuts.items() if not (cut.A_NRI.isfinite().all() & cut.B_NOR.isfinite().all())
        ]:
            raise ValueError(f"adapter {name!r}: {', '.join(bad)}: too large for {self.dtype}")
        for layer in cuts.keys() - self.pools.keys():
            self.pools[layer] = Pool(self.pages, self.page_rank, self.sizes[layer], self.dtype, self.device)
        self.stored[name] = cuts

    def check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"adapter name {name!r}: expected a text that is not empty")
        if name in self.stored:
            raise ValueError(f"adapter {name!r} exists: expected another name")

    def faults(self, layers: Mapping[str, Factors]) -> list[str]:
        """Everything that keeps these factors out, one sentence each."""
        found = [] if layers else ["no layers: expected at least one"]
        for layer, (A_rI, B_Or, scale) in layers.items():
            if layer not in self.sizes:
                found.append(f"{layer} is no linear layer that can have an adapter here")
                continue
            inputs, outputs = self.sizes[layer]
            rank = len(A_rI)
            for factor, tensor, shape in (("A", A_rI, (rank, inputs)), ("B", B_Or, (outputs, rank))):
                if tuple(tensor.shape) != shape:
                    found.append(f"{factor} of {layer} has shape {list(tensor.shape)}, expected {list(shape)}")
                if not tensor.isfinite().all():
                    found.append(f"{factor} of {layer} has values that are NaN or infinite")
            if not math.isfinite(scale):
                found.append(f"the scale of {layer} is {scale}, expected a finite number")
            if not 1 <= self._pages_for(rank) <= self.pages:
                found.append(
                    f"{layer} is of rank {rank}, {self._pages_for(rank)} pages of {self.page_rank}: expected rank 1 to "
                    f"{self.pages * self.page_rank}, of {self.pages} pages"
                )
        return found

    def _pages_for(self, rank: int) -> int:
        return -(-rank // self.page_rank)

    @torch.no_grad()
    def _cut(self, factors: Factors) -> Cut:
        rank, R = len(factors.A_rI), self.page_rank
        count = self._pages_for(rank)
        A_NRI = torch.zeros(count * R, factors.A_rI.shape[1], dtype=self.dtype)
        A_NRI[:rank] = factors.A_rI
        B_ONR = torch.zeros(len(factors.B_Or), count * R, dtype=self.dtype)
        B_ONR[:, :rank] = factors.B_Or
        A_NRI, B_NOR = A_NRI.unflatten(0, (count, R)), B_ONR.unflatten(1, (count, R)).transpose(0, 1).contiguous()
        if self.device.type == "cuda":
            A_NRI, B_NOR = A_NRI.pin_memory(), B_NOR.pin_memory()
        return Cut(A_NRI, B_NOR, factors.scale, tuple(min(R, rank - n * R) for n in range(count)))

    # ---- pages -------------------------------------------------------------------------------------------------------

    def acquire(self, names: Iterable[str | None]) -> None:
        """Brings the adapters of a batch (each counts once, None is none) into pages and holds them there."""
        names = list(names)
        needed = self.check(names)
        wanted = _distinct(names)
        others = sum(len(self.resident[name]) for name, holds in self.held.items() if holds and name not in wanted)
        if needed > self.pages - others:
            raise ValueError(
                f"adapters {wanted} need {needed} pages, and running batches hold {others} of {self.pages} for others: "
                f"expected at most {self.pages - others}, or release first"
            )
        missing = [name for name in wanted if name not in self.resident]
        self._make_room(sum(map(self.pages_needed, missing)), wanted)
        for name in missing:
            self._load(name)
        for name in wanted:
            self._touch(name)
            self.held[name] += 1
        self.counts.hits += len(wanted) - len(missing)
        self.counts.misses += len(missing)

    def check(self, names: Iterable[str | None]) -> int:
        """The pages that a batch of these adapters needs. Raises ValueError for unknown ones, and where not even an
        empty device would have so many."""
        wanted = _distinct(names)
        if unknown := [name for name in wanted if name not in self.stored]:
            raise ValueError(f"adapters {unknown} are unknown: expected some of {list(self.stored)}, or None")
        needed = sum(map(self.pages_needed, wanted))
        if needed > self.pages:
            raise ValueError(
                f"adapters {wanted} need {needed} pages: expected at most {self.pages}, all that there are"
            )
        return needed

    def release(self, names: Iterable[str | None]) -> None:
        """The batch is done; its adapters stay in their pages until others need those."""
        wanted = _distinct(names)
        if free := [name for name in wanted if not self.held[name]]:
            raise ValueError(f"release of adapters {free}: expected ones that a batch has acquired")
        for name in wanted:
            self.held[name] -= 1
            self._touch(name)

    def pages_of(self, name: str | None) -> tuple[int, ...]:
        """Where the adapter lies; None has no pages."""
        if name is not None and name not in self.resident:
            raise ValueError(f"adapter {name!r} is not on the device: expected acquire first")
        return () if name is None else self.resident[name]

    def pages_needed(self, name: str) -> int:
        """As many as the layer with the largest rank needs."""
        return max(len(cut.ranks) for cut in self.stored[name].values())

    def memory_bytes(self) -> int:
        """Of all pages on the device."""
        return self.pages * sum(pool.page_bytes for pool in self.pools.values())

    def _make_room(self, count: int, wanted: list[str]) -> None:
        victims = [name for name in self.resident if not self.held[name] and name not in wanted]
        for name in victims:
            if len(self.free) >= count:
                break
            self.free += reversed(self.resident.pop(name))
            self.counts.evictions += 1

    def _load(self, name: str) -> None:
        """Every pool is written: the page's last owner may have had layers that this adapter has not."""
        pages = tuple(self.free.pop() for _ in range(self.pages_needed(name)))
        for layer, pool in self.pools.items():
            for number, page in enumerate(pages):
                self.counts.bytes_moved += pool.write(page, self.stored[name].get(layer), number)
        self.resident[name] = pages

    def _touch(self, name: str) -> None:
        self.resident[name] = self.resident.pop(name)


def _distinct(names: Iterable[str | None]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name is not None]
