"""A frozen layer with adapters beside it: `LoraLinear` and `LoraEmbedding`, each with any number of adapters by name.

A is (r, I) and B (O, r), as in PEFT's files; of an embedding I is the vocabulary. Both are float32, or float64 beside
a float64 layer, whatever the layer's dtype: the result is rounded to the layer's only at the end. Merged, a layer keeps
a copy of its weight, so merging costs the memory of the weight once more, and unmerging gives it back bit for bit.
Refused: merging into weights that are not floating point.

Shapes: B batch, T time, I inputs, O outputs, r rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.targets import Place


class Adapter(nn.Module):
    """One A and B. Layers of one place share the Parameter A."""

    def __init__(self, config: LoraConfig, place: Place, A: nn.Parameter, B: nn.Parameter):
        super().__init__()
        self.config, self.place, self.scale = config, place, config.scale(*place.names)
        self.A, self.B = A, B

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}, scale={self.scale:g}, dropout={self.config.dropout:g}"


def new_factors(
    config: LoraConfig, place: Place, layers: list[nn.Module], generator: torch.Generator
) -> tuple[nn.Parameter, list[nn.Parameter]]:
    """A, and one B for each layer of the place, as `LoraConfig.init` says; drawn on the CPU in float32."""
    weight, rank, embedding = layers[0].weight, config.rank_of(*place.names), place.embedding
    inputs, outputs = zip(*(sizes(layer, embedding) for layer in layers), strict=True)
    A, Bs = torch.zeros(rank, inputs[0]), [torch.zeros(count, rank) for count in outputs]
    if embedding:
        for B in Bs:
            B.normal_(generator=generator)
    elif config.init == "kaiming":
        A.uniform_(-1 / math.sqrt(inputs[0]), 1 / math.sqrt(inputs[0]), generator=generator)
    else:
        A.normal_(std=1 / rank, generator=generator)
    own = {"dtype": torch.promote_types(torch.float32, weight.dtype), "device": weight.device}
    return nn.Parameter(A.to(**own)), [nn.Parameter(B.to(**own)) for B in Bs]


def sizes(layer: nn.Module, embedding: bool) -> tuple[int, int]:
    """I and O."""
    return (layer.num_embeddings, layer.embedding_dim) if embedding else (layer.in_features, layer.out_features)


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
        """The frozen layer's own."""
        return self.base.weight

    def change(self, adapter: Adapter, scale: float) -> Tensor:
        """What the adapter adds to the weight."""
        return scale * (adapter.B @ adapter.A)

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
        y_BTO = self.base(x_BTI)
        if self.kept is not None:
            return y_BTO
        total_BTO = y_BTO
        for adapter, scale in self.chosen():
            dropped_BTI = F.dropout(x_BTI, adapter.config.dropout, self.training)
            if not torch.is_autocast_enabled(x_BTI.device.type):  # which chooses the dtype itself
                dropped_BTI = dropped_BTI.to(adapter.A.dtype)
            total_BTO = total_BTO + F.linear(F.linear(dropped_BTI, adapter.A) * scale, adapter.B)
        return total_BTO.to(y_BTO.dtype)


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
