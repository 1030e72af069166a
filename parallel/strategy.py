"""What the trainer asks of whoever keeps the parameters of several ranks together: plain data parallelism, ZeRO, FSDP.

Every rank of a data group computes the mean loss of its own rows. A strategy turns those gradients into that of the
mean over all ranks, wherever it keeps them, and names the tensors that this rank's optimizer steps. The order of calls:

    for each part of the batch but the last:  with strategy.no_sync(): loss.backward()
    for the last:                             loss.backward()
    strategy.finish()                         gradients are averaged, in strategy.parameters()[name].grad
    sum_partial(...); clip(...); optimizer.step()
    strategy.stepped()                        everybody computes with the new weights
    strategy.zero_grad()
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from parallel.comm import Comm
from parallel.model import StageGPT
from parallel.pieces import Piece


class Strategy:
    """Names are the GPT's; the stages of one rank share none. Parameters that require no gradient take no part."""

    stages: Sequence[StageGPT]
    split_over: tuple[Comm, ...] = ()  # groups over whose ranks `parameters` are split: each element is on one of them

    def parameters(self) -> dict[str, nn.Parameter]:
        """What this rank's optimizer steps: whole parameters, or flat parts of them. Always the same objects."""
        raise NotImplementedError

    def pieces(self) -> dict[str, Piece]:
        """Which part of the whole parameter each of `parameters` is; optimizer states of its shape are so too."""
        raise NotImplementedError

    def no_sync(self) -> AbstractContextManager:
        """Inside, backward passes only add up gradients on this rank."""
        raise NotImplementedError

    def finish(self) -> None:
        """Ends a step's backward passes: averages whatever is not averaged yet, also where no hook saw the gradient
        come (under no_sync, or weight gradients computed late), and waits. A parameter that no rank used has gradient
        None or zero; one that some rank used has the mean, missing ones counting as zero."""
        raise NotImplementedError

    def stepped(self) -> None:
        """After optimizer.step()."""

    def zero_grad(self) -> None:
        for p in self.parameters().values():
            p.grad = None


def sum_partial(strategy: Strategy, groups: Mapping[str, Comm]) -> None:
    """Adds up gradients of which several ranks of another axis have a part each, by parameter name: gains under
    sequence parallelism, key/value heads that ranks share, an embedding that is also the head of another stage."""
    parameters, device = strategy.parameters(), _device(strategy)
    for name in sorted(groups):
        if name in parameters:
            p = parameters[name]
            total = (torch.zeros_like(p) if p.grad is None else p.grad.contiguous()).to(device)
            groups[name].all_reduce(total, tag=f"partial gradient of {name}")
            p.grad = total.to(p.device)


def global_norm(strategy: Strategy, over: Iterable[Comm] = ()) -> Tensor:
    """The norm of the whole model's gradient, each number of one process counted once; float64, the same on all ranks.

    `over` are the groups along tp and pp, whose ranks have different parts of the model (or copies, see Piece.copies).
    """
    parameters, pieces = strategy.parameters(), strategy.pieces()
    total = torch.zeros((), dtype=torch.float64, device=_device(strategy))
    for name, p in parameters.items():
        if p.grad is not None:
            square = torch.linalg.vector_norm(p.grad, dtype=torch.float64).square() / pieces[name].copies
            total += square.to(total.device)
    for comm in (*strategy.split_over, *over):
        comm.all_reduce(total, tag="gradient norm")
    return total.sqrt()


def clip(strategy: Strategy, most: float, over: Iterable[Comm] = ()) -> float:
    """Scales the gradient down to this norm if it is longer, as torch's clip_grad_norm_ does; 0 leaves it. Returns the
    norm before."""
    norm = global_norm(strategy, over)
    if most:
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for p in strategy.parameters().values():
            if p.grad is not None:
                p.grad.mul_(factor.to(p.grad))
    value = norm.item()
    assert value >= 0 or math.isnan(value)
    return value


def _device(strategy: Strategy) -> torch.device:
    """Where the model computes, and ranks can talk: what is stepped may lie elsewhere (FSDP's offload)."""
    return next(iter(strategy.stages[0].parameters())).device
