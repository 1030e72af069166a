"""Which part of an adapter each rank of a tp group has, in three ways: boxes of A and B, and what cannot be split so.

                     column-parallel layer                    row-parallel layer
                     A                 B                      A                     B
    block-diagonal   own r / W rows    own block              own block             own r / W columns
    s-lora           own r / W rows    own O / W rows         own I / W columns     own O / W rows
    replicated       whole             own O / W rows         own I / W columns     whole

A is (r, I) and B (O, r), block-diagonal ones packed as in lora/layers.py: A (r, I / N), B (O, r / N), so that a rank's
blocks are rows of them. "Own" inputs and outputs are those that stage 4 gave the rank of the frozen weight.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from lora.config import LoraConfig
from lora.targets import Place
from minigpt.model import GPT
from parallel.comm import Comm
from parallel.pieces import Box, piece_of
from parallel.tensor_linear import ColumnLinear, RowLinear, part

Sharding = Literal["block-diagonal", "s-lora", "replicated"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)


def own_parts(
    bases: list[nn.Module], A: nn.Parameter, Bs: list[nn.Parameter], sharding: Sharding, comm: Comm
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """This rank's part of an A and its Bs, beside layers that are cut already; the layers share A's. Each has a piece,
    whose `copies` count the ranks that have the same part."""
    box = _box_of_A(bases[0], sharding, comm, A)
    own_A = part(A, box, comm.size if box == _everything(A) else 1)
    pairs = []
    for base, B in zip(bases, Bs, strict=True):
        box = _box_of_B(base, sharding, comm, B)
        copies = comm.size if box == _everything(B) else piece_of(base.weight).copies
        pairs.append((own_A, part(B, box, copies)))
    return pairs


def _box_of_A(base: nn.Module, sharding: Sharding, comm: Comm, A: Tensor) -> Box:
    if isinstance(base, RowLinear) and sharding != "block-diagonal":
        return (0, len(A)), piece_of(base.weight).box[1]
    return _everything(A) if sharding == "replicated" else (_share(len(A), comm), (0, A.shape[1]))


def _box_of_B(base: nn.Module, sharding: Sharding, comm: Comm, B: Tensor) -> Box:
    if isinstance(base, ColumnLinear):
        return piece_of(base.weight).box[0], (0, B.shape[1])
    if sharding == "block-diagonal":
        return (0, len(B)), _share(B.shape[1], comm)
    return _everything(B) if sharding == "replicated" else (_share(len(B), comm), (0, B.shape[1]))


def _share(count: int, comm: Comm) -> tuple[int, int]:
    return comm.rank * count // comm.size, (comm.rank + 1) * count // comm.size


def _everything(x: Tensor) -> Box:
    return tuple((0, size) for size in x.shape)


def check_sharding(config: LoraConfig, sharding: str, ranks: int) -> None:
    """Raises ValueError for a way that does not exist, or does not go with the config's blocks."""
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding {sharding!r}: expected {', '.join(SHARDINGS)}")
    if ranks < 2:
        raise ValueError(f"sharding over {ranks} rank: expected at least 2; for one there is add_adapter")
    if sharding == "block-diagonal" and config.blocks % ranks:
        raise ValueError(f"blocks {config.blocks} over tp {ranks}: expected {ranks} or a multiple of it")
    if sharding != "block-diagonal" and config.blocks > 1:
        raise ValueError(f"blocks {config.blocks} with sharding {sharding}: expected 1, or sharding block-diagonal")


def check_place(whole: GPT, place: Place, config: LoraConfig, sharding: Sharding, ranks: int) -> None:
    """Raises ValueError for a layer of the whole model whose adapter cannot be split so."""
    names = ", ".join(place.layers)
    if place.embedding:
        raise ValueError(f"target {names}: expected linear layers, adapters of embeddings are not sharded")
    rank = config.rank_of(*place.names)
    if sharding != "replicated" and rank % ranks:
        raise ValueError(f"rank {rank} of {names} over tp {ranks}: expected a multiple of {ranks}")
    if sharding == "s-lora" and place.row and (O := whole.get_submodule(place.layers[0]).out_features) % ranks:
        raise ValueError(f"{names} of {O} outputs over tp {ranks}: expected a multiple of {ranks} for s-lora")
