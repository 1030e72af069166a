"""Dropout over tp: own masks in the branches, one mask for the stream, the same again after a restore or recomputed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.dist import spawn
from parallel.comm import make_comm
from parallel.mesh import Layout, Mesh
from parallel.random_state import local_random, seed_ranks
from parallel.tensor_linear import ColumnLinear, RowLinear
from parallel.tensor_region import Region
from tests.parallel.cut_gpts import meet
from tests.parallel.gpts import error


def draw(rank, world_size):
    mesh, comm = meet(rank, world_size)
    seed_ranks(mesh, 5)
    drawn = [torch.rand(3).tolist()]
    for _ in range(2):
        with local_random(comm):
            drawn.append(torch.rand(3).tolist())
        drawn.append(torch.rand(3).tolist())
    saved = torch.get_rng_state()
    with pytest.raises(KeyError), local_random(comm):
        torch.rand(rank + 1)  # as many as it likes
        raise KeyError
    drawn.append(torch.rand(3).tolist())
    with local_random(comm):
        drawn.append(torch.rand(3).tolist())
    torch.set_rng_state(saved)
    with local_random(comm):
        torch.rand(100)
    again = [torch.rand(3).tolist()]
    with local_random(comm):
        again.append(torch.rand(3).tolist())
    assert again == drawn[-2:]
    return drawn


def test_local_regions_differ_and_what_is_between_is_equal():
    ranks = spawn(draw, 3)
    assert ranks == spawn(draw, 3)  # from run to run
    local = [1, 3, 6]
    for place in range(7):
        numbers = {tuple(drawn[place]) for drawn in ranks}
        assert len(numbers) == (3 if place in local else 1), place
    assert len({tuple(numbers) for drawn in ranks for numbers in drawn}) == 4 + 3 * 3  # none comes twice


def seeds(rank, world_size):
    mesh = Mesh(Layout(pp=2, dp=2, tp=2), rank, world_size)
    numbers = []
    for shared in (("tp",), ("tp", "pp"), ()):
        seed_ranks(mesh, 11, shared)
        numbers.append(torch.rand(()).item())
    return numbers


def test_seeds_are_alike_along_the_shared_axes_alone():
    along_tp, along_both, apart = zip(*(seeds(rank, 8) for rank in range(8)), strict=True)
    assert [along_tp.index(number) for number in along_tp] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert [along_both.index(number) for number in along_both] == [0, 0, 2, 2, 0, 0, 2, 2]
    assert len(set(apart)) == 8
    with pytest.raises(ValueError, match="axis 'tensor': expected one of pp, dp"):
        seed_ranks(Mesh(Layout()), 1, ("tensor",))


class Block(nn.Module):
    """A branch with dropout inside, where each rank has its channels, and after it, where all have the stream."""

    def __init__(self, up, down, region, comm):
        super().__init__()
        self.up, self.down, self.region, self.comm, self.masks = up, down, region, comm, []

    def forward(self, x_BTC):
        h_BTF = F.gelu(self.up(self.region.enter(x_BTC)))
        with local_random(self.comm):
            inner_BTF = F.dropout(torch.ones_like(h_BTF), 0.5)
        y_BTC = self.down(h_BTF * inner_BTF)
        outer_BTC = F.dropout(torch.ones_like(y_BTC), 0.25)
        self.masks.append((inner_BTF, outer_BTC))
        return x_BTC + y_BTC * outer_BTC


def check_block(rank, world_size, recompute):
    mesh, comm = meet(rank, world_size)
    seed_ranks(mesh, 3)
    generator = torch.Generator().manual_seed(0)
    up, down = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for p in (*up.parameters(), *down.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    channels = (8 * rank // world_size, 8 * (rank + 1) // world_size)
    region = Region(comm)
    block = Block(ColumnLinear(up, channels), RowLinear(down, channels, region), region, comm)
    y = block(block(x)) if not recompute else checkpoint_twice(block, x)
    y.square().sum().backward()
    got = {"y": y.detach(), "x": x.grad.clone(), "up": block.up.weight.grad, "down": block.down.weight.grad}
    masks = block.masks[:2]
    if recompute:  # the last block is recomputed first
        for first, again in zip(masks, reversed(block.masks[2:]), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    x.grad = None
    whole = x
    for inner_BTF, outer_BTC in masks:
        same = outer_BTC.clone()
        comm.all_reduce(same, "max")
        assert torch.equal(same, outer_BTC)
        parts = inner_BTF.new_empty(world_size, *inner_BTF.shape)
        comm.all_gather(inner_BTF, parts)
        assert not torch.equal(parts[0], parts[1])
        whole = whole + down(F.gelu(up(whole)) * torch.cat(list(parts), dim=-1)) * outer_BTC
    whole.square().sum().backward()
    cut = slice(*channels)
    want = {"y": whole.detach(), "x": x.grad, "up": up.weight.grad[cut], "down": down.weight.grad[:, cut]}
    return {name: error(got[name], want[name]) for name in want}


def checkpoint_twice(block, x):
    for _ in range(2):
        x = checkpoint(block, x, use_reentrant=False)
    return x


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_with_dropout_is_one_process_with_the_same_masks(recompute):
    for found in spawn(check_block, 2, recompute):
        for name, value in found.items():
            assert value <= 1e-12, name


def test_a_group_of_one():
    comm = make_comm(Mesh(Layout()).group("tp"))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with local_random(comm):
        torch.rand(5)
    assert not torch.equal(before, torch.get_rng_state())  # one number was drawn, so the next region differs
