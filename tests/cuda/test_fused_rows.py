"""The fused operations on rows against torch in float64: norms, rotary embedding, activations, softmax.

Values and gradients are held to the definition in float64. In 16 bits the error may be 1.1 times that of torch's own
operation in that type, or of one rounding of the largest number. On a machine with a GPU the same cases run there too.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("cuda._simt", reason="make native builds the kernels")

from cuda import device as device_of
from cuda import fused_ops as fused
from cuda import layers, modules
from minigpt.config import GPTConfig
from minigpt.model import GPT, rotate
from tests.cuda.products import DEVICES, normal

_simt = modules.load("_simt")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 33, 768, 1000, 5001]
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-9, torch.float16: 2**-12}  # float32: a few of a sum
SCHEDULES = [("fifo", "eager"), ("reverse", "lazy"), ("random", "random"), ("priority", "lazy")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def checked():
    """The operations run on the checked model: it raises what it finds."""
    with device_of.model("_simt_checked") as module:
        yield module


def close(got, want, theirs=None):
    """`want` in float64, `theirs` in the type of `got`. A NaN fails."""
    assert got.shape == want.shape
    if got.numel() == 0:
        return
    error = (got.double() - want).abs().max().item()
    limit = ROUNDING[got.dtype] * want.abs().max().item()
    if theirs is not None and got.dtype != torch.float32:
        limit = max(limit, (theirs.double() - want).abs().max().item())
    assert error <= 1.1 * limit + 1e-7, (error, limit)


def both(ours, definition, inputs, weights=None):
    """Compares values and all gradients of ours(*inputs) with those of the definition, in float64 and in the type of
    the inputs; `inputs` may hold None, and tensors that want no gradient."""

    def run(f, tensors):
        leaves = [x for x in tensors if x is not None and x.requires_grad]
        results = f(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        grads = [w.to(y.dtype) for w, y in zip(weights, results, strict=True)]
        return [*results, *(torch.autograd.grad(results, leaves, grads) if leaves else ())]

    def as_type(x, dtype):
        return None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_(x.requires_grad)

    if weights is None:
        weights = [torch.randn_like(y) for y in _tuple(definition(*inputs))]
    got = run(ours, inputs)
    want = run(definition, [as_type(x, torch.float64) for x in inputs])
    theirs = run(definition, [as_type(x, inputs[0].dtype) for x in inputs])
    for one, wish, their in zip(got, want, theirs, strict=True):
        close(one, wish, their)
    types = [x.dtype for x in inputs if x is not None and x.requires_grad]
    assert [x.dtype for x in got[len(got) - len(types) :]] == types
    return got


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def rms_definition(x, gain=None, bias=None, residual=None):
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], None if gain is None else gain.to(h.dtype), 1e-6)
    return y if residual is None else (y, h)


def layer_definition(x, gain=None, bias=None, residual=None):
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], *(None if p is None else p.to(h.dtype) for p in (gain, bias)), 1e-6)
    return y if residual is None else (y, h)


def our_rms(x, gain=None, bias=None, residual=None):
    return fused.rms_norm(x, gain, eps=1e-6, residual=residual)


def our_layer(x, gain=None, bias=None, residual=None):
    return fused.layer_norm(x, gain, bias, eps=1e-6, residual=residual)


NORMS = {"rms": (our_rms, rms_definition), "layer": (our_layer, layer_definition)}


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(device, kind, dtype, width):
    if kind == "layer" and width == 1:
        pytest.skip("all of it is the bias")
    x, residual = (normal(5, width, dtype=dtype, device=device, grad=True) for _ in range(2))
    gain, bias = (normal(width, dtype=dtype, device=device, grad=True) for _ in range(2))
    both(*NORMS[kind], (x, gain, bias if kind == "layer" else None, None))
    # h is rounded before it is normalised, and the same h goes into the definition
    sum_of_both = (x + residual).detach()
    exact = [t.detach().requires_grad_() for t in (sum_of_both, torch.zeros_like(residual))]
    both(*NORMS[kind], (exact[0], gain, bias if kind == "layer" else None, exact[1]))
    with torch.no_grad():
        y, h = NORMS[kind][0](x, gain, None, residual)
        assert torch.equal(h, sum_of_both) and torch.equal(y, NORMS[kind][0](h, gain))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("parameters", ["none", "gain", "float32 gain", "all float32"])
@pytest.mark.parametrize("width", [40, 33, 4104])
def test_gains_and_biases_are_optional_and_may_be_float32(kind, parameters, width):
    x = normal(2, 9, width, dtype=torch.bfloat16, grad=True)
    dtype = torch.float32 if "float32" in parameters else torch.bfloat16
    gain = None if parameters == "none" else normal(width, dtype=dtype, grad=True)
    bias = normal(width, dtype=dtype, grad=True) if "all" in parameters and kind == "layer" else None
    both(*NORMS[kind], (x, gain, bias, None))


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_of_many_rows_and_of_the_widest(kind):
    half = torch.bfloat16
    for dtype, *shape in ((torch.float32, 700, 64), (half, 3, 16384), (torch.float32, 2, 12288), (half, 2, 5119)):
        x, gain = (normal(*s, dtype=dtype, grad=True) for s in (shape, shape[-1:]))
        both(*NORMS[kind], (x, gain, None, None))
    for width, dtype in ((16384 + 8, half), (12288 + 4, torch.float32), (5120 + 1, half)):
        with pytest.raises(ValueError, match=f"x: rows of {width} elements: expected 1 to"):
            NORMS[kind][0](normal(2, width, dtype=dtype))


@pytest.mark.parametrize("kind", NORMS)
def test_only_one_of_two_results_has_a_gradient(kind):
    x, residual, gain = normal(3, 10, grad=True), normal(3, 10, grad=True), normal(10, grad=True)
    ours, definition = NORMS[kind]
    for result in (0, 1):
        got = torch.autograd.grad(
            ours(x, gain, None, residual)[result].square().sum(), (x, residual, gain), allow_unused=True
        )
        want = torch.autograd.grad(
            definition(x, gain, None, residual)[result].square().sum(), (x, residual, gain), allow_unused=True
        )
        for one, wish in zip(got, want, strict=True):
            assert (one is None) == (wish is None)
            if one is not None:
                close(one, wish.double())


# ---- rows that lie anywhere ------------------------------------------------------------------------------------------


def layouts(width, dtype):
    """Name -> x of 24 rows of `width`."""
    return {
        "padded": normal(24, width + 8, dtype=dtype)[:, :width],
        "shifted": normal(24, width + 3, dtype=dtype)[:, 3:],
        "every second row": normal(24, 2, width, dtype=dtype)[:, 1],
        "heads": normal(2, 4, 3, width, dtype=dtype).transpose(1, 2),
        "heads of a wider tensor": normal(2, 4, 3 * width + 8, dtype=dtype)[..., : 3 * width]
        .view(2, 4, 3, width)
        .transpose(1, 2),
        "expanded": normal(2, 1, 3, width, dtype=dtype).expand(2, 4, 3, width),
        "one row": normal(width, dtype=dtype),
        "unaligned": normal(24 * width + 1, dtype=dtype)[1:].view(24, width),
    }


@pytest.mark.parametrize("layout", layouts(1, torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 33])
def test_rows_with_strides(layout, dtype, width):
    x = layouts(width, dtype)[layout].detach().requires_grad_()
    gain = normal(width, dtype=dtype, grad=True)
    assert x.stride(-1) == 1
    both(our_rms, rms_definition, (x, gain, None, None))
    both(fused.softmax, lambda x: x.softmax(-1), (x,))
    both(fused.gelu, F.gelu, (x,))
    both(fused.swiglu, lambda gate, up: F.silu(gate) * up, (x, normal(*x.shape, dtype=dtype, grad=True)))


@pytest.mark.parametrize("rows", [(1,), (0,), (2, 0, 3), ()])
def test_one_row_and_none(rows):
    x, gain, bias = (normal(*shape, grad=True) for shape in ((*rows, 20), (20,), (20,)))
    both(our_layer, layer_definition, (x, gain, bias, None))
    both(our_rms, rms_definition, (x, gain, None, x.detach().clone().requires_grad_()))
    both(fused.softmax, lambda x: x.softmax(-1), (x,))
    both(fused.relu2, lambda x: F.relu(x).square(), (x,))
    assert fused.rotary(x, *normal(2, 10)).shape == x.shape


def test_rows_of_no_width():
    x = torch.zeros(3, 0)
    for y in (fused.rms_norm(x), fused.layer_norm(x), fused.softmax(x), fused.gelu(x), fused.swiglu(x, x)):
        assert y.shape == (3, 0)


@pytest.mark.parametrize("width", [64, 37])
def test_nothing_is_written_beside_a_result(width):
    x, d_y = normal(6, width), normal(6, width)
    whole = torch.full((3, 10, width + 24), math.nan)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[:, 2:8, 8 : 8 + width] = False
    y, rstd, d_x = whole[0, 2:8, 8 : 8 + width], torch.empty(6), whole[1, 2:8, 8 : 8 + width]
    runs = [
        lambda: _simt.run("norm_forward", x=x, y=y, rstd=rstd, eps=1e-6),
        lambda: _simt.run("norm_backward", h=x, d_y=d_y, d_x=d_x, rstd=rstd),
        lambda: _simt.run("softmax_forward", x=x, y=y),
        lambda: _simt.run("softmax_backward", y=x, d_y=d_y, d_x=d_x),
        lambda: _simt.run("activation_forward", kind="swiglu", gate=x, up=d_y, y=y),
        lambda: _simt.run("activation_backward", kind="swiglu", gate=x, up=d_y, d_y=d_y, d_gate=y, d_up=d_x),
    ]
    for run in runs:
        run()
        assert whole[outside].isnan().all()
    assert not y.isnan().any() and not d_x.isnan().any()


# ---- rotary embedding ------------------------------------------------------------------------------------------------


def tables(*shape, dtype=torch.float32):
    angles = torch.rand(shape) * 7
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("K", [2, 6, 64, 128])
def test_rotary_is_minigpts(device, dtype, heads_first, K):
    B, H, T = 2, 3, 5
    x = (
        normal(B, H, T, K, dtype=dtype, device=device)
        if heads_first
        else normal(B, T, H, K, dtype=dtype).transpose(1, 2)
    )
    x = x.to(device).requires_grad_()
    cos, sin = (t.to(device) for t in tables(B, 1, T, K // 2, dtype=dtype))

    def definition(x):
        full = [torch.cat([t, t], dim=-1).to(x.dtype) for t in (cos, sin)]
        return rotate(x, *full)

    got = both(lambda x: fused.rotary(x, cos, sin), definition, (x,))[0]
    full = [torch.cat([t, t], dim=-1) for t in (cos, sin)]
    assert torch.equal(fused.rotary(x, *full), got)  # minigpt's tables
    assert torch.equal(fused.rotary(x, cos.float(), sin.float()), got)
    one = fused.rotary(x, cos[0, 0], sin[0, 0])  # (T, K/2): shared by the batch
    assert torch.equal(one[0], got[0]) and (K == 2 or not torch.equal(one[1], got[1]))


# ---- activations -----------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": (fused.gelu, lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),  # F.gelu(inf) is NaN on a CPU
    "gelu_tanh": (lambda x: fused.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "relu2": (fused.relu2, lambda x: F.relu(x).square()),
    "silu": (lambda x: fused.swiglu(x, torch.ones_like(x)), F.silu),
    "swiglu": (lambda x: fused.swiglu(*x.chunk(2, -1)), lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 2), (5, 66), (2, 3, 1000), (1, 10002)])
def test_activations(device, dtype, kind, shape):
    both(*ACTIVATIONS[kind], (normal(*shape, dtype=dtype, device=device).mul(3).requires_grad_(),))


def large_or_none(ours, definition, dtype):
    """An activation of numbers at which exponentials end, and of those that are none."""
    x = torch.tensor([0.0, -0.0, 20, -20, 87, -87, 89, -89, 100, -100, 1e4, -1e4], dtype=dtype, requires_grad=True)
    both(ours, definition, (x,))
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype)
    got, want = ours(special), definition(special)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_numbers_that_are_large_or_none(kind, dtype):
    large_or_none(*ACTIVATIONS[kind], dtype)


# ---- softmax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 16384, 20000, 20001])
def test_softmax(device, dtype, width):
    rows = 3 if width < 10000 else 1
    both(
        fused.softmax,
        lambda x: x.softmax(-1),
        (normal(rows, width, dtype=dtype, device=device).mul(3).requires_grad_(),),
    )


@pytest.mark.parametrize("width", [10, 64, 20000])
def test_softmax_of_numbers_that_are_large_or_none(width):
    x = normal(8, width)
    x[0] += 1e4
    x[1] *= 1e4
    x[2, : width - 1] = -math.inf
    x[3, 0] = -math.inf
    x[4] = -math.inf
    x[5, -1] = math.inf
    x[6, 3] = math.nan
    x[7, 1] = -3e38
    got, want = fused.softmax(x), x.softmax(-1)
    assert torch.equal(got.isnan(), want.isnan())
    close(got.nan_to_num(7), x.double().softmax(-1).nan_to_num(7))


def test_a_softmax_of_256k():
    x = normal(1, 2**18, dtype=torch.bfloat16, grad=True)
    both(fused.softmax, lambda x: x.softmax(-1), (x,))


def test_norms_pass_nan_and_infinity_on_and_stand_large_numbers():
    for ours, definition in NORMS.values():
        x = normal(5, 50)
        x[0, 3], x[1, 4], x[2, 5] = math.nan, math.inf, -math.inf
        x[3] *= 1e15
        x[4] = x[4] * 1e-3 + 1e3
        got, want = ours(x), definition(x)
        assert torch.equal(got.isnan(), want.isnan())
        close(got[3], definition(x[3].double()))
        exact = definition(x[4].double())
        assert (got[4] - exact).abs().max() <= 2 * (want[4] - exact).abs().max() + 1e-6


# ---- schedules, races ------------------------------------------------------------------------------------------------


def everything(width=40, rows=9):
    """All operations and their gradients at one width: a list of tensors."""
    torch.manual_seed(1)
    x, residual = (normal(2, rows, width, dtype=torch.bfloat16, grad=True) for _ in range(2))
    gain, bias = (normal(width, grad=True) for _ in range(2))
    y, h = fused.layer_norm(x, gain, bias, residual=residual)
    z = fused.rms_norm(h, gain) + y
    z = fused.rotary(z, *tables(rows, width // 2)) if width % 2 == 0 else z
    z = fused.swiglu(z, fused.gelu(y)) + fused.relu2(y) + fused.gelu(h, "tanh") + fused.softmax(z)
    return [z.detach(), *torch.autograd.grad(z, (x, residual, gain, bias), torch.randn_like(z))]


@pytest.mark.parametrize("width, rows", [(40, 9), (33, 100), (1100, 5)])
def test_bits_do_not_depend_on_the_schedule(width, rows):
    first = everything(width, rows)
    for order, async_ in SCHEDULES:
        with _simt.options(order=order, async_=async_, seed=3, multiprocessors=7):
            for one, other in zip(first, everything(width, rows), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("width, rows", [(8, 3), (33, 3), (1100, 2)])
def test_the_checked_model_finds_nothing(checked, width, rows):
    for order, async_ in SCHEDULES[:2]:
        with checked.options(order=order, async_=async_):
            assert all(x.isfinite().all() for x in everything(width, rows))


def test_the_checked_model_finds_nothing_in_wide_rows(checked):
    for width in (16392, 5121):
        x = normal(1, width, dtype=torch.bfloat16, grad=True)
        fused.softmax(x).square().sum().backward()
    for order, async_ in SCHEDULES:  # blocks of many warps that take several rows one after the other
        with checked.options(order=order, async_=async_, seed=5):
            x, gain = normal(11, 4104, dtype=torch.bfloat16, grad=True), normal(4104, grad=True)
            fused.rms_norm(x, gain).square().sum().backward()
            assert gain.grad.isfinite().all()


# ---- torch.library, torch.compile, modules ---------------------------------------------------------------------------


def test_opcheck():
    x, residual, gate = (normal(2, 3, 8, grad=True) for _ in range(3))
    gain, bias = normal(8, grad=True), normal(8, grad=True)
    cos, sin = tables(3, 4)
    calls = [
        (fused._rms_norm, (x, residual, gain, None, 1e-6)),
        (fused._rms_norm, (x, None, None, None, 1e-6)),
        (fused._layer_norm, (x, residual, gain, bias, 1e-6)),
        (fused._layer_norm, (x.transpose(0, 1), None, gain, None, 1e-6)),
        (fused._norm_backward, (x.detach(), None, gate.detach(), gain.detach(), torch.ones(6), torch.ones(6), True)),
        (fused._rotary, (x, cos, sin, 1.0)),
        (fused._swiglu, (gate, x)),
        (fused._activation, (x, "gelu_tanh")),
        (fused._softmax, (x,)),
    ]
    for operation, arguments in calls:
        assert set(torch.library.opcheck(operation, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile(device):
    def f(x, residual, gain, cos, sin):
        y, h = fused.rms_norm(x, gain, residual=residual)
        y = fused.rotary(y.view(-1, 2, 8).transpose(0, 1), cos, sin).transpose(0, 1).reshape(h.shape)
        return (fused.swiglu(y, fused.gelu(h)) + fused.softmax(fused.layer_norm(h, gain, gain))).sum()

    compiled = torch.compile(f, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for rows in (5, 9):  # the second size: with the size as a symbol
        x, residual = (normal(rows, 16, device=device, grad=True) for _ in range(2))
        gain = normal(16, device=device, grad=True)
        given = (x, residual, gain, *(t.to(device) for t in tables(rows, 4)))
        want = torch.autograd.grad(f(*given), given[:3])
        for got, wish in zip(torch.autograd.grad(compiled(*given), given[:3]), want, strict=True):
            close(got, wish.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_gpt_with_our_norms(device, norm):
    config = GPTConfig(
        vocab_size=33, context=12, layers=2, width=24, heads=2, kv_heads=1, mlp_width=40, norm=norm, qk_norm=True
    )
    ours = GPT(config, norm_cls=layers.RMSNorm if norm == "rmsnorm" else layers.LayerNorm).to(device)
    theirs = GPT(config).to(device)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + (p.ndim == 1))
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours.norm, nn.RMSNorm | nn.LayerNorm)
    tokens, targets = torch.randint(33, (2, 2, 11)).to(device)
    losses = [model(tokens, targets) for model in (ours, theirs)]
    close(losses[0].detach(), losses[1].detach().double())
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    with torch.autocast(device, torch.bfloat16):
        x = normal(3, 24, dtype=torch.bfloat16, device=device, grad=True)
        y = ours.norm(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert ours.norm.weight.grad.dtype == torch.float32


# ---- bad input -------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 8)
BAD = [
    (lambda: fused.rms_norm(X.long()), r"x is torch.int64: expected one of"),
    (lambda: fused.rms_norm(X.double()), r"x is torch.float64: expected one of"),
    (lambda: fused.rms_norm(X.T), r"x has strides \(1, 8\): expected a contiguous last dimension, call .contiguous"),
    (lambda: fused.rms_norm(X[:, ::2]), r"x has strides \(8, 2\)"),
    (lambda: fused.rms_norm(torch.zeros(())), "x is a scalar"),
    (lambda: fused.rms_norm(X, X[0, :7]), r"gain has shape \(7,\): expected \(8,\)"),
    (lambda: fused.rms_norm(X, X.T[:, :1].expand(8, 8)[0].half()), "gain is torch.float16: expected torch.float32"),
    (lambda: fused.rms_norm(X.half(), X[0].bfloat16()), "gain is torch.bfloat16: expected torch.float16, as x is or"),
    (lambda: fused.rms_norm(X, residual=X[:3]), r"residual has shape \(3, 8\): expected \(4, 8\)"),
    (lambda: fused.rms_norm(X.half(), residual=X), "residual is torch.float32: expected torch.float16"),
    (lambda: fused.rms_norm(X, X[0].to("meta")), "gain is on meta, x on cpu: expected one device"),
    (lambda: fused.layer_norm(X, None, X[0]), "bias without gain"),
    (
        lambda: fused.layer_norm(X.half(), X[0], X[0].half()),
        "bias is torch.float16: expected torch.float32, as gain is",
    ),
    (
        lambda: fused.layer_norm(torch.zeros(3, 3, 3, 3, 8).permute(3, 2, 1, 0, 4)),
        "at most three strides, call .contig",
    ),
    (lambda: fused.swiglu(X, X[:2]), r"up has shape \(2, 8\): expected \(4, 8\)"),
    (lambda: fused.swiglu(X.T, X.T), "gate has strides"),
    (lambda: fused.gelu(X, "fast"), "approximate 'fast': expected one of none, tanh"),
    (lambda: fused.rotary(X[:, :7], X, X), r"x has shape \(4, 7\): expected an even number of channels"),
    (lambda: fused.rotary(X, X[:3, :4], X[:, :4]), r"cos has shape \(3, 4\): expected one that broadcasts to \(4,\)"),
    (lambda: fused.rotary(X, X[:, :4], X[:, :3]), r"sin has shape \(4, 3\)"),
    (lambda: fused.rotary(X, X[:, :4], X[:, :4].half()), "sin is torch.float16"),
    (lambda: fused.rotary(X, X[:, :4].clone().requires_grad_(), X[:, :4]), "cos requires a gradient"),
    (lambda: fused.softmax(X.T), "x has strides"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_of_the_operations_themselves():
    y, rstd = torch.empty(4, 8), torch.empty(4)
    for given, message in [
        ({"x": X, "y": y[:3], "rstd": rstd}, r"y: shape \(3, 8\): expected rows of 8 as in x \(4, 8\)"),
        ({"x": X, "y": y, "rstd": rstd[:3]}, "rstd: shape"),
        ({"x": X, "y": y, "rstd": rstd, "residual": X}, "residual and h: expected both or none"),
        ({"x": X.T, "y": y.T, "rstd": torch.empty(8)}, "x: strides"),
        ({"x": X, "rstd": rstd}, "y: expected an array"),
    ]:
        with pytest.raises(ValueError, match=message):
            _simt.run("norm_forward", **given, eps=1e-6)
    with pytest.raises(ValueError, match="kind 'elu': expected one of swiglu"):
        _simt.run("activation_forward", kind="elu", x=X, y=y)


def test_gradients_of_gradients_are_refused():
    x = normal(2, 8, grad=True)
    (first,) = torch.autograd.grad(fused.softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize("name", ["relu2", "softmax", "rms_norm"])
def test_a_gradient_beside_rows_in_another_order(name):
    """The rows of x merge into two dimensions, and beside a contiguous gradient would not."""
    x = normal(2, 3, 2, 3, 8).permute(3, 0, 1, 2, 4)
    grad = torch.randn(x.shape)
    found = []
    for given in (x, x.contiguous()):
        leaf = given.detach().requires_grad_()
        found.append(torch.autograd.grad(getattr(fused, name)(leaf), leaf, grad)[0])
    assert torch.equal(*found)
