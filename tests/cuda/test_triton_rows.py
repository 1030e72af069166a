"""The operations on rows in Triton against torch in float64, in the interpreter, and what its compiler makes of them.

Values and gradients are held to the limits of test_fused_rows.py, whose definitions and layouts these are. On a machine
with a GPU the same cases run there too. Machine code is made for capability 9.0 on any machine, and read.
"""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from cuda import device as device_of
from cuda import fused_ops as fused
from cuda import layers, triton_activation, triton_norm, triton_rotary, triton_softmax
from cuda.triton_compat import compiling
from minigpt.config import GPTConfig
from minigpt.model import GPT, rotate
from tests.cuda import sass
from tests.cuda.products import DEVICES, normal
from tests.cuda.test_fused_rows import (
    DTYPES,
    both,
    close,
    large_or_none,
    layer_definition,
    layouts,
    rms_definition,
    tables,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rms(x, gain=None, bias=None, residual=None):
    return fused.rms_norm(x, gain, eps=1e-6, residual=residual, kernels="triton")


def layer(x, gain=None, bias=None, residual=None):
    return fused.layer_norm(x, gain, bias, eps=1e-6, residual=residual, kernels="triton")


def softmax(x):
    return fused.softmax(x, kernels="triton")


def swiglu(gate, up):
    return fused.swiglu(gate, up, kernels="triton")


def rotary(x, cos, sin):
    return fused.rotary(x, cos, sin, kernels="triton")


NORMS = {"rms": (rms, rms_definition), "layer": (layer, layer_definition)}
ACTIVATIONS = {
    "gelu": (lambda x: fused.gelu(x, kernels="triton"), lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    "gelu_tanh": (lambda x: fused.gelu(x, "tanh", kernels="triton"), lambda x: F.gelu(x, approximate="tanh")),
    "relu2": (lambda x: fused.relu2(x, kernels="triton"), lambda x: F.relu(x).square()),
    "swiglu": (lambda x: swiglu(*x.chunk(2, -1)), lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
}


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 128, 1000])
def test_norms(device, kind, dtype, width):
    x, residual = (normal(5, width, dtype=dtype, device=device, grad=True) for _ in range(2))
    gain, bias = (normal(width, dtype=dtype, device=device, grad=True) for _ in range(2))
    ours, definition = NORMS[kind]
    if not (kind == "layer" and width == 1):  # all of it is the bias
        both(ours, definition, (x, gain, bias if kind == "layer" else None, None))
    # h is rounded before it is normalised, and the same h goes into the definition
    total = (x + residual).detach()
    with torch.no_grad():
        y, h = ours(x, gain, None, residual)
        assert torch.equal(h, total) and torch.equal(y, ours(h, gain))
    if width > 1:
        exact = [t.requires_grad_() for t in (total, torch.zeros_like(residual))]
        both(ours, definition, (exact[0], gain, bias if kind == "layer" else None, exact[1]))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("parameters", ["none", "gain", "float32 gain", "all float32"])
@pytest.mark.parametrize("width", [40, 33])
def test_gains_and_biases_are_optional_and_may_be_float32(kind, parameters, width):
    x = normal(2, 9, width, dtype=torch.bfloat16, grad=True)
    dtype = torch.float32 if "float32" in parameters else torch.bfloat16
    gain = None if parameters == "none" else normal(width, dtype=dtype, grad=True)
    bias = normal(width, dtype=dtype, grad=True) if "all" in parameters and kind == "layer" else None
    both(*NORMS[kind], (x, gain, bias, None))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    "rows, width, dtype",
    [
        (700, 64, torch.float32),  # more rows than programs hold at once
        (300, 256, torch.bfloat16),
        (3, 8200, torch.bfloat16),  # the gradient in two strips
        (2, 5001, torch.float32),
        (3, 16392, torch.bfloat16),  # the norm in two strips
        (2, 16385, torch.float32),
    ],
)
def test_norms_of_many_rows_and_of_wide_ones(kind, rows, width, dtype):
    x, residual = (normal(rows, width, dtype=dtype, grad=True) for _ in range(2))
    gain, bias = (normal(width, dtype=dtype, grad=True) for _ in range(2))
    with torch.no_grad():
        residual.zero_()
    both(*NORMS[kind], (x, gain, bias if kind == "layer" else None, residual))


@pytest.mark.parametrize("kind", NORMS)
def test_only_one_of_two_results_has_a_gradient(kind):
    x, residual, gain = normal(3, 10, grad=True), normal(3, 10, grad=True), normal(10, grad=True)
    ours, definition = NORMS[kind]
    for result in (0, 1):
        got, want = (
            torch.autograd.grad(
                f(x, gain, None, residual)[result].square().sum(), (x, residual, gain), allow_unused=True
            )
            for f in (ours, definition)
        )
        for one, wish in zip(got, want, strict=True):
            assert (one is None) == (wish is None)
            if one is not None:
                close(one, wish.double())


@pytest.mark.parametrize("width", [50, 16400])
def test_norms_pass_nan_and_infinity_on_and_stand_large_numbers(width):
    for ours, definition in NORMS.values():
        x = normal(5, width)
        x[0, 3], x[1, 4], x[2, 5] = math.nan, math.inf, -math.inf
        x[3] *= 1e15
        x[4] = x[4] * 1e-3 + 1e3
        got, want = ours(x), definition(x)
        assert torch.equal(got.isnan(), want.isnan())
        close(got[3], definition(x[3].double()))
        exact = definition(x[4].double())
        assert (got[4] - exact).abs().max() <= 2 * (want[4] - exact).abs().max() + 1e-6


# ---- rows that lie anywhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", layouts(1, torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 33])
def test_rows_with_strides(layout, dtype, width):
    x = layouts(width, dtype)[layout].detach().requires_grad_()
    gain = normal(width, dtype=dtype, grad=True)
    both(rms, rms_definition, (x, gain, None, None))
    both(softmax, lambda x: x.softmax(-1), (x,))
    both(ACTIVATIONS["gelu"][0], F.gelu, (x,))
    both(swiglu, lambda gate, up: F.silu(gate) * up, (x, normal(*x.shape, dtype=dtype, grad=True)))


def test_rows_of_three_leading_dimensions():
    """Three strides that do not fold into fewer, of sizes that all differ."""
    x = normal(5, 2, 3, 48)[..., :40].permute(2, 1, 0, 3).requires_grad_()
    assert all(
        view.ndim == 4 for view in fused._rows({"x": x, "y": torch.empty_like(x.detach()).contiguous()}).values()
    )
    both(rms, rms_definition, (x, normal(40, grad=True), None, None))
    both(softmax, lambda x: x.softmax(-1), (x,))
    both(swiglu, lambda gate, up: F.silu(gate) * up, (x, normal(*x.shape, grad=True)))


@pytest.mark.parametrize("rows", [(1,), (0,), (2, 0, 3), ()])
def test_one_row_and_none(rows):
    x, gain, bias = (normal(*shape, grad=True) for shape in ((*rows, 20), (20,), (20,)))
    both(layer, layer_definition, (x, gain, bias, None))
    both(rms, rms_definition, (x, gain, None, x.detach().clone().requires_grad_()))
    both(softmax, lambda x: x.softmax(-1), (x,))
    both(*ACTIVATIONS["relu2"], (x,))
    assert rotary(x, *normal(2, 10)).shape == x.shape
    empty = torch.zeros(3, 0)
    for f in (rms, layer, softmax, ACTIVATIONS["gelu"][0], lambda x: swiglu(x, x)):
        assert f(empty).shape == (3, 0)


@pytest.mark.parametrize("width", [64, 37])
def test_nothing_is_written_beside_a_result(width):
    run = device_of.place(torch.device("cpu"), kernels="triton").run
    x, d_y, cos, sin = normal(6, width), normal(6, width), normal(6, width // 2), normal(6, width // 2)
    whole = torch.full((3, 10, width + 24), math.nan)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[:, 2:8, 8 : 8 + width] = False
    y, d_x, even = whole[0, 2:8, 8 : 8 + width], whole[1, 2:8, 8 : 8 + width], width // 2 * 2
    statistics = torch.full((2, 8), math.nan)
    mean, rstd = statistics[:, 1:7]
    d_gain, d_bias = torch.full((2, width + 2), math.nan)[:, 1:-1]
    partials = torch.full((12, 2, width), math.nan)
    run("norm_forward", x=x, residual=d_y, y=y, h=d_x, mean=mean, rstd=rstd, eps=1e-6)
    given = {"gain": x[0], "partials": partials, "d_gain": d_gain, "d_bias": d_bias}
    run("norm_backward", h=x, d_y=d_y, d_x=d_x, mean=mean, rstd=rstd, **given)
    run("softmax_forward", x=x, y=y)
    run("softmax_backward", y=x, d_y=d_y, d_x=d_x)
    run("activation_forward", kind="swiglu", gate=x, up=d_y, y=y)
    run("activation_backward", kind="swiglu", gate=x, up=d_y, d_y=d_y, d_gate=y, d_up=d_x)
    run("rotary", x=x[:, :even], y=whole[2, 2:8, 8 : 8 + even], cos=cos, sin=sin, sign=1.0)
    assert whole[outside].isnan().all() and statistics[:, [0, 7]].isnan().all()
    assert not any(t.isnan().any() for t in (y, d_x, mean, rstd, d_gain, d_bias))


# ---- rotary embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("K", [2, 6, 64])
def test_rotary_is_minigpts(device, dtype, heads_first, K):
    B, H, T = 2, 3, 5
    x = normal(B, H, T, K, dtype=dtype) if heads_first else normal(B, T, H, K, dtype=dtype).transpose(1, 2)
    x = x.to(device).requires_grad_()
    cos, sin = (t.to(device) for t in tables(B, 1, T, K // 2, dtype=dtype))
    full = [torch.cat([t, t], dim=-1) for t in (cos, sin)]
    got = both(lambda x: rotary(x, cos, sin), lambda x: rotate(x, *(t.to(x.dtype) for t in full)), (x,))[0]
    assert torch.equal(rotary(x, *full), got)  # minigpt's tables
    assert torch.equal(rotary(x, cos.float(), sin.float()), got)
    one = rotary(x, cos[0, 0], sin[0, 0])  # (T, K/2): shared by the batch
    assert torch.equal(one[0], got[0]) and (K == 2 or not torch.equal(one[1], got[1]))


def test_rotary_of_wide_rows():
    x, cos, sin = normal(2, 5000, grad=True), *tables(2, 2500)
    full = [torch.cat([t, t], dim=-1) for t in (cos, sin)]
    both(lambda x: rotary(x, cos, sin), lambda x: rotate(x, *(t.to(x.dtype) for t in full)), (x,))


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 2), (5, 66), (2, 3, 1000), (1, 10002)])
def test_activations(device, dtype, kind, shape):
    both(*ACTIVATIONS[kind], (normal(*shape, dtype=dtype, device=device).mul(3).requires_grad_(),))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_numbers_that_are_large_or_none(kind, dtype):
    large_or_none(*ACTIVATIONS[kind], dtype)


# ---- softmax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 768, 5001, 16384, 20000, 20001])
def test_softmax(device, dtype, width):
    x = normal(3 if width < 10000 else 1, width, dtype=dtype, device=device).mul(3).requires_grad_()
    both(softmax, lambda x: x.softmax(-1), (x,))


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
    got, want = softmax(x), x.softmax(-1)
    assert torch.equal(got.isnan(), want.isnan())
    close(got.nan_to_num(7), x.double().softmax(-1).nan_to_num(7))


def test_the_references_say_what_the_kernels_do():
    x, residual, gain, bias = normal(4, 24), normal(4, 24), normal(24), normal(24)
    y, h, _, _ = triton_norm.reference(x, gain, bias, residual, centred=True)
    for got, want in zip(layer(x, gain, bias, residual), (y, h), strict=True):
        close(got, want.double())
    close(rms(x, gain), triton_norm.reference(x, gain)[0].double())
    close(softmax(x), triton_softmax.reference(x).double())
    cos, sin = tables(4, 12)
    close(rotary(x, cos, sin), triton_rotary.reference(x, cos, sin).double())
    close(swiglu(x, residual), triton_activation.reference("swiglu", x, residual).double())
    for kind in ("gelu", "gelu_tanh", "relu2"):
        close(ACTIVATIONS[kind][0](x), triton_activation.reference(kind, x).double())


# ---- torch.library, modules, bad input -------------------------------------------------------------------------------


def test_opcheck():
    x, residual, gate = (normal(2, 3, 8, grad=True) for _ in range(3))
    gain, bias = normal(8, grad=True), normal(8, grad=True)
    cos, sin = tables(3, 4)
    calls = [
        (fused._rms_norm, (x, residual, gain, None, 1e-6, "triton")),
        (fused._layer_norm, (x.transpose(0, 1), residual.transpose(0, 1), gain, bias, 1e-6, "triton")),
        (
            fused._norm_backward,
            (x.detach(), None, gate.detach(), gain.detach(), torch.ones(6), torch.ones(6), True, "triton"),
        ),
        (fused._rotary, (x, cos, sin, 1.0, "triton")),
        (fused._swiglu, (gate, x, "triton")),
        (fused._activation, (x, "gelu_tanh", "triton")),
        (fused._softmax, (x, "triton")),
    ]
    for operation, arguments in calls:
        assert set(torch.library.opcheck(operation, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_gpt_with_our_norms(norm):
    config = GPTConfig(
        vocab_size=33, context=12, layers=2, width=24, heads=2, kv_heads=1, mlp_width=40, norm=norm, qk_norm=True
    )
    ours = GPT(config, norm_cls=layers.TritonRMSNorm if norm == "rmsnorm" else layers.TritonLayerNorm)
    theirs = GPT(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + (p.ndim == 1))
    ours.load_state_dict(theirs.state_dict())
    tokens, targets = torch.randint(33, (2, 2, 11))
    losses = [model(tokens, targets) for model in (ours, theirs)]
    close(losses[0].detach(), losses[1].detach().double())
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


X = torch.zeros(4, 8)
BAD = [
    (lambda: fused.rms_norm(X, kernels="no"), "kernels 'no': expected one of cuda, triton"),
    (lambda: fused.layer_norm(X, kernels="no"), "kernels 'no'"),
    (lambda: fused.rotary(X, X, X, kernels="no"), "kernels 'no'"),
    (lambda: fused.swiglu(X, X, kernels="no"), "kernels 'no'"),
    (lambda: fused.gelu(X, kernels="no"), "kernels 'no'"),
    (lambda: fused.relu2(X, kernels="no"), "kernels 'no'"),
    (lambda: fused.softmax(X, kernels="no"), "kernels 'no'"),
    (lambda: rms(X.T), r"x has strides \(1, 8\): expected a contiguous last dimension"),
    (lambda: layer(X.half(), X[0].bfloat16()), "gain is torch.bfloat16: expected torch.float16, as x is or"),
    (lambda: swiglu(X, X[:2]), r"up has shape \(2, 8\): expected \(4, 8\)"),
    (lambda: softmax(torch.zeros(1).expand(2**30, 1)), r"x has shape \(\d+, 1\): expected less than 2\^30 rows"),
    (
        lambda: device_of.place(X.device, kernels="triton").run("activation_forward", kind="elu", x=X, y=X),
        "kind 'elu': expected one of swiglu",
    ),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- machine code ----------------------------------------------------------------------------------------------------


def compiled(tmp_path, f) -> list[sass.Kernel]:
    """The kernels that f would launch on a Hopper GPU, disassembled."""
    if reason := sass.missing("cuobjdump", "nvdisasm"):
        pytest.skip(reason)
    with compiling(90) as found:
        f()
    kernels = []
    for number, one in enumerate(found):
        path = tmp_path / f"{number}.cubin"
        path.write_bytes(one.kernel.asm["cubin"])
        kernels += sass.disassemble(path, sass.kernels(path))
    return kernels


def accesses(kernel) -> list[int]:
    """Loads from memory and stores to it, and those of them of 16 bytes; loads into shared memory are loads."""
    loads = (r"LDG\.E|LDGSTS", r"LDG\.E\S*\.128|LDGSTS\S*\.128")
    return [kernel.count(pattern) for pattern in (*loads, r"STG\.E", r"STG\.E\S*\.128")]


def empty(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("width", [1024, 1000])  # 16 divides one, and 8 the other
def test_machine_code_of_norms(tmp_path, width):
    x, residual, gain = empty(512, width), empty(512, width), empty(width, dtype=torch.float32)

    def both_passes():
        y, h = fused.layer_norm(x, gain, gain, residual=residual, kernels="triton")
        torch.autograd.grad((y, h), (x, gain), (torch.zeros_like(y), torch.zeros_like(h)))

    forward, backward, partials = compiled(tmp_path, both_passes)
    assert not [fault for kernel in (forward, backward, partials) for fault in sass.memory_faults(kernel)]
    loads, wide_loads, stores, wide_stores = accesses(forward)
    # x and residual once: 8 rows of 1024 in 256 threads are 4 accesses each; gain and bias in float32 are 2 or 4
    assert loads == wide_loads <= 16 and wide_stores == 8 and stores - wide_stores == 2  # these: mean and rstd
    # the backward pass asks for the next rows while it works: loads of the first rows, and as many in the loop
    assert accesses(backward)[1] >= 12 and accesses(backward)[3] >= 2 and backward.count("LDGSTS") >= 6
    assert forward.registers <= 128 and backward.registers <= 128


def test_machine_code_of_elementwise_operations_and_softmax(tmp_path):
    x, line = empty(512, 2 * 1000).detach(), empty(2**16).detach()
    q, cos = empty(2, 512, 4, 128).detach().transpose(1, 2), empty(512, 64).detach()
    cases = {  # loads and stores
        "halves of a row": (lambda: swiglu(*x.chunk(2, -1)), 4, 2),
        "line": (lambda: swiglu(line, line), 4, 2),
        "rotary": (lambda: rotary(q, cos, cos), 4, 2),
        "softmax": (lambda: softmax(x), 4, 4),
        "softmax backward": (lambda: fused._softmax_backward(x, x, "triton"), 4, 2),
    }
    for name, (f, loads, stores) in cases.items():
        (kernel,) = compiled(tmp_path, f)
        assert not sass.memory_faults(kernel)
        assert accesses(kernel) == [loads, loads, stores, stores], name
