"""Quantised layers: products and gradients against float64 and nn.Linear, states, moves to other types, bytes that are
really held, a GPT made of them, bitsandbytes' own layer."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora.quantised import QuantisedLinear, bits_per_weight, predicted_bytes
from minigpt.config import GPTConfig
from minigpt.model import GPT
from tests.cuda.products import DEVICES, normal

FORMATS = [("nf4", False), ("nf4-double", False), ("int8", False), ("int4", False), ("int4", True)]
SHAPES = [(33, 127), (24, 128), (5, 1), (1, 300)]
ROUNDING = {torch.float32: 2**-20, torch.float64: 2**-48, torch.bfloat16: 2**-7, torch.float16: 2**-10}
every_format = pytest.mark.parametrize("format, asymmetric", FORMATS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer_of(shape, format, asymmetric=False, bias=True, device="cpu", **options):
    linear = nn.Linear(shape[1], shape[0], bias=bias, device=device)
    return QuantisedLinear.from_linear(linear, format, asymmetric=asymmetric, **options), linear


def close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    error, limit = (got.double() - want).abs().max().item(), ROUNDING[dtype] * max(1.0, want.abs().max().item())
    assert error <= limit, (error, limit)


def held(layer):
    """Bytes of memory below the tensors, each piece once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in layer.buffers()}
    return sum(storages.values())


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@every_format
def test_product_and_gradient(device, kernels, format, asymmetric):
    if kernels == "triton":
        pytest.importorskip("triton", reason="the kernels are in Triton")
    for shape, dtype in zip(SHAPES, (torch.float32, torch.bfloat16, torch.float32, torch.float16), strict=True):
        layer, linear = layer_of(shape, format, asymmetric, kernels=kernels, device=device)
        x = normal(2, 3, shape[1], dtype=dtype, device=device, grad=True)
        y = layer(x)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        w = layer.dequantised().double()
        close(y, x.detach().double() @ w.T + linear.bias.detach().double(), dtype)
        close(dx, dy.double() @ w, dtype)


@every_format
def test_by_torch_it_is_linear_with_the_dequantised_weight(format, asymmetric):
    """Bit for bit, values, gradients and gradients of gradients, in float64 too."""
    for dtype in (torch.float32, torch.float64):
        layer, linear = layer_of((19, 70), format, asymmetric)
        w, bias = layer.dequantised(dtype), linear.bias.detach().to(dtype)
        results = []
        for product in (layer, lambda x: F.linear(x, w, bias)):  # noqa: B023
            x = torch.linspace(-1, 1, 210, dtype=dtype).view(3, 70).requires_grad_()
            y = product(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            results.append((y, dx, *torch.autograd.grad(dx.square().sum(), x)))
        for got, want in zip(*results, strict=True):
            assert got.dtype == dtype and torch.equal(got, want)


@every_format
def test_near_the_linear_layer_it_was_made_of(format, asymmetric):
    """Relative errors of uniform weights: step / sqrt(12) over range / sqrt(12), 1/254 and 1/15; NF4 below a tenth."""
    layer, linear = layer_of((64, 256), format, asymmetric)
    error = ((layer.dequantised() - linear.weight).norm() / linear.weight.norm()).item()
    low, high = {"int8": (0.0037, 0.004), "int4": (0.064, 0.068)}.get(format, (0.085, 0.1))
    assert low <= error <= high
    assert torch.equal(layer.bias, linear.bias) and not list(layer.parameters())


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@every_format
def test_nothing_but_the_packed_weight_waits_for_the_backward_pass(kernels, format, asymmetric):
    layer, _ = layer_of((64, 128), format, asymmetric, kernels=kernels)
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(normal(4, 128, grad=True))
    pieces = {x.data_ptr(): x.numel() * x.element_size() for x in saved}
    assert saved and sum(pieces.values()) <= layer.memory_bytes()


def test_a_weight_changed_before_the_backward_pass_is_refused():
    layer, _ = layer_of((6, 64), "nf4")
    y = layer(normal(2, 64, grad=True))
    layer.absmax.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_autocast_decides_the_type(kernels):
    layer, linear = layer_of((7, 64), "nf4-double", kernels=kernels)
    x = normal(3, 64, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    close(y, x.detach().double() @ layer.dequantised().double().T + linear.bias.detach().double(), torch.bfloat16)
    close(x.grad.bfloat16(), layer.dequantised().double().sum(0).expand(3, 64), torch.bfloat16)
    assert x.grad.dtype == torch.float32


@every_format
def test_compiled_in_one_graph(format, asymmetric):
    layer, _ = layer_of((9, 65), format, asymmetric)
    x = normal(4, 65, grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for product in (layer, compiled):
        (dx,) = torch.autograd.grad(product(x).square().sum(), x)
        close(dx, (2 * layer(x) @ layer.dequantised()).detach().double(), torch.float32)


@every_format
def test_no_rows_one_row_and_no_bias(format, asymmetric):
    layer, _ = layer_of((9, 65), format, asymmetric, bias=False)
    assert layer.bias is None
    assert layer(torch.zeros(0, 65)).shape == (0, 9)
    x = normal(65)
    close(layer(x), layer.dequantised().double() @ x.double(), torch.float32)


def test_nan_stays():
    layer, _ = layer_of((9, 65), "nf4")
    x = normal(3, 65)
    x[1, 4] = math.nan
    y = layer(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


# ---- states and moves ------------------------------------------------------------------------------------------------


@every_format
def test_state_dict(format, asymmetric, tmp_path):
    from safetensors.torch import load_file, save_file

    layer, _ = layer_of((33, 127), format, asymmetric)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = QuantisedLinear(127, 33, format, bias=True, asymmetric=asymmetric)
    assert not other.dequantised().any() or format == "nf4-double"
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = normal(3, 127)
    assert torch.equal(layer(x), other(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert {"packed", "bias"} < set(layer.state_dict()) and not {"table", "code"} & set(layer.state_dict())


def test_states_of_other_formats_are_refused():
    made = {case: layer_of((33, 127), *case)[0] for case in FORMATS}
    for case, layer in made.items():
        for state in (x.state_dict() for other, x in made.items() if other != case):
            with pytest.raises(RuntimeError, match="size mismatch|expected torch|Missing key|Unexpected key"):
                copy.deepcopy(layer).load_state_dict(state)
    single, double = made["nf4", False], made["nf4-double", False]
    before = single.absmax.clone()
    with pytest.raises(RuntimeError, match="absmax is torch.uint8: expected torch.float32, as nf4 has it"):
        single.load_state_dict(double.state_dict(), strict=False)
    assert torch.equal(single.absmax, before)
    for format, options, state in (("nf4", {"block": 128}, single), ("int4", {"group": 64}, made["int4", False])):
        with pytest.raises(RuntimeError, match="size mismatch"):
            QuantisedLinear(127, 33, format, bias=True, **options).load_state_dict(state.state_dict())


@every_format
def test_other_types_leave_the_quantised_weight_alone(format, asymmetric):
    layer, _ = layer_of((33, 127), format, asymmetric)
    w = layer.dequantised()
    for move in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.float()):
        model = move(nn.Sequential(layer))
        assert torch.equal(model[0].dequantised(), w)
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16 and layer(normal(2, 127, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES[1:])
def test_moved_to_a_gpu(device):
    layer, _ = layer_of((33, 127), "nf4-double")
    w = layer.dequantised()
    layer.to(device, torch.bfloat16)
    assert all(x.device.type == device for x in layer.buffers()) and torch.equal(layer.dequantised().cpu(), w)


def test_two_layers_share_no_table():
    one, other = (layer_of((4, 64), "nf4-double")[0] for _ in range(2))
    one.table.zero_(), one.code.zero_()
    assert other.table.any() and other.code.any() and layer_of((4, 64), "nf4")[0].table.any()


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@every_format
@pytest.mark.parametrize("bias", [False, True])
def test_predicted_bytes_are_those_held(format, asymmetric, bias):
    for shape in (*SHAPES, (260, 67), (0, 5), (5, 0)):
        for block, group in ((64, 128), (32, 32), (256, 64)):
            options = {"block": block, "group": group, "asymmetric": asymmetric}
            layer = QuantisedLinear.from_linear(nn.Linear(*shape[::-1], bias=bias), format, **options)
            predicted = predicted_bytes([shape], format, **options) + (4 * shape[0] if bias else 0)
            assert layer.memory_bytes() == held(layer) == predicted
            empty = QuantisedLinear(*shape[::-1], format, bias=bias, **options)
            assert held(empty) == predicted


def test_bits_per_weight_are_those_of_large_matrices():
    shape = (4096, 14336)
    for format, asymmetric in FORMATS:
        for block, group in ((64, 128), (32, 32), (256, 64)):
            options = {"block": block, "group": group, "asymmetric": asymmetric}
            bits = 8 * predicted_bytes([shape], format, **options) / math.prod(shape)
            assert abs(bits - bits_per_weight(format, columns=shape[1], **options)) <= 2e-4
    assert bits_per_weight("nf4", columns=1) == 4.5
    assert bits_per_weight("nf4-double", columns=1) == 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125
    assert bits_per_weight("int8", columns=4096) == 8.0078125
    assert bits_per_weight("int4", columns=1) == 4.25 and bits_per_weight("int4", columns=1, asymmetric=True) == 4.3125


def test_predicted_bytes_of_several_and_of_none():
    assert predicted_bytes([], "nf4") == 0
    shapes = [(33, 127), (1, 300)]
    assert predicted_bytes(iter(shapes), "nf4") == sum(predicted_bytes([shape], "nf4") for shape in shapes)


# ---- a model of them -------------------------------------------------------------------------------------------------


def replaced(model, format, asymmetric, kernels="torch"):
    for name, module in list(model.named_modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                label = f"{name}.{key}"
                new = QuantisedLinear.from_linear(child, format, asymmetric=asymmetric, name=label, kernels=kernels)
                setattr(module, key, new)
    return model


@every_format
def test_a_gpt(format, asymmetric):
    """Its logits are those of a GPT whose weights are the dequantised ones; the bytes are those predicted."""
    model = GPT(
        GPTConfig(vocab_size=31, context=16, layers=2, width=48, heads=4, kv_heads=2, mlp_width=100, tied=False)
    )
    predicted = predicted_bytes(model, format, asymmetric=asymmetric)
    small, rounded = replaced(copy.deepcopy(model), format, asymmetric), copy.deepcopy(model)
    layers = {name: m for name, m in small.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(layers) > 10 and predicted == sum(held(layer) for layer in layers.values())
    for name, layer in layers.items():
        rounded.get_submodule(name).weight.data.copy_(layer.dequantised())
    tokens = torch.randint(31, (2, 16))
    gradients = []
    for one in (small, rounded):
        logits = one(tokens)
        logits = logits[0] if isinstance(logits, tuple) else logits
        F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1).flatten()).backward()
        gradients.append((logits, one.embedding.weight.grad))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_layer_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(128, 24)
    theirs = bitsandbytes.nn.Linear4bit(128, 24, quant_type="nf4", compress_statistics=True)
    theirs.load_state_dict(linear.state_dict())
    with torch.compiler.set_stance("force_eager"):
        theirs = theirs.to("cpu")
        ours = QuantisedLinear.from_linear(linear, "nf4-double")
        x = normal(5, 128)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.packed, theirs.weight.data.view(-1))


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_refused():
    linear = nn.Linear(64, 6)
    for arguments, message in (
        ((nn.Embedding(6, 64), "nf4"), "blocks.0.up is Embedding: expected nn.Linear"),
        ((linear, "nf3"), "format 'nf3': expected one of nf4, nf4-double, int8, int4"),
        ((nn.Linear(64, 6, dtype=torch.float64), "int8"), "blocks.0.up.weight is torch.float64: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantisedLinear.from_linear(*arguments, name="blocks.0.up")
    for options, message in (
        ({"block": 60}, "block 60: expected one of 32, 64"),
        ({"group": 8}, "group 8: expected one of 32, 64, 128"),
        ({"kernels": "cuda"}, "kernels 'cuda': expected one of triton, torch"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantisedLinear.from_linear(linear, "nf4", **options)
    with torch.no_grad():
        linear.weight[3, 7] = math.nan
    for format, _ in FORMATS:
        with pytest.raises(ValueError, match=r"blocks.0.up.weight has 1 numbers that are NaN or infinite.*\[3, 7\]"):
            QuantisedLinear.from_linear(linear, format, name="blocks.0.up")
    with pytest.raises(ValueError, match=r"shape \(6, -1\): expected two dimensions"):
        QuantisedLinear(-1, 6)


def test_refused_of_products_and_predictions():
    layer, _ = layer_of((6, 64), "nf4")
    for x in (torch.zeros(2, 63), torch.zeros(()), torch.zeros(64, 2)):
        with pytest.raises(ValueError, match=r"x has shape .*: expected \(.., 64\)"):
            layer(x)
    layer, _ = layer_of((6, 64), "nf4", kernels="triton")
    with pytest.raises(ValueError, match="x is torch.float64"):
        layer(torch.zeros(2, 64, dtype=torch.float64))
    for shape in ((3,), (3, 4, 5), (-1, 4)):
        with pytest.raises(ValueError, match=r"shape .*: expected two dimensions, \(out, in\)"):
            predicted_bytes([shape], "nf4")
    with pytest.raises(ValueError, match="format 'fp4'"):
        predicted_bytes([(3, 4)], "fp4")
    with pytest.raises(ValueError, match="columns 0: expected at least 1"):
        bits_per_weight("int8", columns=0)
