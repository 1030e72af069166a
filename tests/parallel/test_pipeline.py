"""The pipeline equals one process: losses and every gradient, for each schedule; and keeps to its memory and bubble."""

import gc
import os
import re
import signal
import weakref
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from common.dist import RankError, spawn
from minigpt.config import GPTConfig
from parallel import deferred
from parallel.comm import make_comm
from parallel.deferred import DeferrableLinear
from parallel.mesh import Layout, Mesh
from parallel.model import StageGPT, materialise
from parallel.pipeline import Pipeline, chunk_layers, make_back, tied_groups
from parallel.schedules import bubble, peaks, schedule
from tests.parallel.gpts import CONFIGS, batch, error, single, stir, stirred_gpt

STEPS, T = 2, 9


@dataclass(frozen=True)
class Case:
    schedule: str
    p: int
    m: int
    v: int = 1
    config: str = "ours"
    layers: int = 0  # 0: as many as chunks, and one more
    optimizer: str = "sgd"
    accumulate: int = 1
    frozen: tuple[str, ...] = ()
    kind: str = "torch"
    back: bool = False

    @property
    def gpt(self) -> GPTConfig:
        return replace(CONFIGS[self.config], layers=self.layers or self.p * self.v + 1)

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return [batch(self.gpt, self.m * self.accumulate * 2, T, seed=step) for step in range(STEPS)]


FROZEN = ("embedding.weight", "blocks.0.", "blocks.2.mlp.up.weight", "head.weight")
CASES = [
    Case("gpipe", 1, 3),
    Case("zb-h1", 1, 2, config="gpt2"),
    Case("interleaved-1f1b", 1, 3, v=2, accumulate=2),
    Case("gpipe", 2, 3),
    Case("1f1b", 2, 3, optimizer="adamw", accumulate=3),
    Case("zb-h1", 2, 3, accumulate=3),
    Case("interleaved-1f1b", 2, 4, v=2, back=True),
    Case("1f1b", 2, 1, config="gpt2"),
    Case("zb-h1", 2, 3, config="gpt2", optimizer="adamw"),
    Case("1f1b", 2, 2, frozen=FROZEN),
    Case("zb-h1", 2, 2, frozen=FROZEN, kind="ours"),
    Case("gpipe", 3, 2, config="gpt2"),
    Case("1f1b", 3, 4, layers=5),
    Case("zb-h1", 3, 5, layers=3),
    Case("interleaved-1f1b", 3, 3, v=2, config="gpt2", optimizer="adamw", back=True),
    Case("gpipe", 4, 3, layers=4),
    Case("1f1b", 4, 6, layers=4, config="gpt2", back=True),
    Case("zb-h1", 4, 5, optimizer="adamw"),
    Case("interleaved-1f1b", 4, 4, v=2, accumulate=2, kind="ours"),
]


def make_optimizer(name: str, parameters) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1)
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-4)  # with less it divides gradients of rounding by themselves


def is_frozen(name: str, frozen: tuple[str, ...]) -> bool:
    return any(name.startswith(start) for start in frozen)


@cache
def truth(case: Case):
    """What one process computes with the whole batch at once."""
    names = tuple(n for n, _ in stirred_gpt(case.gpt).named_parameters() if is_frozen(n, case.frozen))
    return single(case.gpt, case.batches, lambda p: make_optimizer(case.optimizer, p), frozen=names)


def build(case: Case, mesh: Mesh, **options) -> tuple[Pipeline, dict[str, nn.Parameter]]:
    """With the same random weights as gpts.stirred_gpt; the rank's parameters by name."""
    config, rank = case.gpt, mesh.place["pp"]
    linear = {"linear_cls": DeferrableLinear} if case.schedule == "zb-h1" else {}
    stages = [StageGPT(config, layers, **linear) for layers in chunk_layers(config.layers, rank, case.p, case.v)]
    values = stir(dict(stirred_gpt(config).named_parameters()))
    for stage in stages:
        materialise(stage, dtype=torch.float64)
        for name, p in stage.named_parameters():
            p.data.copy_(values[name])
            p.requires_grad_(not is_frozen(name, case.frozen))
    comm = make_comm(mesh.group("pp"), case.kind)
    back = make_back(mesh, case.kind) if case.back else None
    pipeline = Pipeline(stages, comm, schedule=case.schedule, microbatches=case.m, back=back, **options)
    return pipeline, {name: p for stage in stages for name, p in stage.named_parameters()}


def train(mesh: Mesh, case: Case):
    """(losses, gradients of each step, weights at the end, peak activations) of this rank."""
    pipeline, parameters = build(case, mesh)
    tied = tied_groups(mesh, case.gpt, case.kind)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizer = make_optimizer(case.optimizer, trained.values()) if trained else None
    losses, gradients = [], []
    for tokens_BT, targets_BT in case.batches:
        total = 0.0
        parts = zip(tokens_BT.chunk(case.accumulate), targets_BT.chunk(case.accumulate), strict=True)
        for part_BT, wanted_BT in parts:
            loss = pipeline.run(part_BT, wanted_BT, scale=1 / case.accumulate)
            assert (loss is None) == (mesh.place["pp"] != case.p - 1)
            total += pipeline.share_loss(loss).item() / case.accumulate
        for name, comm in tied.items():
            comm.all_reduce(parameters[name].grad)
        losses.append(total)
        gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
    return losses, gradients, {name: p.detach() for name, p in parameters.items()}, pipeline.peak


def train_all(rank: int, world: int, cases: list[Case]):
    torch.manual_seed(rank)
    return [train(Mesh(Layout(pp=world), rank, world), case) for case in cases]


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_equals_one_process(p):
    cases = [case for case in CASES if case.p == p]
    ranks = spawn(train_all, p, cases, timeout_s=240) if p > 1 else [train_all(0, 1, cases)]
    for i, case in enumerate(cases):
        losses, gradients, weights = truth(case)
        names = set()
        for rank, of_cases in enumerate(ranks):
            mine, of_steps, at_end, peak = of_cases[i]
            assert all(abs(a - b) <= 1e-12 * b for a, b in zip(mine, losses, strict=True)), (case, rank, mine, losses)
            for got, want in zip(of_steps, gradients, strict=True):
                assert got.keys() <= want.keys(), (case, rank)
                for name in got:
                    assert error(got[name], want[name]) <= 1e-12, (case, rank, name)
            for name in at_end:
                assert error(at_end[name], weights[name]) <= 1e-12, (case, rank, name)
            names |= of_steps[0].keys()
            assert peak == peaks(case.schedule, p, case.m, case.v)[rank], (case, rank)
        assert names == gradients[0].keys(), case


# ---- what else it does ----


def evaluate_all(rank: int, world: int):
    """Forward only, with the options of the model; then training still works. Errors come before any message."""
    mesh = Mesh(Layout(pp=world), rank, world)
    found = []
    for case in (Case("zb-h1", 2, 3), Case("interleaved-1f1b", 2, 4, v=2, config="gpt2")):
        pipeline, parameters = build(case, mesh)
        tokens_BT, targets_BT = case.batches[0]
        loss = pipeline.evaluate(tokens_BT, targets_BT, separator=5)
        logits_BTV = pipeline.evaluate(tokens_BT)
        assert all(p.grad is None for p in parameters.values())
        with pytest.raises(ValueError, match=f"5 rows in {case.m} micro-batches"):
            pipeline.run(tokens_BT[:5], targets_BT[:5])
        with pytest.raises(ValueError, match="targets of shape"):
            pipeline.run(tokens_BT, targets_BT[:, 1:])
        trained = pipeline.run(tokens_BT, targets_BT, separator=5, z_loss=0.01)
        grads = {n: p.grad for n, p in parameters.items() if n != "embedding.weight"}
        found.append((loss, logits_BTV, trained, grads))
    return found


def test_evaluation_and_options():
    first, last = spawn(evaluate_all, 2, timeout_s=240)
    for i, case in enumerate((Case("zb-h1", 2, 3), Case("interleaved-1f1b", 2, 4, v=2, config="gpt2"))):
        model = stirred_gpt(case.gpt)
        tokens_BT, targets_BT = case.batches[0]
        loss = model(tokens_BT, targets_BT, separator=5, z_loss=0.01)
        loss.backward()
        assert first[i][:3] == (None, None, None)
        assert error(last[i][0], loss.detach()) <= 1e-12 and error(last[i][2], loss.detach()) <= 1e-12
        assert error(last[i][1], model(tokens_BT).detach()) <= 1e-12
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for name, got in {**first[i][3], **last[i][3]}.items():
            assert error(got, gradients[name]) <= 1e-12, (case, name)


def groups(rank: int, world: int):
    """Of two pipelines side by side."""
    mesh = Mesh(Layout(pp=2, dp=2), rank, world)
    tied = tied_groups(mesh, CONFIGS["gpt2"])
    number = torch.tensor([float(rank)])
    tied["embedding.weight"].all_reduce(number)
    back = make_back(mesh)
    assert tied_groups(mesh, CONFIGS["ours"]) == {} and back.group.ranks == mesh.group("pp").ranks
    three = Mesh(Layout(pp=4), rank, world)
    return number.item(), tied["embedding.weight"].group.ranks, sorted(tied_groups(three, CONFIGS["gpt2"]))


def test_groups_of_tied_embeddings():
    tied = ["embedding.weight"]
    assert spawn(groups, 4, timeout_s=240) == [
        (2.0, (0, 2), tied),
        (4.0, (1, 3), []),
        (2.0, (0, 2), []),
        (4.0, (1, 3), tied),
    ]


def test_stages_that_do_not_fit():
    mesh = Mesh(Layout())
    config = CONFIGS["ours"]
    comm = make_comm(mesh.group("pp"))
    with pytest.raises(ValueError, match="stage 0 of pipeline rank 0 is chunk 0 of 1, but has first True and last F"):
        Pipeline([StageGPT(config, [0, 1])], comm, schedule="1f1b", microbatches=2)
    with pytest.raises(ValueError, match="expected one of gpipe"):
        Pipeline([StageGPT(config)], comm, schedule="none", microbatches=2)
    tied = CONFIGS["gpt2"]
    with pytest.raises(ValueError, match="2 chunks of a tied model on one rank"):
        stages = [StageGPT(tied, layers) for layers in chunk_layers(3, 0, 1, 2)]
        Pipeline(stages, comm, schedule="interleaved-1f1b", microbatches=2)
    with pytest.raises(ValueError, match="6 pipeline stages for 5 layers"):
        chunk_layers(5, 0, 3, 2)
    pipeline = Pipeline([StageGPT(config)], comm, schedule="1f1b", microbatches=2, sequence_parallel=2)
    with pytest.raises(ValueError, match="sequences of 9 tokens over 2 ranks"):
        pipeline.run(*batch(config, 2, 9))


def test_activations_of_another_dtype_are_named():
    case = Case("interleaved-1f1b", 1, 2, v=2)
    pipeline, _ = build(case, Mesh(Layout()), dtype=torch.float32)
    with pytest.raises(ValueError, match="torch.float64: expected .* of torch.float32"):
        pipeline.run(*case.batches[0])


def test_record_hears_of_each_computation_in_order():
    case, heard = Case("zb-h1", 1, 2), []
    pipeline, _ = build(case, Mesh(Layout()), record=lambda x, start, end: heard.append((x, start, end)))
    pipeline.run(*case.batches[0])
    assert [x for x, *_ in heard] == schedule("zb-h1", 1, 2)[0]
    times = [t for _, *span in heard for t in span]
    assert times == sorted(times)


# ---- memory: what is alive, seen from outside ----


class Alive:
    """How many of the tensors that it was given are alive, and the most at once."""

    def __init__(self):
        self.now = self.most = 0

    def watch(self, x: Tensor) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(x, self.forget)

    def forget(self) -> None:
        self.now -= 1


class Watched(torch.autograd.Function):
    """Identity that keeps a tensor of its own until its backward pass is over."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.kept = torch.empty(1)
        alive.watch(ctx.kept)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.kept = None
        return gradient, None


def watch(stage: StageGPT, graphs: Alive, inputs: Alive) -> None:
    """The graph of the stage's first block, and the input of a linear layer in it."""
    watched = stage.blocks[str(stage.layers[0])]
    stage.run_block = lambda block, x, sight: block(Watched.apply(x, graphs) if block is watched else x, sight)
    watched.mlp.down.register_forward_pre_hook(lambda _, x: inputs.watch(x[0]))


def live(rank: int, world: int, cases: list[Case]):
    """The peak of graphs alive per case, and of inputs of a linear layer, which zb-h1 keeps until W."""
    found = []
    for case in cases:
        pipeline, _ = build(case, Mesh(Layout(pp=world), rank, world))
        graphs, inputs = Alive(), Alive()
        for stage in pipeline.stages:
            watch(stage, graphs, inputs)
        gc.disable()  # reference counts alone must free it
        pipeline.run(*case.batches[0])
        found.append((graphs.most, inputs.most, graphs.now, inputs.now))
        gc.enable()
    return found


def test_graphs_alive_are_those_of_theory():
    cases = [Case("gpipe", 2, 5), Case("1f1b", 2, 5), Case("interleaved-1f1b", 2, 4, v=2), Case("zb-h1", 2, 5)]
    for rank, found in enumerate(spawn(live, 2, cases, timeout_s=240)):
        for case, (graphs, inputs, *left) in zip(cases, found, strict=True):
            want = peaks(case.schedule, case.p, case.m, case.v)[rank]
            assert inputs == want and left == [0, 0], (case, rank, inputs, want, left)
            assert graphs == (want if case.schedule != "zb-h1" else 2 - rank), (case, rank, graphs)


# ---- time, by clocks that travel with the tensors ----
# Each computation takes one unit of its rank's clock; what it needs says when that was ready, and the rank waits until
# then (Lamport's clocks). Real ranks, real messages, and no second is measured.


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def work(self, ready: float = 0.0) -> int:
        self.now = max(self.now, round(ready)) + 1
        return self.now


class ClockedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stage):
        ctx.weight, ctx.stage = weight, stage
        return torch.full_like(x, stage.clock.work(x.max().item()))

    @staticmethod
    def backward(ctx, gradient):
        stage = ctx.stage
        stage.clock.work(0.0 if stage.last else gradient.max().item())  # the last one's gradient is that of the loss
        weight_gradient = deferred.weight_gradient(ctx.weight, lambda: ctx.weight * 0.0 * stage.clock.work())
        return torch.full_like(gradient, stage.clock.now), weight_gradient, None


class ClockedStage(nn.Module):
    can_defer = True

    def __init__(self, chunk: int, chunks: int, clock: Clock):
        super().__init__()
        self.first, self.last, self.config = chunk == 0, chunk == chunks - 1, SimpleNamespace(width=3, tied=False)
        self.weight = nn.Parameter(torch.zeros(2))
        self.clock = clock

    def forward(self, x, tokens_BT, targets_BT=None):
        x = torch.zeros(*tokens_BT.shape, 3) if x is None else x
        x = ClockedProduct.apply(x, self.weight, self)
        return x.sum() if self.last else x


def clocked(rank: int, world: int, name: str, m: int, v: int) -> int:
    """When this rank is done."""
    comm, clock = make_comm(Mesh(Layout(pp=world), rank, world).group("pp")), Clock()
    stages = [ClockedStage(chunk, world * v, clock) for chunk in range(rank, world * v, world)]
    tokens_BT = torch.zeros(m, 4, dtype=torch.long)
    Pipeline(stages, comm, schedule=name, microbatches=m).run(tokens_BT, tokens_BT)
    return clock.now


@pytest.mark.parametrize(
    ("name", "p", "m", "v"),
    [
        ("gpipe", 4, 4, 1), ("1f1b", 4, 6, 1), ("interleaved-1f1b", 4, 4, 2), ("interleaved-1f1b", 2, 6, 3),
        ("zb-h1", 4, 8, 1), ("zb-h1", 8, 8, 1),
    ],
)  # fmt: skip
def test_bubble_by_the_clocks_of_real_ranks(name, p, m, v):
    total = max(spawn(clocked, p, name, m, v, timeout_s=120))
    assert 1 - 3 * m * v / total == pytest.approx(bubble(name, p, m, v), abs=1e-12)


# ---- failures ----


def die(rank: int, world: int):
    """One step for all, then rank 1 is killed in the middle of the next."""
    case = Case("1f1b", 3, 4)
    pipeline, _ = build(case, Mesh(Layout(pp=world), rank, world))
    pipeline.run(*case.batches[0])
    if rank == 1:
        pipeline.stages[0].run_block = lambda block, x, sight: os.kill(os.getpid(), signal.SIGKILL)
    pipeline.run(*case.batches[0])


def test_a_rank_that_dies_is_an_error_and_not_a_hang():
    with pytest.raises(RankError, match="SIGKILL") as caught:
        spawn(die, 3, timeout_s=120)
    assert caught.value.rank == 1
    assert re.search("rank [02] after it: .*Error", str(caught.value))  # who waited for it heard of it
