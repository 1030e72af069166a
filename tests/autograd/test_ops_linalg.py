"""Matrix products against torch: matmul of every pair of ranks, linear, and einsum in all its notations."""

import numpy as np
import pytest

import autograd as ag
from tests.autograd.helper import LAYOUTS, check, check_forward, ours, rand, table

MATMULS = {
    "matrices": ((3, 4), (4, 5)),
    "vectors": ((4,), (4,)),
    "matrix, vector": ((3, 4), (4,)),
    "vector, matrix": ((4,), (4, 5)),
    "batch, matrix": ((2, 3, 4), (4, 5)),
    "batch, batch": ((2, 3, 4), (2, 4, 5)),
    "matrix, batch": ((3, 4), (2, 4, 5)),
    "vector, batch": ((4,), (2, 4, 5)),
    "batch, vector": ((2, 3, 4), (4,)),
    "two batch dims": ((2, 3, 3, 4), (2, 3, 4, 5)),
    "broadcast": ((2, 1, 3, 4), (3, 4, 5)),
    "broadcast both": ((2, 1, 3, 4), (1, 3, 4, 1)),
    "many batch dims, matrix": ((2, 1, 3, 3, 4), (4, 2)),
    "ones": ((1, 1), (1, 1)),
    "inner 1": ((3, 1), (1, 5)),
    "inner 0": ((3, 0), (0, 5)),
    "batch, inner 0": ((2, 3, 0), (0, 5)),
    "empty batch": ((0, 3, 4), (4, 5)),
    "empty rows": ((2, 0, 4), (2, 4, 5)),
    "empty columns": ((3, 4), (4, 0)),
    "empty vector": ((0,), (0,)),
    "odd": ((17, 31), (31, 13)),
}


@table(MATMULS)
def test_matmul(case):
    check(lambda m, x, y: m.matmul(x, y), *case)
    check(lambda m, x, y: (x * x) @ (y * y), *case, single=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["matrices", "batch, matrix", "batch, batch", "broadcast", "vectors"])
def test_matmul_layouts(name, layout):
    check(lambda m, x, y: x @ y, *MATMULS[name], layout=LAYOUTS[layout], single=False)


def test_matmul_broadcast_views_and_special_values():
    x = np.repeat(rand(1, 3, 3), 4, 0)
    check(lambda m, x: x @ x.mT @ x, x, layout=lambda a: np.broadcast_to(a[:1], a.shape), single=False)
    values = np.array([[1.0, np.nan, 0.0], [np.inf, 0.0, 1.0], [2.0, 3.0, -np.inf]])
    check(lambda m, x: x @ x, values, second=False, single=False)


def test_matmul_same_tensor_twice():
    check(lambda m, x: x @ x, (3, 3))
    check(lambda m, x: x @ x.mT, (2, 3, 4))
    check(lambda m, x: x @ x, (4,))


def test_matmul_integers():
    check_forward(
        lambda m, x, y: (x @ y, x @ y[0], y[0] @ x), np.arange(9).reshape(3, 3), np.arange(9).reshape(3, 3) - 4
    )


# -- linear --
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4), (1, 4)], ids=str)
def test_linear(shape):
    check(lambda m, x, w: m.linear(x, w), shape, (5, 4))
    check(lambda m, x, w, b: m.linear(x, w, b), shape, (5, 4), (5,))
    check(lambda m, x, w, b: m.linear(x, w, bias=b), shape, (1, 4), (1,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_layouts(layout):
    check(lambda m, x, w, b: m.linear(x, w, b), (2, 3, 4), (5, 4), (5,), layout=LAYOUTS[layout], single=False)


def test_linear_partly_frozen():
    """Gradients for the weight alone, for the input alone, for the bias alone."""
    x, w, b = rand(3, 4), rand(5, 4), rand(5)
    check(lambda m, w: m.linear(m.array(x, w), w, m.array(b, w)), w)
    check(lambda m, x: m.linear(x, m.array(w, x), m.array(b, x)), x)
    check(lambda m, b: m.linear(m.array(x, b), m.array(w, b), b), b)
    check(lambda m, x, w: m.linear(x, w) + m.linear(x * 2, w), x, w)


def test_linear_empty_and_mixed_dtypes():
    check(lambda m, x, w, b: m.linear(x, w, b), (3, 0), (5, 0), (5,))
    x, w = ag.Tensor(rand(3, 4).astype(np.float32), requires_grad=True), ag.Tensor(rand(5, 4).astype(np.float32))
    b = ag.Tensor(rand(5), requires_grad=True)
    y = ours.linear(x, w, b)
    assert y.dtype == np.float64
    assert [g.dtype for g in ag.grad(y.sum(), [x, b])] == [np.float32, np.float64]
    np.testing.assert_allclose(ours.linear(x, w.data, b.data).data, x.data @ w.data.T + b.data, rtol=1e-5)


# -- einsum --
EINSUMS = {
    "product": ("ij,jk->ik", (3, 4), (4, 5)),
    "implicit": ("ij,jk", (3, 4), (4, 5)),
    "implicit order": ("ba", (3, 4)),
    "implicit upper case": ("aB", (3, 4)),
    "implicit sum": ("ij,ij", (3, 4), (3, 4)),
    "transposed output": ("ij,jk->ki", (3, 4), (4, 5)),
    "dot": ("i,i->", (4,), (4,)),
    "outer": ("i,j->ij", (3,), (4,)),
    "elementwise": ("ij,ij->ij", (3, 4), (3, 4)),
    "row sums": ("ij->i", (3, 4)),
    "total": ("ij->", (3, 4)),
    "transpose": ("ij->ji", (3, 4)),
    "trace": ("ii", (4, 4)),
    "trace explicit": ("ii->", (4, 4)),
    "diagonal": ("ii->i", (4, 4)),
    "diagonal of a batch": ("bii->bi", (2, 4, 4)),
    "diagonal and product": ("ii,ij->j", (4, 4), (4, 5)),
    "triple letter": ("iii->i", (3, 3, 3)),
    "two pairs": ("ijij->ij", (2, 3, 2, 3)),
    "letter of one operand": ("ij,jk->k", (3, 4), (4, 5)),
    "letters of nobody else": ("ab,cd->ad", (2, 3), (4, 5)),
    "batched": ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    "attention": ("bhtd,bhsd->bhts", (2, 3, 4, 5), (2, 3, 6, 5)),
    "grouped heads": ("bkgtd,bksd->bkgts", (2, 2, 3, 4, 5), (2, 2, 6, 5)),
    "bilinear": ("bi,oij,bj->bo", (3, 4), (2, 4, 5), (3, 5)),
    "three": ("ij,jk,kl->il", (2, 3), (3, 4), (4, 5)),
    "three elementwise": ("i,i,i->i", (4,), (4,), (4,)),
    "four": ("a,b,c,d->abcd", (2,), (3,), (1,), (2,)),
    "ellipsis": ("...ij,...jk->...ik", (2, 3, 4), (2, 4, 5)),
    "ellipsis implicit": ("...ij,...jk", (2, 3, 4), (2, 4, 5)),
    "ellipsis broadcast": ("...ij,...jk->...ik", (2, 1, 3, 4), (5, 4, 2)),
    "ellipsis on one": ("...i,ij->...j", (2, 3, 4), (4, 5)),
    "ellipsis of nothing": ("...i,i...->...", (4,), (4,)),
    "ellipsis in the middle": ("i...j->j...i", (2, 3, 4, 5)),
    "ellipsis summed": ("...i,...i->...", (2, 3), (2, 3)),
    "ellipsis of different length": ("...i,...i->...i", (2, 3, 4), (3, 4)),
    "ellipsis moved": ("...ij->ij...", (2, 3, 4)),
    "size 1 broadcasts": ("ij,ij->ij", (1, 4), (3, 4)),
    "size 1 summed": ("ij,ij->j", (1, 4), (3, 4)),
    "size 1 both": ("ij,ij->", (1, 4), (3, 1)),
    "spaces": (" i j , j k -> i k ", (3, 4), (4, 5)),
    "scalar": (",i->i", (), (4,)),
    "empty": ("ij,jk->ik", (3, 0), (0, 5)),
    "empty batch": ("bi,bi->b", (0, 4), (0, 4)),
    "length 1": ("ij,jk->ik", (1, 1), (1, 1)),
}


@table(EINSUMS)
def test_einsum(case):
    equation, *shapes = case
    check(lambda m, *t: m.einsum(equation, *t), *shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["product", "attention", "diagonal", "three", "ellipsis broadcast"])
def test_einsum_layouts(name, layout):
    equation, *shapes = EINSUMS[name]
    check(lambda m, *t: m.einsum(equation, *t), *shapes, layout=LAYOUTS[layout], single=False)


def test_einsum_same_tensor_twice():
    check(lambda m, x: m.einsum("ij,kj->ik", x, x), (3, 4))
    check(lambda m, x: m.einsum("i,i,i->", x, x, x), (3,))


def test_einsum_mixed_dtypes():
    x = ag.Tensor(rand(3, 4).astype(np.float32), requires_grad=True)
    assert ours.einsum("ij,j->i", x, np.arange(4)).dtype == np.float32
    y = ours.einsum("ij,j->i", x, ag.Tensor(rand(4)))
    assert y.dtype == np.float64 and ag.grad(y.sum(), x)[0].dtype == np.float32


def test_random_einsum():
    """Random equations: 1 to 3 operands, repeated letters, letters left out of the output, sometimes an ellipsis."""
    rng = np.random.default_rng(6)
    sizes = {c: int(rng.integers(1, 4)) for c in "abcde"}
    for _ in range(60):
        operands = ["".join(rng.choice(list("abcde"), rng.integers(0, 4))) for _ in range(rng.integers(1, 4))]
        letters = sorted(set("".join(operands)))
        output = "".join(rng.permutation(letters)[: rng.integers(len(letters) + 1)]) if letters else ""
        shapes = [tuple(sizes[c] for c in subs) for subs in operands]
        if rng.random() < 0.3:
            operands = ["..." + subs for subs in operands]
            shapes = [(2,) * int(rng.integers(2)) + shape for shape in shapes]
            output = "..." + output
        equation = ",".join(operands) + ("->" + output if rng.random() < 0.8 else "")
        check(lambda m, *t, e=equation: m.einsum(e, *t), *shapes, single=False, inplace=False)
