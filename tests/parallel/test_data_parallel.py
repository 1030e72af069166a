"""Data parallelism against one process in float64: losses, every gradient and the weights to 1e-12, in every order in
which gradients may come; and its messages: how many, how large, when, in the same order on all ranks."""

import pytest
import torch
from torch import nn

from common.dist import spawn
from parallel.comm import TorchComm
from parallel.data_parallel import DATA_PARALLEL, Overlapped, split_into_buckets
from parallel.mesh import Layout, Mesh
from parallel.model import whole_shapes
from parallel.strategy import global_norm
from tests.parallel.data_ranks import Case, Heard, Toy, batches_of, check, make_strategy, train
from tests.parallel.gpts import CONFIGS
from tests.parallel.toy_steps import STEPS, check_toy, loss_of

ALONE = TorchComm(Mesh(Layout()).group())


@pytest.mark.parametrize("config", CONFIGS)
def test_a_gpt_trains_as_in_one_process(config):
    frozen = ("blocks.1.attention.query.weight", "norm.weight")
    cases = [Case(name, config, "adamw", 3, clip=0.5, frozen=frozen) for name in DATA_PARALLEL]
    cases += [Case("naive", config), Case("flat", config, kind="ours"), Case("overlapped", config)]
    cases += [Case("overlapped", config, "sgd", 3, sync, kind=kind) for sync, kind in
              (("last", "ours"), ("all", "torch"), ("none", "ours"))]  # fmt: skip
    assert set(frozen) < set(whole_shapes(CONFIGS[config]))
    ranks = spawn(train, 3, cases, batches_of(config), timeout_s=120)
    for number, case in enumerate(cases):
        check(case, [rank[number] for rank in ranks])


@pytest.mark.parametrize("ranks, kind", [(1, "torch"), (2, "torch"), (3, "ours")])
def test_gradients_in_any_order(ranks, kind):
    """Branches of some ranks only, several synchronised passes, gradients that come late or without a hook."""
    assert spawn(check_toy, ranks, list(DATA_PARALLEL), kind, ranks, timeout_s=120) == [[]] * ranks


def _messages(rank: int, W: int, name: str, **options) -> dict:
    """What a rank sends in a step of each kind, before and in finish()."""
    heard = Heard()
    stage = Toy(seed=rank)
    strategy = make_strategy(name, [stage], Mesh(Layout(dp=W), rank, W), "torch", 3e-4, [heard], **options)
    start = [(call.name, call.payload) for call in heard.take()]
    found = {}
    for label, passes in STEPS.items():
        for number, one in enumerate(passes):
            if not one.late and rank != one.skip:
                if one.sync:
                    loss_of(stage, rank, 0, number, one).backward()
                else:
                    with strategy.no_sync():
                        loss_of(stage, rank, 0, number, one).backward()
        before = [(call.name, call.payload, call.tag) for call in heard.take()]
        strategy.finish()
        found[label] = before, [(call.name, call.payload, call.tag) for call in heard.take()]
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in stage.parameters())
        strategy.zero_grad()
    return {"start": start, "buckets": len(getattr(strategy, "buckets", ())), "steps": found}


def _all_messages(rank: int, W: int) -> dict[str, dict]:
    found = {name: _messages(rank, W, name) for name in DATA_PARALLEL}
    return found | {"half": _messages(rank, W, "flat", reduce_dtype=torch.float32)}


def test_messages():
    ranks = spawn(_all_messages, 3)
    toy = Toy(seed=0)
    trained = {name: p for name, p in toy.named_parameters() if p.requires_grad}
    S = 8 * sum(p.numel() for p in trained.values())
    for name in ranks[0]:
        for label in STEPS:
            sent = [before + after for before, after in (rank[name]["steps"][label] for rank in ranks)]
            assert sent[0] == sent[1] == sent[2], (name, label)
            assert {call for call, _, _ in sent[0]} <= {"all_reduce"}
        everything = [8 * p.numel() for p in toy.parameters()]
        assert sorted(ranks[0][name]["start"]) == sorted(("broadcast", size) for size in everything), name
    for rank in ranks:
        naive, flat, overlapped, half = (rank[name]["steps"] for name in ("naive", "flat", "overlapped", "half"))
        unused = {"none", "branches.1.weight", "branches.2.weight"}
        used = [8 * p.numel() for name, p in trained.items() if name not in unused]
        assert [size for _, size, _ in naive["plain"][1]] == used
        assert 5 <= rank["flat"]["buckets"] == rank["overlapped"]["buckets"] <= 8
        assert sum(size for _, size, _ in flat["plain"][1]) <= S
        assert sum(size for _, size, _ in flat["branches"][1]) == S
        assert sum(size for _, size, _ in half["branches"][1]) == S / 2
        assert sum(size for _, size, _ in overlapped["plain"][1] + overlapped["plain"][0]) == S
        for steps in (naive, flat, half):
            assert not any(before for before, _ in steps.values())
        assert not overlapped["none"][0] and overlapped["none"][1]


class _Chain(nn.Module):
    """Every parameter is used, in reverse order of the gradients' coming."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(6)))

    def forward(self, x_BC):
        return self.layers(x_BC).square().mean()


def _overlap(rank: int, W: int) -> list[list[int]]:
    """How many buckets are on their way each time a gradient has come, in three backward passes of a step."""
    heard, counts = Heard(), []
    stage = _Chain()
    strategy = make_strategy("overlapped", [stage], Mesh(Layout(dp=W), rank, W), "torch", 1e-6, [heard])
    heard.take()
    for p in stage.parameters():
        p.register_post_accumulate_grad_hook(lambda p: counts[-1].append(len(heard.calls)))
    for sync in (False, True, True):
        counts.append([])
        strategy._sync = sync
        stage(torch.ones(2, 9)).backward()
    strategy.finish()
    return counts


def test_buckets_leave_while_the_backward_pass_goes_on():
    for counts in spawn(_overlap, 2):
        assert counts == [[0] * 6, [1, 2, 3, 4, 5, 6], [8, 9, 10, 11, 12, 13]]  # a vote before the second round


def test_buckets_are_cut_by_size_and_kind_in_reverse_order():
    sizes = {"a": 30, "b": 1, "c": 2, "d": 40, "e": 3, "f": 1}
    parameters = {name: nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    assert [list(bucket) for bucket in split_into_buckets(parameters, 40.0)] == [["f", "e", "d"], ["c", "b", "a"]]
    assert [list(b) for b in split_into_buckets(parameters, 1.0)] == [[name] for name in reversed(sizes)]
    by_kind = split_into_buckets(parameters, 100.0, kind=lambda name: name in "ad")
    assert [list(bucket) for bucket in by_kind] == [["d"], ["a"], ["f", "e", "c", "b"]]
    parameters["e"] = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    assert [list(b) for b in split_into_buckets(parameters, 1e9)] == [["f", "d", "c", "b", "a"], ["e"]]
    assert split_into_buckets({}, 1.0) == []


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_one_process_without_torch_distributed(name):
    toy = Toy(seed=0)
    strategy = DATA_PARALLEL[name]([toy], ALONE)
    assert list(strategy.parameters()) == [n for n, p in toy.named_parameters() if n != "frozen"]
    loss = toy(torch.ones(3, 7, dtype=torch.float64), 1)
    wanted = torch.autograd.grad(loss, [toy.gain, toy.square.weight], retain_graph=True)
    loss.backward()
    strategy.finish()
    assert torch.equal(toy.gain.grad, wanted[0]) and torch.equal(toy.square.weight.grad, wanted[1])
    assert toy.none.grad is None and toy.frozen.grad is None
    assert global_norm(strategy) > 0
    strategy.finish()  # another step, in which nobody has a gradient
    strategy.zero_grad()
    with pytest.raises(RuntimeError), strategy.no_sync():
        raise RuntimeError
    assert strategy._sync


def test_bad_input():
    with pytest.raises(ValueError, match="gain.*two stages"):
        Overlapped([Toy(0), Toy(1)], ALONE)
    for size in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="bucket_mb.*positive"):
            Overlapped([Toy(0)], ALONE, bucket_mb=size)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    nothing = Overlapped([frozen], ALONE)
    nothing.finish()
    nothing.stepped()
    assert nothing.parameters() == {}
