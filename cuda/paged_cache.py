"""Keys and values of many sequences in blocks of one array, as attention_decode reads them: they grow without moving.

    cache = PagedCache(1000, 64, kv_heads=2, head_dim=128)
    a = cache.new()
    cache.append(a, k_NGK, v_NGK)
    o = attention_decode(q_BHTK, cache.k, cache.v, *cache.tables([a]))
    cache.free(a)

A block belongs to one sequence. Which are free is a list, kept on the CPU; taking and giving back is O(1) a block.
"""

import torch
from torch import Tensor


class PagedCache:
    """`blocks` blocks of `block_size` tokens, a multiple of 16, in k and v of shape (blocks, block_size, G, K).

    The model has one for each layer, or one of all layers' heads. What a block held before is not cleared.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        *,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        if block_size < 1 or block_size % 16:
            raise ValueError(f"block_size {block_size}: expected a multiple of 16")
        for name, value in (("blocks", blocks), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name} {value}: expected 1 or more")
        self.block_size = block_size
        self.k = torch.zeros(blocks, block_size, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self._free = list(range(blocks))[::-1]  # taken from the end
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def new(self) -> int:
        """A sequence without tokens; its name is never given again."""
        sequence, self._next = self._next, self._next + 1
        self._blocks[sequence], self._lengths[sequence] = [], 0
        return sequence

    def length(self, sequence: int) -> int:
        self._expect(sequence)
        return self._lengths[sequence]

    def append(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """Adds tokens: k and v (tokens, G, K), in the cache's type, on its device. Raises ValueError, and has changed
        nothing, where there are too few free blocks."""
        self._expect(sequence)
        shape = ", ".join(map(str, self.k.shape[2:]))
        for name, x in (("k", k), ("v", v)):
            if x.ndim != 3 or x.shape[1:] != self.k.shape[2:] or x.shape != k.shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (tokens, {shape})")
            if x.dtype != self.k.dtype or x.device != self.k.device:
                raise ValueError(f"{name} is {x.dtype} on {x.device}: expected {self.k.dtype} on {self.k.device}")
        blocks, first = self._blocks[sequence], self._lengths[sequence]
        last = first + k.shape[0]
        wanted = -(-last // self.block_size) - len(blocks)
        if wanted > len(self._free):
            raise ValueError(
                f"sequence {sequence} needs {wanted} more blocks, the cache has {len(self._free)} free: free a sequence"
            )
        blocks += [self._free.pop() for _ in range(wanted)]
        self._lengths[sequence] = last
        token = torch.arange(first, last)
        block = torch.tensor(blocks, dtype=torch.int64)[token // self.block_size]
        slots = (block * self.block_size + token % self.block_size).to(self.k.device)
        for cache, x in ((self.k, k), (self.v, v)):
            cache.view(-1, *cache.shape[2:])[slots] = x.detach()

    def free(self, sequence: int) -> None:
        """Gives the sequence's blocks back. Raises ValueError for one that is not there, or not any more."""
        self._expect(sequence)
        self._free += self._blocks.pop(sequence)[::-1]
        del self._lengths[sequence]

    def tables(self, sequences: list[int]) -> tuple[Tensor, Tensor]:
        """block_table (B, most_blocks) and lengths (B,), int32 on the cache's device; -1 past a sequence's blocks."""
        for sequence in sequences:
            self._expect(sequence)
        rows = [self._blocks[sequence] for sequence in sequences]
        most = max(1, *map(len, rows)) if rows else 1
        table = torch.tensor([row + [-1] * (most - len(row)) for row in rows], dtype=torch.int32).view(len(rows), most)
        lengths = torch.tensor([self._lengths[sequence] for sequence in sequences], dtype=torch.int32)
        return table.to(self.k.device), lengths.to(self.k.device)

    def _expect(self, sequence: int) -> None:
        if sequence not in self._blocks:
            raise ValueError(f"sequence {sequence!r}: expected one that new() gave and free() has not taken")
