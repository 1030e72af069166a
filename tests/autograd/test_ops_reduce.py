"""Reductions, extrema, softmax and cumsum against torch: dims in every form, ties, zeros in products, NaN and inf."""

import numpy as np
import pytest

import autograd as ag
from tests.autograd.helper import INF, LAYOUTS, NAN, check, check_forward, rand, table

# dim=None means "all" everywhere but in the functions that want a dim.
REDUCTIONS = {
    "sum": lambda m, x, dim, keep: x.sum(dim, keepdim=keep),
    "mean": lambda m, x, dim, keep: x.mean(dim, keepdim=keep),
    "var": lambda m, x, dim, keep: x.var(dim, keepdim=keep),
    "var 0": lambda m, x, dim, keep: x.var(dim, correction=0, keepdim=keep),
    "std": lambda m, x, dim, keep: x.std(dim, keepdim=keep),
    "std 2": lambda m, x, dim, keep: x.std(dim, correction=2, keepdim=keep),
    "amax": lambda m, x, dim, keep: m.amax(x, tuple(range(x.ndim)) if dim is None else dim, keepdim=keep),
    "amin": lambda m, x, dim, keep: m.amin(x, tuple(range(x.ndim)) if dim is None else dim, keepdim=keep),
    "logsumexp": lambda m, x, dim, keep: m.logsumexp(x, tuple(range(x.ndim)) if dim is None else dim, keepdim=keep),
}
ALONG = {
    "prod": lambda m, x, dim, keep: x.prod(dim, keepdim=keep),
    "max": lambda m, x, dim, keep: x.max(dim, keepdim=keep),
    "min": lambda m, x, dim, keep: x.min(dim, keepdim=keep),
    "argmax": lambda m, x, dim, keep: (x.sum(), x.argmax(dim, keepdim=keep)),
    "argmin": lambda m, x, dim, keep: (x.sum(), x.argmin(dim, keepdim=keep)),
}
KEEPING = {
    "softmax": lambda m, x, dim: m.softmax(x, dim),
    "log_softmax": lambda m, x, dim: m.log_softmax(x, dim),
    "cumsum": lambda m, x, dim: m.cumsum(x, dim),
}


@pytest.mark.parametrize("keep", [False, True])
@table(REDUCTIONS)
def test_reduction_dims(case, keep):
    for dim in (None, 0, 1, -1, (0, 2), (-1, 0), (1,), (0, 1, 2)):
        check(lambda m, x, dim=dim: case(m, x, dim, keep), (3, 4, 5), inplace=dim in (None, 1, (0, 2)))


@pytest.mark.parametrize("keep", [False, True])
@table(ALONG)
def test_reduction_along_one_dim(case, keep):
    for dim in (0, 1, -1):
        check(lambda m, x, dim=dim: case(m, x, dim, keep), (3, 4, 5))


@table(KEEPING)
def test_along_one_dim(case):
    for dim in (0, 1, -1):
        check(lambda m, x, dim=dim: case(m, x, dim), (3, 4, 5))
        check(lambda m, x, dim=dim: case(m, x, dim), (3, 1, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@table(REDUCTIONS | ALONG | {k: lambda m, x, dim, keep, f=f: f(m, x, dim) for k, f in KEEPING.items()})
def test_layouts(case, layout):
    check(lambda m, x: case(m, x, 1, False), (3, 4, 5), layout=LAYOUTS[layout], single=False)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@table(REDUCTIONS | {k: f for k, f in ALONG.items() if k in ("prod", "max", "min")})
def test_zero_dimensions_and_length_one(case):
    second = case not in [REDUCTIONS[k] for k in ("var", "std", "std 2")]  # NaN: the variance of one number
    for shape in ((), (1,)):
        for dim in (0, -1):
            check(lambda m, x, dim=dim: case(m, x, dim, False), shape, second=second)
    check(lambda m, x: case(m, x, 1, True), (3, 1), second=second)


def test_full_extrema_and_functions_without_dim():
    for shape in ((), (1,), (3, 4)):
        check(lambda m, x: (x.max(), x.min(), x.prod(), x.argmax(), x.argmin(), x.argmax(keepdim=True)), shape)
        check(lambda m, x: (x.amax(), x.amin()), shape)


@table(KEEPING)
def test_zero_dimensions_keeping(case):
    check(lambda m, x: case(m, x, 0), ())
    check(lambda m, x: case(m, x, -1), (0,))
    check(lambda m, x: case(m, x, 0), (0, 3))
    check(lambda m, x: case(m, x, 1), (0, 3))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_empty():
    """Sums of nothing are 0, products 1, means NaN; an extremum of nothing is an error (test_ops_bad_input)."""
    for dim in (0, 1, None, (0, 1)):
        check(lambda m, x, dim=dim: x.sum(dim), (0, 3))
        check(lambda m, x, dim=dim: (x.mean(dim), x.var(dim, correction=0)), (0, 3), second=False)
    for dim in (0, 1):
        check(lambda m, x, dim=dim: (x.prod(dim), m.logsumexp(x, dim)), (0, 3))
        check(lambda m, x, dim=dim: x.prod(dim, keepdim=True), (0, 3))
    check(lambda m, x: x.prod(), (0, 3))
    check(lambda m, x: (m.amax(x, 1), x.max(1).values, x.argmax(1)), (0, 3))


# -- special values and ties --
SPECIAL = {
    "NaN": np.array([[1.0, NAN, 3.0], [NAN, NAN, 1.0], [1.0, 2.0, 3.0]]),
    "inf": np.array([[1.0, INF, 3.0], [-INF, -INF, 1.0], [INF, INF, -INF]]),
    "all -inf": np.array([[-INF, -INF], [-INF, 1.0]]),
    "large": np.array([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4], [800.0, -800.0, 0.0]]),
}


# Functions whose derivatives at NaN and inf torch and we have alike. In the others torch has more NaN: its prod
# divides, its logsumexp subtracts -inf from -inf. (NaN among extrema: see below.)
ALIKE = ("sum", "mean", "max", "min", "argmax", "softmax", "log_softmax", "cumsum")


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", REDUCTIONS | ALONG | KEEPING)
def test_special_values(name, special):
    case = (REDUCTIONS | ALONG).get(name) or (lambda m, x, dim, keep: KEEPING[name](m, x, dim))
    check_forward(lambda m, x: case(m, x, 1, False), SPECIAL[special], tolerance=1e-12)
    if name in ALIKE or special == "large":
        second = special == "large" and "std" not in name
        check(lambda m, x: case(m, x, 1, False), SPECIAL[special], second=second, single=False)


def test_nan_among_extrema():
    """The extremum is NaN and its gradient goes to the NaNs: torch does so in max() and loses it in amax()."""
    check(lambda m, x: (x.max(), x.min()), SPECIAL["NaN"], second=False)
    x = ag.Tensor(SPECIAL["NaN"], requires_grad=True)
    assert ag.grad(x.amax(1).sum(), x)[0].tolist() == [[0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]]


TIED = np.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [-0.0, 0.0, -1.0, -1.0]])


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_ties(dim):
    """amax and amin share the gradient, max and min with a dim give it to the first."""
    check(lambda m, x: (m.amax(x, dim), m.amin(x, dim)), TIED)
    check(lambda m, x: x.max(dim), TIED)
    check(lambda m, x: x.min(dim), TIED)
    check(
        lambda m, x: (x.max(), x.min(), m.amax(x, (0, 1)), x.argmax(), x.argmin(), x.argmax(dim), x.argmin(dim)), TIED
    )


def test_std_of_equal_numbers():
    """The root of a variance of 0: torch takes the derivative 0 there, not NaN."""
    check(lambda m, x: x.std(1), TIED, second=False)
    check(lambda m, x: (x.std(), x.std(0, correction=0)), np.ones((2, 3)), second=False)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_var_without_degrees_of_freedom():
    """A divisor of 0 or less: NaN or inf as torch has it."""
    check_forward(lambda m, x: (x.var(1), x.std(1), x.var(1, correction=1)), rand(3, 1))
    check_forward(lambda m, x: (x.var(0, correction=3), x.std(0, correction=3), x.var(0, correction=5)), rand(3, 2))


# -- products --
ZEROS = {
    "none": rand(3, 5),
    "one zero": np.array([1.0, 2.0, 0.0, 4.0, 5.0]),
    "two zeros": np.array([1.0, 0.0, 0.0, 4.0, 5.0]),
    "three zeros": np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0], [3.0, 4.0, 5.0]]),
    "one element": np.array([[0.0], [2.0]]),
}


@table(ZEROS)
def test_prod_with_zeros(case):
    check(lambda m, x: x.prod(-1), case)
    check(lambda m, x: x.prod(), case)
    check(lambda m, x: x.prod(0, keepdim=True), case)


def test_prod_over_several_dims():
    """torch takes one dim only: the reference multiplies twice."""
    check(lambda m, x: x.prod((0, -1)), (3, 2, 4), reference=lambda m, x: x.prod(0).prod(-1))
    check(
        lambda m, x: x.prod((1, 0), keepdim=True),
        (3, 2, 4),
        reference=lambda m, x: x.prod(0, keepdim=True).prod(1, keepdim=True),
    )


# -- integers --
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.bool_])
def test_integer_inputs(dtype):
    x = rand(3, 4, low=0, high=3).astype(dtype)
    check_forward(lambda m, x: (x.sum(), x.sum(1), x.prod(), x.prod(0), m.cumsum(x, 1)), x)
    if dtype is not np.bool_:
        check_forward(lambda m, x: (x.max(), x.min(), m.amax(x, 1), x.max(0).values, x.max(0).indices, x.argmax(1)), x)
    check_forward(lambda m, x: (x.any(), x.all()), x > 1)


def test_random_dims():
    """Random shapes, dims and keepdim for each reduction."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        ndim = int(rng.integers(1, 5))
        shape = tuple(int(n) for n in rng.integers(1, 4, ndim))
        dims = tuple(
            int(d) - (ndim if rng.random() < 0.5 else 0) for d in rng.permutation(ndim)[: rng.integers(1, ndim + 1)]
        )
        for name in ("sum", "mean", "var 0", "amax", "logsumexp"):
            case, keep = REDUCTIONS[name], bool(rng.random() < 0.5)
            check(lambda m, x, c=case, d=dims, k=keep: c(m, x, d, k), shape, single=False, inplace=False)
