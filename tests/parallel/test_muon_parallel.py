"""Muon over tp against minigpt's Muon in one process; what it moves."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from common.dist import spawn
from minigpt.optim import Muon, group_names
from parallel.muon_parallel import TensorParallelMuon
from parallel.pieces import Piece
from parallel.strategy import sum_partial
from tests.parallel.cut_gpts import Plain, cut, meet
from tests.parallel.gpts import GPT2_LIKE, SMALL, batch, error, stirred_gpt

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "dtype": torch.float64}
SIX = replace(GPT2_LIKE, heads=6, kv_heads=1, mlp_width=39, vocab_size=87)


def steps(model, loss_of, optimizer, finish, count=3):
    for number in range(count):
        loss_of(*batch(model.config, 2, 12, seed=number)).backward()
        finish()
        optimizer.step()
        model.zero_grad()


def check_steps(rank, world_size, config, few, frozen):
    mesh, comm = meet(rank, world_size)
    model = stirred_gpt(config)
    names = group_names(model)["matrices"][:few]
    named = dict(model.named_parameters())
    for name in frozen:
        named[name].requires_grad_(False)
    steps(model, model, Muon([named[name] for name in names], **OPTIONS), lambda: None)
    stage, groups = cut(config, mesh, comm, sequence_parallel=True)
    here = dict(stage.named_parameters())
    for name in frozen:
        here[name].requires_grad_(False)
    optimizer = partial(TensorParallelMuon, comm=comm)([here[name] for name in names], **OPTIONS)
    steps(stage, partial(stage, None), optimizer, lambda: sum_partial(Plain(stage), groups))
    assert all(optimizer.state[here[name]]["buffer"].shape == here[name].shape for name in names if name not in frozen)
    return max(error(p.detach(), p.piece.of(named[name].detach())) for name, p in here.items())


@pytest.mark.parametrize(
    ("ranks", "config", "few", "frozen"),
    [
        (2, SMALL, None, ("blocks.1.mlp.up.weight",)),
        (3, SIX, None, ()),
        (4, SMALL, None, ()),
        (4, GPT2_LIKE, 1, ()),  # ranks without a matrix
    ],
)
def test_steps_are_those_of_one_process(ranks, config, few, frozen):
    assert all(value <= 1e-12 for value in spawn(check_steps, ranks, config, few, frozen))


class Ear:
    def __init__(self):
        self.calls = []

    def started(self, call):
        self.calls.append((call.name, call.payload))

    def ended(self, call):
        pass


def calls_of_a_step(rank, world_size):
    ear = Ear()
    _, comm = meet(rank, world_size, listeners=(ear,))
    parameters = []
    for _ in range(8):
        p = torch.nn.Parameter(torch.ones(6, 5))
        p.piece = Piece((6 * world_size, 5), ((6 * rank, 6 * rank + 6), (0, 5)))
        p.grad = torch.ones_like(p)
        parameters.append(p)
    optimizer = TensorParallelMuon(parameters, comm, lr=0.1)
    ear.calls.clear()
    optimizer.step()
    return ear.calls


def test_a_step_moves_each_part_once_each_way():
    own = 8 * 6 * 5 * 4  # bytes of this rank's parts of all matrices
    assert spawn(calls_of_a_step, 4) == [[("all_to_all", own)] * 2] * 4


def test_ranges_are_refused():
    _, comm = meet(0, 1)
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.piece = Piece.whole((2, 6)).cut(0, 6)
    with pytest.raises(ValueError, match=r"elements \(0, 6\) of the box"):
        TensorParallelMuon([p], comm, lr=0.1)
