"""Muon under tensor parallelism: the update is the polar factor of a whole matrix, not of the parts that ranks have.

Each matrix is put together on one rank, orthogonalised there, and its parts go back: two all-to-alls, which move
W / 2 times fewer bytes than gathering every matrix on all W ranks, and no product is computed twice. Refused:
parameters of which a rank has less than its box (ZeRO and FSDP call `orthogonalize_parts` once they have the boxes).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minigpt.optim import Muon, orthogonalize
from parallel.comm import Comm
from parallel.pieces import Box, Piece, piece_of
from parallel.whole_state import boxes_of


class TensorParallelMuon(Muon):
    """minigpt's Muon for parameters that have pieces; states are of the pieces' shape.

    All ranks of `comm` step the same parameters in the same order, and the same of them have gradients.
    """

    def __init__(self, params, comm: Comm, lr: float, **options):
        super().__init__(params, lr, **options)
        self.comm = comm
        self.boxes: dict[nn.Parameter, list[Box]] = {}
        for p in (p for group in self.param_groups for p in group["params"]):
            self.boxes[p] = boxes_of(piece_of(p), comm, p.device)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(piece_of(p).shape, []).append(p)
            for same in by_shape.values():
                self._update(same, **{name: value for name, value in group.items() if name != "params"})

    def _update(self, same: list[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, **_) -> None:
        for p in same:
            if "buffer" not in self.state[p]:
                self.state[p]["buffer"] = torch.zeros_like(p)
        buffers, gradients = [self.state[p]["buffer"] for p in same], [p.grad for p in same]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        rows, columns = shape = piece_of(same[0]).shape
        updates = orthogonalize_parts(ahead, shape, [self.boxes[p] for p in same], self.comm, self.dtype)
        if weight_decay:
            torch._foreach_mul_(same, 1 - lr * weight_decay)
        torch._foreach_add_(same, updates, alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonalize_parts(
    parts: Sequence[Tensor], shape: tuple[int, int], boxes: Sequence[Sequence[Box]], comm: Comm, dtype: torch.dtype
) -> list[Tensor]:
    """`orthogonalize` of whole matrices of one shape, of which each rank has its parts and wants them back.

    boxes[i][r] is what rank r has of matrix i, which rank i % W puts together. The same arguments on all ranks but for
    `parts`.
    """
    W, mine = comm.size, range(comm.rank, len(parts), comm.size)
    own = [_numel(box[comm.rank]) for box in boxes]  # of this rank's part of each matrix
    sent = [sum(own[rank::W]) for rank in range(W)]
    received = [sum(_numel(boxes[i][rank]) for i in mine) for rank in range(W)]
    out = torch.cat([parts[i].reshape(-1) for rank in range(W) for i in range(rank, len(parts), W)])
    arrived = out.new_empty(sum(received))
    comm.all_to_all(out, arrived, sent, received, tag="updates to their owners")
    if mine:
        whole = out.new_empty(len(mine), *shape)
        targets = [(row, Piece(shape, boxes[i][rank])) for rank in range(W) for row, i in enumerate(mine)]
        for (row, piece), value in zip(targets, arrived.split([p.numel for _, p in targets]), strict=True):
            piece.put(whole[row], value)
        whole = orthogonalize(whole, dtype)
        arrived = torch.cat([piece.of(whole[row]).reshape(-1) for row, piece in targets])
    comm.all_to_all(arrived, out, received, sent, tag="updates from their owners")
    order = [i for rank in range(W) for i in range(rank, len(parts), W)]
    updates = dict(zip(order, out.split([own[i] for i in order]), strict=True))
    return [updates[i].view(part.shape) for i, part in enumerate(parts)]


def _numel(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
