"""Weight gradients that wait: the backward pass of a linear layer in two halves that need not follow each other.

A pipeline stage owes the stage before it the gradient of its input, and soon; the gradient of its weights can wait
(zero-bubble pipelines, Qi et al. 2023). A weight with a WeightGradients on it as `weight.deferred` has its gradient put
there as a job, for as long as that is open; otherwise it is computed at once. Biases and gains do not wait.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Job = tuple[nn.Parameter, Callable[[], Tensor]]


class WeightGradients:
    def __init__(self) -> None:
        self.open = False
        self.jobs: list[Job] = []

    def attach(self, module: nn.Module) -> None:
        """To the weights of all layers that can wait."""
        for layer in module.modules():
            if getattr(layer, "can_defer", False):
                layer.weight.deferred = self

    def take(self) -> list[Job]:
        """The jobs since the last call."""
        jobs, self.jobs = self.jobs, []
        return jobs


@torch.no_grad()
def run(jobs: list[Job]) -> None:
    """Adds each gradient to its parameter's."""
    for weight, job in jobs:
        gradient = job()
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


def weight_gradient(weight: nn.Parameter, job: Callable[[], Tensor]) -> Tensor | None:
    """For the backward of an autograd function: the gradient job(), or None where it has been put off."""
    queue = getattr(weight, "deferred", None)
    if queue is None or not queue.open:
        return job()
    queue.jobs.append((weight, job))
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (x,), weight = ctx.saved_tensors, ctx.weight
        rows = gradient.reshape(-1, gradient.shape[-1])
        dtype = gradient.dtype  # under autocast the product's, not that of x and weight
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight.to(dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            columns = x.reshape(-1, x.shape[-1])
            of_weight = weight_gradient(weight, lambda: (rows.mT @ columns.to(dtype)).to(weight.dtype))
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias


class DeferrableLinear(nn.Linear):
    """torch's Linear whose weight gradient can wait."""

    can_defer = True

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias)
