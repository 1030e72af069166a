"""ZeRO-1 and ZeRO-2 against one process in float64, with AdamW, SGD and Muon; who has what, how many bytes that takes
and how many move."""

import gc
from itertools import product

import pytest
import torch
from torch import nn

from common.dist import spawn
from parallel.comm import TorchComm
from parallel.mesh import Layout, Mesh
from parallel.pieces import even_range
from parallel.zero import Zero1, Zero2, assign_owners
from tests.parallel.data_ranks import (
    ZERO,
    Case,
    Heard,
    batches_of,
    check,
    make_strategy,
    matrices,
    stirred_stage,
    train,
)  # fmt: skip
from tests.parallel.gpts import CONFIGS
from tests.parallel.toy_steps import check_toy

ALONE = TorchComm(Mesh(Layout()).group())


@pytest.mark.parametrize("config", CONFIGS)
def test_a_gpt_trains_as_in_one_process(config):
    frozen = ("blocks.1.attention.query.weight", "norm.weight")
    cases = [
        Case("zero1", config, "sgd", 3),
        Case("zero1", config, "muon", kind="ours"),
        Case("zero2", config, "sgd", 3, "all", kind="ours"),
        Case("zero2", config, "muon", 3, clip=0.5, frozen=frozen),
        Case("zero2", config, "adamw", 3, "none", frozen=frozen),
    ]
    ranks = spawn(train, 3, cases, batches_of(config), timeout_s=120)
    for number, case in enumerate(cases):
        check(case, [rank[number] for rank in ranks])


def test_a_gpt_trains_with_replicas_of_the_parts():
    """2 x 2. A gradient that is not averaged over the second axis would show under SGD."""
    cases = [Case("zero1", "gpt2", "sgd", fsdp=2), Case("zero2", "ours", "muon", 3, "all", clip=0.5, fsdp=2)]
    ranks = spawn(train, 4, cases, batches_of("ours"), timeout_s=120)
    for number, case in enumerate(cases):
        check(case, [rank[number] for rank in ranks])


@pytest.mark.parametrize("ranks, fsdp, kind", [(1, 1, "torch"), (3, 3, "ours"), (4, 2, "torch"), (2, 1, "torch")])
def test_gradients_in_any_order(ranks, fsdp, kind):
    """Branches of some ranks only, several synchronised passes, gradients that come late or without a hook."""
    assert spawn(check_toy, ranks, list(ZERO), kind, fsdp, timeout_s=120) == [[]] * ranks


def _parts(rank: int, W: int) -> None:
    """Who has what."""
    mesh = Mesh(Layout(fsdp=W), rank, W)
    for config, name in product(CONFIGS, ZERO):
        stage = stirred_stage(config, seed=1)
        named = dict(stage.named_parameters())
        whole = matrices(list(named), named)
        owners = assign_owners({name: named[name].numel() for name in whole}, W)
        strategy = make_strategy(name, [stage], mesh, whole=whole)
        parameters, pieces = strategy.parameters(), strategy.pieces()
        assert strategy.split_over == (strategy.comm,)
        assert list(parameters) == [name for name in named if name in parameters] == list(pieces)
        for name, p in named.items():
            if name not in whole:
                start, stop = even_range(p.numel(), rank, W)
                assert pieces[name].flat == (start, stop) and parameters[name].shape == (stop - start,)
                assert parameters[name].data_ptr() == p.data_ptr() + start * p.element_size()
            elif owners[name] == rank:
                assert pieces[name].flat is None and parameters[name].shape == p.shape
                assert parameters[name].data_ptr() == p.data_ptr()
            else:
                assert name not in parameters


def test_the_parts_are_views():
    spawn(_parts, 3)


def test_owners_have_even_loads():
    """Within 4/3 - 1/(3 W) of the best (Graham 1969), which brute force finds."""
    generator = torch.Generator().manual_seed(0)
    for ranks in (1, 2, 3):
        for _ in range(5):
            sizes = {str(i): int(n) for i, n in enumerate(torch.randint(1, 50, (6,), generator=generator))}
            owners = assign_owners(sizes, ranks)
            assert owners == assign_owners(sizes, ranks) and owners.keys() == sizes.keys()
            loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(ranks)]
            best = min(max(sum(n for n, o in zip(sizes.values(), choice, strict=True) if o == rank)
                           for rank in range(ranks)) for choice in product(range(ranks), repeat=6))  # fmt: skip
            assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * best
    assert assign_owners({"a": 1, "b": 1, "c": 1}, 2) == {"a": 0, "b": 1, "c": 0}


class _Tower(nn.Module):
    """Many matrices, little else: S bytes of float32."""

    def __init__(self, layers: int = 32, width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x_BC):
        for layer in self.layers:
            x_BC = torch.tanh(layer(x_BC))
        return x_BC.square().mean()

    S = 32 * 64 * 64 * 4


def _live_bytes() -> int:
    """Of all storages that any tensor holds, but for those from before the last gc.freeze()."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    gradients = [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors + gradients}
    return sum(storages.values())


def _memory(rank: int, W: int, names: list[str], owned: bool) -> list[tuple[float, float]]:
    """For each (the most while gradients come and after them, what is left after a step), in units of S."""
    mesh = Mesh(Layout(fsdp=W), rank, W)
    return [_memory_of(mesh, name, owned) for name in names]


def _memory_of(mesh: Mesh, name: str, owned: bool) -> tuple[float, float]:
    gc.collect()
    gc.freeze()  # gc.get_objects() is the quicker for it
    seen = []
    stage = _Tower()
    options = {"whole": [n for n, _ in stage.named_parameters()]} if owned else {}
    strategy = make_strategy(name, [stage], mesh, "ours", 1 / 64, **options)
    states = [torch.zeros_like(p) for p in strategy.parameters().values() for _ in range(2)]  # as Adam has
    for p in list(stage.parameters())[::6]:  # to look takes long
        p.register_post_accumulate_grad_hook(lambda p: seen.append(_live_bytes()))
    for _ in range(2):
        for _ in range(2 if name == "zero2" else 1):
            stage(torch.ones(1, 64)).backward()
        strategy.finish()
        seen.append(_live_bytes())
        strategy.stepped()
        strategy.zero_grad()
    gc.collect()
    assert states
    return max(seen) / _Tower.S, _live_bytes() / _Tower.S


def test_memory():
    """Rajbhandari et al., figure 1, with float32 throughout: parameters, gradients, Adam's two numbers for each."""
    W = 4
    wanted = {"overlapped": (4, 3), "zero1": (2 + 2 / W, 1 + 2 / W), "zero2": (1 + 3 / W, 1 + 2 / W)}
    for rank in spawn(_memory, W, list(wanted), False, timeout_s=120):
        for (peak, after), (most, left) in zip(rank, wanted.values(), strict=True):
            assert abs(peak - most) <= 0.1 * most and abs(after - left) <= 0.01 * left, (peak, after, most, left)
    for rank in spawn(_memory, 2, ["zero2"], True, timeout_s=120):  # 32 matrices, 16 owned by each rank
        assert abs(rank[0][0] - 2.5) <= 0.25 and abs(rank[0][1] - 2) <= 0.02


def _messages(rank: int, W: int, fsdp: int, name: str, owned: bool) -> list[list[tuple[str, str, int]]]:
    """The calls of a step, by when they are made: in the backward pass, in finish(), in stepped()."""
    heard = Heard()
    stage = _Tower()
    options = {"whole": [n for n, _ in stage.named_parameters()]} if owned else {}
    mesh = Mesh(Layout(dp=W // fsdp, fsdp=fsdp), rank, W)
    strategy = make_strategy(name, [stage], mesh, "ours", 1 / 16, [heard], **options)
    heard.take()
    found = []

    def note() -> None:
        found.append([(call.name, call.group.label, call.payload) for call in heard.take()])

    with strategy.no_sync():
        stage(torch.ones(1, 64)).backward()
    assert not heard.calls
    stage(torch.ones(1, 64)).backward()
    note()
    strategy.finish()
    note()
    strategy.stepped()
    note()
    return found


def _all_messages(rank: int, W: int) -> list:
    return [_messages(rank, W, *case) for case in MESSAGES]


MESSAGES = [(4, "zero1", False), (4, "zero2", False), (4, "zero2", True), (2, "zero2", False)]  # ranks, what, owned


def test_messages():
    """(W - 1) / W of S for gradients and as much again for parameters: a reduce-scatter and an all-gather of S."""
    S = _Tower.S
    bucket = S // 8
    for zero1, zero2, owned, hybrid in spawn(_all_messages, 4):
        assert zero1 == [[], [("reduce_scatter", "fsdp", bucket)] * 8, [("all_gather", "fsdp", bucket)] * 8]
        assert zero2 == [[("reduce_scatter", "fsdp", bucket)] * 8, [], [("all_gather", "fsdp", bucket)] * 8]
        assert owned == [[("all_to_all", "fsdp", bucket)] * 8, [], [("all_to_all", "fsdp", bucket)] * 8]
        assert hybrid == [zero2[0], [("all_reduce", "dp", bucket // 2)] * 8, zero2[2]]


def test_bad_input():
    stage = stirred_stage("gpt2", seed=1, frozen=["blocks.0.mlp.up.weight"])
    for zero in (Zero1, Zero2):
        with pytest.raises(ValueError, match="blocks.7.*trained parameters"):
            zero([stage], ALONE, whole=["blocks.7.mlp.up.weight"])
        with pytest.raises(ValueError, match="blocks.0.mlp.up.*trained parameters"):
            zero([stage], ALONE, whole=["blocks.0.mlp.up.weight"])
        with pytest.raises(ValueError, match=r"norm.bias.*\(24,\).*matrix"):
            zero([stage], ALONE, whole=["norm.bias"])
        with pytest.raises(ValueError, match="in two stages"):
            zero([stage, stirred_stage("ours", seed=1)], ALONE)
        with pytest.raises(ValueError, match="bucket_mb"):
            zero([stage], ALONE, bucket_mb=float("nan"))
