"""Elementwise operations against torch: values, first and second derivatives, kinks, NaN and inf, dtypes.

Broadcasting, Python numbers and numpy arrays as operands, and non-contiguous inputs are here too.
"""

import numpy as np
import pytest
import torch

import autograd as ag
from tests.autograd.helper import INF, LAYOUTS, NAN, check, check_forward, ours, rand, table, theirs

UNARY = {
    "neg": lambda m, x: -x,
    "abs": lambda m, x: m.abs(x),
    "sign": lambda m, x: m.sign(x),
    "exp": lambda m, x: m.exp(x),
    "log": lambda m, x: m.log(x),
    "log1p": lambda m, x: m.log1p(x),
    "expm1": lambda m, x: m.expm1(x),
    "sqrt": lambda m, x: m.sqrt(x),
    "rsqrt": lambda m, x: m.rsqrt(x),
    "sin": lambda m, x: m.sin(x),
    "cos": lambda m, x: m.cos(x),
    "tan": lambda m, x: m.tan(x),
    "tanh": lambda m, x: m.tanh(x),
    "sigmoid": lambda m, x: m.sigmoid(x),
    "erf": lambda m, x: m.erf(x),
    "relu": lambda m, x: m.relu(x),
    "gelu": lambda m, x: m.gelu(x),
    "gelu tanh": lambda m, x: m.gelu(x, approximate="tanh"),
    "silu": lambda m, x: m.silu(x),
    "softplus": lambda m, x: m.softplus(x),
    "softplus beta": lambda m, x: m.softplus(x, beta=2.5, threshold=1.0),
    "leaky_relu": lambda m, x: m.leaky_relu(x),
    "leaky_relu 0.3": lambda m, x: m.leaky_relu(x, negative_slope=0.3),
    "clamp": lambda m, x: m.clamp(x, -0.5, 0.7),
    "clamp min": lambda m, x: m.clamp(x, min=0.5),
    "clamp max": lambda m, x: m.clamp(x, max=0.5),
    "clamp integer bounds": lambda m, x: m.clamp(x, -1, 1),
    "clamp crossed": lambda m, x: m.clamp(x, min=1.0, max=0.5),
    "square": lambda m, x: x**2,
    "cube": lambda m, x: x**3,
    "pow 0": lambda m, x: x**0,
    "pow 1": lambda m, x: x**1,
    "pow -1": lambda m, x: x**-1,
    "pow -2": lambda m, x: x**-2,
    "pow 0.5": lambda m, x: x**0.5,
    "pow 2.5": lambda m, x: m.pow(x, 2.5),
    "1.5 ** x": lambda m, x: 1.5**x,
    "scalar add": lambda m, x: 2 + x + 0.5 + True,
    "scalar sub": lambda m, x: 2 - x - 0.5,
    "scalar mul": lambda m, x: 2 * x * 0.5,
    "scalar div": lambda m, x: 2 / x / 0.5,
    "masked_fill": lambda m, x: x.masked_fill(x > 0.3, -1.5),
    "where scalars": lambda m, x: m.where(x > 0, x, 2.0) + m.where(x > 0, -1.0, x),
    "where constants": lambda m, x: x * m.where(x > 0, 2.0, -1.0),
}
BINARY = {
    "add": lambda m, x, y: x + y,
    "sub": lambda m, x, y: x - y,
    "mul": lambda m, x, y: x * y,
    "div": lambda m, x, y: x / y,
    "pow": lambda m, x, y: m.exp(x) ** y,
    "maximum": lambda m, x, y: m.maximum(x, y),
    "minimum": lambda m, x, y: m.minimum(x, y),
    "where": lambda m, x, y: m.where(x > y, x, y),
}
INPUTS = {
    "positive": rand(3, 5, low=0.2, high=3.0),
    "both signs": rand(2, 3, 5),
    "0-d": np.array(0.7),
    "length 1": np.array([-0.7]),
    "empty": np.zeros((0, 3)),
}
SPECIAL = np.array([NAN, INF, -INF, 0.0, -0.0, 0.5, -0.5, 0.7, 1.0, -1.0, -2.5, 30.0, -30.0, 800.0, -800.0])
# Where the libraries differ at the edge of the domain: torch has x ** -0.5 at -inf as NaN and at -0.0 as -inf.
SPECIAL_ONLY = {"pow 0.5": SPECIAL[[0, 1, 3, 5, 6, 7]]}


@pytest.mark.parametrize("kind", INPUTS)
@table(UNARY)
def test_unary(case, kind):
    check(case, INPUTS[kind])


@pytest.mark.parametrize("name", UNARY)
def test_unary_special_values(name):
    """NaN, inf, zeros of both signs, kinks, and arguments that overflow: also the derivatives are torch's."""
    check(UNARY[name], SPECIAL_ONLY.get(name, SPECIAL), single=False)


@pytest.mark.parametrize("name", UNARY)
def test_unary_special_values_float32(name):
    values = np.delete(SPECIAL, 1) if name == "gelu" else SPECIAL  # torch's gelu(inf) is NaN in float32, inf in float64
    check_forward(UNARY[name], values.astype(np.float32), tolerance=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@table(UNARY)
def test_unary_layouts(case, layout):
    check(case, rand(3, 5, low=0.2, high=3.0), layout=LAYOUTS[layout], single=False)


@table(BINARY)
def test_binary(case):
    check(case, (3, 5), (3, 5))
    check(case, (), ())
    check(case, (0, 3), (0, 3))


@table(BINARY)
def test_binary_broadcasting(case):
    for a, b in [((3, 5), (5,)), ((5,), (3, 5)), ((2, 1, 4), (3, 1)), ((), (2, 3)), ((1, 1), (1,)), ((0, 1), (1, 3))]:
        check(case, a, b)


def random_broadcast(rng):
    """Two shapes that broadcast together, with sizes 0 to 4."""
    full = [int(rng.choice([0, 1, 2, 3, 4], p=[0.05, 0.2, 0.25, 0.25, 0.25])) for _ in range(rng.integers(5))]
    shapes = []
    for _ in range(2):
        shape = [1 if rng.random() < 0.35 else n for n in full]
        shapes.append(tuple(shape[rng.integers(len(shape) + 1) if rng.random() < 0.4 else 0 :]))
    return shapes


@table(BINARY)
def test_binary_random_broadcasting(case):
    rng = np.random.default_rng(1)
    for _ in range(12):
        check(case, *random_broadcast(rng), single=False, inplace=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@table(BINARY)
def test_binary_layouts(case, layout):
    check(case, (3, 5), (3, 5), layout=LAYOUTS[layout], single=False)


@table(BINARY)
def test_binary_broadcast_view(case):
    """An operand whose memory is one row seen three times (stride 0, read-only)."""
    x = np.repeat(rand(1, 5), 3, 0)
    check(case, x, x + 0.3, layout=lambda a: np.broadcast_to(a[:1], a.shape), single=False)


@table(BINARY)
def test_binary_same_tensor_twice(case):
    check(lambda m, x: case(m, x, x), (3, 5))


@pytest.mark.parametrize("name", BINARY)
def test_binary_special_values(name):
    x, y = (a.reshape(-1) for a in np.meshgrid(SPECIAL, SPECIAL))
    check(BINARY[name], x, y, single=False, second=name != "pow")


def test_division_keeps_its_range():
    """a / b² without overflow or underflow of b² on the way."""
    x, y = np.float32([1e20, 1e-30]), np.float32([1e25, 1e-25])
    b = ag.Tensor(y, requires_grad=True)
    (gradient,) = ag.grad((ag.Tensor(x) / b).sum(), b)
    np.testing.assert_allclose(gradient.data, -(x.astype(np.float64) / y / y), rtol=1e-6)


# -- powers --
POWERS = {
    "positive base": (rand(7, low=0.1, high=2), rand(7)),
    "zero base": (np.zeros(5), np.array([0.0, 0.5, 1.0, 2.0, 3.0])),
    "zero base, negative exponent": (np.zeros(2), np.array([-1.0, -0.5])),
    "negative base": (np.array([-2.0, -2.0, -1.5, -0.5]), np.array([2.0, 3.0, -2.0, 0.0])),
    "negative base, fraction": (np.array([-2.0, -1.0]), np.array([0.5, -1.5])),
    "broadcast": (rand(3, 1, low=0.1, high=2), rand(4)),
}


@table(POWERS)
def test_pow_tensor_exponent(case):
    """The second derivative at base 0 is left out: torch has NaN in places where ours is finite."""
    check(lambda m, x, y: x**y, *case, second=not (case[0] == 0).any(), single_tolerance=1e-4)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, 0.5, 1.0, 2.0, -0.5])
def test_pow_base_zero_and_negative(exponent):
    check(lambda m, x: x**exponent, np.array([0.0, 2.0, 0.25]))
    check(lambda m, x: x**exponent, np.array([-1.5, -2.0]))


def test_pow_scalar_base():
    for base in (2, 0.5, 1):
        check(lambda m, x, base=base: base**x, (3, 2))
    check(lambda m, x: 0**x, np.array([0.0, 0.5, 2.0]), second=False)


def test_pow_integer_tensors():
    check_forward(lambda m, x, y: (x**2, x**y, x**0.5), np.arange(1, 5), np.array([3, 2, 1, 0]))
    with pytest.raises(ValueError, match=r"pow: integers to a negative"):
        ag.Tensor(np.arange(3)) ** ag.Tensor(np.array([1, 2, -1]))


def test_pow_integer_exponent_tensor_gets_no_gradient():
    check(lambda m, x, y: x**y, (3, 4), np.array([0, 1, 2, 3]))


# -- kinks and ties --
def test_kinks_at_zero():
    zeros = np.array([0.0, -0.0, 1.0, -1.0])
    for name in ("abs", "sign", "relu", "leaky_relu", "gelu", "silu", "softplus"):
        check(UNARY[name], zeros)


def test_ties():
    x, y = np.array([1.0, 2.0, -0.0, 3.0, 0.0]), np.array([1.0, 2.0, 0.0, 4.0, -1.0])
    check(BINARY["maximum"], x, y)
    check(BINARY["minimum"], x, y)
    check(lambda m, x: m.maximum(x, m.array(np.zeros(5), x)), x)
    check(lambda m, x: m.clamp(x, 1.0, 3.0), x)


def test_where_keeps_nan_out():
    """The branch that is not chosen may hold NaN and inf: its gradient is 0, not NaN."""
    x = np.array([NAN, INF, 0.0, -1.0, 4.0])
    check(lambda m, x: m.where(x > 1, m.sqrt(x), 0.0) + m.where(m.array(np.array([False] * 5)), x, 1.0), x)


def test_where_broadcasts_condition():
    check(lambda m, x, y: m.where(m.array(np.array([[True], [False], [True]])), x, y), (5,), (2, 1, 5))
    check(lambda m, c, x: m.where(c, x, -x), np.array(True), (2, 3))


def test_masked_fill():
    mask = rand(3, 5) > 0
    check(lambda m, x, k: x.masked_fill(k, -INF), (3, 5), mask)
    check(lambda m, x, y, k: m.where(k, x, y) * m.where(k, y, 2.0), (3, 5), (3, 5), mask)
    check(lambda m, x, k: x.masked_fill(k, 2), (2, 3, 5), mask[:, :1])
    check(lambda m, x: x.masked_fill(x != x, 0.0), np.array([NAN, 1.0, INF]))


# -- dtypes and operands of other kinds --
ARITHMETIC = {k: BINARY[k] for k in ("add", "sub", "mul", "div", "maximum", "minimum")}
DTYPES = (np.float32, np.float64, np.int64, np.int32, np.uint8, np.bool_)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3,), ()), ((), (3,)), ((), ())], ids=str)
@table(ARITHMETIC)
def test_result_dtypes(case, shapes):
    """As torch promotes, 0-d operands included."""
    for left in DTYPES:
        for right in DTYPES:
            if case is ARITHMETIC["sub"] and np.bool_ in (left, right):
                continue  # torch refuses
            x, y = np.ones(shapes[0], left), np.ones(shapes[1], right)
            check_forward(case, x, y)


@table(ARITHMETIC | {"where": BINARY["where"], "matmul": lambda m, x, y: x @ y})
def test_mixed_dtypes_gradients(case):
    """float32 with float64: float64, and each gradient in its operand's dtype. Integers follow, without gradient."""
    x32 = ag.Tensor(rand(3, 3).astype(np.float32), requires_grad=True)
    y64 = ag.Tensor(rand(3, 3, seed=1), requires_grad=True)
    y = case(ours, x32, y64)
    assert y.dtype == np.float64
    gx, gy = ag.grad(y.sum(), [x32, y64], create_graph=True)
    assert (gx.dtype, gy.dtype) == (np.float32, np.float64)
    tx, ty = (torch.from_numpy(np.array(t.data)).double().requires_grad_() for t in (x32, y64))
    ex, ey = torch.autograd.grad(case(theirs, tx, ty).sum(), [tx, ty])
    np.testing.assert_allclose(gx.data, ex.numpy(), rtol=1e-6)
    np.testing.assert_allclose(gy.data, ey.numpy(), rtol=1e-10)
    for integers in (np.arange(1, 10).reshape(3, 3), np.ones((3, 3), np.int8), np.ones((3, 3), bool)):
        for y in (case(ours, x32, ag.Tensor(integers)), case(ours, ag.Tensor(integers), x32)):
            assert y.dtype == np.float32
            assert ag.grad(y.sum(), x32)[0].dtype == np.float32


@table(UNARY)
def test_python_scalars_keep_float32(case):
    x = ag.Tensor(rand(4, low=0.2, high=0.9).astype(np.float32), requires_grad=True)
    y = case(ours, x)
    assert y.dtype == np.float32 and ag.grad(y.sum(), x)[0].dtype == np.float32


def test_numpy_scalars_keep_float32():
    """np.sqrt(2) is a float64 scalar; like a Python number it does not widen the tensor, as in torch."""
    x = ag.Tensor(np.ones(3, np.float32), requires_grad=True)
    for y in (
        x * np.sqrt(2),
        np.sqrt(2) * x,
        x / np.float64(3),
        x + np.int64(1),
        x ** np.float64(2),
        x - np.float32(1),
    ):
        assert y.dtype == np.float32, y
    assert ag.grad((x * np.float64(3)).sum(), x)[0].tolist() == [3.0] * 3


def test_integers_to_floats():
    integers = np.array([1, 2, 3])
    for name in ("exp", "log", "sqrt", "rsqrt", "sin", "tanh", "sigmoid", "erf", "scalar div"):
        check_forward(UNARY[name], integers, tolerance=1e-6)
    for name in ("neg", "abs", "sign", "relu", "square", "clamp integer bounds", "scalar sub"):
        check_forward(UNARY[name], integers - 2)
    check_forward(lambda m, x: (m.clamp(x, 0.5), x * 0.5, x + 1, x * True), integers)


def test_casts():
    """Between floats with a gradient in the old dtype; to and from integers and bools without."""
    x = ag.Tensor(np.float32([-1.7, 0.0, 2.9]), requires_grad=True)
    y = x.double() ** 2
    assert y.dtype == np.float64
    (gradient,) = ag.grad(y.sum(), x, create_graph=True)
    assert gradient.dtype == np.float32 and ag.grad(gradient.sum(), x)[0].tolist() == [2, 2, 2]
    assert x.to(np.float32) is x
    check(lambda m, x: x.double() * 1.0 if m is ours else x * 1.0, (3,), single=False)
    check_forward(lambda m, x: (x.long(), x.float(), x.double()), np.array([-1.7, 0.0, 2.9]))
    check_forward(lambda m, x: (x.float(), x.long()), np.array([True, False]))
    assert not x.long().requires_grad


def test_numpy_array_on_the_left():
    a, x = rand(3, 5), rand(5, seed=1, low=0.5, high=1)
    check(lambda m, x: m.array(a, x) * x, x)
    for fn in (
        lambda a, x: a + x,
        lambda a, x: a - x,
        lambda a, x: a * x,
        lambda a, x: a / x,
        lambda a, x: abs(a) ** x,
        lambda a, x: a @ x,
    ):
        tensor = ag.Tensor(x, requires_grad=True)
        y = fn(a, tensor)
        assert type(y) is ag.Tensor and y.dtype == np.float64
        tx = torch.from_numpy(x).requires_grad_()
        ty = fn(torch.from_numpy(a), tx)
        np.testing.assert_allclose(y.data, ty.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(
            ag.grad(y.sum(), tensor)[0].data, torch.autograd.grad(ty.sum(), tx)[0].numpy(), rtol=1e-12
        )


def test_comparisons():
    x, y = SPECIAL, SPECIAL[::-1].copy()
    check_forward(lambda m, x, y: (x == y, x != y, x < y, x <= y, x > y, x >= y, x > 0, x >= 0.5), x, y)
    check_forward(lambda m, x: (m.isnan(x), m.isfinite(x)), x)
    check_forward(lambda m, x, y: (x == y, x < y), np.arange(3), np.float32([0, 1.5, 2]))
    assert not (ag.Tensor(x, requires_grad=True) > 0).requires_grad
