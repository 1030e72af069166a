"""Operations that move elements against torch: every one, also on empty, 0-d and non-contiguous tensors.

Also which results are views of their input and which are copies, as far as torch promises it.
"""

import numpy as np
import pytest

import autograd as ag
from tests.autograd.helper import LAYOUTS, check, check_forward, ours, rand, table

SHAPE = (3, 4, 5)
CASES = {
    "reshape": lambda m, x: x.reshape(4, 15),
    "reshape tuple": lambda m, x: m.reshape(x, (5, -1)),
    "reshape flat": lambda m, x: x.reshape(-1),
    "view": lambda m, x: x.reshape(60).reshape(2, 30),
    "flatten": lambda m, x: x.flatten(),
    "flatten 1": lambda m, x: m.flatten(x, 1),
    "flatten 0 1": lambda m, x: x.flatten(start_dim=0, end_dim=-2),
    "transpose": lambda m, x: x.transpose(0, 2),
    "transpose negative": lambda m, x: m.transpose(x, -1, 1),
    "mT": lambda m, x: x.mT,
    "permute": lambda m, x: x.permute(2, 0, 1),
    "permute tuple": lambda m, x: m.permute(x, (-1, 1, 0)),
    "expand": lambda m, x: x[:, :1].expand(3, 7, 5),
    "expand keep": lambda m, x: x[:1].expand(2, -1, -1),
    "expand new dims": lambda m, x: x.expand(2, 1, 3, 4, 5),
    "squeeze": lambda m, x: x[:1, :, :1].squeeze(),
    "squeeze dim": lambda m, x: x[:1, :, :1].squeeze(0),
    "squeeze not 1": lambda m, x: x[:1].squeeze(1),
    "squeeze dims": lambda m, x: x[:1, :, :1].squeeze((0, -1)),
    "unsqueeze": lambda m, x: x.unsqueeze(0) * x.unsqueeze(-1).sum(-1) + x.unsqueeze(2).sum(2),
    "unsqueeze negative": lambda m, x: m.unsqueeze(x, -4),
    "flip": lambda m, x: x.flip(0) + m.flip(x, (1, -1)) + x.flip(0, 2),
    "flip nothing": lambda m, x: m.flip(x, ()),
    "roll": lambda m, x: m.roll(x, 2, 1),
    "roll flat": lambda m, x: m.roll(x, 7),
    "roll several": lambda m, x: m.roll(x, (1, -3), (0, -1)),
    "roll round": lambda m, x: x.roll(-9, 0),
    "pad": lambda m, x: m.pad(x, (1, 2)),
    "pad several": lambda m, x: m.pad(x, (0, 1, 2, 0, 1, 1)),
    "pad value": lambda m, x: m.pad(x, (1, 0), value=-2.5),
    "pad mode": lambda m, x: m.pad(x, (1, 1), "constant", 3.0),
    "pad negative": lambda m, x: m.pad(x, (-1, 2, 1, -2)),
    "pad nothing": lambda m, x: m.pad(x, ()),
    "cat": lambda m, x: m.cat([x, x * 2, x[:1]]),
    "cat dim": lambda m, x: m.cat((x, x[:, :0], x[:, :3]), dim=1),
    "cat negative": lambda m, x: m.cat([x], -1),
    "stack": lambda m, x: m.stack([x, -x]),
    "stack dim": lambda m, x: m.stack([x, x * x, -x], dim=2),
    "stack last": lambda m, x: m.stack([x, -x], -1),
    "split": lambda m, x: m.split(x, 2, dim=-1),
    "split exact": lambda m, x: x.split(2, 1),
    "split sizes": lambda m, x: m.split(x, [1, 0, 3], dim=1),
    "split larger": lambda m, x: m.split(x, 9),
    "chunk": lambda m, x: m.chunk(x, 2, dim=2),
    "chunk fewer": lambda m, x: x.chunk(4, dim=2),
    "chunk more": lambda m, x: m.chunk(x, 7),
    "tril": lambda m, x: m.tril(x),
    "tril 1": lambda m, x: x.tril(1),
    "tril -2": lambda m, x: m.tril(x, diagonal=-2),
    "triu": lambda m, x: m.triu(x),
    "triu 2": lambda m, x: x.triu(diagonal=2),
    "triu -1": lambda m, x: m.triu(x, -1),
    "repeat": lambda m, x: x.repeat(2, 1, 3),
    "repeat new dims": lambda m, x: x.repeat((2, 1, 1, 2)),
    "repeat once": lambda m, x: x.repeat(1, 1, 1),
    "repeat none": lambda m, x: x.repeat(1, 0, 2),
    "clone": lambda m, x: x.clone() * x,
    "contiguous": lambda m, x: x.transpose(0, 1).contiguous() * 2,
}


@table(CASES)
def test_case(case):
    """Linear maps alone, and of x² so that the second derivative is not trivial."""
    check(case, SHAPE)
    check(lambda m, x: case(m, x * x), SHAPE, single=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@table(CASES)
def test_layouts(case, layout):
    check(case, SHAPE, layout=LAYOUTS[layout], second=False, single=False)


@table(CASES)
def test_integers_and_bools(case):
    x = np.arange(60).reshape(SHAPE)
    check_forward(case, x)
    check_forward(case, x.astype(np.int32))
    check_forward(lambda m, x: (x.reshape(-1), m.flip(x, (0,)), m.cat([x, x]), m.tril(x), x.repeat(1, 2, 1)), x > 30)


ONES = ("reshape flat", "flatten", "flip nothing", "roll flat", "cat negative", "stack", "stack last", "clone", "pad")
BATCHED = ("flatten 1", "transpose", "mT", "permute", "flip", "roll", "roll several", "pad", "pad value", "unsqueeze")
BATCHED += (
    "cat dim",
    "stack dim",
    "split",
    "chunk",
    "tril",
    "triu 2",
    "repeat",
    "repeat new dims",
    "flatten 0 1",
    "clone",
)


def test_length_one_and_empty():
    for name in ONES:
        check(CASES[name], (1,))
        check(CASES[name], (0,))
    for name in BATCHED:
        check(CASES[name], (0, 4, 5))
        check(CASES[name], (1, 4, 5))
    check(lambda m, x: (x.reshape(0, 5, 2), x.reshape(-1), x.flatten(0, 1), x.flatten(1), x.expand(4, 0, 3)), (0, 3))
    check(lambda m, x: x.reshape(3, 0).permute(1, 0).unsqueeze(0).expand(2, 0, 3), (0, 3))
    check(lambda m, x: (*m.chunk(x, 3), *m.split(x, 2)), (0, 3))
    check(lambda m, x: x.expand(0, 3), (1, 3))
    check(lambda m, x: (m.tril(x), m.triu(x)), (2, 1, 1))


def test_zero_dimensions():
    check(lambda m, x: (x.reshape(1, 1), x.reshape(()), x.flatten(), x.unsqueeze(0), x.unsqueeze(-1), x.clone()), ())
    check(lambda m, x: (x.expand(2, 3), x.repeat(3), x.repeat(2, 2), x.squeeze(), m.flip(x, ()), x.permute(())), ())
    check(lambda m, x: (m.stack([x, x * 2]), m.roll(x, 1), m.pad(x, ()), x.squeeze(0)), ())


def test_cat_of_several_tensors():
    check(lambda m, x, y, z: m.cat([x, y, z, x], 1), (2, 3), (2, 0), (2, 1))
    check(lambda m, x, y: m.stack([x, y, x], 1), (2, 3), (2, 3))


def test_cat_dtypes():
    """As torch promotes: int64 with float32 is float32."""
    i, f, d = np.arange(3), rand(2).astype(np.float32), rand(2)
    check_forward(lambda m, *t: m.cat(t), i, f)
    check_forward(lambda m, *t: m.cat(t), f, d, i.astype(np.int32))
    check_forward(lambda m, *t: m.cat(t), i > 0, i.astype(np.uint8))
    x = ag.Tensor(f, requires_grad=True)
    assert ag.grad(ag.cat([x, ag.Tensor(d)]).sum(), x)[0].dtype == np.float32


def test_random_reshapes_permutations_pads():
    rng = np.random.default_rng(5)
    for _ in range(40):
        shape = tuple(int(n) for n in rng.integers(1, 5, rng.integers(1, 5)))
        order = tuple(int(i) for i in rng.permutation(len(shape)))
        widths = [int(w) for w in rng.integers(-1, 3, 2 * rng.integers(1, len(shape) + 1))]
        widths = [w if shape[-1 - i // 2] > 2 else abs(w) for i, w in enumerate(widths)]
        dims = tuple(int(i) for i in rng.permutation(len(shape))[: rng.integers(len(shape) + 1)])
        shifts = tuple(int(s) for s in rng.integers(-5, 6, len(dims)))

        def fn(m, x, order=order, widths=widths, dims=dims, shifts=shifts):
            y = m.pad(x.permute(order), widths)
            return m.roll(m.flip(x, dims), shifts, dims) if dims else y, y.reshape(-1), y.mT if y.ndim > 1 else y

        check(fn, shape, single=False)


# -- memory --
VIEWS = (
    "reshape",
    "flatten 1",
    "transpose",
    "permute",
    "expand new dims",
    "squeeze dim",
    "unsqueeze negative",
    "split",
)
COPIES = ("flip", "flip nothing", "roll", "pad", "pad nothing", "cat", "cat negative", "stack", "tril", "repeat")
COPIES += ("repeat once", "clone")


@pytest.mark.parametrize("name", VIEWS + COPIES)
def test_views_and_copies(name):
    x = ag.Tensor(rand(*SHAPE))
    y = CASES[name](ours, x)
    y = y[0] if isinstance(y, tuple) else y
    assert np.shares_memory(y.data, x.data) == (name in VIEWS)
    before = y.data.copy()
    x.fill_(9)
    assert (y.data == 9).any() == (name in VIEWS) or not np.array_equal(before, y.data)
    if name in COPIES:
        np.testing.assert_array_equal(y.data, before)
        y.fill_(7)
        assert (x.data == 9).all()


def test_contiguous_returns_contiguous_tensors_unchanged():
    x = ag.Tensor(rand(2, 3))
    assert x.contiguous() is x
    assert x.mT.contiguous().data.flags.c_contiguous
