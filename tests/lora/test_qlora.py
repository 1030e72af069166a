"""A GPT on quantised blocks: bytes as bitsandbytes makes them, adapters' gradients as on the dequantised weights,
training that leaves the base alone, checkpointing, autocast, states, files of adapters, the way back, what is refused.
"""

import copy
import inspect
import json.decoder
import math

import pytest
import torch
from torch import nn

from lora import integers, nf4
from lora.adamw8bit import AdamW8bit
from lora.config import LoraConfig
from lora.layers import LoraLinear
from lora.lora import adapter_parameters, add_adapter, fold, lora_layers, merge, remove
from lora.peft_files import load_adapter, save_adapter
from lora.qlora import dequantise_base, quantise_base
from lora.quantised import QuantisedLinear, predicted_bytes
from minigpt.config import GPTConfig
from minigpt.model import GPT
from tests.minigpt.models import random_gpt

SMALL = {
    "vocab_size": 31, "context": 16, "layers": 2, "width": 10, "heads": 5, "kv_heads": 1, "mlp_width": 7,
    "value_embeddings": True,
}  # fmt: skip
GPT2_LIKE = SMALL | {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu", "qkv_bias": True, "output_bias": True, "mlp_bias": True,
    "qk_norm": False, "tied": True, "kv_heads": 5, "value_embeddings": False, "softcap": 0.0,
}  # fmt: skip
LLAMA_LIKE = SMALL | {"mlp": "swiglu", "qk_norm": False, "value_embeddings": False}
FORMATS = ["nf4", "nf4-double", "int8", "int4"]
EVERY_LINEAR = LoraConfig(rank=3)
EVERYTHING = LoraConfig(rank=3, targets=("query", "key", "value", "output", "up", "down", "gate", "embedding"))
TOKENS = torch.randint(0, 31, (3, 13), generator=torch.Generator().manual_seed(5))


def small(options=SMALL, **config) -> GPT:
    return random_gpt(**options, **config).float()


def dequantised(w, format):
    """By the functions of the formats, past the layers and this file's own way back."""
    if format == "int8":
        return integers.dequantise_int8(integers.quantise_int8(w))
    if format == "int4":
        return integers.dequantise_int4(integers.quantise_int4(w))
    return nf4.dequantise_nf4(nf4.quantise_nf4(w, double=format == "nf4-double"))


def on_dequantised_weights(model: GPT, names, format) -> GPT:
    """A plain GPT; `model` is not quantised yet."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            weight = plain.get_submodule(name).weight
            weight.copy_(dequantised(weight, format))
    return plain


def with_adapter(model: GPT, config: LoraConfig = EVERY_LINEAR) -> GPT:
    """All factors random."""
    add_adapter(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def loss_and_gradients(model: GPT):
    adapters = adapter_parameters(model)
    loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
    return [loss.detach(), *torch.autograd.grad(loss, adapters)]


def frozen(model: GPT):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: x.detach().clone() for name, x in tensors if ".adapters." not in name}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name].view(-1), other[name].view(-1)) for name in one
    )


# ---- what becomes of the base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_all_linear_layers_of_the_blocks_and_nothing_else(format):
    model = small(SMALL | {"mlp": "swiglu"})
    before = frozen(model)
    names = quantise_base(model, format)
    kinds = (
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
        "mlp.up",
        "mlp.gate",
        "mlp.down",
    )
    assert names == [f"blocks.{layer}.{kind}" for layer in range(2) for kind in kinds]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    assert list(layers) == names and all(layer.format == format for layer in layers.values())
    assert not any(p.requires_grad for p in model.parameters())
    rest = {name: x for name, x in before.items() if name.removesuffix(".weight") not in names}
    after = frozen(model)
    assert same(rest, {name: after[name] for name in rest}) and "blocks.1.attention.value_embedding.weight" in rest
    shapes = [tuple(before[f"{name}.weight"].shape) for name in names]
    assert sum(layer.memory_bytes() for layer in layers.values()) == predicted_bytes(shapes, format)


@pytest.mark.parametrize("double", [True, False])
def test_bytes_are_those_of_bitsandbytes_in_every_layer(double):
    functional = pytest.importorskip("bitsandbytes").functional
    model = small(GPT2_LIKE)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in quantise_base(model, "nf4-double" if double else "nf4"):
        layer = model.get_submodule(name)
        packed, state = functional.quantize_4bit(
            weights[f"{name}.weight"], blocksize=64, quant_type="nf4", compress_statistics=double
        )
        assert torch.equal(layer.packed, packed.view(-1)) and torch.equal(layer.absmax, state.absmax)
        if double:
            assert torch.equal(layer.absmax2, state.state2.absmax) and torch.equal(layer.offset, state.offset)
        assert torch.equal(layer.bias, weights[f"{name}.bias"])


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict(format, tmp_path):
    """With adapters, through a file, into a model of other numbers; not into another format."""
    model = small()
    quantise_base(model, format)
    with_adapter(model)
    torch.save(model.state_dict(), tmp_path / "state")
    other = small(spread=0.1)
    quantise_base(other, format)
    add_adapter(other, EVERY_LINEAR)
    other.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(other(TOKENS), model(TOKENS)) and same(frozen(other), frozen(model))
    wrong = small()
    quantise_base(wrong, "int8" if format != "int8" else "nf4")
    add_adapter(wrong, EVERY_LINEAR)
    with pytest.raises(RuntimeError, match="packed"):
        wrong.load_state_dict(torch.load(tmp_path / "state"))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SMALL, GPT2_LIKE, LLAMA_LIKE], ids=["ours", "gpt2", "llama"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_lora_on_the_dequantised_weights(format, options):
    """In float64, for adapters everywhere, with and without activation checkpointing."""
    targets = tuple(t for t in EVERYTHING.targets if t != "gate" or options.get("mlp") == "swiglu")
    config = LoraConfig(rank=3, targets=targets)
    model = small(options)
    plain = copy.deepcopy(model)
    plain = on_dequantised_weights(plain, quantise_base(model, format), format)
    want = loss_and_gradients(with_adapter(plain, config).double())
    with_adapter(model, config).double()
    before = frozen(model)
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        got = loss_and_gradients(model)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == torch.float64 and one.abs().sum() > 0
            assert (one - other).abs().max().item() <= 1e-12 * max(1.0, other.abs().max().item())
    assert same(before, frozen(model))


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_by_our_kernels(format):
    """In float32, on a CPU by Triton's interpreter."""
    pytest.importorskip("triton", reason="the kernels are in Triton")
    model = small(SMALL | {"layers": 1})
    plain = copy.deepcopy(model)
    plain = on_dequantised_weights(plain, quantise_base(model, format, kernels="triton"), format)
    for one, other in zip(
        loss_and_gradients(with_adapter(model)), loss_and_gradients(with_adapter(plain)), strict=True
    ):
        assert (one - other).abs().max().item() <= 2e-5 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [GPT2_LIKE, LLAMA_LIKE], ids=["gpt2", "llama"])
def test_under_autocast(options, checkpointing):
    """The weight is rounded to bfloat16 as autocast rounds that of a plain layer: the same bits."""
    model = small(options)
    plain = copy.deepcopy(model)
    plain = on_dequantised_weights(plain, quantise_base(model), "nf4-double")
    results = []
    for each in (model, plain):
        each.activation_checkpointing = checkpointing
        with_adapter(each)
        with torch.autocast("cpu", torch.bfloat16):
            assert each(TOKENS).dtype == torch.float32 and each.blocks[0].mlp.up(torch.ones(10)).dtype == torch.bfloat16
            results.append(loss_and_gradients(each))
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def text(module) -> torch.Tensor:
    return torch.tensor(list(inspect.getsource(module).encode()))


def batches(tokens, steps, rows=8, T=32):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - T - 1, (rows,), generator=generator).tolist()
        yield torch.stack([tokens[start : start + T + 1] for start in starts])


def trained(model, optimizer, tokens, steps):
    losses = []
    for rows in batches(tokens, steps):
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_learns_and_the_base_stays_bit_for_bit():
    """A GPT that has seen some Python learns a module's source on four bits, with states in eight, in pages: nearly as
    much as on whole weights with torch's AdamW."""
    config = GPTConfig(vocab_size=256, context=32, layers=2, width=48, heads=4, kv_heads=4, mlp_width=96)
    model = GPT(config, seed=0)
    trained(model, torch.optim.AdamW(model.parameters(), lr=3e-3), text(inspect), 100)
    model.zero_grad()
    plain = copy.deepcopy(model)
    quantise_base(model)
    (rows,) = batches(text(json.decoder), 1, rows=64)
    learned = []
    for each, make in ((model, AdamW8bit), (plain, torch.optim.AdamW)):
        add_adapter(each, LoraConfig(rank=8))
        before, losses = frozen(each), []
        options = {"paged": True} if make is AdamW8bit else {}
        optimizer = make(adapter_parameters(each), lr=1e-2, weight_decay=0.0, **options)
        for steps in (0, 40):
            trained(each, optimizer, text(json.decoder), steps)
            with torch.no_grad():
                losses.append(each(rows[:, :-1], rows[:, 1:]).item())
        learned.append(losses[0] - losses[1])
        assert same(before, frozen(each)) and all(p.grad is None for p in each.parameters() if not p.requires_grad)
    assert learned[0] >= 0.8 * learned[1] >= 0.1, learned


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapter_files(family, tmp_path):
    """Of PEFT's format: from a quantised model into a plain one and into another quantised one."""
    model = small({"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE | {"softcap": 0.0}}[family])
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    plain = on_dequantised_weights(plain, quantise_base(model), "nf4-double")
    with_adapter(model)
    save_adapter(model, tmp_path)
    quantise_base(again)
    load_adapter(again, tmp_path)
    load_adapter(plain, tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS))
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SMALL, GPT2_LIKE], ids=["ours", "gpt2"])
@pytest.mark.parametrize("format", FORMATS)
def test_dequantised_it_is_a_plain_gpt_into_which_adapters_fold(format, options):
    model = small(options)
    plain = copy.deepcopy(model)
    names = quantise_base(model, format)
    plain = on_dequantised_weights(plain, names, format)
    with_adapter(model)
    wanted = model(TOKENS)
    with pytest.raises(
        ValueError,
        match=r"merge into quantised blocks.0.attention.query, .*: expected dequantise_base of lora/qlora.py",
    ):
        merge(model)
    assert [name.removesuffix(".base") for name in dequantise_base(model)] == names
    assert torch.equal(model(TOKENS), wanted) and not any(layer.base.weight.requires_grad for layer in _adapted(model))
    fold(model)
    assert not lora_layers(model) and all(type(model.get_submodule(name)) is nn.Linear for name in names)
    with_adapter(plain)
    fold(plain)
    assert same(dict(model.state_dict()), dict(plain.state_dict()))


def _adapted(model):
    return [layer for layer in lora_layers(model).values() if isinstance(layer, LoraLinear)]


def test_without_adapters_and_in_half_precision():
    model = small()
    names = quantise_base(model)
    wanted = {name: model.get_submodule(name).dequantised().bfloat16() for name in names}
    assert dequantise_base(model, torch.bfloat16) == names
    assert all(torch.equal(model.get_submodule(name).weight, w) for name, w in wanted.items())
    assert quantise_base(model) == names  # of bfloat16 weights


def test_an_adapter_taken_out_leaves_the_quantised_layer():
    model = small()
    names = quantise_base(model)
    wanted = model(TOKENS)
    with_adapter(model)
    assert not torch.equal(model(TOKENS), wanted)
    remove(model, "default")
    assert torch.equal(model(TOKENS), wanted)
    assert all(type(model.get_submodule(name)) is QuantisedLinear for name in names)


# ---- refused ---------------------------------------------------------------------------------------------------------


def refuses(model, message, **options):
    before = frozen(model)
    with pytest.raises(ValueError, match=message):
        quantise_base(model, **options)
    assert same(before, frozen(model)) and all(p.requires_grad for p in model.parameters())


def test_refused_before_anything_is_changed():
    for value in (math.nan, math.inf, -math.inf):
        model = small()
        with torch.no_grad():
            model.blocks[1].mlp.down.weight[3, 2] = value
        with pytest.raises(
            ValueError, match=r"blocks.1.mlp.down.weight has 1 numbers that are NaN or infinite.*\[3, 2\]"
        ):
            quantise_base(model)
        assert type(model.blocks[0].attention.query) is nn.Linear
        assert all(p.requires_grad for p in model.parameters())
    refuses(small(), "format 'fp4': expected one of nf4, nf4-double, int8, int4", format="fp4")
    refuses(small(), "kernels 'cuda': expected one of", kernels="cuda")
    refuses(small(), "block 100: expected one of", block=100)
    refuses(small(), "group 31: expected one of", format="int4", group=31)
    refuses(small().double(), "blocks.0.attention.query.weight is torch.float64")
    model = small()
    model.blocks[1].mlp.up = nn.Sequential(nn.Linear(10, 7))
    refuses(model, "blocks.1.mlp.up is Sequential: expected nn.Linear")


def test_twice_and_in_the_wrong_order():
    model = small()
    quantise_base(model)
    with pytest.raises(
        ValueError, match="blocks.0.attention.query is quantised already: expected .* a plain GPT, once"
    ):
        quantise_base(model, "int8")
    model = small()
    add_adapter(model, LoraConfig(targets=("embedding",)))
    with pytest.raises(ValueError, match="embedding has an adapter: expected .* before add_adapter"):
        quantise_base(model)
    with pytest.raises(ValueError, match="without quantised layers: expected quantise_base before it"):
        dequantise_base(small())
    model = small()
    quantise_base(model)
    with pytest.raises(ValueError, match="dtype torch.int8: expected a floating point type"):
        dequantise_base(model, torch.int8)
