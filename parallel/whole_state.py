"""Between the parts that the ranks of a tp group have and the state dict of one process: load, gather.

Both go by the pieces of the parameters alone, one parameter at a time. Refused: a state of another model, parameters of
which a rank has less than its box (FSDP's: gather those first).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from parallel.comm import Comm
from parallel.pieces import Box, Piece, piece_of


@torch.no_grad()
def load_whole(stage: nn.Module, state: Mapping[str, Tensor]) -> None:
    """This rank's pieces of a single-process state dict, which may hold more than this stage's names.

    Raises ValueError for a name that is missing and for another shape, before any parameter is touched.
    """
    named = {name: (p, piece_of(p)) for name, p in stage.named_parameters()}
    for name, (_, piece) in named.items():
        if name not in state:
            raise ValueError(f"{name}: missing among the {len(state)} names of the state")
        if tuple(state[name].shape) != piece.shape:
            raise ValueError(f"{name} of shape {tuple(state[name].shape)}: expected {piece.shape}")
    for name, (p, piece) in named.items():
        p.copy_(piece.of(state[name]))


def gather_whole(stage: nn.Module, comm: Comm) -> dict[str, Tensor]:
    """The whole parameters by name on rank 0 of the tp group, nothing on the others; all ranks call it."""
    return gather_tensors({name: (p.detach(), piece_of(p)) for name, p in stage.named_parameters()}, comm)


@torch.no_grad()
def gather_tensors(tensors: Mapping[str, tuple[Tensor, Piece]], comm: Comm) -> dict[str, Tensor]:
    """Likewise of any tensors that are such pieces: gradients, optimizer states."""
    whole = {}
    for name, (tensor, piece) in tensors.items():
        boxes = boxes_of(piece, comm, tensor.device)
        if comm.rank:
            comm.send(tensor.contiguous(), 0, tag=name)
            continue
        whole[name] = tensor.new_empty(piece.shape)
        for rank, box in enumerate(boxes):
            other = Piece(piece.shape, box)
            value = tensor if rank == 0 else tensor.new_empty(other.box_shape)
            if rank:
                comm.receive(value, rank, tag=name)
            other.put(whole[name], value)
    return whole


def boxes_of(piece: Piece, comm: Comm, device: torch.device) -> list[Box]:
    """Every rank's box of a parameter. Raises ValueError for a piece that is only a range of its box."""
    if piece.flat is not None:
        raise ValueError(f"elements {piece.flat} of the box {piece.box}: expected all of it")
    mine = torch.tensor(piece.box, dtype=torch.int64, device=device).view(-1)
    every = mine.new_empty(comm.size, len(mine))
    comm.all_gather(mine, every, tag="boxes")
    return [tuple((start, stop) for start, stop in zip(row[::2], row[1::2], strict=True)) for row in every.tolist()]
