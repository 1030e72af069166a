"""A linear layer whose rows have different adapters: which pages each row reads, and the products with them.

y = base(x), and then y[b] += scale * x[b] A' B' for each page of row b's adapter, in place. "triton" and "cuda" read
the pages of all rows at once by our kernels (cuda/lora_ops.py): BGMV where rows are one token long, else SGMV, with a
segment for each row. "torch" takes the rows of each adapter together, by torch's products. No gradients.
Refused: batches of other rows than were said.

Shapes: B rows, T time, M rows times time, I inputs, O outputs, r rank, K pages of the largest adapter in the batch.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda import ops
from cuda.lora_ops import MOST_SEGMENTS
from lora.adapter_cache import Pool

Kernels = Literal["torch", "triton", "cuda"]


class RowPages:
    """Which pages the rows of the next pass have: one for all layers, so that a pass costs the host one look."""

    def __init__(self, kernels: Kernels, device: torch.device):
        self.kernels, self.device = kernels, device
        self.rows: list[tuple[int, ...]] | None = None
        self.laid_out = None  # the kernels and rows that groups and indices_KB are of
        self.segments = ()

    def set(self, rows: list[tuple[int, ...]] | None) -> None:
        """The pages of each row's adapter; None: all rows, however many, are the model's own."""
        if rows is not None and (self.kernels, rows) != self.laid_out:  # the usual token: the same rows as before
            groups, indices_KB = [], []
            if self.kernels == "torch":
                groups = [(self._index(numbers), pages) for pages, numbers in split(rows).items() if pages]
            elif most := max(map(len, rows), default=0):
                table = [[row[k] if k < len(row) else -1 for row in rows] for k in range(most)]
                indices_KB = self._sent(table, torch.int32)
            self.laid_out, self.groups, self.indices_KB = (self.kernels, rows), groups, indices_KB
        self.rows = rows

    def _index(self, numbers: list[int]) -> slice | Tensor:
        """Neighbours are a slice, which copies nothing."""
        if numbers[-1] - numbers[0] == len(numbers) - 1:
            return slice(numbers[0], numbers[-1] + 1)
        return self._sent(numbers, torch.int64)

    def _sent(self, numbers: list, dtype: torch.dtype) -> Tensor:
        """On the device; from pinned memory, whose copy the host does not wait for."""
        made = torch.tensor(numbers, dtype=dtype)
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made

    def _segments(self, count: int, T: int) -> Tensor:
        """Of rows of T tokens each, one after the other: nothing has to be sorted."""
        if self.segments[:2] != (count, T):
            made = torch.arange(0, T * (count + 1), T, dtype=torch.int32, device=self.device)
            self.segments = count, T, made
        return self.segments[2]

    def add(self, pool: Pool, x_BTI: Tensor, y_BTO: Tensor) -> None:
        """y += what each row's adapter adds; rows without one keep their bits."""
        if self.rows is None:
            return
        if x_BTI.ndim != 3 or len(x_BTI) != len(self.rows):
            raise ValueError(f"a batch of shape {tuple(x_BTI.shape)}: expected {len(self.rows)} rows, as were selected")
        kernels, _ = self.laid_out  # not self.kernels, which may be another's since
        if kernels == "torch":
            self._by_torch(pool, x_BTI, y_BTO)
        else:
            self._by_kernels(kernels, pool, x_BTI, y_BTO)

    def _by_torch(self, pool: Pool, x_BTI: Tensor, y_BTO: Tensor) -> None:
        """The rows of an adapter together, by two products for each of its pages."""
        for rows, pages in self.groups:
            x_MI, own_BTO = x_BTI[rows].flatten(0, 1), y_BTO[rows]
            own_MO = own_BTO.view(-1, own_BTO.shape[-1])
            for page in pages:
                if rank := pool.ranks[page]:
                    low_Mr = F.linear(x_MI, pool.A_PRI[page, :rank])
                    own_MO.addmm_(low_Mr, pool.B_POR[page, :, :rank].T, alpha=pool.scales[page])
            if not isinstance(rows, slice):
                y_BTO.index_copy_(0, rows, own_BTO)

    def _by_kernels(self, kernels: str, pool: Pool, x_BTI: Tensor, y_BTO: Tensor) -> None:
        """One page of every row after the other."""
        T, weights, ranks = x_BTI.shape[1], (pool.A_PRI, pool.B_POR), (pool.scales_P, pool.ranks_P)
        for indices_B in self.indices_KB:
            if T == 1:
                args = x_BTI[:, 0], *weights, indices_B, *ranks
                ops.lora_bgmv(*args, y=y_BTO[:, 0], kernels=kernels)
                continue
            for start in range(0, len(indices_B), MOST_SEGMENTS):
                rows = slice(start, start + MOST_SEGMENTS)
                own_B, x_MI, y_MO = indices_B[rows], x_BTI[rows].flatten(0, 1), y_BTO[rows].view(-1, y_BTO.shape[2])
                args = x_MI, *weights, self._segments(len(own_B), T), own_B, *ranks
                ops.lora_sgmv(*args, y=y_MO, kernels=kernels)


def split(names: Sequence) -> dict:
    """{name: the rows that have it}."""
    rows: dict = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


class MultiLoraLinear(nn.Module):
    """A frozen linear layer, and of each row the adapter whose pages `rows` says. It has `.weight` where that has."""

    def __init__(self, base: nn.Module, name: str, pools: dict[str, Pool], rows: RowPages):
        super().__init__()
        self.base, self.name, self.pools, self.rows = base, name, pools, rows
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO = self.base(x_BTI)
        if (pool := self.pools.get(self.name)) is not None:
            self.rows.add(pool, x_BTI, y_BTO)
        return y_BTO
