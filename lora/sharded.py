"""Adapters of a GPT whose matrices are cut among the ranks of a tp group (stage 4), in three ways.

    block-diagonal  one factor of each layer is block-diagonal, so a rank's part of the adapter needs nothing from other
                    ranks: no collective (Block-Diagonal LoRA). The config's `blocks` are W, or a multiple of it.
    s-lora          both factors are split, and the ranks meet between them: a collective of r numbers a token and layer
                    (S-LoRA, Sheng et al. 2023, section 6; vLLM's `fully_sharded_loras`).
    replicated      one factor of each layer is whole on every rank (vLLM's default): no collective in the forward pass,
                    and in training its gradient is a sum over the ranks, once a step.

What an adapter adds is added to the layer's own partial result, so one reduction serves both. What is sent has the
dtype of the adapter, float32 beside layers of 16 or 32 bits, or that of autocast. Refused before anything is changed:
embeddings, sizes that W does not divide, block-diagonal factors where ranks share key/value heads, a second adapter.
With `overlap` of stage 4 an input's gradient waits for the adapter's part: it is right, and overlaps with nothing.

Shapes: B batch, T time, I inputs, O outputs, r rank, all as this rank has them; R the whole rank; W ranks; o the rows
of B that a rank has in a row-parallel layer.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.layers import block_linear, new_factors
from lora.lora import check_addition
from lora.sharding import Sharding, check_place, check_sharding, own_parts
from lora.targets import Place
from minigpt.model import GPT
from parallel.comm import Comm
from parallel.model import StageGPT
from parallel.pieces import piece_of
from parallel.random_state import local_random
from parallel.tensor_linear import ColumnLinear, RowLinear
from parallel.whole_state import gather_tensors

GATHER, SUM = "adapter products of all ranks", "sum of adapter products"  # tags of the collectives
TAGS = (GATHER, SUM)


def shard_adapter(
    stage: StageGPT,
    config: LoraConfig,
    sharding: Sharding,
    comm: Comm,
    partial: Mapping[str, Comm],
    *,
    name: str = "default",
    seed: int = 0,
) -> dict[str, Comm]:
    """Puts this rank's part of a new adapter into a stage after `parallelise` and `materialise`, and freezes the rest.

    `comm` and `partial` are what `parallelise` got and returned. The whole adapter is the one that `add_adapter` makes
    of the same config and seed, with the same names of parameters, and each parameter's `piece` says which part of it
    is here. Returns for `sum_partial` the parameters whose gradients on this rank are only terms of theirs.
    With dropout the ranks' random numbers have to be in step (parallel/random_state.py).
    Raises ValueError for all that is refused, see above.
    """
    check_sharding(config, sharding, comm.size)
    whole = _whole(stage)
    places = check_addition(whole, config, name)
    for place in places:
        check_place(whole, place, config, sharding, comm.size)
    _check_stage(stage, places, sharding, comm, partial)
    stage.requires_grad_(False)
    modules, groups, generator = dict(stage.named_modules()), {}, torch.Generator().manual_seed(seed)
    for place in places:
        factors = new_factors(config, place, [_like(whole, stage, layer) for layer in place.layers], generator)
        if place.layers[0] in modules:  # else another pipeline stage's; its numbers are drawn all the same
            bases = [modules[layer] for layer in place.layers]
            pairs = own_parts(bases, *factors, sharding, comm)
            for layer, base, (A, B) in zip(place.layers, bases, pairs, strict=True):
                shard = Shard(config.scale(*place.names), A, B)
                kind = ShardedRow if isinstance(base, RowLinear) else ShardedColumn
                sharded = kind(base, name, shard, config.dropout, comm, talks=sharding == "s-lora")
                stage.set_submodule(layer, sharded.train(base.training))
                groups |= _partial(layer, name, shard, comm, partial)
    return groups


class Shard(nn.Module):
    """This rank's part of one A and B."""

    def __init__(self, scale: float, A: nn.Parameter, B: nn.Parameter):
        super().__init__()
        self.scale, self.A, self.B = scale, A, B

    def extra_repr(self) -> str:
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}, scale={self.scale:g}"


class ShardedLinear(nn.Module):
    """A rank's part of a frozen layer with its part of an adapter. `talks`: the ranks meet between A and B.

    Parameters have the names that they have in a GPT after `lora.lora.add_adapter`.
    """

    def __init__(self, base: nn.Module, name: str, shard: Shard, dropout: float, comm: Comm, talks: bool):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict({name: shard})
        self.dropout, self.comm, self.talks = dropout, comm, talks

    @property
    def shard(self) -> Shard:
        (shard,) = self.adapters.values()
        return shard

    def dropped(self, x_BTI: Tensor) -> Tensor:
        """Of what all ranks have; with their random numbers in step it is one mask."""
        return F.dropout(x_BTI, self.dropout) if self.dropout and self.training else x_BTI

    def products(self, x_BTI: Tensor) -> Tensor:
        """scale * A drop(x), in A's dtype except under autocast, which chooses itself."""
        shard, x_BTI = self.shard, self.dropped(x_BTI)
        if not torch.is_autocast_enabled(x_BTI.device.type):
            x_BTI = x_BTI.to(shard.A.dtype)
        return product(x_BTI, shard.A) * shard.scale


class ShardedColumn(ShardedLinear):
    def forward(self, x_BTI: Tensor) -> Tensor:
        x_BTI = x_BTI.view_as(x_BTI)  # without an arrival: the gradient is that of two readers
        y_BTO = self.base(x_BTI)
        h_BTr = self.products(x_BTI)
        if self.talks:
            h_BTr = _Gather.apply(h_BTr, self.comm)
        return (y_BTO + product(h_BTr, self.shard.B)).to(y_BTO.dtype)


class ShardedRow(ShardedLinear):
    def forward(self, x_BTI: Tensor) -> Tensor:
        h_BTr = self.products(x_BTI)
        if self.talks:
            h_BTr = _Sum.apply(h_BTr, self.comm)
        y_BTO = self.base.product(x_BTI)
        if self.base.region.keep_products:  # for the second forward pass
            y_BTO = y_BTO.clone()
        start, _ = piece_of(self.shard.B).box[0]
        return self.base.leave(_AddPart.apply(y_BTO, F.linear(h_BTr, self.shard.B), start))

    def dropped(self, x_BTI: Tensor) -> Tensor:
        """Each rank has inputs of its own here, and so a mask of its own."""
        if not (self.dropout and self.training):
            return x_BTI
        with local_random(self.comm):
            return super().dropped(x_BTI)


def product(x_BTI: Tensor, factor: Tensor) -> Tensor:
    """x times a dense or a packed block-diagonal factor (O, I / blocks); how many blocks are here, the shapes tell."""
    return block_linear(x_BTI, factor, x_BTI.shape[-1] // factor.shape[1])


class _AddPart(torch.autograd.Function):
    """The outputs of one rank's rows of B are added over the total. Through a view of it, autograd would copy the
    gradient of all outputs, and `total[..., start:stop] += part` the part once more forward."""

    @staticmethod
    def forward(ctx, total_BTO, part_BTo, start):
        ctx.mark_dirty(total_BTO)
        ctx.columns = slice(start, start + part_BTo.shape[-1])
        total_BTO[..., ctx.columns].add_(part_BTo)
        return total_BTO

    @staticmethod
    def backward(ctx, gradient_BTO):
        return gradient_BTO, gradient_BTO[..., ctx.columns], None


class _Gather(torch.autograd.Function):
    """Each rank's r / W products become all r on every rank; the gradients of all are summed, and each gets its own."""

    @staticmethod
    def forward(ctx, h_BTr, comm):
        ctx.comm, h_WBTr = comm, h_BTr.new_empty(comm.size, *h_BTr.shape)
        comm.all_gather(h_BTr.contiguous(), h_WBTr, tag=GATHER)
        return h_WBTr.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx, gradient_BTR):
        of_WBTr = gradient_BTR.unflatten(-1, (ctx.comm.size, -1)).movedim(-2, 0).contiguous()
        of_BTr = torch.empty_like(of_WBTr[0])
        ctx.comm.reduce_scatter(of_WBTr, of_BTr, tag=GATHER)
        return of_BTr, None


class _Sum(torch.autograd.Function):
    """Each rank's terms of the r products become their sum, of which every rank reads another part of the outputs."""

    @staticmethod
    def forward(ctx, h_BTr, comm):
        ctx.comm = comm
        return _summed(h_BTr, comm)

    @staticmethod
    def backward(ctx, gradient_BTr):
        return _summed(gradient_BTr, ctx.comm), None


def _summed(h_BTr: Tensor, comm: Comm) -> Tensor:
    total_BTr = h_BTr.clone(memory_format=torch.contiguous_format)
    comm.all_reduce(total_BTr, tag=SUM)
    return total_BTr


# ---- the whole adapter -----------------------------------------------------------------------------------------------


def sharded_layers(stage: nn.Module) -> dict[str, ShardedLinear]:
    return {name: module for name, module in stage.named_modules() if isinstance(module, ShardedLinear)}


def gather_adapter(stage: StageGPT, comm: Comm) -> dict[str, Tensor]:
    """The adapter of one process, this stage's layers of it, by the names of `GPT.named_parameters` after
    `add_adapter`; on rank 0 of the tp group, nothing on the others. All ranks call it."""
    return gather_tensors({name: (p.detach(), piece_of(p)) for name, p in _parameters(stage).items()}, comm)


@torch.no_grad()
def scatter_adapter(stage: StageGPT, tensors: Mapping[str, Tensor]) -> None:
    """This rank's pieces of such tensors, which every rank has.

    Raises ValueError, before anything is changed, for names that are missing or, where the stage is the whole model,
    too many, for other shapes, for types that would be rounded, and for NaN and infinity.
    """
    named = _parameters(stage)
    if missing := [name for name in named if name not in tensors]:
        raise ValueError(f"{', '.join(missing)}: missing among the {len(tensors)} tensors")
    if stage.first and stage.last and (more := [name for name in tensors if name not in named]):
        raise ValueError(f"{', '.join(more)}: expected {', '.join(named)} only")
    for name, p in named.items():
        if tuple(tensors[name].shape) != piece_of(p).shape:
            raise ValueError(f"{name} of shape {tuple(tensors[name].shape)}: expected {piece_of(p).shape}")
        if torch.promote_types(tensors[name].dtype, p.dtype) != p.dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}: expected {p.dtype}, or fewer bits")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: expected finite numbers")
    for name, p in named.items():
        p.copy_(piece_of(p).of(tensors[name]))


def _parameters(stage: StageGPT) -> dict[str, nn.Parameter]:
    if not (layers := sharded_layers(stage)):
        raise ValueError("a stage without an adapter: expected one after shard_adapter")
    mine = {id(p) for layer in layers.values() for p in layer.adapters.parameters()}
    return {name: p for name, p in stage.named_parameters() if id(p) in mine}


# ---- what is partial, what is refused --------------------------------------------------------------------------------


def _partial(layer: str, name: str, shard: Shard, comm: Comm, partial: Mapping[str, Comm]) -> dict[str, Comm]:
    """Ranks that have the same factor have different outputs, inputs or heads beside it, and so different gradients."""
    groups = {}
    for factor, p in (("A", shard.A), ("B", shard.B)):
        if p.piece.box_shape == p.piece.shape:
            groups[f"{layer}.adapters.{name}.{factor}"] = comm
        elif p.piece.copies > 1:
            groups[f"{layer}.adapters.{name}.{factor}"] = partial[f"{layer}.weight"]
    return groups


def _check_stage(
    stage: StageGPT, places: list[Place], sharding: Sharding, comm: Comm, partial: Mapping[str, Comm]
) -> None:
    if sharded_layers(stage):
        raise ValueError("a stage that has an adapter: expected one without")
    if any(p.is_meta for p in stage.parameters()):
        raise ValueError("a stage on the meta device: expected `materialise` first")
    modules = dict(stage.named_modules())
    for layer in (layer for place in places for layer in place.layers if layer in modules):
        base = modules[layer]
        if not isinstance(base, ColumnLinear | RowLinear):
            raise ValueError(f"{layer} is a {type(base).__name__}: expected a stage after `parallelise`")
        copies = piece_of(base.weight).copies
        if copies > 1 and sharding == "block-diagonal":
            raise ValueError(f"{layer}, which {copies} ranks share, with block-diagonal factors: expected at least as "
                             f"many key/value heads as ranks, {comm.size}")  # fmt: skip
        if copies > 1 and f"{layer}.weight" not in partial:
            raise ValueError(f"{layer}, which {copies} ranks share: expected what `parallelise` returned as `partial`")


def _whole(stage: StageGPT) -> GPT:
    """The model of one process, without storage."""
    with torch.device("meta"):
        return GPT(stage.config, seed=None)


def _like(whole: GPT, stage: StageGPT, layer: str) -> SimpleNamespace:
    """What `new_factors` reads of a layer: the sizes of the whole one, dtype and device of the stage."""
    module, weight = whole.get_submodule(layer), next(stage.parameters())
    return SimpleNamespace(in_features=module.in_features, out_features=module.out_features, weight=weight)
