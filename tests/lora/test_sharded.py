"""Sharded adapters against one process: outputs, losses, gradients, steps, the whole adapter in and out, refusals."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.dist import spawn
from lora.config import LoraConfig
from lora.lora import adapter_parameters, add_adapter
from lora.peft_files import load_adapter, save_adapter
from lora.sharded import GATHER, SUM, gather_adapter, scatter_adapter, shard_adapter, sharded_layers
from lora.sharding import SHARDINGS
from minigpt.config import GPTConfig
from parallel.activation import apply_activation_policy
from parallel.comm import TorchComm, make_comm
from parallel.data_parallel import Overlapped
from parallel.mesh import Group, Layout, Mesh
from parallel.model import StageGPT, initialise, materialise
from parallel.strategy import clip, sum_partial
from parallel.tensor_parallel import parallelise
from parallel.vocab_parallel import gather_logits
from parallel.zero import Zero1
from tests.parallel.cut_gpts import Plain, cut, meet, worst
from tests.parallel.gpts import GPT2_LIKE, SMALL, batch, error, stirred_gpt

LLAMA = GPTConfig(
    vocab_size=88, context=24, layers=2, width=24, heads=4, kv_heads=4, head_width=6, mlp="swiglu", mlp_width=40,
    qk_norm=False, softcap=0.0,
)  # fmt: skip
ODD = replace(LLAMA, width=21)  # which no number of ranks divides
WIDE = replace(LLAMA, layers=1, heads=8, kv_heads=8, width=16, head_width=2, mlp_width=48)
ALL = ("query", "key", "value", "output", "gate", "up", "down", "head")
OURS = ("query", "key", "value", "output", "up", "down")
MODES = [{"sequence_parallel": sp, "overlap": overlap} for sp in (False, True) for overlap in (False, True)]
# name: (ranks, GPT, targets, blocks of a rank, T, modes)
CASES = {
    "llama": (2, LLAMA, ALL, 1, 15, MODES[:2]),
    "two blocks a rank": (2, LLAMA, ALL, 2, 15, MODES[:1]),
    "biases, tied, c_attn": (2, GPT2_LIKE, "all-linear", 1, 16, MODES),
    "biases, tied": (2, GPT2_LIKE, OURS, 1, 16, MODES),
    "ours": (2, SMALL, "all-linear", 1, 10, MODES[2:]),
    "some layers": (2, SMALL, ("query", "up", "down"), 1, 12, MODES[1::2]),
    "odd width": (2, ODD, ALL, 1, 1, MODES[:1]),
    "4 ranks": (4, LLAMA, ALL, 1, 15, MODES[:1]),
    "shared heads": (4, SMALL, ALL, 1, 12, MODES),
    "8 ranks": (8, WIDE, ALL, 1, 5, MODES[:1]),
}


def lora(sharding, ranks, targets=ALL, each=1, **options):
    blocks = ranks * each if sharding == "block-diagonal" else 1
    return LoraConfig(**({"rank": 8, "alpha": 12.0, "targets": targets, "blocks": blocks} | options))


def refused(name, sharding):
    """What the next tests look at: these are the cases that cannot be."""
    return (name, sharding) in {
        ("odd width", "s-lora"), ("shared heads", "block-diagonal"), ("biases, tied, c_attn", "block-diagonal"),
    }  # fmt: skip


@torch.no_grad()
def filled(config, adapter, seed=3):
    """(GPT of one process with an adapter, all of whose numbers are random; the adapter's parameters by name)."""
    model = stirred_gpt(config)
    add_adapter(model, adapter)
    generator, mine = torch.Generator().manual_seed(seed), {id(p) for p in adapter_parameters(model)}
    named = {name: p for name, p in model.named_parameters() if id(p) in mine}
    for p in named.values():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[1] ** 0.5)
    return model, named


def sharded(config, adapter, sharding, mesh, comm, named=None, **options):
    stage, groups = cut(config, mesh, comm, **options)
    groups |= shard_adapter(stage, adapter, sharding, comm, groups)
    if named is not None:
        scatter_adapter(stage, named)
    return stage, groups


def check_cases(rank, world_size):
    """{case: {what: error}}"""
    found = {}
    mesh, comm = meet(rank, world_size)
    for name, (ranks, config, targets, each, T, modes) in CASES.items():
        for sharding in SHARDINGS:
            if ranks != world_size or refused(name, sharding):
                continue
            adapter = lora(sharding, ranks, targets, each)
            model, named = filled(config, adapter)
            tokens, targets_BT = batch(config, 3, T)
            loss, logits = model(tokens, targets_BT, z_loss=0.1), model(tokens).detach()
            loss.backward()
            want = {n: p.grad for n, p in model.named_parameters()}
            for mode in modes:
                stage, groups = sharded(config, adapter, sharding, mesh, comm, named, **mode)
                got = stage(None, tokens, targets_BT, z_loss=0.1)
                got.backward()
                sum_partial(Plain(stage), groups)
                with torch.no_grad():
                    seen = gather_logits(stage(None, tokens), comm)
                of_gradient, parameter = worst(stage, {n: want.get(n) for n, _ in stage.named_parameters()})
                count = sum(p.grad is not None for p in stage.parameters())
                found[f"{name} {sharding} {mode}"] = {
                    "logits": error(seen, logits), "loss": abs(got.item() - loss.item()), parameter: of_gradient,
                    "gradients": 0.0 if count == len(named) else float("inf"),
                }  # fmt: skip
    return found


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_outputs_losses_and_gradients_are_those_of_one_process(ranks):
    for found in spawn(check_cases, ranks):
        assert len(found) >= 3
        for case, errors in found.items():
            for what, value in errors.items():
                assert value <= 1e-12, (case, what)


STEPS = {"sgd": partial(torch.optim.SGD, lr=0.3), "adamw": partial(torch.optim.AdamW, lr=0.01, eps=1e-6)}


def check_steps(rank, world_size):
    """{case: error of the worst parameter of the adapter after three steps, clipped}"""
    mesh, comm = meet(rank, world_size)
    found = {}
    for sharding in SHARDINGS:
        adapter = lora(sharding, world_size)
        for name, make_optimizer in STEPS.items():
            model, named = filled(LLAMA, adapter)
            stage, groups = sharded(LLAMA, adapter, sharding, mesh, comm, named, sequence_parallel=name == "sgd")
            optimizers = make_optimizer(named.values()), make_optimizer(Plain(stage).parameters().values())
            frozen = {n: p.detach().clone() for n, p in stage.named_parameters() if not p.requires_grad}
            for seed in range(3):
                tokens, targets = batch(LLAMA, 2, 12, seed)
                model(tokens, targets).backward()
                torch.nn.utils.clip_grad_norm_(named.values(), 0.3)
                stage(None, tokens, targets).backward()
                sum_partial(Plain(stage), groups)
                assert clip(Plain(stage), 0.3, over=(comm,)) > 0.3
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            errors = [error(p.detach(), p.piece.of(named[n].detach())) for n, p in Plain(stage).parameters().items()]
            here = dict(stage.named_parameters())
            assert len(frozen) > 20 and all(torch.equal(here[n], p) for n, p in frozen.items())
            found[f"{sharding} {name}"] = max(errors, key=lambda e: float("inf") if e != e else e)
    return found


def test_clipped_steps_are_those_of_one_process_and_leave_the_base_alone():
    for found in spawn(check_steps, 2):
        assert len(found) == 6
        for case, value in found.items():
            assert value <= 1e-12, case


def check_whole(rank, world_size):
    """Fresh adapters are the pieces of one process's, in pipeline stages too; what is put in comes out."""
    mesh, comm = meet(rank, world_size)
    gathered = {}
    for sharding in SHARDINGS:
        adapter = lora(sharding, world_size, rank_pattern={"down": 12})
        model, named = filled(LLAMA, adapter)
        fresh = stirred_gpt(LLAMA)
        add_adapter(fresh, adapter, seed=7)
        fresh = dict(fresh.named_parameters())
        for layers in (None, [0], [1]):
            stage, groups = cut(LLAMA, mesh, comm, layers)
            groups |= shard_adapter(stage, adapter, sharding, comm, groups, seed=7)
            for name, p in Plain(stage).parameters().items():
                assert torch.equal(p, p.piece.of(fresh[name])), name
                count = torch.zeros(p.piece.shape)
                p.piece.of(count).fill_(1)
                comm.all_reduce(count)
                assert (count == p.piece.copies).all(), name
            assert list(gather_adapter(stage, comm)) == (list(Plain(stage).parameters()) if rank == 0 else [])
        scatter_adapter(stage, named)  # of the second stage: names of the first are passed over
        stage, _ = sharded(LLAMA, adapter, sharding, mesh, comm, named)
        with torch.no_grad():
            logits = gather_logits(stage(None, batch(LLAMA, 2, 9)[0]), comm)
        gathered[sharding] = adapter, gather_adapter(stage, comm), logits
    return gathered


def test_the_whole_adapter_goes_in_and_comes_out(tmp_path):
    first, second = spawn(check_whole, 2)
    assert all(tensors == {} for _, tensors, _ in second.values())
    for sharding, (adapter, tensors, logits) in first.items():
        model, named = filled(LLAMA, adapter)
        assert list(tensors) == list(named)
        assert all(torch.equal(tensors[name], p) for name, p in named.items())
        save_adapter(model, tmp_path / sharding)
        served = stirred_gpt(LLAMA)
        load_adapter(served, tmp_path / sharding)
        with torch.no_grad():
            assert error(logits, served(batch(LLAMA, 2, 9)[0])) <= 1e-12


def check_recomputed(rank, world_size):
    found = {}
    for kind in ("torch", "ours"):
        mesh, comm = meet(rank, world_size, kind)
        for sharding in SHARDINGS:
            adapter = lora(sharding, world_size)
            model, named = filled(LLAMA, adapter)
            tokens, targets = batch(LLAMA, 2, 12)
            model(tokens, targets).backward()
            for policy in ("none",) if kind == "ours" else ("full", "selective"):
                options = {"sequence_parallel": policy == "full", "keep_products": policy == "selective"}
                stage, groups = sharded(LLAMA, adapter, sharding, mesh, comm, named, **options)
                apply_activation_policy(stage, policy)
                stage(None, tokens, targets).backward()
                sum_partial(Plain(stage), groups)
                want = {name: named[name].grad if name in named else None for name, _ in stage.named_parameters()}
                found[f"{sharding} {kind} {policy}"] = worst(stage, want)
    return found


def test_recomputed_blocks_and_our_own_collectives():
    for found in spawn(check_recomputed, 2):
        assert len(found) == 9
        for case, (value, name) in found.items():
            assert value <= 1e-12, (case, name)


def check_stages(rank, world_size):
    """Two pipeline stages one after the other, each with its layers of one adapter."""
    mesh, comm = meet(rank, world_size)
    found = {}
    for sharding in SHARDINGS:
        adapter = lora(sharding, world_size)
        model, named = filled(LLAMA, adapter)
        tokens, targets = batch(LLAMA, 2, 12)
        model(tokens, targets).backward()
        first, groups = sharded(LLAMA, adapter, sharding, mesh, comm, named, layers=[0])
        last, more = sharded(LLAMA, adapter, sharding, mesh, comm, named, layers=[1])
        last(first(None, tokens), tokens, targets).backward()
        sum_partial(Plain(first, last), groups | more)
        parameters = Plain(first, last).parameters()
        assert list(parameters) == list(named)
        found |= {f"{sharding} {n}": error(p.grad, p.piece.of(named[n].grad)) for n, p in parameters.items()}
    return found


def check_data_ranks(rank, world_size):
    """Two data ranks of two tp ranks each: gradients of all rows, where the strategy keeps them."""
    mesh = Mesh(Layout(dp=2, tp=2), rank, world_size)
    comm, data = make_comm(mesh.group("tp")), make_comm(mesh.group("dp"))
    found = {}
    for sharding in SHARDINGS:
        adapter = lora(sharding, 2)
        model, named = filled(LLAMA, adapter)
        tokens, targets = batch(LLAMA, 4, 12)
        model(tokens, targets).backward()
        for strategy_cls in (Overlapped, Zero1):
            stage, groups = sharded(LLAMA, adapter, sharding, mesh, comm, named)
            strategy = strategy_cls([stage], data)
            rows = slice(2 * mesh.place["dp"], 2 * mesh.place["dp"] + 2)
            stage(None, tokens[rows], targets[rows]).backward()
            strategy.finish()
            sum_partial(strategy, groups)
            pieces = strategy.pieces()
            for name, p in strategy.parameters().items():
                found[f"{sharding} {strategy_cls.__name__} {name}"] = error(p.grad, pieces[name].of(named[name].grad))
    return found


@pytest.mark.parametrize(("check", "ranks", "most"), [(check_stages, 2, 90), (check_data_ranks, 4, 180)])
def test_with_pipeline_stages_and_data_ranks(check, ranks, most):
    for found in spawn(check, ranks):
        assert 0.5 * most <= len(found) <= most
        for case, value in found.items():
            assert value <= 1e-12, case


class Ear:
    def __init__(self):
        self.calls = []

    def started(self, call):
        self.calls.append(call)

    def ended(self, call):
        pass


def check_dtypes(rank, world_size):
    """A bfloat16 base keeps a float32 adapter, whose products travel in float32; under autocast in bfloat16."""
    ear = Ear()
    mesh, comm = meet(rank, world_size, listeners=(ear,))
    found = []
    for sharding in SHARDINGS:
        adapter = lora(sharding, world_size)
        model, named = filled(LLAMA, adapter)
        tokens, targets = batch(LLAMA, 2, 12)
        model(tokens, targets).backward()
        for autocast in (False, True):
            stage, groups = cut(LLAMA, mesh, comm)
            stage.to(torch.float32 if autocast else torch.bfloat16)
            groups |= shard_adapter(stage, adapter, sharding, comm, groups)
            with pytest.raises(ValueError, match="is torch.float64: expected torch.float32, or fewer bits"):
                scatter_adapter(stage, named)
            scatter_adapter(stage, {name: p.detach().float() for name, p in named.items()})
            ear.calls.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = stage(None, tokens, targets)
            loss.backward()
            dtypes = {call.dtype for call in ear.calls if call.tag in (GATHER, SUM)}
            assert dtypes == ({torch.bfloat16 if autocast else torch.float32} if sharding == "s-lora" else set())
            sum_partial(Plain(stage), groups)
            mine = Plain(stage).parameters()
            assert len(mine) == 30 and all(p.dtype == p.grad.dtype == torch.float32 for p in mine.values())
            want = torch.cat([p.piece.of(named[name].grad).flatten() for name, p in mine.items()])
            got = torch.cat([p.grad.flatten() for p in mine.values()])
            found.append(((got - want).norm() / want.norm()).item())
    return found


def test_dtypes_of_adapters_and_of_what_is_sent():
    for found in spawn(check_dtypes, 2):
        assert len(found) == 6 and all(value <= 0.2 for value in found), found


class Copies(TorchDispatchMode):
    """Counts copies of tensors of at least so many numbers."""

    def __init__(self, least):
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default) and args[0].numel() >= self.least:
            self.count += 1
        return func(*args, **(kwargs or {}))


def check_copies(rank, world_size):
    """{way: copies of outputs, or a rank's part of them, forward and backward}"""
    mesh, comm = meet(rank, world_size)
    found = {}
    for sharding in SHARDINGS:
        stage, _ = sharded(LLAMA, lora(sharding, world_size, ("down",)), sharding, mesh, comm)
        layer = stage.get_submodule("blocks.1.mlp.down")
        x = torch.randn(2, 8, layer.base.in_features, dtype=torch.float64, requires_grad=True)
        gradient = torch.randn(2, 8, 24, dtype=torch.float64)
        with Copies(2 * 8 * 24 // world_size) as copies:
            layer(x).backward(gradient)
        found[sharding] = copies.count
    return found


def test_outputs_and_their_gradients_are_not_copied():
    for found in spawn(check_copies, 2):
        assert found == dict.fromkeys(SHARDINGS, 0)


def check_dropout(rank, world_size):
    mesh, comm = meet(rank, world_size)
    found = {}
    columns = ("query", "key", "value", "gate", "up", "head")
    for sharding in SHARDINGS:
        adapter = lora(sharding, world_size, columns, dropout=0.4)
        model, named = filled(LLAMA, adapter)
        tokens, targets = batch(LLAMA, 2, 12)
        torch.manual_seed(5)
        loss = model(tokens, targets)
        stage, _ = sharded(LLAMA, adapter, sharding, mesh, comm, named)
        torch.manual_seed(5)
        got = stage(None, tokens, targets)
        assert not abs(got - stage.eval()(None, tokens, targets)) <= 1e-3
        found[f"{sharding} columns"] = abs(got.item() - loss.item())
        stage, _ = sharded(LLAMA, replace(adapter, targets=("output", "down")), sharding, mesh, comm)
        (first, *_) = sharded_layers(stage).values()
        mask = (first.dropped(torch.ones(9, 12)) == 0).float()
        first.eval()
        assert torch.equal(first.dropped(torch.ones(9, 12)), torch.ones(9, 12))
        assert 0.2 <= mask.mean() <= 0.6
        both, number = mask.clone(), torch.rand(1)
        comm.all_reduce(both)
        assert (both == 1).any() and (both == 2).any()  # dropped by one rank, by both
        most = number.clone()
        comm.all_reduce(most, "max")
        assert torch.equal(most, number)  # in step as before
    return found


def test_dropout_has_one_mask_for_what_all_ranks_have_and_own_ones_else():
    for found in spawn(check_dropout, 2):
        for case, value in found.items():
            assert value <= 1e-12, case


def alone(ranks, config=LLAMA, **options):
    """A stage of rank 0 of a tp group of which only this process is there: enough for refusals."""
    mesh, comm = Mesh(Layout(tp=ranks), 0, ranks), TorchComm(Group(("tp",), tuple(range(ranks)), 0))
    stage = StageGPT(config)
    parallelise(stage, mesh, comm, **options)
    materialise(stage)
    initialise([stage], config, seed=0)
    return stage, comm


@pytest.mark.parametrize(
    ("ranks", "sharding", "options", "message"),
    [
        (2, "bd", {}, "sharding 'bd': expected block-diagonal, s-lora, replicated"),
        (2, "block-diagonal", {}, "blocks 1 over tp 2: expected 2 or a multiple of it"),
        (4, "block-diagonal", {"blocks": 2}, "blocks 2 over tp 4: expected 4 or a multiple"),
        (2, "replicated", {"blocks": 2}, "blocks 2 with sharding replicated: expected 1"),
        (2, "s-lora", {"rank": 5}, "rank 5 of blocks.0.attention.query over tp 2: expected a multiple of 2"),
        (2, "s-lora", {"rank_pattern": {"up": 3}}, "rank 3 of blocks.0.mlp.up over tp 2"),
        (2, "block-diagonal", {"blocks": 16, "rank": 16}, r"blocks 16: .*query has 24 outputs: expected a multiple"),
        (2, "replicated", {"targets": ("embedding",)}, "target embedding: expected linear layers"),
        (2, "replicated", {"targets": ("nothing",)}, r"targets \['nothing'\] fit no layer"),
    ],
)
def test_what_cannot_be_sharded_is_refused(ranks, sharding, options, message):
    stage, comm = alone(ranks)
    before = {name: p for name, p in stage.named_parameters()}
    with pytest.raises(ValueError, match=message):
        shard_adapter(stage, LoraConfig(**({"targets": ALL} | options)), sharding, comm, {})
    assert {name: id(p) for name, p in stage.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert all(p.requires_grad for p in before.values()) and not sharded_layers(stage)


def test_other_refusals():
    stage, comm = alone(2, ODD)
    with pytest.raises(ValueError, match="output of 21 outputs over tp 2: expected a multiple of 2 for s-lora"):
        shard_adapter(stage, lora("s-lora", 2), "s-lora", comm, {})
    shard_adapter(stage, lora("replicated", 2), "replicated", comm, {})
    with pytest.raises(ValueError, match="a stage that has an adapter"):
        shard_adapter(stage, lora("replicated", 2), "replicated", comm, {})
    with pytest.raises(ValueError, match="a stage on the meta device"):
        shard_adapter(StageGPT(LLAMA), lora("replicated", 2), "replicated", comm, {})
    plain = StageGPT(LLAMA)
    materialise(plain)
    with pytest.raises(ValueError, match="blocks.0.attention.query is a Linear: expected a stage after `parallelise`"):
        shard_adapter(plain, lora("replicated", 2), "replicated", comm, {})
    with pytest.raises(ValueError, match="over 1 rank: expected at least 2"):
        shard_adapter(plain, lora("replicated", 2), "replicated", TorchComm(Group(("tp",), (0,), 0)), {})
    with pytest.raises(ValueError, match="a stage without an adapter"):
        gather_adapter(plain, comm)


def check_shared(rank, world_size):
    mesh, comm = meet(rank, world_size)
    stage, groups = cut(SMALL, mesh, comm)
    message = "blocks.0.attention.key, which 2 ranks share, with block-diagonal factors"
    with pytest.raises(ValueError, match=message):
        shard_adapter(stage, lora("block-diagonal", 4), "block-diagonal", comm, groups)
    with pytest.raises(ValueError, match="which 2 ranks share: expected what `parallelise` returned"):
        shard_adapter(stage, lora("replicated", 4), "replicated", comm, {})
    shard_adapter(stage, lora("block-diagonal", 4, ("query", "output", "up")), "block-diagonal", comm, groups)
    return True


def test_block_diagonal_factors_of_shared_heads_are_refused():
    assert spawn(check_shared, 4) == [True] * 4


def test_what_is_scattered_is_checked():
    stage, comm = alone(2)
    shard_adapter(stage, lora("s-lora", 2), "s-lora", comm, {})
    _, named = filled(LLAMA, lora("s-lora", 2))
    first = next(iter(named))
    before = {name: p.clone() for name, p in stage.named_parameters()}
    for change, message in (
        (lambda d: d.pop(first), "query.adapters.default.A: missing among the 29 tensors"),
        (lambda d: d.update(more=torch.zeros(1)), "more: expected"),
        (lambda d: d.update({first: torch.zeros(8, 23)}), r"of shape \(8, 23\): expected \(8, 24\)"),
        (lambda d: d.update({first: torch.full((8, 24), float("nan"))}), "holds NaN or infinity"),
    ):
        tensors = {name: p.detach() for name, p in named.items()}
        change(tensors)
        with pytest.raises(ValueError, match=message):
            scatter_adapter(stage, tensors)
    assert all(torch.equal(p, before[name]) for name, p in stage.named_parameters())
