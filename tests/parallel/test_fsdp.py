"""FSDP against one process in float64: losses, every gradient, the weights; and what it holds and sends by formula."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from common.dist import spawn
from minigpt.model import GPT
from parallel import deferred
from parallel.comm import make_comm
from parallel.fsdp import FSDP, summon
from parallel.mesh import Layout, Mesh
from parallel.model import StageGPT, split_layers, whole_shapes
from parallel.pieces import even_range
from parallel.strategy import clip
from tests.parallel import gpts

TIGHT = 1e-12
DTYPE = torch.float64


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    """The gradient of a key's bias is zero but for rounding: a larger eps, or AdamW makes steps of the rounding."""
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-4)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


@dataclass(frozen=True)
class Case:
    config: str = "ours"
    optimizer: str = "sgd"
    accumulate: int = 1
    no_sync: bool = False
    reshard: bool = True
    prefetch: int = 1
    replicas: int = 1
    kind: str = "torch"
    frozen: tuple[str, ...] = ()
    in_flight: bool = False  # all forward passes before the first backward pass
    stages: int = 1  # parts of the model, one behind the other on the same rank
    checkpointed: bool = False
    deferred: bool = False
    offload: bool = False
    clip: float = 0.0


class Counter:
    """Adds up the bytes that the formulas give to each call: all-gathers and reduce-scatters (W-1)/W of S."""

    def __init__(self):
        self.sent, self.names = 0.0, []

    def started(self, call):
        W = call.group.size
        self.sent += call.payload * (W - 1) / W
        self.names.append((call.name, call.tag))

    def ended(self, call):
        pass


def stages_of(case: Case, config) -> list[StageGPT]:
    linear = {"linear_cls": deferred.DeferrableLinear} if case.deferred else {}
    layers = split_layers(config.layers, case.stages)
    stages = [StageGPT(config, list(part), **linear).double() for part in layers]
    for stage in stages:
        for name, p in stage.named_parameters():
            p.requires_grad_(name not in case.frozen)
        if case.checkpointed:
            stage.run_block = lambda block, x, sight: checkpoint(block, x, sight, use_reentrant=False)
    return stages


def stirred(config) -> dict[str, torch.Tensor]:
    return gpts.stir({name: torch.empty(shape, device="meta") for name, shape in whole_shapes(config).items()})


def run_case(case: Case, mesh: Mesh, batches):
    """(losses, gradients of each step, weights), whole, as `gpts.single` returns them."""
    config = gpts.CONFIGS[case.config]
    comm = make_comm(mesh.group("fsdp"), case.kind)
    replicas = make_comm(mesh.group("dp"), case.kind) if case.replicas > 1 else None
    everybody = make_comm(mesh.group("dp", "fsdp"))
    stages = stages_of(case, config)
    queue = deferred.WeightGradients()
    for stage in stages:
        queue.attach(stage)
    strategy = FSDP(
        stages, comm, replicas, config=config, values=stirred(config), reshard_after_forward=case.reshard,
        prefetch=case.prefetch, offload=case.offload,
    )  # fmt: skip
    optimizer = OPTIMIZERS[case.optimizer](strategy.parameters().values())
    losses, gradients = [], []
    for tokens_BT, targets_BT in batches:
        total = torch.zeros((), dtype=DTYPE)
        parts = list(zip(*(x.chunk(case.accumulate) for x in (tokens_BT, targets_BT)), strict=True))
        waiting = []
        for index, part in enumerate(parts):
            mine = [x.chunk(everybody.size)[everybody.rank] for x in part]
            waiting.append((index, forward(stages, mine, case) / case.accumulate))
            if case.in_flight and index < len(parts) - 1:
                continue
            while waiting:
                number, loss = waiting.pop(0)
                backward(loss, queue, strategy, case, last=number == len(parts) - 1)
                total += loss.detach()
        strategy.finish()
        if case.clip:
            clip(strategy, case.clip)
        everybody.all_reduce(total, "mean")
        losses.append(total.item())
        gradients.append(whole({name: p.grad for name, p in strategy.parameters().items()}, strategy, comm))
        optimizer.step()
        strategy.stepped()
        strategy.zero_grad()
    with torch.no_grad():  # an evaluation frees everything again
        forward(stages, mine, case)
    assert all(flat.alone or not flat.whole.untyped_storage().nbytes() for flat in strategy.flats)
    return losses, gradients, whole({name: p for name, (p, _) in strategy.tensors().items()}, strategy, comm)


def forward(stages, mine, case):
    x = None
    for stage in stages:
        x = stage(x, mine[0], mine[1])
    return x


def backward(loss, queue, strategy, case, last):
    quiet = case.no_sync and not last
    queue.open = case.deferred
    with strategy.no_sync() if quiet else nullcontext():
        loss.backward()
    queue.open = False
    deferred.run(queue.take())


def whole(values, strategy, comm):
    """Whole tensors from the segments of all ranks, by the pieces alone."""
    result = {}
    shapes = {name: piece.shape for name, (_, piece) in strategy.tensors().items()}
    names = {name: p.shape for flat in strategy.flats for name, p in flat.parameters.items()}
    for name in names:
        total = torch.zeros(names[name], dtype=DTYPE)
        if name in values and values[name] is not None:
            assert values[name].dtype == DTYPE and shapes[name] == tuple(names[name])
            strategy.tensors()[name][1].put(total, values[name])
        comm.all_reduce(total)
        result[name] = total
    return result


def compare(case: Case, rank_results, batches):
    config = gpts.CONFIGS[case.config]
    want = gpts.single(config, batches, OPTIMIZERS[case.optimizer], case.accumulate, case.clip, case.frozen)
    losses, gradients, weights = rank_results
    assert all(abs(a - b) <= TIGHT for a, b in zip(losses, want[0], strict=True)), (case, losses, want[0])
    for step, (got, wanted) in enumerate(zip(gradients, want[1], strict=True)):
        for name, gradient in wanted.items():
            if not case.clip:  # `single` keeps clipped ones: so do we, but by a norm of our own
                assert gpts.error(got[name], gradient) <= TIGHT, (case, step, name)
    assert set(weights) == set(want[2])
    for name, weight in want[2].items():
        assert gpts.error(weights[name], weight) <= TIGHT, (case, name)


def cases_of_rank(rank, world_size, cases, batches):
    torch.manual_seed(rank)
    results, meshes = [], {}
    for case in cases:
        layout = Layout(dp=case.replicas, fsdp=world_size // case.replicas)
        mesh = meshes.setdefault(layout, Mesh(layout, rank, world_size))
        results.append(run_case(case, mesh, batches))
    return results


TWO = (
    Case(),
    Case(config="gpt2", optimizer="adamw", accumulate=3),
    Case(accumulate=3, no_sync=True, prefetch=0, kind="ours"),
    Case(config="gpt2", accumulate=3, no_sync=True, reshard=False, prefetch=2),
    Case(optimizer="adamw", accumulate=3, in_flight=True, stages=3),
    Case(config="gpt2", accumulate=3, in_flight=True, no_sync=True, checkpointed=True, kind="ours"),
    Case(accumulate=3, reshard=False, in_flight=True, checkpointed=True, prefetch=2),
    Case(accumulate=3, no_sync=True, deferred=True, stages=2),
    Case(deferred=True),
    Case(config="gpt2", frozen=("embedding.weight", "position_embedding.weight", "blocks.1.mlp.up.bias")),
    Case(frozen=tuple(n for n in whole_shapes(gpts.SMALL) if not n.startswith(("norm", "head", "blocks.2")))),
    Case(frozen=tuple(n for n in whole_shapes(gpts.SMALL) if n.startswith(("norm", "head", "blocks.1")))),
    Case(optimizer="adamw", offload=True, clip=0.05),
)  # fmt: skip
FOUR = (
    Case(config="gpt2", optimizer="adamw", accumulate=3, replicas=2, clip=0.05, kind="ours"),
    Case(replicas=2, accumulate=3, no_sync=True, reshard=False),
    Case(optimizer="adamw"),
    Case(config="gpt2", replicas=4),
)  # fmt: skip


def batches_for(world_size: int):
    return [gpts.batch(gpts.SMALL, 3 * world_size, T=7, seed=seed) for seed in range(2)]


@pytest.mark.parametrize(("world_size", "cases"), [(1, TWO[:2]), (2, TWO), (3, TWO[:2]), (4, FOUR)])
def test_equals_one_process(world_size, cases):
    batches = batches_for(world_size)
    results = spawn(cases_of_rank, world_size, cases, batches)
    for number, case in enumerate(cases):
        compare(case, results[0][number], batches)
        weights = [of_rank[number][2] for of_rank in results]
        assert all(torch.equal(other[name], weights[0][name]) for other in weights[1:] for name in other), case


def pair(rank, world_size, **changes) -> tuple[FSDP, StageGPT, Counter]:
    """An FSDP over all ranks of one whole GPT in float64."""
    config = changes.pop("config", gpts.SMALL)
    stage = changes.pop("stage", None) or StageGPT(config).double()
    counter = Counter()
    comm = make_comm(Mesh(Layout(fsdp=world_size), rank, world_size).group("fsdp"), listeners=[counter])
    options = {"config": config} | ({} if "seed" in changes else {"values": stirred(config)}) | changes
    return FSDP([stage], comm, **options), stage, counter


def initial_weights(rank, world_size):
    torch.manual_seed(rank)
    for config in gpts.CONFIGS.values():
        stage = StageGPT(config)
        stage.norm.weight.requires_grad_(False)
        strategy, stage, _ = pair(rank, world_size, config=config, stage=stage, seed=3)
        want = dict(GPT(config, seed=3).named_parameters())
        with summon(strategy) as values:
            assert set(values) == set(want)
            for name, value in values.items():
                assert value.dtype == torch.float32 and torch.equal(value, want[name]), name
            assert stage(None, *gpts.batch(config, 2)).isfinite()
        pieces, parameters = strategy.pieces(), strategy.parameters()
        low, high = even_range(want["embedding.weight"].numel(), rank, world_size)
        assert pieces["embedding.weight"].flat == (low, high)
        assert "norm.weight" not in parameters and set(parameters) == set(pieces)
        assert all(p.shape == (pieces[name].numel,) for name, p in parameters.items())
        held = sum(tensor.numel() for tensor, _ in strategy.tensors().values())
        whole_numel = sum(p.numel() for p in want.values())
        assert held <= whole_numel / world_size + len(strategy.flats)


def test_initial_weights_are_those_of_one_process():
    spawn(initial_weights, 3)


def half_precision(rank, world_size, batches):
    """Passes in bfloat16, everything else in float32, against the same written out."""
    config = gpts.GPT2_LIKE
    strategy, stage, _ = pair(rank, world_size, config=config, dtype=torch.float32, param_dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(strategy.parameters().values(), lr=1e-3)
    model = GPT(config)
    masters = {name: value.float() for name, value in stirred(config).items()}
    for tokens_BT, targets_BT in batches:
        means = {name: torch.zeros_like(value) for name, value in masters.items()}
        for part in range(3):
            rows = slice(part * world_size + rank, part * world_size + rank + 1)
            with strategy.no_sync():
                (stage(None, tokens_BT[rows], targets_BT[rows]) / 3).backward()
            for other in range(world_size):
                rows = slice(part * world_size + other, part * world_size + other + 1)
                model.load_state_dict(masters, strict=False)
                half = model.bfloat16()
                half.zero_grad()
                (half(tokens_BT[rows], targets_BT[rows]) / 3).backward()
                for name, p in half.named_parameters():
                    means[name] += p.grad.float() / world_size
                model = half.float()
        strategy.finish()
        optimizer.step()
        strategy.stepped()
        strategy.zero_grad()
        for name in masters:
            masters[name] -= 1e-3 * means[name]
        with summon(strategy) as values:
            for name, value in values.items():
                assert value.dtype == torch.float32
                assert gpts.error(value, masters[name]) <= 1e-6, name
                assert stage.get_parameter(name).dtype == torch.bfloat16


def test_mixed_precision_has_float32_masters_and_sums():
    spawn(half_precision, 2, batches_for(2))


def unused(rank, world_size, batches):
    """Rank 1 skips an MLP, nobody uses the last block's value embedding: the mean counts zeros, nobody hangs."""
    strategy, stage, _ = pair(rank, world_size)
    model = gpts.stirred_gpt(gpts.SMALL)
    skipped = lambda x_BTC: x_BTC  # noqa: E731
    wide = gpts.SMALL.kv_heads * gpts.SMALL.key_width
    for part in (stage, model):
        embedding = part.blocks["2" if part is stage else 2].attention.value_embedding
        embedding.forward = lambda tokens_BT: torch.zeros(*tokens_BT.shape, wide)
    tokens_BT, targets_BT = (x.chunk(world_size) for x in batches[0])
    for other in range(world_size):
        model.blocks[1].mlp.forward = skipped if other == 1 else type(model.blocks[1].mlp).forward.__get__(
            model.blocks[1].mlp
        )  # fmt: skip
        (model(tokens_BT[other], targets_BT[other]) / world_size).backward()
    if rank == 1:
        stage.blocks["1"].mlp.forward = skipped
    stage(None, tokens_BT[rank], targets_BT[rank]).backward()
    strategy.finish()
    want = {name: p.grad for name, p in model.named_parameters()}
    assert want["blocks.2.attention.value_embedding.weight"] is None
    for name, p in strategy.parameters().items():
        if want[name] is None:
            assert p.grad is None or not p.grad.any()
        else:
            assert gpts.error(p.grad, strategy.pieces()[name].of(want[name])) <= TIGHT, name
    assert all(p.grad is None for p in stage.parameters())


def test_parameters_that_some_ranks_do_not_use():
    spawn(unused, 2, batches_for(2))


def freed(rank, world_size, prefetch, reshard):
    """How many blocks are whole at each moment, and what is sent."""
    config = replace(gpts.SMALL, layers=5)
    strategy, stage, counter = pair(rank, world_size, config=config, prefetch=prefetch, reshard_after_forward=reshard)
    tokens_BT, targets_BT = gpts.batch(config, 1)
    blocks = [unit for unit in strategy.units if unit.flats[0].label.startswith("blocks")]
    roots = [unit for unit in strategy.units if unit not in blocks]
    seen = []

    def whole_units(units) -> int:
        return sum(bool(flat.whole.untyped_storage().nbytes()) for unit in units for flat in unit.flats)

    def looking(block, x_BTC, sight):
        seen.append(whole_units(blocks))
        out_BTC = block(x_BTC, sight)
        out_BTC.register_hook(lambda _: seen.append(whole_units(blocks)))
        return out_BTC

    stage.run_block = looking
    assert whole_units(strategy.units) == 0
    loss = stage(None, tokens_BT, targets_BT)
    assert whole_units(roots) == len(roots) and whole_units(blocks) == (0 if reshard else 5)
    loss.backward()
    assert whole_units(blocks) == (0 if reshard else 5)
    assert all(p.grad is None for p in stage.parameters())
    strategy.finish()
    assert whole_units(strategy.units) == 0
    W, bytes_of = world_size, lambda units: 8 * sum(flat.whole.numel() for unit in units for flat in unit.flats)
    sent = (W - 1) / W * ((3 if reshard else 2) * bytes_of(blocks) + 2 * bytes_of(roots))
    assert counter.sent == pytest.approx(sent, rel=1e-12)
    return seen


def holdings(rank, world_size):
    return {(p, r): freed(rank, world_size, p, r) for p in (0, 2) for r in (True, False)}


def test_holds_few_blocks_and_sends_by_formula():
    results = spawn(holdings, 2)
    assert results[0] == results[1]
    # Each block as its forward pass begins, then as its backward pass begins: how many of the five blocks are whole.
    assert results[0] == {
        (0, True): [0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        (0, False): [0, 1, 2, 3, 4, 5, 5, 5, 5, 5],
        (2, True): [2, 2, 2, 2, 1, 3, 3, 3, 2, 1],
        (2, False): [2, 3, 4, 5, 5, 5, 5, 5, 5, 5],
    }


def test_bad_input():
    comm = make_comm(Mesh(Layout()).group("fsdp"))
    config, stages = gpts.SMALL, [StageGPT(gpts.SMALL)]
    for changes, text in (
        ({"seed": None}, "expected one of the two"),
        ({"values": {}}, "expected one of the two"),
        ({"prefetch": -1}, "prefetch -1: expected"),
        ({"prefetch": 1.5}, "prefetch 1.5: expected"),
        ({"param_dtype": torch.int32}, "expected a floating-point type"),
        ({"stages": [*stages, *stages]}, "in two stages"),
        ({"stages": [GPT(config)]}, "expected stages on the meta device"),
    ):
        arguments = {"stages": stages, "config": config, "seed": 0} | changes
        with pytest.raises(ValueError, match=text):
            FSDP(arguments.pop("stages"), comm, **arguments)
