"""Column- and row-parallel layers against torch's Linear: odd sizes, strides, frozen parts, biases counted once."""

import pytest
import torch
from torch import nn

from common.dist import spawn
from parallel.tensor_linear import ColumnLinear, RowLinear, project
from parallel.tensor_region import Region
from tests.parallel.cut_gpts import meet
from tests.parallel.gpts import error


def layers(bias):
    """Two that read the same, one that reads both."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Linear(5, 12, bias), nn.Linear(5, 12, bias), nn.Linear(12, 7, bias)]
    for p in (p for layer in made for p in layer.parameters()):
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return made


def check_layers(rank, world_size, bias, sequence_parallel, overlap):
    _, comm = meet(rank, world_size)
    region = Region(comm, sequence_parallel, overlap)
    cases = ((2, 12, False, ""), (1, 12, True, ""), (3, 12, True, "weight"), (2, world_size, False, "input"))
    return {case: errors(region, bias, *case) for case in cases}


def errors(region, bias, B, T, strided, frozen):
    comm = region.comm
    channels = slice(comm.rank * 12 // comm.size, (comm.rank + 1) * 12 // comm.size)
    t = T // comm.size
    tokens = slice(comm.rank * t, (comm.rank + 1) * t) if region.sequence_parallel else slice(None)
    up, gate, down = layers(bias)
    up.weight.requires_grad_(frozen != "weight")
    generator = torch.Generator().manual_seed(1)
    x_BTC, weight_BTC = (torch.randn(T, B, C, generator=generator, dtype=torch.float64) for C in (5, 7))
    x_BTC, weight_BTC = x_BTC.transpose(0, 1), weight_BTC.transpose(0, 1)
    own_BTC = x_BTC[:, tokens] if strided else x_BTC[:, tokens].contiguous()
    x_BTC, own_BTC = (x.detach().requires_grad_(frozen != "input") for x in (x_BTC, own_BTC))
    y_BTC = down(up(x_BTC) * gate(x_BTC).sigmoid())
    (y_BTC * weight_BTC).sum().backward()

    my_up, my_gate = (ColumnLinear(layer, (channels.start, channels.stop)) for layer in (up, gate))
    my_down = RowLinear(down, (channels.start, channels.stop), region)
    a_BTF, b_BTF = project(region.enter(own_BTC), my_up, my_gate)
    got_BTC = my_down(a_BTF * b_BTF.sigmoid())
    (got_BTC * weight_BTC[:, tokens]).sum().backward()

    pairs = [(got_BTC, y_BTC[:, tokens]), (my_gate.weight.grad, gate.weight.grad[channels])]
    pairs.append((my_down.weight.grad, down.weight.grad[:, channels]))
    if frozen == "weight":
        assert my_up.weight.grad is None
    else:
        pairs.append((my_up.weight.grad, up.weight.grad[channels]))
    if frozen != "input":
        pairs.append((own_BTC.grad, x_BTC.grad[:, tokens]))
    if bias:
        if region.sequence_parallel:
            comm.all_reduce(my_down.bias.grad)
        pairs += [(my_down.bias.grad, down.bias.grad), (my_up.bias.grad, up.bias.grad[channels])]
    return [error(got, want) for got, want in pairs]


@pytest.mark.parametrize(
    ("ranks", "bias", "sequence_parallel", "overlap"),
    [(2, True, False, True), (3, True, True, True), (3, False, False, False), (2, True, True, False)],
)
def test_layers_are_torchs(ranks, bias, sequence_parallel, overlap):
    for found in spawn(check_layers, ranks, bias, sequence_parallel, overlap):
        for case, values in found.items():
            assert all(value <= 1e-12 for value in values), (case, values)


@pytest.mark.parametrize("trained", ["", "up", "gate"])
def test_frozen_weights_keep_no_input(trained):
    """Their gradient is all that needs it; of the input's own, the shape is enough."""
    up, gate, _ = layers(bias=False)
    for name, layer in (("up", up), ("gate", gate)):
        layer.requires_grad_(name == trained)
    parts = [ColumnLinear(layer, (3, 9)) for layer in (up, gate)]
    x_BTC, kept = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        a_BTF, b_BTF = project(x_BTC, *parts)
    assert len(kept) == bool(trained)
    (a_BTF.sum() + 2 * b_BTF.sum()).backward()
    assert error(x_BTC.grad, (up.weight[3:9].sum(0) + 2 * gate.weight[3:9].sum(0)).expand(2, 3, 5)) <= 1e-12
    grads = {"up": parts[0].weight.grad, "gate": parts[1].weight.grad}
    assert [name for name, grad in grads.items() if grad is not None] == ([trained] if trained else [])


def check_other_readers(rank, world_size):
    """A layer that has to share its input's gradient may not sum it in place."""
    _, comm = meet(rank, world_size)
    x = torch.ones(1, 2, 3, dtype=torch.float64, requires_grad=True)
    entered = Region(comm).enter(x)
    kept = []
    entered.register_hook(lambda gradient: kept.append(gradient))
    (entered * (rank + 1)).sum().backward()
    return kept[0].tolist(), x.grad.tolist()


def test_the_sum_leaves_autograds_gradient_alone():
    for rank, (kept, summed) in enumerate(spawn(check_other_readers, 2)):
        assert kept == [[[rank + 1.0] * 3] * 2]
        assert summed == [[[3.0] * 3] * 2]
