"""Muon and what came after it against loops over single matrices in float64, and N ranks against one."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from common.dist import spawn
from minigpt.optim import Muon as PlainMuon
from minigpt.optim import orthogonalize
from parallel.comm import make_comm
from parallel.mesh import Layout, Mesh
from speedrun.optim import Muon, Rows, clip, evened, halves, joined, share

SHAPES = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4), (4, 6)]
TABLES = [(8, 3), (7,), (6, 2), ()]


def matrices(dtype=torch.float64, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def give_gradients(parameters, step: int, rank: int = 0) -> None:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def errors(ours, theirs) -> float:
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def test_without_extras_it_is_stage_2s_muon():
    ours, theirs = matrices(), matrices()
    a = Muon(ours, lr=0.03, momentum=0.9, weight_decay=0.0, dtype=torch.float64)
    b = PlainMuon(theirs, lr=0.03, momentum=0.9, dtype=torch.float64)
    for step in range(4):
        give_gradients(ours, step), give_gradients(theirs, step)
        a.step(), b.step()
    assert errors(ours, theirs) <= 1e-12


def by_hand(p, buffer, second, g, *, lr, momentum, beta2, decay, cautious):
    buffer += (1 - momentum) * (g - buffer)
    o = orthogonalize((g + momentum * (buffer - g))[None], torch.float64)[0]
    R, C = p.shape
    norm = o.norm()
    mean = o.square().mean(1, keepdim=True) if R >= C else o.square().mean(0, keepdim=True)
    second += (1 - beta2) * (mean - second)
    o = o / second.sqrt()
    o = o * norm / o.norm()
    rate = lr * math.sqrt(max(1, R / C))
    for i in range(R):
        for j in range(C):
            if not cautious or o[i, j] * p[i, j] > 0:
                p[i, j] *= 1 - rate * decay
    p -= rate * o


@pytest.mark.parametrize("cautious", [False, True])
def test_normuon_with_decay_by_hand(cautious):
    ours, theirs = matrices(), [p.detach().clone() for p in matrices()]
    buffers = [torch.zeros_like(p) for p in theirs]
    seconds = [p.new_zeros((p.shape[0], 1) if p.shape[0] >= p.shape[1] else (1, p.shape[1])) for p in theirs]
    options = {"lr": 0.05, "momentum": 0.8, "beta2": 0.9}
    optimizer = Muon(ours, **options, weight_decay=0.7, cautious=cautious, dtype=torch.float64)
    for step in range(4):
        give_gradients(ours, step)
        optimizer.step()
        for p, buffer, second, own in zip(theirs, buffers, seconds, ours, strict=True):
            by_hand(p, buffer, second, own.grad, **options, decay=0.7, cautious=cautious)
    assert errors(ours, theirs) <= 1e-12


def test_evening_keeps_the_norm_and_makes_rows_alike():
    o = torch.randn(3, 8, 5, dtype=torch.float64) * torch.linspace(0.1, 3, 8, dtype=torch.float64)[:, None]
    new = evened(o, torch.zeros(3, 8, 1, dtype=torch.float64), 0.0)
    assert (new.norm(dim=(1, 2)) - o.norm(dim=(1, 2))).abs().max() <= 1e-12
    rows = new.norm(dim=2)
    assert (rows - rows.mean(1, keepdim=True)).abs().max() <= 1e-12
    assert evened(torch.zeros(1, 2, 2), torch.zeros(1, 2, 1), 0.9).abs().max() == 0  # and no NaN


def test_halves_of_floats_are_put_together_again():
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.tensor([0.0, -0.0, 1.0, -1.5])])
    high, low = halves(x[None, None])
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(joined(list(high), low).view(torch.int32), x[None, None].view(torch.int32))


def test_bfloat16_weights_go_the_way_of_float32():
    small = matrices(torch.bfloat16)
    whole = [nn.Parameter(p.detach().float()) for p in small]
    a, b = (Muon(ps, lr=1e-3, beta2=0.9, weight_decay=0.1, dtype=torch.float32) for ps in (small, whole))
    for step in range(30):  # steps far below what bfloat16 could see
        give_gradients(small, step)
        for p, q in zip(small, whole, strict=True):
            q.grad = p.grad.float()
        a.step(), b.step()
    for p, q in zip(small, whole, strict=True):
        assert torch.equal(p.detach(), halves(q.detach())[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_saved_state_goes_on_bit_for_bit(dtype):
    straight, stopped = matrices(dtype), matrices(dtype)
    options = {"lr": 0.01, "beta2": 0.95, "weight_decay": 0.1, "dtype": torch.float32}
    a, b = Muon(straight, **options), Muon(stopped, **options)
    for step in range(6):
        if step == 3:
            state, stopped = b.state_dict(), [nn.Parameter(p.detach().clone()) for p in stopped]
            b = Muon(stopped, **options)
            b.load_state_dict(state)
        for parameters, optimizer in ((straight, a), (stopped, b)):
            give_gradients(parameters, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (6 - step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, stopped, strict=True))


# -- ranks --
def tables() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in TABLES]


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-10)


def steps_on_ranks(rank: int, world_size: int, early: bool) -> tuple[list, list, dict]:
    comm = make_comm(Mesh(Layout(dp=world_size), rank, world_size).group("dp"))
    ours, rest = matrices(), tables()
    optimizers = [
        Muon(ours, lr=0.03, beta2=0.9, weight_decay=0.2, dtype=torch.float64, comm=comm),
        Rows([{"params": rest[:2]}, {"params": rest[2:], "lr": 0.03}], adamw, comm),
    ]
    for step in range(4):
        give_gradients(ours, step, rank), give_gradients(rest, step, rank)
        if early:
            for optimizer in optimizers:
                optimizer.start()
        for optimizer in optimizers:
            optimizer.step()
    owned = {
        "matrices": sum(len(state["buffer"]) for state in optimizers[0].state.values()),
        "numbers": sum(own.numel() for _, own in optimizers[1].tables),
    }
    return [p.detach() for p in ours], [p.detach() for p in rest], owned


@pytest.mark.parametrize(("world_size", "early"), [(2, True), (3, False)])
def test_ranks_are_one_process_with_the_mean_gradient(world_size, early):
    ours, rest = matrices(), tables()
    muon = Muon(ours, lr=0.03, beta2=0.9, weight_decay=0.2, dtype=torch.float64)
    others = Rows([{"params": rest[:2]}, {"params": rest[2:], "lr": 0.03}], adamw, None)
    for step in range(4):
        for parameters in (ours, rest):
            total = [torch.zeros_like(p) for p in parameters]
            for rank in range(world_size):
                give_gradients(parameters, step, rank)
                for t, p in zip(total, parameters, strict=True):
                    t += p.grad / world_size
            for t, p in zip(total, parameters, strict=True):
                p.grad = t
        muon.step(), others.step()
    results = spawn(steps_on_ranks, world_size, early)
    for got, got_rest, _ in results:
        assert errors(got, ours) <= 1e-12 and errors(got_rest, rest) <= 1e-12
        assert all(torch.equal(a, b) for a, b in zip(got, results[0][0], strict=True))
    # Of 3, 2 and 1 matrices of three shapes; of (8, 3) and (6, 2) by rows.
    assert [owned["matrices"] for _, _, owned in results] == ([4, 2] if world_size == 2 else [3, 2, 1])
    assert [owned["numbers"] for _, _, owned in results] == ([18, 18] if world_size == 2 else [4, 4, 4])


class Group(NamedTuple):
    """As much of a Comm as tells who owns what."""

    rank: int
    size: int


def test_shares_are_whole_and_disjoint():
    for count in range(9):
        for size in (1, 2, 3, 8):
            owned = [i for rank in range(size) for i in range(*share(count, Group(rank, size)))]
            assert owned == list(range(count))


def clipped_on_ranks(rank: int, world_size: int, largest: float) -> list[torch.Tensor]:
    """The mean over the ranks of what their gradients are after clipping."""
    parameters = matrices()
    give_gradients(parameters, 0, rank)
    comm = make_comm(Mesh(Layout(dp=world_size), rank, world_size).group("dp"))
    clip(parameters, largest, comm)
    for p in parameters:
        comm.all_reduce(p.grad, "mean")
    return [p.grad for p in parameters]


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_ranks_clip_the_mean_of_their_gradients(largest):
    by_rank = []
    for rank in range(2):
        give_gradients(parameters := matrices(), 0, rank)
        by_rank.append([p.grad for p in parameters])
    for p, *parts in zip(parameters, *by_rank, strict=True):
        p.grad = torch.stack(parts).mean(0)
    torch.nn.utils.clip_grad_norm_(parameters, largest)
    for got in spawn(clipped_on_ranks, 2, largest):
        assert errors(got, [p.grad for p in parameters]) <= 1e-12


# -- bad input --
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum 1.0: expected 0 to less than 1"),
        ({"beta2": math.nan}, "beta2 nan"),
        ({"lr": -1.0}, "lr -1.0: expected 0 or a positive number"),
        ({"weight_decay": math.inf}, "weight_decay inf"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(matrices(), **options)


def test_other_parameters_are_refused():
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\): expected matrices only"):
        Muon([nn.Parameter(torch.zeros(3))])
    parameters = matrices()
    give_gradients(parameters, 0)
    parameters[2].grad = None
    with pytest.raises(ValueError, match="a matrix without a gradient"):
        Muon(parameters).step()


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_gradient_that_one_of_several_ranks_lacks_is_refused(lacking):
    """Before anything is sent: a table's or a small parameter's."""
    comm, rest = Group(rank=1, size=2), tables()
    rows = Rows([{"params": rest}], adamw, comm)
    give_gradients(rest, 0)
    rest[lacking].grad = None
    shape = r"\(8, 3\)" if lacking == 0 else r"\(7,\)"
    with pytest.raises(ValueError, match=f"a parameter of shape {shape} without a gradient on rank 1"):
        rows.start()
