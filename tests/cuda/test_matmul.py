"""Every step of the matmul ladder against float64, at sizes no tile divides, under adversarial schedules.

The kernels write into the middle of a larger array of NaN: an element that was not written, or one beside the result
that was, fails. On a machine with a GPU the same cases run there too (marker gpu), and larger ones.
"""

import importlib
import itertools
import math

import pytest
import torch

from cuda import dispatch

_simt = pytest.importorskip("cuda._simt", reason="make native builds the kernels")
_simt_checked = pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")

STEPS = {step["number"]: step for step in _simt.steps()}
LAYOUTS = ["NN", "NT", "TN", "TT"]
SCHEDULES = [("fifo", "lazy"), ("reverse", "random"), ("random", "eager"), ("priority", "lazy"), ("priority", "random")]
SHAPES = [(1, 1, 1), (33, 65, 17), (64, 64, 64), (129, 70, 100), (40, 264, 8), (200, 24, 321)]
TILINGS = [*dispatch.TILINGS, *dispatch.ROW_COLUMN]
SAME_TYPE_OUT = range(9, 16)  # the steps that write the type of their inputs alone


def dtypes(step):
    return (
        [getattr(torch, name) for name in STEPS[step]["dtypes"]]
        if isinstance(STEPS[step]["dtypes"], tuple)
        else [torch.float32]
    )


def operand(rows, columns, transposed, dtype, generator, batch=(), device="cpu"):
    """A (.., rows, columns) matrix of N(0, 1), whose stored rows are padded to a multiple of 8 elements and 8 more."""
    stored = (columns, rows) if transposed else (rows, columns)
    wide = torch.randn(*batch, stored[0], (stored[1] + 15) // 8 * 8, generator=generator).to(dtype).to(device)
    view = wide[..., : stored[1]]
    return view.mT if transposed else view


class Guarded:
    """A result of NaN in the middle of a larger array."""

    def __init__(self, rows, columns, dtype, batch=(), device="cpu"):
        self.whole = torch.full((*batch, rows + 5, (columns + 31) // 8 * 8), math.nan, dtype=dtype, device=device)
        self.inside = self.whole[..., 2 : rows + 2, 8 : columns + 8]

    def check_outside(self):
        outside = torch.ones_like(self.whole, dtype=torch.bool)
        outside[..., 2 : self.inside.shape[-2] + 2, 8 : self.inside.shape[-1] + 8] = False
        assert self.whole[outside].isnan().all(), "written outside of the result"


def reference(a, b, c, bias, alpha, beta, activation):
    """In float64, and a bound on the rounding error of float32 sums."""
    a, b = a.double(), b.double()
    x = alpha * (a @ b)
    scale = abs(alpha) * (a.abs() @ b.abs())
    if bias is not None:
        x = x + bias.double()
        scale = scale + bias.double().abs()
    if activation == "gelu":
        x = torch.nn.functional.gelu(x)
    if activation == "swiglu":
        gate, up = x[..., ::2], x[..., 1::2]
        scale = scale[..., ::2] * (1 + up.abs()) + scale[..., 1::2] * (1 + gate.abs())
        x = torch.nn.functional.silu(gate) * up
    if c is not None:
        x = x + beta * c.double()
        scale = scale + abs(beta) * c.double().abs()
    return x, scale


def check(module, step, m, n, k, layout, dtype, *, out=None, batch=(), shared_b=False, alpha=1.0, beta=0.0, bias=False,
          activation="none", tiling=None, device="cpu", seed=0):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    columns = n // 2 if activation == "swiglu" else n
    a = operand(m, k, layout[0] == "T", dtype, generator, batch, device)
    b = operand(k, n, layout[1] == "T", dtype, generator, () if shared_b else batch, device)
    out = out or dtype
    c = operand(m, columns, False, out, generator, batch, device) if beta else None
    bias_N = torch.randn(n, generator=generator).to(dtype).to(device) if bias else None
    d = Guarded(m, columns, out, batch, device)
    module.matmul(step, a, b, d.inside, c=c, bias=bias_N, alpha=alpha, beta=beta, activation=activation,
                  **({"tiling": tiling} if tiling else {}))  # fmt: skip
    if device == "cuda":
        torch.cuda.synchronize()
    expected, scale = reference(a, b, c, bias_N, alpha, beta, activation)
    rounding = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[out]
    bound = 4e-6 * scale + rounding * expected.abs() + 1e-6
    error = (d.inside.double() - expected).abs()
    assert (error <= bound).all(), (
        f"largest error {error.max():.3g}, where {bound[error == error.max()].max():.3g} is allowed"
    )
    d.check_outside()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", STEPS)
def test_odd_sizes_in_every_layout(step, layout):
    for (m, n, k), dtype in itertools.product(SHAPES, dtypes(step)):
        check(_simt, step, m, n, k, layout, dtype)


@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
@pytest.mark.parametrize("step", STEPS)
def test_every_schedule(step, schedule):
    for seed, multiprocessors in [(1, 1), (2, 3)]:
        with _simt.options(order=schedule[0], async_=schedule[1], seed=seed, multiprocessors=multiprocessors):
            check(_simt, step, 150, 300, 200, "NT", dtypes(step)[0], seed=seed)


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids="-".join)
@pytest.mark.parametrize("step", STEPS)
def test_checked_build_finds_no_mistake(step, schedule):
    with _simt_checked.options(order=schedule[0], async_=schedule[1], seed=3, multiprocessors=2):
        check(_simt_checked, step, 72, 136, 80, "NT", dtypes(step)[0])
        check(_simt_checked, step, 33, 40, 24, "TN", dtypes(step)[-1])


@pytest.mark.parametrize("step", STEPS)
def test_epilogues(step):
    for dtype in dtypes(step):
        check(_simt, step, 65, 72, 40, "NT", dtype, alpha=-0.5, beta=2.0, bias=True)
        check(_simt, step, 65, 70, 40, "NN", dtype, bias=True, activation="gelu")
        if step not in SAME_TYPE_OUT:
            check(_simt, step, 30, 130, 24, "TN", dtype, out=torch.float32, alpha=2.0, beta=-1.0)
            check(_simt, step, 130, 72, 40, "NT", dtype, out=torch.float32, bias=True, activation="gelu")
        if step >= 5:  # a thread of steps 1-4 has no two neighbouring columns
            check(_simt, step, 65, 72, 40, "NT", dtype, bias=True, activation="swiglu", beta=1.0)


@pytest.mark.parametrize("step", SAME_TYPE_OUT)
def test_steps_between_refuse_f32_out(step):
    with pytest.raises(ValueError, match="steps 08 and 16 write f32 too"):
        check(_simt, step, 8, 8, 8, "NT", torch.bfloat16, out=torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [8, 16])
def test_f32_out(step, layout):
    for batch, dtype in [((), torch.bfloat16), ((3,), torch.float16)]:
        check(_simt, step, 129, 75, 100, layout, dtype, out=torch.float32, batch=batch)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_first_steps_refuse_swiglu(step):
    with pytest.raises(ValueError, match="swiglu"):
        check(_simt, step, 8, 8, 8, "NN", torch.float32, activation="swiglu")


@pytest.mark.parametrize("step", STEPS)
def test_batches(step):
    for dtype, layout in zip(dtypes(step) * 2, ["NT", "TN"], strict=False):
        check(_simt, step, 40, 56, 33, layout, dtype, batch=(3,))
        check(_simt, step, 70, 24, 40, layout, dtype, batch=(2,), shared_b=True, bias=True)


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: "-".join(map(str, tiling[:4])))
def test_tilings(tiling):
    layouts = ["NT"] if tiling in dispatch.ROW_COLUMN else LAYOUTS
    for layout, schedule in zip(itertools.cycle(layouts), SCHEDULES[:4], strict=False):
        for raster, stagger in [(0, 1), (3, 0)]:
            with _simt.options(order=schedule[0], async_=schedule[1], multiprocessors=8):
                check(_simt, 16, 200, 520, 136, layout, torch.bfloat16, tiling=(*tiling[:4], raster, stagger, 1, 2, 1))
                check(_simt, 16, 72, 136, 72, layout, torch.bfloat16, out=torch.float32, tiling=tiling)
    with _simt_checked.options(order="priority", async_="random", multiprocessors=8):
        check(_simt_checked, 16, 136, 264, 200, "NT", torch.float16, tiling=tiling)


def test_nan_and_infinity_reach_the_result():
    for step in STEPS:
        dtype = dtypes(step)[0]
        a, b = torch.ones(16, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype)
        a[3, 5], b[2, 7] = math.nan, math.inf
        d = torch.zeros(16, 16, dtype=dtype)
        _simt.matmul(step, a, b, d)
        assert torch.equal(d.isnan(), (a @ b).isnan()) and torch.equal(d.isinf(), (a @ b).isinf()), step


def gpu_modules():
    """The modules this machine's GPU can run, with their steps."""
    if not torch.cuda.is_available():
        return []
    names = ["cuda._sm90"] if torch.cuda.get_device_capability() == (9, 0) else []
    found = []
    for name in [*names, "cuda._sm80"]:
        module = importlib.import_module(name)
        found += [(module, step["number"]) for step in module.steps()]
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("module", "step"), gpu_modules() or [pytest.param(None, 0, marks=pytest.mark.skip("no CUDA device"))]
)
def test_on_a_gpu(module, step):
    shapes = [*SHAPES, (1024, 1024, 1024), (1000, 1336, 520), (4096, 256, 2048)]
    for (m, n, k), layout, dtype in itertools.product(shapes, LAYOUTS, dtypes(step)):
        check(module, step, m, n, k, layout, dtype, device="cuda")
    for dtype in dtypes(step):
        check(
            module, step, 650, 720, 400, "NT", dtype, alpha=-0.5, beta=2.0, bias=True, activation="gelu", device="cuda"
        )
        if step not in SAME_TYPE_OUT:
            check(module, step, 300, 130, 24, "TN", dtype, out=torch.float32, alpha=2.0, beta=-1.0, device="cuda")
        check(module, step, 400, 560, 333, "NT", dtype, batch=(3,), shared_b=True, device="cuda")
    if STEPS[step]["tilings"]:
        for tiling in TILINGS:
            layouts = ["NT"] if tiling in dispatch.ROW_COLUMN else LAYOUTS
            for layout in layouts:
                check(module, step, 2048, 1000, 1544, layout, torch.bfloat16, tiling=tiling, device="cuda")
