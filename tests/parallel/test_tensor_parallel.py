"""Tensor parallelism against one process: losses, gradients, steps, weights, bytes, refusals."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.dist import spawn
from minigpt.model import GPT
from parallel.comm import TorchComm
from parallel.deferred import WeightGradients, run
from parallel.mesh import Group, Layout, Mesh
from parallel.model import StageGPT, initialise, materialise
from parallel.strategy import clip, sum_partial
from parallel.tensor_parallel import parallelise
from parallel.vocab_parallel import gather_logits
from parallel.whole_state import gather_tensors
from tests.parallel.cut_gpts import Plain, cut, meet, worst
from tests.parallel.gpts import GPT2_LIKE, SMALL, batch, error, single, stirred_gpt

MODES = [{"sequence_parallel": sp, "overlap": overlap} for sp in (False, True) for overlap in (False, True)]
THREE = replace(SMALL, heads=6, kv_heads=3, vocab_size=87, mlp_width=39)
# name: (ranks, config, T, keywords of forward)
CASES = {
    "ours": (2, SMALL, 16, {}),
    "gpt2": (2, GPT2_LIKE, 16, {}),
    "z_loss": (2, SMALL, 10, {"z_loss": 0.1}),
    "documents": (2, SMALL, 16, {"separator": 3}),
    "windows": (2, replace(SMALL, window=5, window_pattern="SL"), 24, {"separator": 3, "z_loss": 0.01}),
    "mha": (3, replace(THREE, kv_heads=6), 15, {}),
    "gqa": (3, THREE, 9, {"z_loss": 0.1}),
    "mqa": (3, replace(THREE, kv_heads=1), 3, {}),
    "gpt2 of 6 heads": (3, replace(GPT2_LIKE, heads=6, kv_heads=6, vocab_size=87, mlp_width=39), 15, {"z_loss": 0.1}),
    "4 ranks": (4, GPT2_LIKE, 16, {"z_loss": 0.1}),
    "2 kv heads": (4, SMALL, 24, {"separator": 3}),
    "1 kv head": (4, replace(SMALL, kv_heads=1, qkv_bias=True, mlp="relu2", tied=True), 4, {}),
}


def check_cases(rank, world_size):
    """{case and mode: (error of the loss, error of the worst gradient, its name)}"""
    names = [name for name, case in CASES.items() if case[0] == world_size]
    found = {}
    for kind, name in [("torch", name) for name in names] + [("ours", name) for name in names[-1:]]:
        mesh, comm = meet(rank, world_size, kind)
        _, config, T, options = CASES[name]
        model = stirred_gpt(config)
        tokens, targets = batch(config, 3, T)
        loss = model(tokens, targets, **options)
        loss.backward()
        want = {name: p.grad for name, p in model.named_parameters()}
        for mode in MODES:
            stage, groups = cut(config, mesh, comm, **mode)
            got = stage(None, tokens, targets, **options)
            got.backward()
            sum_partial(Plain(stage), groups)
            found[f"{name} {kind} {mode}"] = (abs(got.item() - loss.item()), *worst(stage, want))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_loss_and_every_gradient_are_those_of_one_process(ranks):
    for found in spawn(check_cases, ranks):
        assert len(found) >= 4 * len(MODES)
        for case, (of_loss, of_gradient, parameter) in found.items():
            assert of_loss <= 1e-12, case
            assert of_gradient <= 1e-12, (case, parameter)


STEPS = {"sgd": partial(torch.optim.SGD, lr=0.3), "adamw": partial(torch.optim.AdamW, lr=0.01, eps=1e-6)}
FROZEN = ("embedding.weight", "blocks.1.mlp.up.weight", "blocks.0.attention.key.weight", "blocks.2.mlp_norm.weight")


def check_steps(rank, world_size, config, frozen):
    mesh, comm = meet(rank, world_size)
    batches = [batch(config, 4, 12, seed) for seed in range(3)]
    found = {}
    for name, make_optimizer in STEPS.items():
        want = single(config, batches, make_optimizer, accumulate=2, clip=0.7, frozen=frozen)
        for mode in MODES:
            stage, groups = cut(config, mesh, comm, **mode)
            found[f"{name} {mode}"] = steps(stage, groups, comm, batches, make_optimizer, frozen, want)
    return found


def steps(stage, groups, comm, batches, make_optimizer, frozen, want):
    """Steps of two parts each, clipped: the worst error of a weight at the end. A wrong norm would scale them all."""
    losses, _, weights = want
    for name, p in stage.named_parameters():
        p.requires_grad_(name not in frozen)
    strategy = Plain(stage)
    optimizer = make_optimizer(strategy.parameters().values())
    for (tokens, targets), loss in zip(batches, losses, strict=True):
        total = 0.0
        for part, wanted in zip(tokens.chunk(2), targets.chunk(2), strict=True):
            got = stage(None, part, wanted) / 2
            got.backward()
            total += got.item()
        assert abs(total - loss) <= 1e-12
        sum_partial(strategy, groups)
        assert clip(strategy, 0.7, over=(comm,)) > 0.7
        optimizer.step()
        strategy.zero_grad()
    return max(error(p.detach(), p.piece.of(weights[name])) for name, p in stage.named_parameters())


@pytest.mark.parametrize(
    ("ranks", "config", "frozen"), [(2, GPT2_LIKE, ()), (2, SMALL, FROZEN), (4, SMALL, ())], ids=["gpt2", "frozen", "4"]
)
def test_accumulated_and_clipped_steps_are_those_of_one_process(ranks, config, frozen):
    for found in spawn(check_steps, ranks, config, frozen):
        for case, value in found.items():
            assert value <= 1e-12, case


class Ear:
    def __init__(self):
        self.calls = []

    def started(self, call):
        self.calls.append((call.name, call.payload))

    def ended(self, call):
        pass


def count_calls(rank, world_size):
    ear = Ear()
    mesh, comm = meet(rank, world_size, listeners=(ear,))
    counts = []
    for mode in MODES:
        stage, _ = cut(SMALL, mesh, comm, **mode)
        loss = stage(None, *batch(SMALL, 3, 16))
        forward, ear.calls = Counter(ear.calls), []
        loss.backward()
        counts.append((mode["sequence_parallel"], forward, Counter(ear.calls)))
        ear.calls = []
    return counts


def test_calls_and_bytes_are_those_of_the_formula():
    """Twice a block each way B T C numbers are summed; embedding and head once more; the loss has three a token."""
    rows, L = 3 * 16 * 8, SMALL.layers  # bytes of one float64 a token
    size = rows * SMALL.width
    loss = Counter({("all_reduce", rows): 1, ("all_reduce", 2 * rows): 1})
    sums = Counter({("all_reduce", size): 2 * L + 1})
    parts = Counter({("all_gather", size): 2 * L + 1, ("reduce_scatter", size): 2 * L + 1})
    for counts in spawn(count_calls, 2):
        for sequence_parallel, forward, backward in counts:
            assert backward == (parts if sequence_parallel else sums)
            assert forward == backward + loss


class Diary(Ear):
    """Also a `deferred` of weights: what asks whether it is open is about to compute a weight gradient."""

    def started(self, call):
        self.calls.append("sum starts")

    def ended(self, call):
        self.calls.append("sum ends")

    @property
    def open(self):
        self.calls.append("weight")
        return False


def order_of_backward(rank, world_size):
    diary = Diary()
    mesh, comm = meet(rank, world_size, listeners=(diary,))
    orders = []
    for mode in MODES:
        stage, _ = cut(SMALL, mesh, comm, **mode)
        for layer in stage.modules():
            if getattr(layer, "can_defer", False):
                layer.weight.deferred = diary
        loss = stage(None, *batch(SMALL, 2, 8))
        diary.calls = []
        loss.backward()
        orders.append(list(diary.calls))
    return orders


def order(sequence_parallel, overlap):
    """What a backward pass is to do: the head, then of each block MLP and attention, then the embedding."""
    gather = ["sum starts", "sum ends"] if sequence_parallel else []

    def branch(layers):
        weights = ["weight"] * layers
        return ["sum starts", *weights, "sum ends"] if overlap else [*weights, "sum starts", "sum ends"]

    block = [*gather, "weight", *branch(2), *gather, "weight", *branch(3)]  # up and gate; query, key and value
    return branch(1) + block * SMALL.layers + gather


def test_overlap_computes_weight_gradients_while_the_sum_is_under_way():
    wanted = [order(**mode) for mode in MODES]
    assert spawn(order_of_backward, 2) == [wanted, wanted]


def check_ways(rank, world_size):
    """Other ways to the same gradients: two pipeline stages, late weight gradients, recomputed blocks, all at once."""
    mesh, comm = meet(rank, world_size)
    found = {}
    for config in (SMALL, GPT2_LIKE):
        tokens, targets = batch(config, 2, 16)
        model = stirred_gpt(config)
        model(tokens, targets).backward()
        want = {name: p.grad for name, p in model.named_parameters()}
        logits = model(tokens).detach()
        for mode in MODES:
            stages, late = [], WeightGradients()
            groups = {}
            for layers in ([0, 1], [2]):
                stage, partial_here = cut(config, mesh, comm, layers=layers, **mode)
                stage.run_block = recomputed
                late.attach(stage)
                stages.append(stage)
                groups |= partial_here
            late.open = True
            first, last = stages
            x_BTC = first(None, tokens)
            assert x_BTC.shape[1] == (16 // world_size if mode["sequence_parallel"] else 16)
            last(x_BTC, tokens, targets).backward()
            jobs = late.take()
            assert len(jobs) == config.layers * (7 if config.mlp == "swiglu" else 6) + (not config.tied)
            run(jobs)
            if config.tied:
                assert {stage.embedding.weight.piece.copies for stage in stages} == {2}
                total = first.embedding.weight.grad + last.embedding.weight.grad
                first.embedding.weight.grad, last.embedding.weight.grad = total, total.clone()
            for stage in stages:
                sum_partial(Plain(stage), groups)
                found[f"{stage.layers} {mode}"] = worst(stage, want)
            with torch.no_grad():
                whole = gather_logits(last(first(None, tokens), tokens), comm)
            found[f"logits {mode}"] = (error(whole, logits), "")
    return found


def recomputed(block, x_BTC, sight):
    return checkpoint(block, x_BTC, sight, use_reentrant=False)


def test_pipeline_stages_late_weight_gradients_and_recomputed_blocks():
    for found in spawn(check_ways, 2):
        for case, (value, name) in found.items():
            assert value <= 1e-12, (case, name)


def check_pieces(rank, world_size, config):
    """The pieces cover every parameter as often as they say; initial weights are one process's; equal stays equal."""
    mesh, comm = meet(rank, world_size)
    names = list(dict(GPT(config, seed=None).named_parameters()))
    for sequence_parallel in (False, True):
        stage = StageGPT(config)
        assert all(p.is_meta for p in stage.parameters())
        groups = parallelise(stage, mesh, comm, sequence_parallel=sequence_parallel)
        assert all(p.is_meta for p in stage.parameters())
        materialise(stage)
        initialise([stage], config, seed=5)
        model = GPT(config, seed=5)
        here = dict(stage.named_parameters())
        assert list(here) == names
        for name, p in model.named_parameters():
            assert torch.equal(here[name], here[name].piece.of(p)), name
            count = torch.zeros(p.shape)
            here[name].piece.of(count).fill_(1)
            comm.all_reduce(count)
            assert (count == here[name].piece.copies).all(), name
        loss = stage(None, *batch(config, 2, 12))
        loss.backward()
        for name, p in here.items():  # of copies that are not summed, all have the whole gradient already
            if p.piece.box_shape == p.piece.shape and name not in groups:
                most = p.grad.clone()
                comm.all_reduce(most, "max")
                assert torch.equal(most, p.grad), name
                assert not sequence_parallel
    return sorted(groups)


@pytest.mark.parametrize(("ranks", "config"), [(2, GPT2_LIKE), (4, SMALL), (3, replace(THREE, kv_heads=1))])
def test_pieces_and_initial_weights(ranks, config):
    for groups in spawn(check_pieces, ranks, config):
        assert ("blocks.0.attention.query_norm.weight" in groups) == config.qk_norm
        assert ("blocks.0.attention.key.weight" in groups) == (config.kv_heads < ranks)
        assert ("blocks.2.attention.value_embedding.weight" in groups) == (config.kv_heads < ranks)
        assert "norm.weight" in groups
        assert not any("mlp.up" in name or "query.weight" in name or name == "embedding.weight" for name in groups)


def check_autocast(rank, world_size):
    mesh, comm = meet(rank, world_size)
    tokens, targets = batch(GPT2_LIKE, 2, 16)
    model = stirred_gpt(GPT2_LIKE)
    model(tokens, targets).backward()
    want = {name: p.grad.float() for name, p in model.named_parameters() if "key.bias" not in name}  # zero but rounding
    found = {}
    for mode in MODES:
        stage, groups = cut(GPT2_LIKE, mesh, comm, **mode)
        stage.float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = stage(None, tokens, targets)
        loss.backward()
        sum_partial(Plain(stage), groups)
        for name, p in stage.named_parameters():
            assert p.grad.dtype == torch.float32, name
            if name in want:
                part = p.piece.of(want[name])
                found[f"{name} {mode}"] = ((p.grad - part).norm() / part.norm()).item()
    return found


def test_autocast_has_float32_gradients_near_the_exact_ones():
    for found in spawn(check_autocast, 2):
        for case, value in found.items():
            assert value <= 0.05, case


def check_assembled(rank, world_size):
    mesh, comm = meet(rank, world_size)
    stage, groups = cut(SMALL, mesh, comm, sequence_parallel=True)
    tokens, targets = batch(SMALL, 2, 16)
    stage(None, tokens, targets).backward()
    sum_partial(Plain(stage), groups)
    whole = gather_tensors({name: (p.grad, p.piece) for name, p in stage.named_parameters()}, comm)
    if rank:
        return whole
    model = stirred_gpt(SMALL)
    model(tokens, targets).backward()
    assert list(whole) == [name for name, _ in model.named_parameters()]
    return {name: error(whole[name], p.grad) for name, p in model.named_parameters()}


def test_gradients_assembled_on_rank_0():
    first, *others = spawn(check_assembled, 4)
    assert others == [{}] * 3
    assert all(value <= 1e-12 for value in first.values()), first


def alone(ranks: int):
    """A tp group of which only this process is there: enough for refusals, which come before any work."""
    return Mesh(Layout(tp=ranks), 0, ranks), TorchComm(Group(("tp",), tuple(range(ranks)), 0))


@pytest.mark.parametrize(
    ("ranks", "change", "message"),
    [
        (3, {}, r"heads 4 over tp 3: expected a multiple of 3"),
        (3, {"heads": 6}, r"mlp_width 40 over tp 3"),
        (3, {"heads": 6, "mlp_width": 39}, r"vocab_size 88 over tp 3"),
        (3, {"heads": 6, "mlp_width": 39, "vocab_size": 87}, r"kv_heads 2 over tp 3: expected a multiple or a divisor"),
        (2, {"heads": 6, "kv_heads": 3}, r"kv_heads 3 over tp 2"),
    ],
)
def test_what_cannot_be_cut_is_refused(ranks, change, message):
    with pytest.raises(ValueError, match=message):
        parallelise(StageGPT(replace(SMALL, **change)), *alone(ranks))


def test_other_refusals():
    class Own(nn.Linear):
        pass

    with pytest.raises(ValueError, match="blocks.0.attention.query is a Own: expected torch's Linear"):
        parallelise(StageGPT(SMALL, linear_cls=Own), *alone(2))
    stage = StageGPT(SMALL)
    parallelise(stage, *alone(2), sequence_parallel=True)
    tokens, targets = batch(SMALL, 2, 15)
    with pytest.raises(ValueError, match="sequence of 15 tokens over tp 2: expected a multiple of 2"):
        stage(None, tokens, targets)
    with pytest.raises(ValueError, match="sequence of 15 tokens"):
        stage(None, tokens_BT=tokens)


def test_one_rank_changes_nothing():
    stage = StageGPT(SMALL)
    layers = list(stage.modules())
    assert parallelise(stage, *alone(1), sequence_parallel=True, overlap=True) == {}
    assert list(stage.modules()) == layers
