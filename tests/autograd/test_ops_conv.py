"""Convolution and pooling against torch.

Strides, padding, dilation, groups, odd sizes, single pixels, empty batches, ties, NaN and inf.
"""

import numpy as np
import pytest

import autograd as ag
from tests.autograd.helper import INF, LAYOUTS, NAN, check, ours, rand, table

# input shape, weight shape, keyword arguments
CONVS = {
    "plain": ((2, 3, 7, 6), (4, 3, 3, 3), {}),
    "stride": ((2, 3, 8, 7), (4, 3, 3, 3), {"stride": 2}),
    "stride pair": ((1, 2, 9, 8), (3, 2, 3, 2), {"stride": (3, 2)}),
    "padding": ((2, 3, 5, 5), (4, 3, 3, 3), {"padding": 1}),
    "padding pair": ((2, 1, 4, 5), (2, 1, 3, 2), {"padding": (2, 0)}),
    "padding larger than kernel": ((1, 1, 2, 2), (1, 1, 1, 2), {"padding": 3}),
    "dilation": ((2, 2, 7, 9), (3, 2, 3, 3), {"dilation": 2}),
    "dilation pair": ((1, 2, 7, 9), (3, 2, 2, 3), {"dilation": (3, 2), "padding": (1, 2)}),
    "everything": ((2, 4, 9, 11), (6, 2, 3, 2), {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "groups": 2}),
    "groups": ((2, 6, 5, 5), (4, 3, 3, 3), {"groups": 2}),
    "depthwise": ((2, 3, 5, 5), (3, 1, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise multiplied": ((2, 2, 4, 5), (6, 1, 2, 3), {"groups": 2}),
    "1x1": ((2, 3, 4, 5), (5, 3, 1, 1), {}),
    "1x1, one image": ((1, 3, 4, 5), (2, 3, 1, 1), {}),
    "1x1 stride": ((1, 3, 5, 5), (2, 3, 1, 1), {"stride": 2}),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "whole image": ((3, 2, 4, 5), (2, 2, 4, 5), {}),
    "odd kernel": ((2, 1, 11, 3), (1, 1, 5, 1), {"stride": (4, 1), "padding": (2, 0)}),
    "stride leaves a rest": ((1, 1, 6, 6), (1, 1, 3, 3), {"stride": 2}),
    "empty batch": ((0, 3, 5, 5), (4, 3, 3, 3), {"padding": 1}),
}


@table(CONVS)
def test_conv2d(case):
    x, weight, arguments = case
    check(lambda m, x, w: m.conv2d(x, w, **arguments), x, weight)
    check(lambda m, x, w, b: m.conv2d(x, w, b, **arguments), x, weight, weight[:1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["everything", "1x1, one image", "depthwise"])
def test_conv2d_layouts(name, layout):
    x, weight, arguments = CONVS[name]
    check(
        lambda m, x, w, b: m.conv2d(x, w, b, **arguments), x, weight, weight[:1], layout=LAYOUTS[layout], single=False
    )


def test_conv2d_broadcast_view():
    x = np.repeat(rand(1, 2, 4, 4), 3, 0)
    w = rand(2, 2, 3, 3)
    check(lambda m, x: m.conv2d(x, m.array(w, x)), x, layout=lambda a: np.broadcast_to(a[:1], a.shape))


def test_conv2d_partly_frozen_and_special_values():
    x, w = rand(2, 2, 4, 4), rand(3, 2, 3, 3)
    check(lambda m, w: m.conv2d(m.array(x, w), w), w)
    check(lambda m, x: m.conv2d(x, m.array(w, x), padding=1), x)
    x[0, 0, 1, 1], x[1, 1, 3, 3] = NAN, INF
    check(lambda m, x, w: m.conv2d(x, w), x, w, second=False, single=False)


def test_random_convolutions():
    rng = np.random.default_rng(8)
    for _ in range(25):
        groups, per_group, out = (int(n) for n in rng.integers(1, 4, 3))
        kernel, stride, padding, dilation = (tuple(int(n) for n in rng.integers(low, 4, 2)) for low in (1, 1, 0, 1))
        size = [
            max(1, d * (k - 1) + 1 - 2 * p) + int(rng.integers(4))
            for k, p, d in zip(kernel, padding, dilation, strict=True)
        ]
        arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x, weight = (int(rng.integers(1, 3)), groups * per_group, *size), (groups * out, per_group, *kernel)
        check(
            lambda m, x, w, b, a=arguments: m.conv2d(x, w, b, **a), x, weight, weight[:1], single=False, inplace=False
        )


# -- pooling --
POOLS = {
    "plain": ((2, 3, 6, 8), (2,), {}),
    "odd": ((2, 3, 7, 5), (2,), {}),
    "pair": ((1, 2, 7, 9), ((3, 2),), {}),
    "overlapping": ((2, 2, 7, 7), (3,), {"stride": 2}),
    "dense": ((1, 1, 4, 5), (3,), {"stride": 1}),
    "apart": ((1, 2, 9, 9), (2,), {"stride": (3, 4)}),
    "padding": ((2, 2, 5, 6), (3,), {"stride": 2, "padding": 1}),
    "padding pair": ((1, 2, 5, 6), ((4, 2),), {"stride": (1, 2), "padding": (2, 1)}),
    "kernel 1": ((2, 1, 3, 3), (1,), {}),
    "kernel 1, one image": ((1, 1, 3, 3), (1,), {"stride": 2}),
    "one pixel": ((1, 1, 1, 1), (1,), {}),
    "whole image": ((2, 2, 3, 4), ((3, 4),), {}),
    "empty batch": ((0, 2, 4, 4), (2,), {}),
}


@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
@table(POOLS)
def test_pooling(case, op):
    shape, arguments, keywords = case
    check(lambda m, x: getattr(m, op)(x, *arguments, **keywords), shape)
    check(lambda m, x: getattr(m, op)(x * x, *arguments, **keywords), shape, single=False)


@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_layouts(op, layout):
    check(lambda m, x: getattr(m, op)(x, 3, 2, 1), (2, 2, 5, 7), layout=LAYOUTS[layout], single=False)


def test_max_pool_ties_and_special_values():
    """Among equals the first of the window gets the gradient; NaN wins; -inf loses against nothing but padding."""
    ties = rand(2, 2, 6, 6).round()
    check(lambda m, x: m.max_pool2d(x, 2), ties)
    check(lambda m, x: m.max_pool2d(x, 3, 2, 1), ties)
    check(lambda m, x: m.max_pool2d(x, 2, 1), np.zeros((1, 1, 4, 4)))
    special = rand(1, 1, 6, 6)
    special[0, 0, 1, 1], special[0, 0, 4, 5], special[0, 0, 0, 5] = NAN, INF, -INF
    check(lambda m, x: m.max_pool2d(x, 2), special, second=False)
    check(lambda m, x: m.avg_pool2d(x, 2), special, second=False)


def test_pooling_of_integers_gives_floats():
    x = ag.Tensor(np.arange(16).reshape(1, 1, 4, 4))
    assert ours.max_pool2d(x, 2, padding=1, stride=2).tolist() == [[[[0, 2, 3], [8, 10, 11], [12, 14, 15]]]]
    assert ours.avg_pool2d(x, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_a_network_of_all():
    """Convolution, activation, pooling and convolution again: gradients through the whole chain, to second order."""

    def network(m, x, w1, b1, w2):
        h = m.max_pool2d(m.tanh(m.conv2d(x, w1, b1, padding=1)), 2)
        return m.avg_pool2d(m.conv2d(h, w2, stride=2, padding=1), 2)

    check(network, (2, 1, 8, 8), (3, 1, 3, 3), (3,), (2, 3, 3, 3))
