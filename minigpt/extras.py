"""What racing recipes add to a GPT around its blocks: skips along the depth, a look at the token before.

Each is a field of GPTConfig, and begins as nothing: a GPT with any of them on starts with the logits of the one
without. `Skips` mixes the stream that enters a block, `Smear` and `Bigrams` the stream that enters the first.

Shapes: B batch, T time, C width, V vocabulary, L layers. Sources: the records of modded-nanogpt (U-net and embedding
skips, smear, backout, hashed bigrams), Zhou et al. 2024 (value residuals, from which the skips to the embedding came).
"""

import torch
from torch import Tensor, nn

from minigpt.config import GPTConfig

GATE_WIDTH = 12  # channels that a gate reads: enough to tell kinds of tokens apart, too few to cost anything


def gate(x_BTC: Tensor, linear: nn.Linear) -> Tensor:
    """Numbers from 0 to 2, by the first channels of each token; 1 where the weight is zero, as it is at first."""
    return 2 * torch.sigmoid(linear(x_BTC[..., :GATE_WIDTH]))


class Skips(nn.Module):
    """x0_skip: before each block x = a x + b x0, where x0 is what entered the first; at first a = 1, b = 0.
    unet_skips: what left block i is added, times a weight that is at first 0, to what enters block L - 1 - i.
    backout: at the end, x less a weight, at first 0, times what left the block in the middle.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.layers = config.layers
        self.x0 = nn.Parameter(torch.zeros(config.layers, 2)) if config.x0_skip else None
        self.unet = nn.Parameter(torch.zeros(config.layers // 2)) if config.unet_skips else None
        self.backout = nn.Parameter(torch.zeros(())) if config.backout else None

    def forward(self, x_BTC: Tensor, layer: int, past: list[Tensor]) -> Tensor:
        """What enters block `layer`; past[i] is what entered block i (past[0] the first) or left block i - 1."""
        if self.x0 is not None:
            own, first = self.x0[layer].to(x_BTC.dtype)
            x_BTC = (1 + own) * x_BTC + first * past[0]
        partner = self.layers - 1 - layer
        if self.unet is not None and partner < layer:
            x_BTC = x_BTC + self.unet[partner].to(x_BTC.dtype) * past[partner + 1]
        return x_BTC

    def end(self, x_BTC: Tensor, past: list[Tensor]) -> Tensor:
        """What leaves the last block, for the last norm."""
        if self.backout is None:
            return x_BTC
        return x_BTC - self.backout.to(x_BTC.dtype) * past[(self.layers + 1) // 2]


class Smear(nn.Module):
    """x_t + w gate(x_t) x_(t-1): each token carries some of the one before; w is at first 0."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.smear_gate = nn.Linear(min(GATE_WIDTH, config.width), 1, bias=False)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x_BTC: Tensor, first_BT: Tensor) -> Tensor:
        """first_BT: True where a token has none before it in its document."""
        before_BTC = torch.cat([torch.zeros_like(x_BTC[:, :1]), x_BTC[:, :-1]], dim=1)
        before_BTC = before_BTC.masked_fill(first_BT[..., None], 0)
        return x_BTC + self.weight.to(x_BTC.dtype) * gate(x_BTC, self.smear_gate) * before_BTC


class Bigrams(nn.Module):
    """A table of vectors for pairs of tokens, at first 0; pairs share a row where their hashes meet."""

    def __init__(self, config: GPTConfig, embedding_cls):
        super().__init__()
        self.rows = config.bigrams
        self.bigram_embedding = embedding_cls(config.bigrams, config.width)

    def forward(self, tokens_BT: Tensor, first_BT: Tensor) -> Tensor:
        """(B, T, C) to be added to the stream; row 0 is of tokens without one before them."""
        before_BT = torch.cat([tokens_BT[:, :1], tokens_BT[:, :-1]], dim=1)
        # Odd multipliers near 2**32 times the golden ratio and sqrt 2 - 1: pairs spread over the rows.
        rows_BT = ((tokens_BT * 2654435769) ^ (before_BT * 1779033703)) % (self.rows - 1) + 1
        return self.bigram_embedding(rows_BT.masked_fill(first_BT, 0))
