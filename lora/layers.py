"""A frozen layer with adapters beside it: `LoraLinear` and `LoraEmbedding`, each with any number of adapters by name.

A is (r, I) and B (O, r), as in PEFT's files; of an embedding I is the vocabulary. Both are float32, or float64 beside
a float64 layer, whatever the layer's dtype: the result is rounded to the layer's only at the end. Merged, a layer keeps
a copy of its weight, so merging costs the memory of the weight once more, and unmerging gives it back bit for bit.
A block-diagonal factor keeps its N blocks only, one below the other: A as (r, I/N), or B as (O, r/N).
Refused: merging into weights that are not floating point.

Shapes: B batch, T time, M their product, I inputs, O outputs, r rank, N blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.targets import Place


class Adapter(nn.Module):
    """One A and B. Layers of one place share the Parameter A. `blocks_A` and `blocks_B` are 1 of a dense factor."""

    def __init__(self, config: LoraConfig, place: Place, A: nn.Parameter, B: nn.Parameter):
        super().__init__()
        self.config, self.place, self.scale = config, place, config.scale(*place.names)
        self.blocks_A, self.blocks_B = factor_blocks(config, place)
        self.A, self.B = A, B

    def dense(self) -> tuple[Tensor, Tensor]:
        """A (r, I) and B (O, r), with the zeros off the blocks; gradients flow back to the blocks."""
        return unpacked(self.A, self.blocks_A), unpacked(self.B, self.blocks_B)

    def added_to(self, total_MO: Tensor, x_MI: Tensor, scale: float) -> Tensor:
        """total + scale * B A x, of matrices: the product adds to a copy of `total`, and no B A x of that size is made.
        Not to `total` itself, which checkpointing may have kept. Blocks of B are added where they belong."""
        low_Mr = block_linear(x_MI, self.A, self.blocks_A)
        if self.blocks_B == 1:
            return torch.addmm(total_MO, low_Mr, self.B.T, alpha=scale)
        total_MNo = total_MO.unflatten(-1, (self.blocks_B, -1))
        return (total_MNo + _block_products(low_Mr * scale, self.B, self.blocks_B)).flatten(-2)

    def extra_repr(self) -> str:
        blocks = f", blocks={self.config.blocks}" if self.config.blocks > 1 else ""
        return f"rank={len(self.A)}, scale={self.scale:g}, dropout={self.config.dropout:g}{blocks}"


def factor_blocks(config: LoraConfig, place: Place) -> tuple[int, int]:
    """How many blocks A and B have: those of a layer cut over its inputs are A's, else B's (BD-LoRA)."""
    return (config.blocks, 1) if place.row else (1, config.blocks)


def unpacked(factor: Tensor, blocks: int) -> Tensor:
    """(rows, columns/N) -> (rows, columns), each block of rows in its place on the diagonal."""
    return torch.block_diag(*factor.chunk(blocks)) if blocks > 1 else factor


def block_linear(x_BTI: Tensor, factor: Tensor, blocks: int) -> Tensor:
    """x W^T (B, T, O), W (O, I) or block-diagonal and packed, (O, I/N). N blocks cost 1/N of the dense product."""
    return F.linear(x_BTI, factor) if blocks == 1 else _block_products(x_BTI, factor, blocks).flatten(-2)


def _block_products(x_BTI: Tensor, factor: Tensor, blocks: int) -> Tensor:
    """(B, T, N, O/N): each block of channels by its own matrix, in one batched product. M = B T, i = I/N, o = O/N."""
    x_MNi, W_Noi = x_BTI.reshape(-1, blocks, factor.shape[1]), factor.unflatten(0, (blocks, -1))
    y_NMo = torch.bmm(x_MNi.transpose(0, 1), W_Noi.mT)  # einsum says the same in twice as many steps
    return y_NMo.transpose(0, 1).reshape(*x_BTI.shape[:-1], blocks, W_Noi.shape[1])


def new_factors(
    config: LoraConfig, place: Place, layers: list[nn.Module], generator: torch.Generator
) -> tuple[nn.Parameter, list[nn.Parameter]]:
    """A, and one B for each layer of the place, as `LoraConfig.init` says; drawn on the CPU in float32.

    A row of a block-diagonal A sees I/N inputs only, so its numbers are drawn sqrt(N) times wider: then A x has the
    variance that it has in plain LoRA, and alpha and the learning rate mean the same in both. (PEFT draws them uniform
    within sqrt(6 N / I), sqrt(6) times as wide as here, while its dense ones are as ours.)
    """
    weight, embedding = layers[0].weight, place.embedding
    shapes = [factor_shapes(config, place, layer) for layer in layers]
    A, Bs = torch.zeros(shapes[0][0]), [torch.zeros(shape) for _, shape in shapes]
    widening = math.sqrt(factor_blocks(config, place)[0])
    if embedding:
        for B in Bs:
            B.normal_(generator=generator)
    elif config.init == "kaiming":
        bound = widening / math.sqrt(sizes(layers[0], embedding)[0])
        A.uniform_(-bound, bound, generator=generator)
    else:
        A.normal_(std=widening / len(A), generator=generator)
    own = {"dtype": torch.promote_types(torch.float32, weight.dtype), "device": weight.device}
    return nn.Parameter(A.to(**own)), [nn.Parameter(B.to(**own)) for B in Bs]


def sizes(layer: nn.Module, embedding: bool) -> tuple[int, int]:
    """I and O."""
    return (layer.num_embeddings, layer.embedding_dim) if embedding else (layer.in_features, layer.out_features)


def factor_shapes(config: LoraConfig, place: Place, layer: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and B as they are kept: packed where they are block-diagonal."""
    (inputs, outputs), rank = sizes(layer, place.embedding), config.rank_of(*place.names)
    blocks_A, blocks_B = factor_blocks(config, place)
    return (rank, inputs // blocks_A), (outputs, rank // blocks_B)


class LoraLayer(nn.Module):
    """What the two have in common. `active` {adapter's name: its weight in the sum}; `kept` is the weight of a merged
    layer as it was before."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.adapters, self.active = base, nn.ModuleDict(), {}
        self.register_buffer("kept", None, persistent=False)

    def chosen(self) -> list[tuple[Adapter, float]]:
        """The active adapters, each with weight * scale."""
        pairs = [(self.adapters[name], weight) for name, weight in self.active.items() if name in self.adapters]
        return [(adapter, weight * adapter.scale) for adapter, weight in pairs]

    @property
    def weight(self) -> Tensor:
        """The frozen layer's own; merged, it holds the adapters."""
        return self.base.weight

    def change(self, adapter: Adapter, scale: float) -> Tensor:
        """What the adapter adds to the weight."""
        A, B = adapter.dense()
        return scale * (B @ A)

    @torch.no_grad()
    def merge(self) -> None:
        """The active adapters go into the weight, which is rounded to its dtype once."""
        weight, chosen = self.base.weight, self.chosen()
        if self.kept is not None:
            raise ValueError("merged already: expected an unmerged layer")
        if not weight.dtype.is_floating_point:
            raise ValueError(f"weight of {weight.dtype}: expected floating point, quantised weights do not merge")
        self.kept = weight.detach().clone()
        if chosen:
            weight.copy_(sum((self.change(*pair) for pair in chosen), start=self.kept))

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.kept is None:
            raise ValueError("not merged: expected a merged layer")
        self.base.weight.copy_(self.kept)
        self.kept = None


class LoraLinear(LoraLayer):
    """y = base(x) + sum of weight * scale * B A drop(x). Layers that share an A draw their own dropout masks."""

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x_BTI: Tensor) -> Tensor:
        chosen = self.chosen() if self.kept is None else []
        if not chosen:
            return self.base(x_BTI)
        x_MI = x_BTI.reshape(-1, x_BTI.shape[-1])
        y_MO = total_MO = self.base(x_MI)
        for adapter, scale in chosen:
            own_MI, dropout = x_MI, adapter.config.dropout
            if self.training and dropout:  # which would copy x where there is nothing to drop
                own_MI = F.dropout(own_MI, dropout)
            if not torch.is_autocast_enabled(x_BTI.device.type):  # which chooses the dtype itself
                own_MI = own_MI.to(adapter.A.dtype)
                total_MO = total_MO.to(adapter.A.dtype)
            total_MO = adapter.added_to(total_MO, own_MI, scale)
        return total_MO.to(y_MO.dtype).reshape(*x_BTI.shape[:-1], self.out_features)


class LoraEmbedding(LoraLayer):
    """y = base(tokens) + sum of weight * scale * B A[:, token]. No dropout: a token has no channels to drop."""

    @property
    def num_embeddings(self) -> int:
        return self.base.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base.embedding_dim

    @property
    def weight(self) -> Tensor:
        """What a tied head multiplies with: the frozen weight, merged or not, and of the active adapters those whose
        config says tie_head. With such ones the whole matrix is made anew at each use."""
        own = self.base.weight if self.kept is None else self.kept
        tied = [pair for pair in self.chosen() if pair[0].config.tie_head]
        return sum((self.change(*pair) for pair in tied), start=own).to(own.dtype)

    def change(self, adapter: Adapter, scale: float) -> Tensor:
        """Embeddings lie as (vocabulary, width), that is (I, O)."""
        return super().change(adapter, scale).T

    def forward(self, tokens_BT: Tensor) -> Tensor:
        y_BTO = self.base(tokens_BT)
        if self.kept is not None:
            return y_BTO
        total_BTO = y_BTO
        for adapter, scale in self.chosen():
            total_BTO = total_BTO + F.linear(F.embedding(tokens_BT, adapter.A.T) * scale, adapter.B)
        return total_BTO.to(y_BTO.dtype)
