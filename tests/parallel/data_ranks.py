"""What the ranks do in the tests of data parallelism and ZeRO: train a GPT of gpts.py, or a toy with odd parameters.

`train` returns what a rank has; `check` puts that together and holds it against one process. `Toy` has parameters of
odd sizes, one used twice, one frozen, one never used, and branches that only some ranks take.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.optim import Muon
from parallel.comm import Call, Kind, make_comm
from parallel.data_parallel import DATA_PARALLEL
from parallel.deferred import DeferrableLinear
from parallel.mesh import Layout, Mesh
from parallel.model import StageGPT, materialise, whole_shapes
from parallel.pieces import Piece
from parallel.strategy import Strategy, clip
from parallel.zero import Zero1, Zero2
from tests.parallel.gpts import CONFIGS, batch, error, single, stir

ZERO = {"zero1": Zero1, "zero2": Zero2}
BUCKET_MB = 0.01  # a dozen buckets for the small GPTs
EPS = 1e-6  # key biases have gradients of 1e-17, which are rounding: with 1e-8 Adam would make weights of them
BATCHES = 3


@dataclass(frozen=True)
class Case:
    strategy: str  # of DATA_PARALLEL or ZERO
    config: str = "ours"
    optimizer: str = "sgd"
    accumulate: int = 1
    sync: str = "last"  # which backward passes of a step are not under no_sync: last, all, none
    frozen: tuple[str, ...] = ()
    clip: float = 0.0
    fsdp: int = 0  # ranks that share the model, for ZERO; 0: all. The others are replicas
    kind: Kind = "torch"


def matrices(names: Sequence[str], parameters: dict[str, Tensor]) -> list[str]:
    """Those that Muon steps."""
    return [n for n in names if n.startswith("blocks") and parameters[n].ndim == 2 and "embedding" not in n]


class Several:
    """Some optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def make_optimizer(kind: str, parameters: dict[str, nn.Parameter]):
    """For these of the model's parameters, or parts of them."""
    if kind == "sgd":
        return torch.optim.SGD(parameters.values(), lr=0.3)
    if kind == "adamw":
        return torch.optim.AdamW(parameters.values(), lr=3e-3, weight_decay=0.1, eps=EPS)
    chosen = matrices(list(parameters), parameters)
    muon = [Muon([parameters[n] for n in chosen], lr=0.02, weight_decay=0.1, dtype=torch.float64)] if chosen else []
    others = [p for n, p in parameters.items() if n not in chosen]
    return Several(*muon, *([torch.optim.AdamW(others, lr=3e-3, eps=EPS)] if others else []))


class Heard:
    """A listener that keeps what it heard, in order."""

    def __init__(self):
        self.calls: list[Call] = []

    def started(self, call: Call) -> None:
        self.calls.append(call)

    def ended(self, call: Call) -> None:
        pass

    def take(self, *names: str) -> list[Call]:
        """Calls since the last time, of these names or of all, without the votes on who has gradients."""
        calls, self.calls = self.calls, []
        return [call for call in calls if call.tag != "who has gradients" and (not names or call.name in names)]


def make_strategy(
    name: str, stages: Sequence[nn.Module], mesh: Mesh, kind: Kind = "torch", bucket_mb: float = BUCKET_MB,
    listeners: Sequence[Heard] = (), **options,
) -> Strategy:  # fmt: skip
    """Of all ranks; under ZeRO those of the axis fsdp share the model."""
    if name in DATA_PARALLEL:
        comm = make_comm(mesh.group("dp", "fsdp"), kind, listeners)
        return DATA_PARALLEL[name](stages, comm, bucket_mb=bucket_mb, **options)
    comm, replicas = (make_comm(mesh.group(axis), kind, listeners) for axis in ("fsdp", "dp"))
    return ZERO[name](stages, comm, replicas, bucket_mb=bucket_mb, **options)


def stirred_stage(config: str, seed: int, frozen: Sequence[str] = ()) -> StageGPT:
    stage = StageGPT(CONFIGS[config])
    materialise(stage, dtype=torch.float64)
    values = stir(dict(stage.named_parameters()), seed)
    with torch.no_grad():
        for name, p in stage.named_parameters():
            p.copy_(values[name])
            p.requires_grad_(name not in frozen)
    return stage


Held = dict[str, tuple[Piece, Tensor | None]]


def held(strategy: Strategy, of) -> Held:
    pieces, parameters = strategy.pieces(), strategy.parameters()
    assert pieces.keys() == parameters.keys()
    for name, p in parameters.items():
        assert p.numel() == pieces[name].numel, (name, p.shape, pieces[name])
    return {name: (pieces[name], of(p)) for name, p in parameters.items()}


def train(rank: int, W: int, cases: Sequence[Case], batches) -> list[dict]:
    """For each case: losses of this rank's rows, pieces of all gradients and of the weights, norms, all weights."""
    meshes: dict[Layout, Mesh] = {}
    found = []
    for case in cases:
        fsdp = case.fsdp or W
        layout = Layout(dp=W // fsdp, fsdp=fsdp)
        found.append(_train(meshes.setdefault(layout, Mesh(layout, rank, W)), case, batches))
    return found


def _train(mesh: Mesh, case: Case, batches) -> dict:
    rank, W = mesh.rank, mesh.world_size
    stage = stirred_stage(case.config, 1 if rank == 0 else 100 + rank, case.frozen)  # ranks seeded differently
    stage.register_buffer("counter", torch.tensor([float(rank)]))
    named = dict(stage.named_parameters())
    whole = [n for n in matrices(list(named), named) if n not in case.frozen] if case.optimizer == "muon" else ()
    options = {"whole": whole} if case.strategy in ZERO else {}
    strategy = make_strategy(case.strategy, [stage], mesh, case.kind, **options)
    assert stage.counter.item() == 0
    parameters = strategy.parameters()
    optimizer = make_optimizer(case.optimizer, parameters)
    losses, gradients, norms = [], [], []
    for tokens_BT, targets_BT in batches:
        parts = zip(tokens_BT[rank::W].chunk(case.accumulate), targets_BT[rank::W].chunk(case.accumulate), strict=True)
        total = 0.0
        for number, (part_BT, wanted_BT) in enumerate(parts):
            sync = {"last": number == case.accumulate - 1, "all": True, "none": False}[case.sync]
            with nullcontext() if sync else strategy.no_sync():
                loss = stage(None, part_BT, wanted_BT) / case.accumulate
                loss.backward()
            total += loss.item()
        strategy.finish()
        norms.append(clip(strategy, case.clip))
        losses.append(total)
        gradients.append(held(strategy, lambda p: None if p.grad is None else p.grad.clone()))
        optimizer.step()
        strategy.stepped()
        strategy.zero_grad()
        assert all(p is q for p, q in zip(parameters.values(), strategy.parameters().values(), strict=True))
        assert all(p.grad is None for p in stage.parameters())
    weights = {name: p.detach().clone() for name, p in stage.named_parameters()}
    return {
        "losses": losses, "gradients": gradients, "norms": norms, "weights": weights,
        "parts": held(strategy, lambda p: p.detach().clone()),
    }  # fmt: skip


def batches_of(config: str):
    return [batch(CONFIGS[config], rows=36, T=5, seed=step) for step in range(BATCHES)]


@cache
def _wanted(config: str, optimizer: str, accumulate: int, clip: float, frozen: tuple[str, ...]):
    """Of one process."""
    names = [name for name in whole_shapes(CONFIGS[config]) if name not in frozen]

    def make(trained: list[nn.Parameter]):
        return make_optimizer(optimizer, dict(zip(names, trained, strict=True)))

    return single(CONFIGS[config], batches_of(config), make, accumulate, clip, frozen)


def check(case: Case, ranks: list[dict]) -> None:
    """What the ranks have, put together, is what one process has."""
    losses, gradients, weights = _wanted(case.config, case.optimizer, case.accumulate, case.clip, case.frozen)
    fsdp = case.fsdp or len(ranks)
    for step in range(BATCHES):
        assert abs(math.fsum(rank["losses"][step] for rank in ranks) / len(ranks) - losses[step]) <= 1e-12, case
        for first in range(0, len(ranks), fsdp):  # each group that has the whole model between its ranks
            got = put_together([rank["gradients"][step] for rank in ranks[first : first + fsdp]])
            assert got.keys() == gradients[step].keys(), case
            for name, gradient in gradients[step].items():
                assert error(got[name], gradient) <= 1e-12, (case, step, name)
    for rank in ranks:
        for name, weight in weights.items():
            assert error(rank["weights"][name], weight) <= 1e-12, (case, name)
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name]), (case, name)
        assert rank["norms"] == ranks[0]["norms"]


def put_together(held: list[dict]) -> dict[str, Tensor]:
    """Whole tensors from their pieces; where no rank has an element it is NaN, which no comparison passes."""
    whole = {}
    for pieces in held:
        for name, (piece, value) in pieces.items():
            if value is not None:
                piece.put(whole.setdefault(name, torch.full(piece.shape, torch.nan, dtype=value.dtype)), value)
    return whole


class Toy(nn.Module):
    """x_BC -> a loss. `branch` chooses one of three layers, of which the rank uses no other."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first = DeferrableLinear(7, 5)
        self.square = nn.Linear(5, 5, bias=False)  # used twice
        self.branches = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(3))
        self.gain = nn.Parameter(torch.randn(1))
        self.none = nn.Parameter(torch.randn(3))  # no loss depends on it
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.empty = nn.Parameter(torch.randn(0))
        self.scalar = nn.Parameter(torch.randn(()))
        self.last = DeferrableLinear(5, 11)
        self.double()

    def forward(self, x_BC: Tensor, branch: int) -> Tensor:
        x_BC = torch.tanh(self.square(torch.tanh(self.first(x_BC))) * self.frozen)
        x_BC = self.branches[branch](self.square(x_BC)) * self.gain + self.scalar + self.empty.sum()
        return F.cross_entropy(self.last(x_BC), torch.arange(len(x_BC)))
