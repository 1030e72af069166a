"""The way into a tensor-parallel branch and out of it: where the ranks of a tp group talk, forward and backward.

Megatron's operators f and g (Shoeybi et al. 2019, section 3), and with sequence parallelism (Korthikanti et al. 2022,
section 4.2.2) their cheaper twins, between which every rank has only its own tokens:

              forward                 backward                  with sequence parallelism
    enter     nothing                 all-reduce                all-gather        reduce-scatter
    leave     all-reduce              nothing                   reduce-scatter    all-gather

Shapes: B batch, T time, t the T / W tokens of one of W ranks, C width. Refused: T that W does not divide.
"""

import torch
from torch import Tensor

from parallel.comm import Comm, Work


class Region:
    """What the layers of one stage share. `overlap`: see parallel/tensor_linear.py. `keep_products`: the sum over the
    ranks is not written over this rank's product, since activation checkpointing by operation has kept that."""

    def __init__(self, comm: Comm, sequence_parallel: bool = False, overlap: bool = False, keep_products: bool = False):
        self.comm, self.sequence_parallel, self.overlap = comm, sequence_parallel, overlap
        self.keep_products = keep_products

    def enter(self, x: Tensor) -> Tensor:
        """x_BTC for the branch's column-parallel layers, of x_BTC that all ranks have, or of this rank's x_BtC."""
        arrival = Arrival(self)
        x_BTC = _Enter.apply(x, arrival)
        if self.overlap:
            x_BTC.arrival = arrival
        return x_BTC

    def leave(self, x_BTC: Tensor) -> Tensor:
        """The sum of the ranks' contiguous x_BTC, which is spent: all of it, or this rank's tokens x_BtC."""
        return _Leave.apply(x_BTC, self)

    def gather(self, x_BtC: Tensor) -> Tensor:
        """x_BTC of all ranks' tokens."""
        W, (B, t, C) = self.comm.size, x_BtC.shape
        x_WBtC = x_BtC.new_empty(W, B, t, C)
        self.comm.all_gather(x_BtC.contiguous(), x_WBtC, tag="tokens of all ranks")
        return x_WBtC.transpose(0, 1).reshape(B, W * t, C)

    def reduce(self, x_BTC: Tensor, async_: bool = False) -> tuple[Tensor, Work]:
        """The sum over the ranks, or this rank's tokens of it, and what to wait for. x_BTC is spent."""
        if not self.sequence_parallel:
            return x_BTC, self.comm.all_reduce(x_BTC, async_=async_, tag="sum of a branch")
        W, (B, T, C) = self.comm.size, x_BTC.shape
        assert T % W == 0, (T, W)
        x_WBtC = x_BTC.view(B, W, T // W, C).transpose(0, 1).contiguous()
        x_BtC = x_BTC.new_empty(B, T // W, C)
        return x_BtC, self.comm.reduce_scatter(x_WBtC, x_BtC, async_=async_, tag="sum of a branch")


class Arrival:
    """The gradient on its way back through one `enter`: a layer that owns it may start its sum before autograd asks."""

    def __init__(self, region: Region):
        self.region = region
        self.under_way: tuple[Tensor, Work] | None = None

    def start(self, gradient_BTC: Tensor) -> None:
        """With the whole gradient, for the caller no longer to touch."""
        self.under_way = self.region.reduce(gradient_BTC, async_=True)

    def finish(self, gradient_BTC: Tensor) -> Tensor:
        if self.under_way is None:  # autograd's tensor may have other readers, so the sum needs one of its own
            self.under_way = self.region.reduce(gradient_BTC.clone(memory_format=torch.contiguous_format))
        (gradient, work), self.under_way = self.under_way, None
        work.wait()
        return gradient


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, arrival):
        ctx.arrival = arrival
        return arrival.region.gather(x) if arrival.region.sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx, gradient_BTC):
        return ctx.arrival.finish(gradient_BTC), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTC, region):
        ctx.region = region
        if region.keep_products:
            x_BTC = x_BTC.clone()
        elif not region.sequence_parallel:
            ctx.mark_dirty(x_BTC)
        x, work = region.reduce(x_BTC)
        work.wait()
        return x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.region.gather(gradient) if ctx.region.sequence_parallel else gradient, None
