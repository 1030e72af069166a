"""Linear layers of which each rank has a part: rows of the weight (column-parallel) or columns of it (row-parallel).

A weight is (outputs, inputs); the names are the literature's, which writes it the other way round. `project` computes
several column-parallel layers of one input together: with overlap their backward pass has the gradient of the input
first, starts its sum over the ranks, and computes the weights' gradients meanwhile. Weight gradients can wait
(parallel/deferred.py). Refused: anything but torch's Linear to begin with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.deferred import weight_gradient
from parallel.pieces import Box, Piece, piece_of
from parallel.tensor_region import Region


def part(p: nn.Parameter, box: Box, copies: int = 1) -> nn.Parameter:
    """A parameter that is this box of a whole one, noted as its piece; `copies` ranks of the group have the same."""
    whole = piece_of(p)
    piece = Piece(whole.shape, box, None, whole.copies * copies)
    new = nn.Parameter(piece.of(p.detach()).clone(), p.requires_grad)
    new.piece = piece
    return new


class ColumnLinear(nn.Linear):
    """The outputs [start, stop) of a linear layer. The bias is cut like the weight."""

    can_defer = True

    def __init__(self, whole: nn.Linear, outputs: tuple[int, int], copies: int = 1):
        super().__init__(whole.in_features, outputs[1] - outputs[0], bias=whole.bias is not None, device="meta")
        self.weight = part(whole.weight, (outputs, (0, whole.in_features)), copies)
        if whole.bias is not None:
            self.bias = part(whole.bias, (outputs,), copies)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return project(x_BTC, self)[0]


class RowLinear(nn.Linear):
    """A linear layer of the inputs [start, stop), summed over the ranks; then the bias, which all ranks have, once."""

    can_defer = True

    def __init__(self, whole: nn.Linear, inputs: tuple[int, int], region: Region):
        super().__init__(inputs[1] - inputs[0], whole.out_features, bias=whole.bias is not None, device="meta")
        self.region = region
        self.weight = part(whole.weight, ((0, whole.out_features), inputs))
        if whole.bias is not None:
            self.bias = part(whole.bias, ((0, whole.out_features),), region.comm.size)

    def forward(self, x_BTF: Tensor) -> Tensor:
        return self.leave(self.product(x_BTF))

    def product(self, x_BTF: Tensor) -> Tensor:
        """This rank's term of the sum, for those who have something to add to it before `leave`."""
        return _Project.apply(x_BTF, None, self.weight, None)[0]

    def leave(self, x_BTC: Tensor) -> Tensor:
        """The layer's result, of the ranks' terms, which are spent."""
        x = self.region.leave(x_BTC)
        return x if self.bias is None else x + self.bias.to(x.dtype)


def project(x_BTC: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of these layers makes of an x_BTC that nobody else reads, if `Region.enter` made it.

    If one is no ColumnLinear, all are called one by one, and the sum of the gradient waits for the last of them.
    """
    if not all(isinstance(layer, ColumnLinear) for layer in layers):
        x_BTC = x_BTC.view_as(x_BTC)  # without an arrival: no layer knows when the gradient is whole
        return tuple(layer(x_BTC) for layer in layers)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    return _Project.apply(x_BTC, getattr(x_BTC, "arrival", None), *parameters)


class _Project(torch.autograd.Function):
    """parameters are weight, bias (or None), weight, bias, ...; arrival is where the gradient of x goes, if at once.

    The casts are for autocast, which has the products in another dtype than the weights.
    """

    @staticmethod
    def forward(ctx, x, arrival, *parameters):
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2::2]) else None)  # frozen weights do not ask for it
        ctx.arrival, ctx.weights, ctx.shape, ctx.dtype = arrival, parameters[::2], x.shape, x.dtype
        return tuple(F.linear(x, w, b) for w, b in zip(parameters[::2], parameters[1::2], strict=True))

    @staticmethod
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        rows = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _of_input(rows, ctx.weights).view(ctx.shape).to(ctx.dtype)
            if ctx.arrival is not None:
                ctx.arrival.start(of_x)
        of_parameters: list[Tensor | None] = []
        for i, (row, weight) in enumerate(zip(rows, ctx.weights, strict=True)):
            wanted, bias_wanted = ctx.needs_input_grad[2 + 2 * i : 4 + 2 * i]
            of_parameters.append(weight_gradient(weight, _job(row, x, weight.dtype)) if wanted else None)
            of_parameters.append(row.sum(0, dtype=weight.dtype) if bias_wanted else None)
        return of_x, None, *of_parameters


def _of_input(rows: list[Tensor], weights: tuple[Tensor, ...]) -> Tensor:
    total = rows[0] @ weights[0].to(rows[0].dtype)
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total.addmm_(row, weight.to(row.dtype))
    return total


def _job(row: Tensor, x: Tensor, dtype: torch.dtype):
    return lambda: (row.mT @ x.reshape(-1, x.shape[-1]).to(row.dtype)).to(dtype)
