"""Weight gradients that wait, against torch's own Linear."""

import pytest
import torch
from torch import nn

from parallel import deferred
from parallel.deferred import DeferrableLinear, WeightGradients


def pair(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, DeferrableLinear]:
    torch.manual_seed(0)
    theirs = nn.Linear(5, 7, bias=bias, dtype=dtype)
    ours = DeferrableLinear(5, 7, bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(layer: nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (0, 5)])
def test_without_a_queue_it_is_torchs_linear(bias, shape):
    theirs, ours = pair(bias)
    x = torch.randn(shape, dtype=torch.float64)
    for got, want in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_non_contiguous_input():
    theirs, ours = pair()
    x = torch.randn(5, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    for got, want in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_gradients_check_numerically():
    layer = DeferrableLinear(3, 2, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(lambda x, w, b: deferred._Linear.apply(x, w, b), inputs)


def test_jobs_wait_and_add_up():
    theirs, ours = pair()
    queue = WeightGradients()
    queue.attach(nn.Sequential(ours, nn.LayerNorm(7)))
    xs = [torch.randn(3, 5, dtype=torch.float64) for _ in range(2)]
    queue.open = True
    for x in xs:
        ours(x).square().sum().backward()
    queue.open = False
    assert ours.weight.grad is None and ours.bias.grad is not None  # only the matrix waits
    jobs = queue.take()
    assert len(jobs) == 2 and queue.take() == []
    for job in jobs:
        deferred.run([job])
    for x in xs:
        theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, atol=1e-12, rtol=1e-12)


def test_a_closed_queue_changes_nothing():
    theirs, ours = pair()
    queue = WeightGradients()
    queue.attach(ours)
    x = torch.randn(3, 5, dtype=torch.float64)
    for got, want in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert queue.take() == []


def test_frozen_parameters_make_no_job():
    _, ours = pair()
    queue = WeightGradients()
    queue.attach(ours)
    ours.weight.requires_grad_(False)
    queue.open = True
    got = gradients(ours, torch.randn(3, 5, dtype=torch.float64))
    assert queue.take() == [] and got[1] is None and got[0] is not None and got[2] is not None


@pytest.mark.parametrize("waits", [False, True])
def test_under_autocast_as_torchs_linear(waits):
    theirs, ours = pair(dtype=torch.float32)
    queue = WeightGradients()
    queue.attach(ours)
    x = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [layer(x).float().square().sum() for layer in (theirs, ours)]
    losses[0].backward()
    queue.open = waits
    losses[1].backward()
    deferred.run(queue.take())
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad, want.grad, atol=0, rtol=2**-7)
