"""Predicted bytes: against hand-made sums, the real shapes of each layout, and the measured peak of each ZeRO."""

import time
from dataclasses import replace
from math import prod

import pytest
import torch

from common.dist import spawn
from minigpt.config import GPTConfig
from minigpt.model import GPT
from parallel import memory
from parallel.comm import make_comm
from parallel.data_parallel import Overlapped
from parallel.fsdp import FSDP
from parallel.memory import LiveBytes, Plan, activations, block_activations, states, units
from parallel.mesh import Layout, Mesh
from parallel.model import StageGPT, initialise, materialise, split_layers, whole_shapes
from parallel.tensor_parallel import parallelise
from parallel.zero import Zero1, Zero2
from tests.parallel import gpts

# Many weights and few tokens: what ZeRO divides is most of the memory.
HEAVY = GPTConfig(
    vocab_size=90, context=8, layers=5, width=40, heads=4, kv_heads=4, head_width=10, mlp_width=160, tied=True
)
OPTIONS = (
    (3, {"prefetch": 0}), (3, {"prefetch": 2}), (3, {"reshard_after_forward": False}), (0, {}), (1, {}), (2, {}),
)  # fmt: skip


def peak(rank, world_size, config, zero, options) -> tuple[int, int, int]:
    """(held between steps, most during the second step, bytes of the largest bucket) of a rank under AdamW."""
    comm = make_comm(Mesh(Layout(fsdp=world_size), rank, world_size).group("fsdp"))
    with LiveBytes() as live:
        stage = StageGPT(config)
        if zero == 3:
            strategy = FSDP([stage], comm, config=config, seed=0, **options)
        else:
            materialise(stage)
            initialise([stage], config, 0)
            strategy = (Overlapped, Zero1, Zero2)[zero]([stage], comm, bucket_mb=0.02)
        optimizer = torch.optim.AdamW(strategy.parameters().values(), fused=True)
        tokens_BT, targets_BT = gpts.batch(config, 1, T=2)
        for _ in range(2):
            live.peak = 0
            stage(None, tokens_BT, targets_BT).backward()
            strategy.finish()
            optimizer.step()
            strategy.stepped()
            strategy.zero_grad()
        held = live.now()
        for _ in range(20):  # gloo's threads let go of what they have sent a moment later
            time.sleep(0.01)
            held = min(held, live.now())
    buckets = [] if zero == 3 else [4 * sum(bucket.sizes) for bucket in strategy.buckets]
    return held, live.peak, max(buckets, default=0)


def peaks(rank, world_size, config):
    return [peak(rank, world_size, config, zero, options) for zero, options in OPTIONS]


@pytest.mark.parametrize(("world_size", "tied"), [(2, False), (3, True)])
def test_measured_peak_is_within_a_tenth(world_size, tied):
    config = replace(HEAVY, tied=tied)
    measured = spawn(peaks, world_size, config)[0]
    for (zero, options), (held, most, bucket) in zip(OPTIONS, measured, strict=True):
        plan = Plan(
            data=world_size, T=2, prefetch=options.get("prefetch", 1), bucket=bucket,
            reshard=options.get("reshard_after_forward", True),
        )  # fmt: skip
        predicted = states(config, plan, zero)
        assert held == pytest.approx(predicted.parameters + predicted.optimizer, rel=0.02), (zero, options)
        assert most == pytest.approx(predicted.total + activations(config, plan), rel=0.1), (zero, options)
    most = [most for _, most, _ in measured]
    assert most[0] < most[1] < most[2] and most[0] < most[5] <= most[4] < most[3]  # ZeRO-3 in three ways; 3, 2, 1, 0


@pytest.mark.parametrize("config", gpts.CONFIGS.values(), ids=gpts.CONFIGS)
def test_sums_by_hand(config):
    N = GPT(config).num_parameters()
    plain = states(config, Plan(data=4), 0)
    assert (plain.parameters, plain.gradients, plain.optimizer) == (4 * N, 4 * N, 8 * N)
    one, two, three = (states(config, Plan(data=4, bucket=0), zero) for zero in (1, 2, 3))
    assert (one.parameters, one.gradients, one.optimizer) == (4 * N, 4 * N, 2 * N)
    assert two.parameters == 4 * N and two.gradients == pytest.approx(N, rel=0.01) and two.total < one.total
    assert three.parameters == three.gradients == pytest.approx(N, rel=0.01)
    assert three.optimizer == pytest.approx(2 * N, rel=0.01)
    half = states(config, Plan(data=4, number=2), 1)  # bf16 in the passes, a float32 master in the optimizer
    assert half.parameters == half.gradients == 2 * N and half.optimizer == pytest.approx(3 * N, rel=0.01)
    matrices = sum(
        p.numel() for name, p in GPT(config).blocks.named_parameters() if p.ndim == 2 and "embedding" not in name
    )
    assert states(config, Plan(optimizer="muon"), 0).optimizer == 8 * N - 4 * matrices
    with pytest.raises(ValueError, match="ZeRO-4: expected 0, 1, 2 or 3"):
        states(config, Plan(), 4)


@pytest.mark.parametrize("config", gpts.CONFIGS.values(), ids=gpts.CONFIGS)
def test_stages_together_have_every_parameter(config):
    stages = [units(config, Plan(pp=3), stage) for stage in range(3)]
    for stage, layers in zip(stages, split_layers(config.layers, 3), strict=True):
        found = {name: size for unit in stage.values() for name, size in unit.items()}
        real = {name: p.numel() for name, p in StageGPT(config, list(layers)).named_parameters()}
        assert found == real
    assert {name for stage in stages for unit in stage.values() for name in unit} == set(whole_shapes(config))


def shapes_of_rank(rank, world_size, config):
    mesh = Mesh(Layout(tp=world_size), rank, world_size)
    stage = StageGPT(config)
    parallelise(stage, mesh, make_comm(mesh.group("tp")))
    return {name: tuple(p.shape) for name, p in stage.named_parameters()}


def test_tensor_parallel_shapes():
    config = replace(gpts.SMALL, qkv_bias=True, output_bias=True, mlp_bias=True)  # 4 heads, 2 key/value heads
    real = spawn(shapes_of_rank, 4, config)[0]
    found = {name: size for unit in units(config, Plan(tp=4)).values() for name, size in unit.items()}
    assert found == {name: prod(shape) for name, shape in real.items()}


def test_activations_of_korthikanti():
    """34 s b h a layer with dropout, 32 without its two masks; tensor and sequence parallelism divide it all."""
    gpt2 = replace(GPTConfig(mlp="gelu", norm="layernorm", positions="learned", qk_norm=False), tied=True)
    s, b, h, a = 100, 3, gpt2.width, gpt2.heads
    statistics = s * b * 4 * (a + 4)
    plan = Plan(rows=b, T=s, number=2)
    assert block_activations(gpt2, plan) == 32 * s * b * h + statistics
    assert block_activations(gpt2, replace(plan, tp=2)) == 16 * s * b * h + statistics // 2
    # Without sequence parallelism the norms' inputs and results are whole: 8 s b h.
    apart = replace(plan, tp=2, sequence_parallel=False)
    assert block_activations(gpt2, apart) == (8 + 12) * s * b * h + s * b * 4 * (a // 2 + 4)
    assert block_activations(gpt2, plan, "full") == 2 * s * b * h


def test_micro_batches_in_flight():
    config, plan = replace(gpts.SMALL, layers=8), Plan(pp=4, micro_batches=6, T=16)
    block = block_activations(config, plan)
    assert [activations(config, plan, stage=stage) // (2 * block) for stage in range(3)] == [4, 3, 2]
    assert activations(config, replace(plan, micro_batches=2)) == 2 * 2 * block
    with_again = activations(config, plan, "full")
    assert with_again == 4 * 2 * block_activations(config, plan, "full") + block


def test_live_bytes_follow_storage():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100).T  # the same storage
        z = y + 1
        assert live.now() == live.peak == 8000
        del x, y
        assert live.now() == 4000
        z.untyped_storage().resize_(0)
        assert live.now() == 0 and live.peak == 8000
        del z


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["memory", "--layers", "4", "--width", "64", "--heads", "4", "--pp", "2"])
    memory.main()
    text = capsys.readouterr().out
    assert text.count("ZeRO-3") == 2 and "pipeline stage 1 of 2" in text and "activations none" in text
    for wrong, message in (("--bytes 3", "bytes 3: expected 2, 4 or 8"), ("--data 0", "data 0: expected at least 1")):
        monkeypatch.setattr("sys.argv", ["memory", *wrong.split()])
        with pytest.raises(SystemExit) as ended:
            memory.main()
        assert ended.value.code == 2 and message in capsys.readouterr().err
