"""Steps of the toy model in which gradients come in every order that a strategy must bear, and what one process gets.

A step is some backward passes, each under no_sync or not, with weight gradients at once or late; ranks take different
branches, so that each has other parameters without gradient.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.comm import Kind
from parallel.deferred import WeightGradients, run
from parallel.mesh import Layout, Mesh
from parallel.strategy import clip
from tests.parallel.data_ranks import ZERO, Toy, make_strategy
from tests.parallel.gpts import error


@dataclass(frozen=True)
class Pass:
    sync: bool = True
    late: bool = False  # weight gradients of some layers are computed only after all passes
    spread: int = 1  # rank r takes branch spread * r of 3: with 0 all ranks take the first
    skip: int = -1  # this rank makes no backward pass


BUCKET_MB = 3e-4  # 39 numbers: some buckets have one parameter, some more
WHOLE = ("square.weight", "branches.0.weight", "branches.2.weight", "last.weight")  # under ZeRO these have owners

STEPS = {
    "plain": [Pass(spread=0)],
    "branches": [Pass()],
    "two at once": [Pass(), Pass(spread=2)],
    "three at once": [Pass(spread=0), Pass(), Pass(spread=2)],
    "the last": [Pass(sync=False), Pass()],
    "the first": [Pass(), Pass(sync=False, spread=2)],
    "none": [Pass(sync=False), Pass(sync=False, spread=0)],
    "late": [Pass(late=True)],
    "late after the hook": [Pass(), Pass(sync=False, late=True)],
    "one rank idle": [Pass(spread=0, skip=1), Pass(spread=0)],
    "one rank idle at last": [Pass(spread=0), Pass(spread=0, skip=0)],
}


def loss_of(toy: Toy, rank: int, step: int, number: int, one: Pass) -> Tensor:
    x_BC = torch.randn(
        4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + 10 * number + rank)
    )
    return toy(x_BC, one.spread * rank % 3)


def truth(toy: Toy, W: int, step: int, passes: list[Pass]) -> None:
    """Leaves the gradient of the mean over the ranks in toy."""
    for number, one in enumerate(passes):
        for rank in range(W):
            if rank != one.skip:
                (loss_of(toy, rank, step, number, one) / len(passes) / W).backward()


def check_toy(rank: int, W: int, names: list[str], kind: Kind, fsdp: int) -> list[str]:
    """What is wrong by more than 1e-12: nothing, if all is right."""
    mesh = Mesh(Layout(dp=W // fsdp, fsdp=fsdp), rank, W)
    wrong = []
    for name in names:
        stage = Toy(seed=rank)
        options = {"whole": WHOLE} if name in ZERO else {}
        worst = _steps(make_strategy(name, [stage], mesh, kind, BUCKET_MB, **options), stage, rank, W)
        wrong += [f"{name} {where}: {e}" for where, e in worst.items() if not e <= 1e-12]
    return wrong


def _steps(strategy, stage: Toy, rank: int, W: int) -> dict[str, float]:
    want = Toy(seed=0)  # all ranks begin with those of the first
    assert all(torch.equal(p, q) for p, q in zip(stage.parameters(), want.parameters(), strict=True))
    queue = WeightGradients()
    queue.attach(stage)
    worst = {}
    for step, (label, passes) in enumerate(STEPS.items()):
        truth(want, W, step, passes)
        for number, one in enumerate(passes):
            if rank != one.skip:
                queue.open = one.late
                with nullcontext() if one.sync else strategy.no_sync():
                    (loss_of(stage, rank, step, number, one) / len(passes)).backward()
        queue.open = False
        run(queue.take())
        strategy.finish()
        worst[label] = gradient_error(strategy, want)
        norm = clip(strategy, 0.5)
        worst[f"{label}, norm"] = abs(norm - torch.nn.utils.clip_grad_norm_(want.parameters(), 0.5).item())
        descend(strategy.parameters().values())
        strategy.stepped()
        strategy.zero_grad()
        descend(want.parameters())
        want.zero_grad()
        named = dict(want.named_parameters())
        worst[f"{label}, weights"] = max(error(p.detach(), named[n].detach()) for n, p in stage.named_parameters())
    assert stage.frozen.grad is None and torch.equal(stage.frozen, want.frozen)
    return worst


@torch.no_grad()
def descend(parameters: Iterable[nn.Parameter]) -> None:
    """SGD. Those of torch.optim import a compiler first, for a second on each rank."""
    for p in parameters:
        if p.grad is not None:
            p -= 0.5 * p.grad


def gradient_error(strategy, want: Toy) -> float:
    whole = {name: p.grad for name, p in want.named_parameters()}
    errors, pieces = [0.0], strategy.pieces()
    for name, p in strategy.parameters().items():
        if p.grad is None:
            assert whole[name] is None or not whole[name].any(), name
        elif whole[name] is None:
            assert not p.grad.any(), name
        else:
            errors.append(error(p.grad, pieces[name].of(whole[name]).view(p.shape)))
    return max(errors)
