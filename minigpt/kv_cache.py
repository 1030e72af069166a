"""The keys and values of tokens already read, so that the next token costs one forward pass of one position.

A GPT whose embedding looks at the token before (smear, bigrams) has the tokens themselves kept beside them.

Rows are ragged: each has its own length, and a row's next token goes to its own next place. Prompts of different length
are padded on the right; `truncate` then forgets the padding, and what is read next overwrites it. So the causal rule
with the positions of each row is the only mask there is. Refused: more tokens than the capacity.

Shapes: B rows, T new tokens, S tokens in use by the longest row, G key/value heads, K head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.masks import visible

TOKENS = -1  # in place of a layer: the tokens themselves, (B, 1, S, 1)
PREALLOCATED = 4096  # tokens a row


class KVCache:
    """For `GPT.forward(tokens_BT, cache=cache)`. Memory, in the dtype of the keys, is taken once for `capacity` tokens
    a row; beyond 4,096 it doubles as tokens come, since a model's context may be far longer than what is written.

    For generating, under torch.no_grad(): writing in place leaves nothing that a gradient could flow through.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device | str = "cpu"):
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch {batch} and capacity {capacity}: expected at least 1 of each")
        self.capacity, self.device = capacity, device
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self._set_lengths([0] * batch)

    def _set_lengths(self, lengths: list[int], lengths_B: Tensor | None = None) -> None:
        """Kept on the host too: asking the device for them would wait for it at every token."""
        self.lengths, self.batch = lengths, len(lengths)
        self.longest, self.ragged = max(lengths), len(set(lengths)) > 1
        self.lengths_B = torch.tensor(lengths, device=self.device) if lengths_B is None else lengths_B

    def _reserve(self, layer: int, tokens: int, new: Sequence[Tensor]) -> None:
        """Room for so many tokens in every row and more; what is not written is zero, never NaN."""
        held = self.layers.get(layer, ())
        if held and held[0].shape[2] >= tokens:
            return
        room = min(max(2 * tokens, PREALLOCATED), self.capacity)
        self.layers[layer] = tuple(x.new_zeros(self.batch, x.shape[1], room, x.shape[3]) for x in new)
        for new_BGSK, old_BGSK in zip(self.layers[layer], held, strict=False):
            new_BGSK[:, :, : old_BGSK.shape[2]] = old_BGSK

    def positions(self, T: int) -> Tensor:
        """(B, T): where the next T tokens of each row stand. Raises ValueError when the longest row has no room."""
        if self.longest + T > self.capacity:
            raise ValueError(
                f"{self.longest} tokens in the cache and {T} more: expected at most its capacity, {self.capacity}"
            )
        return self.lengths_B[:, None] + torch.arange(T, device=self.device)

    def append(self, layer: int, positions_BT: Tensor, *new: Tensor) -> tuple[Tensor, ...]:
        """Writes the new (B, G, T, K) of a layer, keys and values; returns those of all tokens up to the longest row,
        each (B, G, S, K)."""
        used = self.longest + positions_BT.shape[1]
        self._reserve(layer, used, new)
        for kept_BGSK, new_BGTK in zip(self.layers[layer], new, strict=True):
            if self.ragged:
                rows_B1 = torch.arange(self.batch, device=self.device)[:, None]
                kept_BGSK[rows_B1, :, positions_BT] = new_BGTK.transpose(1, 2)
            else:  # one place for all rows: a plain copy, cheaper than an indexed one
                kept_BGSK[:, :, self.longest : used] = new_BGTK
        return tuple(kept_BGSK[:, :, :used] for kept_BGSK in self.layers[layer])

    def append_tokens(self, tokens_BT: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """Keeps the new tokens; returns them with so many in front of them that the cache holds, and where all of these
        stand, both (B, before + T). In front of the beginning, at places below 0, is any token."""
        T = tokens_BT.shape[1]
        (kept_B1S1,) = self.append(TOKENS, self.positions(T), tokens_BT[:, None, :, None])
        places_BT = self.lengths_B[:, None] + torch.arange(-before, T, device=self.device)
        return kept_B1S1[:, 0, :, 0].gather(1, places_BT.clamp(min=0)), places_BT

    def mask(self, positions_BT: Tensor, window: int) -> Tensor | None:
        """(B, T, S), or None where all rows are as long: the plain causal rule, aligned at the end, says it all."""
        if not self.ragged:
            return None
        used = self.longest + positions_BT.shape[1]
        return visible(positions_BT, torch.arange(used, device=self.device), window)

    def advance(self, T: int) -> None:
        """All rows hold T tokens more; called once a pass, after its last layer."""
        self._set_lengths([length + T for length in self.lengths], self.lengths_B + T)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Row b keeps its first lengths[b] tokens. Raises ValueError for a length beyond what the row holds."""
        held = self.lengths
        if len(lengths) != self.batch or any(not 0 <= new <= old for new, old in zip(lengths, held, strict=True)):
            raise ValueError(f"lengths {lengths}: expected for each row 0 to what it holds, {held}")
        self._set_lengths(list(lengths))

    def keep(self, rows: Sequence[int]) -> None:
        """The rows named stay, in the order given; the others leave the batch."""
        if not rows or any(not 0 <= row < self.batch for row in rows):
            raise ValueError(f"rows {rows}: expected at least one, from 0 to {self.batch - 1}")
        index = torch.tensor(rows, device=self.device)
        self.layers = {layer: tuple(x[index] for x in kept) for layer, kept in self.layers.items()}
        self._set_lengths([self.lengths[row] for row in rows])

    def put(self, row: int, other: "KVCache") -> None:
        """The row becomes a copy of `other`, a cache of one row; both have read something before."""
        if other.batch != 1 or not 0 <= row < self.batch or other.longest > self.capacity:
            raise ValueError(
                f"row {row} from a cache of {other.batch} rows and {other.longest} tokens: expected 0 to "
                f"{self.batch - 1} from a cache of one row and at most {self.capacity} tokens"
            )
        for layer, theirs in other.layers.items():
            self._reserve(layer, other.longest, theirs)
            for kept_BGSK, new_1GSK in zip(self.layers[layer], theirs, strict=True):
                kept_BGSK[row, :, : other.longest] = new_1GSK[0, :, : other.longest]
        self._set_lengths([*self.lengths[:row], other.longest, *self.lengths[row + 1 :]])
