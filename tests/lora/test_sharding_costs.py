"""Costs in formulas: against published ratios, adapters that are really made, collectives that are really counted."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.dist import spawn
from lora.config import LoraConfig
from lora.lora import adapter_parameters, add_adapter
from lora.sharded import GATHER, SUM, shard_adapter
from lora.sharding import SHARDINGS
from lora.sharding_costs import (
    LLAMA_8B,
    LLAMA_70B,
    MODELS,
    CostsConfig,
    aligned,
    backward_calls,
    base_forward,
    count,
    factor_sizes,
    forward_calls,
    gradient_sums,
    macs_per_token,
    main,
    parameters_per_rank,
    projections,
    rows,
    sent,
    whole_parameters,
)  # fmt: skip
from minigpt.config import GPTConfig
from minigpt.model import GPT
from parallel.strategy import sum_partial
from tests.lora.test_sharded import LLAMA, Ear, lora
from tests.parallel.cut_gpts import Plain, cut, meet
from tests.parallel.gpts import GPT2_LIKE, batch

BD, S_LORA, REPLICATED = SHARDINGS
LINEAR = ("query", "key", "value", "output", "gate", "up", "down")
SIX = replace(GPT2_LIKE, layers=1)  # no gate


@pytest.mark.parametrize(
    ("model", "multiple", "ratio", "published"),
    [
        (LLAMA_8B, 1, 0.43125, None), (LLAMA_8B, 2, 0.8625, 0.86), (LLAMA_8B, 4, 1.725, 1.73),
        (LLAMA_70B, 1, 0.43513, None), (LLAMA_70B, 2, 0.8703, 0.87), (LLAMA_70B, 4, 1.7405, 1.74),
    ],
)  # fmt: skip
def test_ratios_of_parameters_are_the_published_ones(model, multiple, ratio, published):
    """Of the abstract: 0.86 and 1.73 times S-LoRA's on 8B, 0.87 and 1.74 on 70B, with 8 ranks. It rounds halves up."""
    got = parameters_per_rank(model, BD, 16 * multiple, 8) / parameters_per_rank(model, S_LORA, 16, 8)
    assert abs(got - ratio) <= 5e-5
    assert published is None or abs(got - published) <= 0.005 + 1e-9


def test_the_numbers_of_pefts_record():
    """Llama 3.2 3B, adapters of the MLP alone: plain of rank 10, and block-diagonal of rank 14 in 2 blocks."""
    config = GPTConfig(layers=28, width=3072, heads=24, kv_heads=8, mlp="swiglu", mlp_width=8192)
    mlp = projections(config)[4:]
    assert [p.name for p in mlp] == ["gate", "up", "down"]
    assert 28 * whole_parameters(mlp, 14, blocks=2) == 8_429_568
    assert 28 * whole_parameters(mlp, 10) == 9_461_760


def test_bytes_and_launches_of_the_notes():
    """9 r / 4 d of the base's bytes, as long as all numbers have equally many: 0.88% and 3.5%, 0.44% and 1.76%."""
    for model, launches, fused, width in ((LLAMA_8B, 224, 128, 4096), (LLAMA_70B, 560, 320, 8192)):
        for rank in (16, 64):
            calls = forward_calls(model, S_LORA, rank=rank, tokens=100, number=2)
            together = forward_calls(model, S_LORA, rank=rank, tokens=100, number=2, fused=True)
            assert (count(calls), count(together)) == (launches, fused)
            assert sent(calls, 8) == pytest.approx(sent(together, 8))
            share = sent(calls, 8) / sent(base_forward(model, 100, 2), 8)
            assert share == pytest.approx(9 * rank / (4 * width))
        assert [forward_calls(model, way, rank=16, tokens=100) for way in (BD, REPLICATED)] == [[], []]
    assert count(forward_calls(SIX, S_LORA, rank=8, tokens=3)) == 6
    assert count(forward_calls(SIX, S_LORA, rank=8, tokens=3, fused=True)) == 4


def test_multiply_adds_of_a_pair_of_layers():
    """Up and down of one MLP, r ranks of W: the three formulas of the notes."""
    d, F, r, W = 64, 96, 16, 4
    config = GPTConfig(layers=1, width=d, heads=4, mlp="gelu", mlp_width=F)
    pair = [p for p in projections(config) if p.name in ("up", "down")]
    macs = {way: sum(sum(factor_sizes(p, way, r, W)) for p in pair) for way in SHARDINGS}
    assert macs[S_LORA] == 2 * r * (d + F) // W
    assert macs[BD] == 2 * r * d // W + 2 * r * F // W**2
    assert macs[REPLICATED] == 2 * r * d + 2 * r * F // W


def check_made(rank, world_size):
    """What a rank really keeps, computes and sends."""
    found = {}
    for config, T in ((LLAMA, 9), (SIX, 4)):
        ear = Ear()
        mesh, comm = meet(rank, world_size, listeners=(ear,))
        tokens, targets = batch(config, 3, T)
        plain, _ = cut(config, mesh, comm)
        with torch.no_grad():
            ear.calls.clear()
            of_base = flops(plain, tokens, targets)
        base = [(call.name, call.payload, call.tag) for call in ear.calls]
        for way in SHARDINGS:
            names = tuple(p.name for p in projections(config))
            stage, groups = cut(config, mesh, comm)
            groups = shard_adapter(stage, lora(way, world_size, names), way, comm, groups)
            steps = {}
            with torch.no_grad():
                ear.calls.clear()
                macs = flops(stage, tokens, targets) - of_base
                steps["inference"] = ear.calls.copy()
            ear.calls.clear()
            loss = stage(None, tokens, targets)
            steps["forward"] = ear.calls.copy()
            ear.calls.clear()
            loss.backward()
            steps["backward"] = ear.calls.copy()
            ear.calls.clear()
            sum_partial(Plain(stage), groups)
            steps["sums"] = ear.calls.copy()
            kept = sum(p.numel() for p in Plain(stage).parameters().values())
            found[config.mlp, way] = (
                kept,
                macs / (2 * tokens.numel()),
                base,
                {name: told(calls) for name, calls in steps.items()},
            )
    return found


def flops(stage, tokens, targets):
    """As torch counts them: two a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        stage(None, tokens, targets)
    return counter.get_total_flops()


def told(calls):
    return [(call.name, call.payload, call.tag) for call in calls]


def per_call(calls):
    return sorted((call.name, call.payload) for call in calls for _ in range(call.count))


@pytest.mark.parametrize("ranks", [2, 4])
def test_formulas_are_what_is_made_and_counted(ranks):
    for found in spawn(check_made, ranks):
        backward_of_base = {}
        for (mlp, way), (kept, macs, base, steps) in found.items():
            config, tokens = (LLAMA, 27) if mlp == "swiglu" else (SIX, 12)
            options = {"rank": 8, "number": 8}
            assert kept == parameters_per_rank(config, way, 8, ranks)
            assert macs == macs_per_token(config, way, 8, ranks)
            extra = {name: [c[:2] for c in calls if c[2] in (GATHER, SUM)] for name, calls in steps.items()}
            others = {name: [c for c in calls if c[2] not in (GATHER, SUM)] for name, calls in steps.items()}
            want = per_call(forward_calls(config, way, tokens=tokens, **options))
            assert sorted(extra["forward"]) == sorted(extra["inference"]) == want
            assert others["forward"] == others["inference"] == base
            sums = [call for call in base if call[2] == "sum of a branch"]
            assert len(sums) == count(base_forward(config, tokens, 8)) + 1  # the embedding's
            assert [c[:2] for c in sums[1:]] == per_call(base_forward(config, tokens, 8))
            assert sorted(extra["backward"]) == per_call(backward_calls(config, way, tokens=tokens, **options))
            assert backward_of_base.setdefault(mlp, others["backward"]) == others["backward"]
            assert len(others["backward"]) == 2 * config.layers  # the first input needs none, the head's does
            assert sorted(c[:2] for c in steps["sums"]) == per_call(gradient_sums(config, way, **options))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_whole_adapters_have_so_many_numbers(blocks):
    for config in (LLAMA, SIX):
        model = GPT(config)
        names = tuple(p.name for p in projections(config))
        add_adapter(model, LoraConfig(rank=8, targets=names, blocks=blocks))
        made = sum(p.numel() for p in adapter_parameters(model))
        assert made == config.layers * whole_parameters(projections(config), 8, blocks)
        if blocks > 1:
            assert made == blocks * parameters_per_rank(config, BD, 8, blocks)


def test_what_does_not_divide_is_refused():
    for change, way, message in (
        ({"rank": 12}, S_LORA, "rank 12 of query over 8 ranks"), ({"rank": 4}, BD, "rank 4 of query over 8 ranks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parameters_per_rank(LLAMA_8B, way, ranks=8, **change)
    for ranks, message in ((16, "kv_heads 8 over 16 ranks"), (5, "heads 32 over 5 ranks")):
        with pytest.raises(ValueError, match=f"{message}: expected a multiple of {ranks}"):
            parameters_per_rank(LLAMA_8B, REPLICATED, rank=16, ranks=ranks)
    odd = replace(LLAMA, width=21)
    assert parameters_per_rank(odd, BD, 8, 2) and parameters_per_rank(odd, REPLICATED, 7, 2)
    with pytest.raises(ValueError, match="outputs 21 of output over 2 ranks"):
        parameters_per_rank(odd, S_LORA, 8, 2)
    with pytest.raises(ValueError, match="outputs 24 of query over 5 ranks"):
        factor_sizes(projections(LLAMA)[0], REPLICATED, 8, 5)


def test_the_program(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 5 + 1
    assert any(line.split()[:6] == ["8B", "block-diagonal", "32", "4,521,984", "0.8625", "4,521,984"] for line in lines)
    assert any(
        line.split()[1:] == ["s-lora", "16", "25,886,720", "1.0000", "25,886,720", "560", "41.3", "0.88%"]
        for line in lines
    )
    with pytest.raises(SystemExit):
        main(["--ranks", "1"])
    assert "ranks 1: expected at least 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--rank", "12"])
    assert "rank 12 of query over 8 ranks: expected a multiple of 8" in capsys.readouterr().err
    assert {row["model"] for row in rows(CostsConfig(ranks=2))} == set(MODELS)


def test_text_in_columns():
    assert aligned([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"
