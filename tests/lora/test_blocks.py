"""Block-diagonal factors against their dense matrices: values, gradients, products counted, life of an adapter."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora.config import LoraConfig
from lora.lora import activate, adapter_of, adapter_parameters, add_adapter, fold, lora_layers, merge, remove, unmerge
from lora.targets import COLUMN, ROW, kind_of
from minigpt.model import GPT
from tests.lora.families import TOKENS, Pair, randomised, worst
from tests.lora.test_lora import same_bits, snapshot, spread_out, with_deltas
from tests.minigpt.models import random_gpt

ALL = (*ROW, *COLUMN)


def blocky(blocks: int) -> GPT:
    """Sizes that `blocks` divides and nothing rounder."""
    sizes = {"width": 4 * blocks, "heads": 2 * blocks, "kv_heads": blocks, "mlp_width": 3 * blocks}
    vocabulary = -(-31 // blocks) * blocks
    return random_gpt(vocab_size=vocabulary, context=16, layers=2, mlp="swiglu", **sizes).eval()


def parts_of(model: GPT, name: str = "default") -> dict:
    """{kind of layer: its part in the last block}."""
    return {kind_of(place.layers[0]): part for place, (part,) in adapter_of(model, name).items()}


def test_rows_have_the_blocks_in_A_and_columns_in_B():
    model = blocky(3)
    add_adapter(model, LoraConfig(6, targets=ALL, blocks=3))
    parts = parts_of(randomised(model))
    assert set(parts) == set(ALL)
    for kind, part in parts.items():
        A, B = part.dense()
        layer = model.head if kind == "head" else model.get_submodule(part.place.layers[0])
        rows, columns = layer.out_features, layer.in_features
        assert A.shape == (6, columns) and B.shape == (rows, 6)
        assert part.A.shape == ((6, columns // 3) if kind in ROW else (6, columns))
        assert part.B.shape == ((rows, 6) if kind in ROW else (rows, 2))
        assert torch.equal(A, spread_out(part.A, 3 if kind in ROW else 1))
        assert torch.equal(B, spread_out(part.B, 1 if kind in ROW else 3))
    assert "rank=6" in repr(parts["up"]) and "blocks=3" in repr(parts["up"])


@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_it_is_the_definition_beside_plain_adapters_and_others(blocks):
    model = blocky(blocks)
    before = model(TOKENS)
    add_adapter(model, LoraConfig(2 * blocks, 5.0, ALL, {"down": blocks}, blocks=blocks, rslora=True), "blocks")
    assert torch.equal(model(TOKENS), before)  # B is zero
    add_adapter(model, LoraConfig(3, 7.0, ("down", "embedding", "query")), "plain")
    add_adapter(model, LoraConfig(blocks, 3.0, ("query", "output"), blocks=blocks), "less")
    randomised(model)
    for weights in ({"blocks": 1.0}, {"blocks": 0.25, "plain": -2.0, "less": 1.5}, {"less": 0.0}):
        activate(model, list(weights), list(weights.values()))
        plain = with_deltas(model, weights)
        assert worst(model(TOKENS), plain(TOKENS)) <= 1e-12
        assert worst(model(TOKENS[:1, :1]), plain(TOKENS[:1, :1])) <= 1e-12
    layer = model.blocks[1].mlp.down
    assert layer.adapters["blocks"].scale == 5 / math.sqrt(blocks)


@pytest.mark.parametrize("kind", ["down", "up"])
def test_inputs_of_any_layout_and_none(kind):
    model = blocky(3)
    add_adapter(model, LoraConfig(6, 5.0, (kind,), blocks=3))
    randomised(model)
    layer = model.blocks[0].mlp.get_submodule(kind)
    part = layer.adapters["default"]
    A, B = spread_out(part.A.detach(), part.blocks_A), spread_out(part.B.detach(), part.blocks_B)
    x = torch.randn(layer.in_features, 7, 2, dtype=torch.float64).permute(2, 1, 0)
    for x_I in (x, x[0, 0], x[:, ::3], x[:0], x[None, :, :0]):
        wanted = layer.base(x_I) + part.scale * (x_I @ A.T @ B.T)
        assert layer(x_I).shape == wanted.shape
        torch.testing.assert_close(layer(x_I), wanted, rtol=1e-12, atol=1e-12)
    bad = x.clone()
    bad[0, 0, 0], bad[1, 1, -1] = math.nan, math.inf
    assert torch.equal(layer(bad).isfinite().all(-1), bad.isfinite().all(-1))


def test_gradients_are_the_blocks_of_the_dense_gradients():
    model = blocky(2)
    add_adapter(model, LoraConfig(4, 5.0, ALL, blocks=2))
    randomised(model)
    plain, state, leaves = GPT(model.config, seed=None).double(), snapshot(model), {}
    for name, layer in lora_layers(model).items():
        part = layer.adapters["default"]
        A, B = (factor.detach().requires_grad_() for factor in part.dense())
        leaves[name], state[f"{name}.weight"] = (A, B), state[f"{name}.weight"] + part.scale * B @ A
    torch.func.functional_call(plain, state, (TOKENS, TOKENS.roll(-1, 1))).backward()
    model(TOKENS, TOKENS.roll(-1, 1)).backward()
    for name, layer in lora_layers(model).items():
        part = layer.adapters["default"]
        for factor, blocks, dense in zip((part.A, part.B), (part.blocks_A, part.blocks_B), leaves[name], strict=True):
            pieces = [dense.grad.tensor_split(blocks)[n].tensor_split(blocks, dim=1)[n] for n in range(blocks)]
            assert factor.grad.abs().max() > 0 and worst(factor.grad, torch.cat(pieces)) <= 1e-10
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", ["down", "up"])
def test_only_the_blocks_are_multiplied(kind):
    model = blocky(4)
    add_adapter(model, LoraConfig(8, targets=(kind,), blocks=4))
    layer = model.blocks[0].mlp.get_submodule(kind)
    (I, O), M, r = (layer.in_features, layer.out_features), 6, 8
    x = torch.randn(2, 3, I, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    narrow = r * I // 4 + O * r if kind == "down" else r * I + O * r // 4
    assert sum(p.numel() for p in layer.adapters.parameters()) == narrow
    assert forward == 2 * M * (I * O + narrow)
    assert counter.get_total_flops() - forward == 2 * M * (I * O + 2 * narrow)  # the frozen weight needs no gradient


def test_training_leaves_the_base_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model = blocky(2).to(dtype).train()
        before, logits = snapshot(model), model(TOKENS)
        add_adapter(model, LoraConfig(4, 6.0, ALL, dropout=0.1, blocks=2))
        optimizer, losses = torch.optim.AdamW(adapter_parameters(model), lr=0.02), []
        for _ in range(5):
            loss = model(TOKENS, TOKENS.roll(-1, dims=1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] and same_bits(snapshot(model), before)
        assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
        activate(model, [])
        assert torch.equal(model(TOKENS), logits)


def test_autocast_computes_in_bfloat16_and_trains_float32():
    model = blocky(2).float()
    add_adapter(model, LoraConfig(4, 6.0, ALL, blocks=2))
    randomised(model)
    exact = model(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].mlp.up(torch.randn(2, 3, 8)).dtype == torch.bfloat16
        rough, loss = model(TOKENS), model(TOKENS, TOKENS)
    assert 1e-5 < worst(rough, exact) < 0.1
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter_parameters(model))


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_merged_unmerged_removed_and_folded(dtype, limit):
    model = blocky(3).to(dtype)
    modules, before = dict(model.named_modules()), snapshot(model)
    add_adapter(model, LoraConfig(6, 1.0, ALL, blocks=3), "one")
    add_adapter(model, LoraConfig(3, 2.0, ("up", "down", "embedding")), "two")
    randomised(model)
    activate(model, ["one", "two"], [0.5, -1.5])
    logits = model(TOKENS)
    for _ in range(2):
        merge(model)
        assert not same_bits(snapshot(model), before) and worst(model(TOKENS), logits) <= limit
        unmerge(model)
        assert same_bits(snapshot(model), before) and torch.equal(model(TOKENS), logits)
    remove(model, "one")
    activate(model, "two")
    alone = model(TOKENS)
    remove(model, "two")
    assert dict(model.named_modules()) == modules and same_bits(snapshot(model), before)
    add_adapter(model, LoraConfig(6, 1.0, ALL, blocks=3))
    randomised(model)
    logits = model(TOKENS)
    fold(model)
    assert not lora_layers(model) and worst(model(TOKENS), logits) <= limit and worst(alone, logits) > 0.01


@pytest.mark.parametrize("blocks", [1, 2])
def test_dropout_is_of_what_goes_into_A_and_is_not_called_for_nothing(blocks):
    model = blocky(2).train()
    add_adapter(model, LoraConfig(4, 6.0, ("up", "down"), dropout=0.4, blocks=blocks), "dropped")
    add_adapter(model, LoraConfig(4, 6.0, ("up", "down"), blocks=blocks), "whole")
    randomised(model)
    for kind in ("up", "down"):
        layer = model.blocks[0].mlp.get_submodule(kind)
        x, part = torch.randn(2, 3, layer.in_features, dtype=torch.float64), layer.adapters["dropped"]
        A, B = spread_out(part.A.detach(), part.blocks_A), spread_out(part.B.detach(), part.blocks_B)
        activate(model, "dropped")
        torch.manual_seed(1)
        result = layer(x)
        torch.manual_seed(1)
        wanted = layer.base(x) + part.scale * (F.dropout(x, 0.4) @ A.T @ B.T)
        torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)
        activate(model, "whole")
        with mock.patch("torch.nn.functional.dropout", side_effect=AssertionError):
            layer(x)
            activate(model, "dropped")
            with pytest.raises(AssertionError):
                layer(x)
            layer.eval()(x)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_fresh_factors_give_A_x_the_variance_of_plain_LoRA(init):
    torch.manual_seed(0)
    x, spreads = torch.randn(500, 400, dtype=torch.float64), {}
    for blocks in (1, 4):
        model = random_gpt(vocab_size=31, context=16, layers=1, width=8, heads=4, kv_heads=4, mlp_width=400)
        add_adapter(model, LoraConfig(40, targets=("down", "up"), init=init, blocks=blocks), seed=3)
        down, up = parts_of(model)["down"], parts_of(model)["up"]
        assert not down.B.any() and not up.B.any()
        if init == "kaiming":
            bound = math.sqrt(blocks / 400)
            assert 0.99 * bound <= down.A.abs().max() <= bound
            assert 0.9 / math.sqrt(8) <= up.A.abs().max() <= 1 / math.sqrt(8)  # dense, whatever the blocks
        spreads[blocks] = (x @ spread_out(down.A.detach(), down.blocks_A).T).std().item()
    wanted = 1 / math.sqrt(3) if init == "kaiming" else math.sqrt(400) / 40
    assert spreads == {1: pytest.approx(wanted, rel=0.03), 4: pytest.approx(wanted, rel=0.03)}


def test_what_blocks_do_not_divide_is_listed_before_anything_changes():
    model = random_gpt(vocab_size=33, context=16, layers=2, width=10, heads=5, kv_heads=1, mlp_width=7)
    state = snapshot(model)
    with pytest.raises(ValueError) as caught:
        add_adapter(model, LoraConfig(4, targets=(*ALL[:2], "query", "key", "up", "head", "embedding"), blocks=2))
    said = str(caught.value)
    assert said.startswith("blocks 2: ") and "embedding is an embedding: expected linear layers only" in said
    assert "head has 33 outputs: expected a multiple of the number of blocks" in said
    for i in range(2):
        assert f"blocks.{i}.mlp.up has 7 outputs" in said and f"blocks.{i}.mlp.down has 7 inputs" in said
    assert "query" not in said and "key" not in said and "attention.output" not in said
    assert said.count(";") == 5 and not lora_layers(model) and same_bits(snapshot(model), state)
    assert all(p.requires_grad for p in model.parameters())
    add_adapter(model, LoraConfig(7, targets=("up",), blocks=7))  # outputs count, 10 inputs do not
    add_adapter(model, LoraConfig(7, targets=("down",), blocks=7), "down")  # and the other way round


def test_the_whole_of_c_attn_has_no_blocks_and_its_three_layers_have():
    model = Pair("gpt2").ours()
    for targets in ("all-linear", ("c_attn",)):
        with pytest.raises(
            ValueError, match=r"attention.value are one matrix, .*c_attn: expected targets query, key and"
        ):
            add_adapter(model, LoraConfig(4, targets=targets, blocks=2))
    assert not lora_layers(model)
    add_adapter(model, LoraConfig(4, 5.0, ("query", "key", "value", "output"), blocks=2))
    randomised(model)
    assert worst(model(TOKENS), with_deltas(model, {"default": 1.0})(TOKENS)) <= 1e-12
