"""scaled_dot_product_attention against torch's plain ("math") attention, and against a few lines of numpy.

Causal, bool, float and learned masks, grouped heads, T != S, rows that may attend to nothing, one tensor as q, k and v.
"""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import autograd as ag
from tests.autograd.helper import INF, LAYOUTS, NAN, check, rand, table, theirs

F = ag.functional


def attend(m, *inputs, **arguments):
    """The only backend of torch whose backward pass can be differentiated again is the plain one."""
    if m is theirs:
        with sdpa_kernel(SDPBackend.MATH):
            return m.scaled_dot_product_attention(*inputs, **arguments)
    return m.scaled_dot_product_attention(*inputs, **arguments)


# query, key, value shapes, keyword arguments
CASES = {
    "plain": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {}),
    "T < S": ((2, 2, 3, 4), (2, 2, 7, 4), (2, 2, 7, 4), {}),
    "T > S": ((2, 2, 7, 4), (2, 2, 3, 4), (2, 2, 3, 4), {}),
    "other value width": ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), {}),
    "causal": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {"is_causal": True}),
    "causal, T < S": ((1, 2, 3, 4), (1, 2, 6, 4), (1, 2, 6, 4), {"is_causal": True}),
    "causal, T > S": ((1, 2, 6, 4), (1, 2, 3, 4), (1, 2, 3, 4), {"is_causal": True}),
    "scale": ((2, 2, 4, 3), (2, 2, 4, 3), (2, 2, 4, 3), {"scale": 0.3}),
    "scale 0": ((2, 2, 4, 3), (2, 2, 4, 3), (2, 2, 4, 3), {"scale": 0.0}),
    "causal scale": ((2, 2, 4, 3), (2, 2, 4, 3), (2, 2, 4, 3), {"scale": 2, "is_causal": True}),
    "one token": ((2, 2, 1, 4), (2, 2, 1, 4), (2, 2, 1, 4), {"is_causal": True}),
    "one key": ((2, 2, 5, 4), (2, 2, 1, 4), (2, 2, 1, 4), {}),
    "one query": ((2, 2, 1, 4), (2, 2, 5, 4), (2, 2, 5, 4), {}),
    "width 1": ((1, 1, 3, 1), (1, 1, 4, 1), (1, 1, 4, 1), {}),
    "no heads": ((2, 5, 4), (2, 5, 4), (2, 5, 4), {"is_causal": True}),
    "no batch": ((5, 4), (3, 4), (3, 2), {}),
    "more dims": ((2, 1, 3, 4, 2), (2, 1, 3, 5, 2), (2, 1, 3, 5, 2), {}),
    "grouped": ((2, 6, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"enable_gqa": True}),
    "grouped causal": ((2, 6, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"enable_gqa": True, "is_causal": True}),
    "multi-query": ((2, 4, 3, 4), (2, 1, 5, 4), (2, 1, 5, 3), {"enable_gqa": True}),
    "grouped in vain": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {"enable_gqa": True, "is_causal": True}),
    "empty batch": ((0, 2, 3, 4), (0, 2, 5, 4), (0, 2, 5, 4), {}),
    "no queries": ((2, 2, 0, 4), (2, 2, 5, 4), (2, 2, 5, 4), {}),
    "grouped, empty batch": ((0, 4, 3, 4), (0, 2, 5, 4), (0, 2, 5, 4), {"enable_gqa": True}),
    "odd": ((1, 3, 17, 13), (1, 3, 19, 13), (1, 3, 19, 11), {"is_causal": True}),
}


@table(CASES)
def test_attention(case):
    *shapes, arguments = case
    check(lambda m, q, k, v: attend(m, q, k, v, **arguments), *shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["causal", "grouped causal", "T < S"])
def test_layouts(name, layout):
    *shapes, arguments = CASES[name]
    check(lambda m, q, k, v: attend(m, q, k, v, **arguments), *shapes, layout=LAYOUTS[layout], single=False)


def test_heads_split_from_one_projection():
    """As in a GPT: q, k and v are transposed views of one tensor."""

    def block(m, x):
        q, k, v = (part.reshape(2, 5, 3, 4).transpose(1, 2) for part in m.split(x, 12, 2))
        return attend(m, q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 12)

    check(block, (2, 5, 36))


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}], ids=str)
def test_one_tensor_in_three_roles(arguments):
    check(lambda m, x: attend(m, x, x, x, **arguments), (2, 3, 5, 4))
    check(lambda m, x, y: attend(m, x, y, y, **arguments), (2, 3, 5, 4), (2, 3, 5, 4))


# -- masks --
BOOLS = rand(2, 3, 4, 5) > -0.3
BOOLS[..., 0] = True
FLOATS = np.where(rand(2, 3, 4, 5, seed=1) > -0.5, rand(2, 3, 4, 5), -INF)
FLOATS[..., 1] = 0.2
MASKS = {
    "bool": BOOLS,
    "bool of queries and keys": BOOLS[0, 0],
    "bool of keys": BOOLS[:, :1, :1],
    "bool per head": BOOLS[:1],
    "bool all": np.ones((4, 5), bool),
    "float": FLOATS,
    "float of queries and keys": FLOATS[0, 0],
    "float per batch": FLOATS[:, :1],
    "float of keys": FLOATS[1, 1, 1],
    "float finite": rand(4, 5),
}


@table(MASKS)
def test_masks(case):
    q, k = (2, 3, 4, 6), (2, 3, 5, 6)
    check(lambda m, q, k, v: attend(m, q, k, v, attn_mask=m.array(case, q)), q, k, k)
    grouped = (2, 1, 5, 6)
    check(lambda m, q, k, v: attend(m, q, k, v, attn_mask=m.array(case, q), enable_gqa=True), q, grouped, grouped)


@pytest.mark.parametrize("name", ["bool", "bool of keys"])
def test_bool_mask_is_an_input(name):
    """The harness overwrites the mask between forward and backward too: an error, not a wrong gradient."""
    check(lambda m, q, k, v, mask: attend(m, q, k, v, mask), (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 6), MASKS[name])


@pytest.mark.parametrize("name", [name for name in MASKS if name.startswith("float")])
def test_learned_mask(name):
    """A float mask with a gradient of its own, 0 where it is -inf; summed to its shape where it broadcasts."""
    shapes = (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 6)
    check(lambda m, q, k, v, mask: attend(m, q, k, v, attn_mask=mask), *shapes, MASKS[name])
    check(lambda m, q, k, v, mask: attend(m, q, k, v, attn_mask=mask, scale=0.5), *shapes, MASKS[name])


def masked_rows(dtype):
    """Query 1 of all heads, and query 3 of one head, may attend to nothing."""
    allowed = BOOLS.copy()
    allowed[:, :, 1] = False
    allowed[0, 2, 3] = False
    return allowed if dtype is bool else np.where(allowed, rand(2, 3, 4, 5), -INF)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "learned", "all"])
def test_rows_that_may_attend_to_nothing(kind, path):
    """Zeros, as in torch, and gradients that are finite, in both paths, and 0 for these queries."""
    mask = np.zeros((4, 5), bool) if kind == "all" else masked_rows(bool if kind == "bool" else float)
    shapes = (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 6)
    q, k, v = (ag.Tensor(rand(*s, seed=i), requires_grad=True) for i, s in enumerate(shapes))
    tensor = ag.Tensor(mask, requires_grad=kind == "learned")
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=tensor)
    expected = attend(
        theirs, *(torch.from_numpy(np.array(t.data)) for t in (q, k, v)), attn_mask=torch.from_numpy(mask)
    )
    np.testing.assert_allclose(y.data, expected.numpy(), rtol=1e-12, atol=1e-12)
    empty = ~(mask if mask.dtype == bool else np.isfinite(mask)).any(-1)
    assert not y.data[np.broadcast_to(empty, (2, 3, 4))].any()
    inputs = [q, k, v, *([tensor] if kind == "learned" else [])]
    gradients = ag.grad((y * y).sum(), inputs, create_graph=path)
    assert all(np.isfinite(g.data).all() for g in gradients)
    assert not gradients[0].data[np.broadcast_to(empty, (2, 3, 4))].any()
    if path:
        second = ag.grad(sum((g * g).sum() for g in gradients), inputs, allow_unused=True)
        assert all(np.isfinite(g.data).all() for g in second if g is not None)


def test_masked_rows_do_not_disturb_the_others():
    """The rows that may attend get the same gradient as without the masked ones."""
    allowed = masked_rows(bool)

    def fn(m, q, k, v):
        y = attend(m, q, k, v, attn_mask=m.array(allowed))
        return y[:, :, [0, 2]]

    check(
        fn,
        (2, 3, 4, 6),
        (2, 3, 5, 6),
        (2, 3, 5, 6),
        reference=lambda m, q, k, v: attend(m, q[:, :, [0, 2]], k, v, attn_mask=m.array(allowed[:, :, [0, 2]])),
    )


def test_no_keys_at_all():
    q, k, v = (ag.Tensor(rand(*s), requires_grad=True) for s in ((2, 3, 4), (2, 0, 4), (2, 0, 5)))
    y = F.scaled_dot_product_attention(q, k, v)
    assert y.shape == (2, 3, 5) and not y.data.any()
    assert not ag.grad(y.sum(), q)[0].data.any()


def test_masks_in_float64_do_not_widen_float32():
    q, k, v = (ag.Tensor(rand(1, 2, 3, 4, seed=i).astype(np.float32), requires_grad=True) for i in range(3))
    for mask in (rand(3, 3), ag.Tensor(rand(3, 3), requires_grad=True), np.ones((3, 3), bool)):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert y.dtype == np.float32
        assert [g.dtype for g in ag.grad(y.sum(), [q, k, v])] == [np.float32] * 3


def test_large_scores_and_special_values():
    """Scores near 1e4 do not overflow; NaN in one query stays in its row."""
    check(lambda m, q, k, v: attend(m, q * 100, k * 100, v), (1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), single=False)
    q = rand(1, 1, 3, 4)
    q[0, 0, 1, 2] = NAN
    check(lambda m, q, k, v: attend(m, q, k, v), q, (1, 1, 5, 4), (1, 1, 5, 4), second=False)


# -- dropout --
def test_dropout_of_the_weights():
    """With the identity as values the output is the weights: kept ones are scaled, and q gets gradients."""
    q, k = (ag.Tensor(rand(1, 1, 60, 4, seed=i), requires_grad=True) for i in range(2))
    v = ag.Tensor(np.eye(60)[None, None])
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ag.manual_seed(1)
    dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)
    kept = (dropped.data != 0) & (plain.data != 0)
    np.testing.assert_allclose(dropped.data[kept], plain.data[kept] / 0.7, rtol=1e-6)
    assert abs(kept.sum() / (plain.data != 0).sum() - 0.7) < 0.05
    assert np.abs(ag.grad(dropped.sum(), q)[0].data).sum() > 0
    ag.manual_seed(1)
    again = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)
    np.testing.assert_array_equal(again.data, dropped.data)
    for arguments in ({"attn_mask": np.ones((60, 60), bool)}, {"attn_mask": np.zeros((60, 60))}, {}):
        nothing = F.scaled_dot_product_attention(q, k, v, dropout_p=1.0, **arguments)
        assert not nothing.data.any()


def test_against_numpy():
    """Independent of torch: row by row."""
    q, k, v = rand(3, 5, 4), rand(3, 6, 4, seed=1), rand(3, 6, 2, seed=2)
    y = F.scaled_dot_product_attention(ag.Tensor(q), ag.Tensor(k), ag.Tensor(v), is_causal=True).data
    for h in range(3):
        for t in range(5):
            weights = np.exp([q[h, t] @ k[h, s] / 2 for s in range(t + 1)])
            np.testing.assert_allclose(y[h, t], weights @ v[h, : t + 1] / weights.sum(), rtol=1e-12)
