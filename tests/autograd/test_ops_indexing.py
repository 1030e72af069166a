"""Indexing against torch: basic, advanced and mixed, gather, scatter_add, index_select, embedding, in-place assignment.

Two corners follow numpy where torch refuses or differs: slices with a negative step, and an int apart from an array.
"""

import numpy as np
import pytest
import torch

import autograd as ag
from tests.autograd.helper import LAYOUTS, check, check_forward, rand, table

SHAPE = (4, 5, 6)
MASK = rand(*SHAPE) > 0.3
BASIC = {
    "int": lambda m, x: x[2],
    "negative int": lambda m, x: x[-1],
    "ints": lambda m, x: x[1, -2],
    "all ints": lambda m, x: x[1, 2, 3],
    "slice": lambda m, x: x[1:3],
    "slices": lambda m, x: x[1:, :-2, ::2],
    "slice beyond": lambda m, x: x[2:99],
    "empty slice": lambda m, x: x[3:1],
    "int and slice": lambda m, x: x[:, 2, 1:4],
    "none": lambda m, x: x[None],
    "none inside": lambda m, x: x[:, None, 1:, None],
    "ellipsis": lambda m, x: x[..., 0],
    "ellipsis alone": lambda m, x: x[...],
    "ellipsis inside": lambda m, x: x[0, ..., 1:3],
    "ellipsis of nothing": lambda m, x: x[0, :, ..., 1],
    "all": lambda m, x: x[1, ..., None, 2:],
    "0-d tensor": lambda m, x: x[m.array(2)] + x[:, m.array(-1)].sum(),
    "numpy int": lambda m, x: x[np.int64(1), :, np.int32(2)],
}
ADVANCED = {
    "array": lambda m, x: x[m.array([2, 0, 3])],
    "array with repeats": lambda m, x: x[m.array([1, 1, 0, 1, -1])],
    "array 2-d": lambda m, x: x[m.array([[0, 1], [3, 3], [2, -4]])],
    "list": lambda m, x: x[[1, 3, 1]],
    "list in tuple": lambda m, x: x[:, [1, 3, 1]],
    "bool list": lambda m, x: x[[True, False, False, True]],
    "empty list": lambda m, x: x[[]],
    "two arrays": lambda m, x: x[m.array([0, 1, 0]), m.array([2, 2, 2])],
    "two arrays broadcast": lambda m, x: x[m.array([[0], [1]]), m.array([2, 2, -1])],
    "arrays apart": lambda m, x: x[m.array([0, 1, 1]), :, m.array([5, 0, 0])],
    "array behind slice": lambda m, x: x[:, m.array([4, 4, 1])],
    "array and step": lambda m, x: x[::2, m.array([[0, 1]]), 1:4],
    "array and ellipsis": lambda m, x: x[..., m.array([0, 0, 5])],
    "array and none": lambda m, x: x[None, m.array([0, 0, 3]), :, None],
    "array then int": lambda m, x: x[m.array([1, 2, 1]), 3],
    "int then array": lambda m, x: x[1, m.array([1, 2, 1])],
    "three arrays": lambda m, x: x[m.array([0, 0]), m.array([1, 1]), m.array([2, 2])],
    "int32 array": lambda m, x: x[m.array(np.int32([3, 3, 1]))],
    "bool full": lambda m, x: x[m.array(MASK)],
    "bool rows": lambda m, x: x[m.array([True, False, True, True])],
    "bool two dims": lambda m, x: x[m.array(MASK[:, :, 0])],
    "bool behind slice": lambda m, x: x[:, m.array(MASK[0, :, 0])],
    "bool and array": lambda m, x: x[m.array([True, False, True, False]), m.array([1, 4])],
    "bool of x": lambda m, x: x[x > 0.5],
    "bool nothing": lambda m, x: x[x > 1e9],
    "numpy array": lambda m, x: x[np.array([0, 2, 2])],
    "numpy bool": lambda m, x: x[:, np.array([True, False, True, True, False])],
    "chained": lambda m, x: x[1:][m.array([0, 0, 2])][..., 1],
}


@table(BASIC | ADVANCED)
def test_getitem(case):
    """The linear map, and of x² so that the second derivative is not trivial."""
    check(case, SHAPE)
    check(lambda m, x: case(m, x * x), SHAPE, single=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@table(BASIC | ADVANCED)
def test_layouts(case, layout):
    check(case, SHAPE, layout=LAYOUTS[layout], second=False, single=False)


@table(BASIC | ADVANCED)
def test_integers(case):
    if case not in (ADVANCED["bool of x"],):
        check_forward(case, np.arange(120).reshape(SHAPE))


def test_zero_dimensions_and_empty():
    check(lambda m, x: (x[...], x[None], x[()], x[None, ..., None]), ())
    check(lambda m, x: (x[0], x[-1:], x[[0, 0, 0]], x[m.array([True])], x[m.array(0)]), (1,))
    check(lambda m, x: (x[1:], x[:, 0], x[:, [0, 2]], x[m.array(np.zeros((0,), np.int64))]), (0, 3))
    check(lambda m, x: (x[:, m.array(np.zeros((2, 0), np.int64))], x[m.array(np.zeros(2, bool))]), (2, 3))


@pytest.mark.parametrize(
    "index", [np.array([2, 0, 2]), np.array([[1, 1], [0, 3]]), np.array([True, False, True, True])]
)
def test_index_is_an_input(index):
    """The index as a Tensor, which the harness overwrites between forward and backward too."""
    check(lambda m, x, i: x[i], (4, 3), index)
    check(lambda m, x, i: x[:, i] * x[i, :2].sum(), (4, 4), index)


def test_iteration_and_unpacking():
    check(lambda m, x: [row * i for i, row in enumerate(x)], (3, 4))
    check(lambda m, x: (lambda a, b: a * b)(*x), (2, 4))


def test_random_slices():
    rng = np.random.default_rng(2)
    for _ in range(60):
        shape = tuple(int(n) for n in rng.integers(1, 6, rng.integers(1, 4)))
        index = []
        for n in shape[: rng.integers(len(shape) + 1)]:
            start, stop = (None if rng.random() < 0.3 else int(v) for v in rng.integers(-n - 1, n + 2, 2))
            index.append(
                int(rng.integers(-n, n)) if rng.random() < 0.3 else slice(start, stop, int(rng.integers(1, 4)))
            )
        if rng.random() < 0.3:
            index.insert(int(rng.integers(len(index) + 1)), None)
        if rng.random() < 0.3:
            index.append(...)
        check(lambda m, x, index=tuple(index): x[index], shape, single=False)


def test_random_integer_arrays():
    """One array somewhere among slices; several adjacent arrays that broadcast; many repeats."""
    rng = np.random.default_rng(4)
    for _ in range(40):
        shape = tuple(int(n) for n in rng.integers(1, 5, 3))
        first, number = int(rng.integers(3)), int(rng.integers(1, 3))
        index = [slice(None)] * first
        for n in shape[first : first + number]:
            index.append(rng.integers(-n, n, [(3,), (2, 3), (2, 1)][rng.integers(3)]))
        check(
            lambda m, x, index=tuple(index): x[tuple(m.array(i) if isinstance(i, np.ndarray) else i for i in index)],
            shape,
            single=False,
        )


# -- where numpy's rules hold and torch refuses or differs --
@pytest.mark.parametrize(
    "index",
    [np.s_[::-1], np.s_[:, ::-2, 1:], np.s_[0, :, [1, 2, 2]], np.s_[[0, 0], :, 1], np.s_[:, [1, 1], None, 3]],
    ids=str,
)
def test_numpy_semantics(index):
    x, g = rand(*SHAPE), rand(*rand(*SHAPE)[index].shape, seed=1)
    tensor = ag.Tensor(x, requires_grad=True)
    y = tensor[index]
    np.testing.assert_array_equal(y.data, x[index])
    expected = np.zeros(SHAPE)
    np.add.at(expected, index, g)
    np.testing.assert_allclose(ag.grad(y, tensor, ag.Tensor(g))[0].data, expected, rtol=1e-14)


def test_basic_indices_are_views():
    x = ag.Tensor(np.arange(6.0).reshape(2, 3))
    for index in (0, (1, 2), slice(None), (..., 1), None):
        assert np.shares_memory(x[index].data, x.data), index
    x[1, 2].fill_(9)
    x[0].fill_(3)
    assert x.tolist() == [[3, 3, 3], [3, 4, 9]]
    assert not np.shares_memory(x[[0, 1]].data, x.data)


# -- assignment --
ASSIGNMENTS = {
    "row": (np.s_[1], (5,)),
    "broadcast": (np.s_[1:3], (1,)),
    "column": (np.s_[:, 2], (4,)),
    "scalar": (np.s_[2, 3], ()),
    "steps": (np.s_[::2, 1::3], (2, 2)),
    "array": (np.array([3, 0]), (2, 5)),
    "arrays": ((np.array([3, 0]), np.array([1, 1])), (2,)),
    "mask": (rand(4, 5) > 0.5, ()),
    "all": (..., (4, 5)),
}


@pytest.mark.parametrize("both", [True, False])
@table(ASSIGNMENTS)
def test_setitem(case, both):
    """x[index] = value on a result of the graph: gradients of the old values and of the new ones."""
    index, shape = case

    def assign(m, x, value):
        y = x * x
        y[index] = value * 3
        return y * y

    check(assign, (4, 5), shape, inplace=False)
    if not both:
        value = rand(*shape)
        check(lambda m, x: assign(m, x, m.array(value, x)), (4, 5), inplace=False)


def test_setitem_numbers_and_dtypes():
    def assign(m, x):
        y = x * 1
        y[0] = 2
        y[1, 1:] = 0.5
        return y * x

    check(assign, (3, 4), inplace=False)
    x = ag.Tensor(np.ones(3, np.float32), requires_grad=True)
    value = ag.Tensor(np.float64(4), requires_grad=True)
    y = x * 1
    y[1] = value
    assert y.dtype == np.float32
    gx, gv = ag.grad((y * y).sum(), [x, value])
    assert (gx.tolist(), gv.item(), gv.dtype) == ([2, 0, 2], 8, np.float64)


# -- gather, scatter_add, index_select, embedding --
def random_index(rng, shape, dim, size):
    """An index for gather along dim: as large as shape or smaller elsewhere, `size` along dim."""
    wanted = [size if i == dim % len(shape) else int(rng.integers(1, n + 1)) for i, n in enumerate(shape)]
    return rng.integers(0, shape[dim], wanted)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_gather(dim):
    for size, seed in ((1, 0), (3, 1), (9, 2), (0, 3)):
        check(lambda m, x, i: m.gather(x, dim, i), SHAPE, random_index(np.random.default_rng(seed), SHAPE, dim, size))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_scatter_add(dim):
    for size, seed in ((1, 0), (3, 1), (6, 2)):
        index = random_index(np.random.default_rng(seed), SHAPE, dim, size)
        check(lambda m, x, i, src: m.scatter_add(x, dim, i, src), SHAPE, index, index.shape)


def test_scatter_add_from_a_larger_source():
    """torch differentiates scatter_add only where src has the shape of index: the reference cuts it first."""
    index = random_index(np.random.default_rng(1), SHAPE, 1, 7)
    check(
        lambda m, x, i, src: m.scatter_add(x, 1, i, src),
        SHAPE,
        index,
        tuple(n + 1 for n in index.shape),
        reference=lambda m, x, i, src: m.scatter_add(x, 1, i, src[tuple(slice(n) for n in i.shape)]),
    )


def test_gather_scatter_one_dimension():
    index = np.array([0, 2, 2, 2, 0])
    check(lambda m, x, i: x.gather(0, i) * x.gather(-1, i), (3,), index)
    check(lambda m, x, i, s: x.scatter_add(0, i, s), (3,), index, (5,))


def test_index_select():
    index = np.array([2, 0, 2, 2])
    for dim in (0, 1, -1):
        check(lambda m, x, i, dim=dim: m.index_select(x, dim, i), SHAPE, index)
    check(lambda m, x, i: x.index_select(1, i), SHAPE, np.zeros(0, np.int64))
    check(lambda m, x, i: m.index_select(x, 0, i), (1,), np.zeros(3, np.int64))


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,), (), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_embedding(shape, dtype):
    index = np.asarray(rand(*shape, low=0, high=5)).astype(dtype)
    second = index.size > 0  # torch has no second derivative of an empty look-up
    check(lambda m, i, w: m.embedding(i, w), index, (5, 4), second=second)
    check(lambda m, i, w: m.embedding(i, w * w), index, (5, 4), second=second)


def test_embedding_many_repeats():
    """The sum over repeats: against a product with one-hot rows."""
    index = np.random.default_rng(0).integers(0, 7, (40, 30))
    weight = ag.Tensor(rand(7, 3), requires_grad=True)
    upstream = rand(40, 30, 3, seed=1)
    (gradient,) = ag.grad(ag.functional.embedding(ag.Tensor(index), weight), weight, ag.Tensor(upstream))
    expected = np.einsum("btv,btc->vc", np.eye(7)[index], upstream)
    np.testing.assert_allclose(gradient.data, expected, rtol=1e-12)
    np.testing.assert_array_equal(
        ag.functional.one_hot(ag.Tensor(index), 7).data, torch.nn.functional.one_hot(torch.from_numpy(index), 7).numpy()
    )
