"""Norms, dropout and losses against torch, and the fused operations against their own definitions."""

import numpy as np
import pytest
import torch

import autograd as ag
from tests.autograd.helper import INF, LAYOUTS, NAN, check, ours, rand, table

F = ag.functional

# -- norms --
NORM_SHAPES = {
    "2-d": ((3, 5), (5,)),
    "3-d": ((2, 3, 5), (5,)),
    "two dims": ((2, 3, 5), (3, 5)),
    "all dims": ((3, 5), (3, 5)),
    "1-d": ((5,), (5,)),
    "width 1": ((3, 1), (1,)),
    "batch 1": ((1, 7), (7,)),
    "empty batch": ((0, 5), (5,)),
}


@table(NORM_SHAPES)
def test_layer_norm(case):
    shape, normalized = case
    check(lambda m, x: m.layer_norm(x, normalized), shape)
    check(lambda m, x, w: m.layer_norm(x, normalized, w), shape, normalized)
    check(lambda m, x, w, b: m.layer_norm(x, normalized, w, b, eps=0.1), shape, normalized, normalized)
    check(
        lambda m, x, b: m.layer_norm(x, normalized, bias=b),
        shape,
        normalized,
        reference=lambda m, x, b: m.layer_norm(x, normalized) + b,  # torch has no second derivative with a bias alone
    )


@table(NORM_SHAPES)
def test_rms_norm(case):
    shape, normalized = case
    check(lambda m, x: m.rms_norm(x, normalized), shape, single_tolerance=1e-4)
    check(lambda m, x, w: m.rms_norm(x, normalized, w), shape, normalized, single_tolerance=1e-4)
    check(lambda m, x, w: m.rms_norm(x, normalized, weight=w, eps=0.1), shape, normalized)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_layouts(layout):
    layout = LAYOUTS[layout]
    check(lambda m, x, w, b: m.layer_norm(x, (5,), w, b), (2, 3, 5), (5,), (5,), layout=layout, single=False)
    check(lambda m, x, w: m.rms_norm(x, (5,), w), (2, 3, 5), (5,), layout=layout, single=False)


def test_norms_of_special_rows():
    """A constant row, a row of zeros, rows with NaN and inf, a large offset."""
    rows = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1e4, 1e4 + 1, 1e4 - 1, 1e4]])
    check(lambda m, x: m.layer_norm(x, (4,)), rows, single=False, tolerance=1e-8)
    check(lambda m, x: m.rms_norm(x, (4,), eps=1e-6), rows, single=False, tolerance=1e-8)
    special = np.array([[1.0, NAN, 2.0, 3.0], [1.0, INF, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    check(lambda m, x: m.layer_norm(x, (4,)), special, second=False)
    x = ag.Tensor(special, requires_grad=True)
    with np.errstate(all="ignore"):
        y = F.rms_norm(x, (4,))
    np.testing.assert_array_equal(y.data, torch.nn.functional.rms_norm(torch.from_numpy(special), (4,)).numpy())


def test_norms_of_mixed_dtypes():
    x = ag.Tensor(rand(3, 4).astype(np.float32), requires_grad=True)
    w, b = (ag.Tensor(rand(4, seed=i), requires_grad=True) for i in (1, 2))
    for y in (F.layer_norm(x, (4,), w, b), F.rms_norm(x, (4,), w) + b):
        assert y.dtype == np.float64
        for path in (False, True):
            gradients = ag.grad(y.sum(), [x, w, b], create_graph=path, retain_graph=True)
            assert [g.dtype for g in gradients] == [np.float32, np.float64, np.float64]
    assert F.layer_norm(ag.Tensor(np.arange(4)), 4).dtype == np.float32
    assert F.rms_norm(x, 4, np.ones(4, np.float32)).dtype == np.float32


# -- the hand-written first derivative is the derivative of the definition --
FUSED = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (4, 3, 8), (5, 8), (5,)),
    "linear without bias": (lambda x, w: F.linear(x, w), (3, 8), (5, 8)),
    "relu": (lambda x: F.relu(x), (7, 9)),
    "silu": (lambda x: F.silu(x), (7, 9)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), (7, 9)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (9,), w, b), (7, 9), (9,), (9,)),
    "layer_norm bare": (lambda x: F.layer_norm(x, (7, 9)), (7, 9)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (9,), w), (7, 9), (9,)),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)),
    "attention, causal, grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        (2, 4, 5, 4),
        (2, 2, 5, 4),
        (2, 2, 5, 4),
    ),
    "cross_entropy": (lambda x: F.cross_entropy(x, ag.Tensor(np.arange(7) % 3)), (7, 9)),
}


@table(FUSED)
def test_fused_derivative_is_the_definitions(case):
    fn, *shapes = case
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        inputs = [ag.Tensor(rand(*s, seed=i).astype(dtype), requires_grad=True) for i, s in enumerate(shapes)]
        y = fn(*inputs)
        assert y._node.joint is not None  # it is fused indeed
        upstream = ag.Tensor(rand(*y.shape, seed=9).astype(dtype))
        by_hand = ag.grad(y, inputs, upstream, retain_graph=True)
        by_definition = ag.grad(y, inputs, upstream, create_graph=True)
        for a, b in zip(by_hand, by_definition, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype == dtype
            np.testing.assert_allclose(a.data, b.data, rtol=tolerance, atol=tolerance)


@table(FUSED)
def test_fused_with_some_inputs_frozen(case):
    """Only one input wants its gradient: the same numbers as when all do."""
    fn, *shapes = case
    arrays = [rand(*s, seed=i) for i, s in enumerate(shapes)]
    full = [ag.Tensor(a, requires_grad=True) for a in arrays]
    expected = ag.grad(fn(*full).sum(), full)
    for i in range(len(arrays)):
        inputs = [ag.Tensor(a, requires_grad=i == j) for j, a in enumerate(arrays)]
        for path in (False, True):
            (found,) = ag.grad(fn(*inputs).sum(), inputs[i], create_graph=path)
            np.testing.assert_allclose(found.data, expected[i].data, rtol=1e-12, atol=1e-12)


# -- dropout --
def test_dropout_is_seeded():
    x = ag.Tensor(rand(50, 4))
    ag.manual_seed(3)
    first, second = F.dropout(x, 0.4), F.dropout(x, 0.4)
    ag.manual_seed(3)
    np.testing.assert_array_equal(F.dropout(x, 0.4).data, first.data)
    assert not np.array_equal(first.data, second.data)
    ours_twice = [F.dropout(x, 0.4, generator=np.random.default_rng(5)).data for _ in range(2)]
    np.testing.assert_array_equal(*ours_twice)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_gradient_is_the_mask(p, dtype):
    x = ag.Tensor(np.ones((200, 101), dtype), requires_grad=True)
    y = F.dropout(x, p, generator=np.random.default_rng(0))
    assert y.dtype == dtype
    kept = y.data != 0
    np.testing.assert_allclose(y.data[kept], 1 / (1 - p), rtol=1e-6)
    assert abs(kept.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / kept.size)
    assert abs(y.data.mean() - 1) < 5 * np.sqrt(p / (1 - p) / kept.size)
    g = rand(200, 101).astype(dtype)
    for path in (False, True):
        (gradient,) = ag.grad(y, x, ag.Tensor(g), create_graph=path, retain_graph=True)
        np.testing.assert_array_equal(gradient.data, g * y.data)


def test_dropout_at_its_ends():
    x = ag.Tensor(rand(3, 4), requires_grad=True)
    np.testing.assert_array_equal(F.dropout(x, 0.0).data, x.data)
    np.testing.assert_array_equal(F.dropout(x, 0.7, training=False).data, x.data)
    y = F.dropout(x, 1.0)
    assert not y.data.any() and not ag.grad(y.sum(), x)[0].data.any()
    assert F.dropout(ag.Tensor(np.zeros((0, 3))), 0.5).shape == (0, 3)
    assert F.dropout(ag.Tensor(2.0), 0.5).shape == ()


# -- cross entropy and negative log-likelihood --
def targets(*shape, classes=6, ignored=None, seed=0):
    rng = np.random.default_rng(seed)
    index = rng.integers(0, classes, shape)
    return index if ignored is None else np.where(rng.random(shape) < 0.4, ignored, index)


LOSSES = {
    "plain": ((5, 6), targets(5), {}),
    "one row": ((1, 6), targets(1), {}),
    "one class": ((4, 1), targets(4, classes=1), {}),
    "1-d": ((6,), np.array(2), {}),
    "sum": ((5, 6), targets(5), {"reduction": "sum"}),
    "none": ((5, 6), targets(5), {"reduction": "none"}),
    "1-d none": ((6,), np.array(2), {"reduction": "none"}),
    "ignored": ((9, 6), targets(9, ignored=-100), {}),
    "ignored sum": ((9, 6), targets(9, ignored=-100), {"reduction": "sum"}),
    "ignored none": ((9, 6), targets(9, ignored=-100), {"reduction": "none"}),
    "ignored class": ((9, 6), targets(9), {"ignore_index": 2}),
    "ignored negative": ((9, 6), targets(9, ignored=-1), {"ignore_index": -1}),
    "nothing to ignore": ((5, 6), targets(5), {"ignore_index": -1}),
    "3-d": ((2, 6, 4), targets(2, 4), {}),
    "4-d": ((2, 6, 3, 2), targets(2, 3, 2), {}),
    "4-d ignored none": ((2, 6, 3, 2), targets(2, 3, 2, ignored=-100), {"reduction": "none"}),
    "4-d ignored": ((2, 6, 3, 2), targets(2, 3, 2, ignored=-100), {}),
    "many rows": ((50, 17), targets(50, classes=17), {}),
}


@table(LOSSES)
def test_cross_entropy(case):
    shape, target, arguments = case
    check(lambda m, x, t: m.cross_entropy(x, t, **arguments), shape, target)
    for smoothing in (0.1, 1.0):
        check(lambda m, x, t, s=smoothing: m.cross_entropy(x, t, label_smoothing=s, **arguments), shape, target)


@table(LOSSES)
def test_nll_loss(case):
    shape, target, arguments = case
    check(lambda m, x, t: m.nll_loss(x, t, **arguments), shape, target)
    dim = 0 if len(shape) == 1 else 1
    check(lambda m, x, t: m.nll_loss(m.log_softmax(x, dim), t, **arguments), shape, target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_layouts(layout):
    check(lambda m, x, t: m.cross_entropy(x, t), (5, 6), targets(5), layout=LAYOUTS[layout], single=False)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_extreme_logits(reduction):
    x = np.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [800.0, 799.0, -800.0]])
    t = np.array([0, 1, 2, 1])
    check(lambda m, x, t: m.cross_entropy(x, t, reduction=reduction), x, t)
    check(lambda m, x, t: m.cross_entropy(x, t, reduction=reduction, label_smoothing=0.2), x, t, single_tolerance=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"reduction": "none"}], ids=str)
def test_cross_entropy_special_logits(arguments):
    """-inf on another class is a class that cannot be; -inf on the target an infinite loss; NaN stays NaN."""
    x = np.array([[1.0, -INF, 2.0], [0.5, 1.0, -INF], [0.0, 0.0, 0.0]])
    check(lambda m, x, t: m.cross_entropy(x, t, **arguments), x, np.array([0, 1, 2]), second=False)
    check(lambda m, x, t: m.cross_entropy(x, t, **arguments), x, np.array([1, 1, 2]), second=False, single=False)
    x[1, 1] = NAN
    check(lambda m, x, t: m.cross_entropy(x, t, **arguments), x, np.array([0, 1, 2]), second=False, single=False)


@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss"])
def test_nothing_counts(loss):
    """All targets ignored, or no rows at all: the mean is NaN, the sum 0, as in torch."""
    for shape, target in (((3, 6), np.full(3, -100)), ((0, 6), np.zeros(0, np.int64))):
        for reduction in ("mean", "sum", "none"):
            check(
                lambda m, x, t, r=reduction: getattr(m, loss)(x, t, reduction=r),
                shape,
                target,
                second=reduction != "mean",
            )


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_cross_entropy_target_dtypes(dtype):
    x = ag.Tensor(rand(5, 6))
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(rand(5, 6)), torch.from_numpy(targets(5)))
    for target in (targets(5).astype(dtype), ag.Tensor(targets(5).astype(dtype)), targets(5).tolist()):
        assert abs(F.cross_entropy(x, target).item() - expected.item()) < 1e-12


# -- mean squared error, binary cross entropy --
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_loss(reduction):
    for shape in ((3, 4), (), (1,), (2, 0), (2, 3, 1)):
        second = not (reduction == "mean" and 0 in shape)
        check(lambda m, x, y: m.mse_loss(x, y, reduction=reduction), shape, shape, second=second)
    check(lambda m, x, y: m.mse_loss(x, y, reduction=reduction), np.array([NAN, INF, 1.0]), np.zeros(3), second=False)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_cross_entropy_with_logits(reduction):
    def loss(m, x, t):
        return m.binary_cross_entropy_with_logits(x, t, reduction=reduction)

    for shape in ((3, 4), (), (1,), (2, 0)):
        second = not (reduction == "mean" and 0 in shape)
        check(loss, rand(*shape) * 3, rand(*shape, seed=1, low=0, high=1), second=second)


def test_binary_cross_entropy_large_and_zero_logits():
    """No overflow, and at exactly 0 the derivative 1/2 - t: a formula with |x| has a kink there."""
    x = np.array([0.0, 0.0, -0.0, 40.0, -40.0, 40.0, -40.0, 1e4, -1e4, 1e4, -1e4, 700.0, -700.0])
    t = np.array([0.0, 1.0, 0.3, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.5])
    check(lambda m, x, t: m.binary_cross_entropy_with_logits(x, t, reduction="none"), x, t)
    check(lambda m, x, t: m.binary_cross_entropy_with_logits(x, t), x, t)
    special = np.array([INF, -INF, NAN, INF, -INF])
    target = np.array([1.0, 0.0, 0.0, 0.0, 1.0])
    with np.errstate(all="ignore"):
        y = ours.binary_cross_entropy_with_logits(ag.Tensor(special), ag.Tensor(target), reduction="none")
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(special), torch.from_numpy(target), reduction="none"
    )
    np.testing.assert_array_equal(y.data, expected.numpy())
