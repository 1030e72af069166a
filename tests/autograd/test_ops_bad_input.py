"""Wrong input of every operation: ValueError (IndexError for positions) that names the operation and what it was given.

Each row is a call, and words that the message must have, in this order.
"""

import re

import numpy as np
import pytest

import autograd as ag
from tests.autograd.helper import ours as m
from tests.autograd.helper import table


def t(*shape, dtype=np.float64):
    return ag.Tensor(np.zeros(shape, dtype), requires_grad=dtype is np.float64)


def i(*values):
    return ag.Tensor(np.array(values, np.int64))


# Two shapes that do not fit together: the message names the operation and both.
SHAPES = {
    "add": lambda: t(2, 3) + t(4),
    "sub": lambda: t(2, 3) - t(2),
    "mul": lambda: t(2, 3) * t(3, 2),
    "div": lambda: t(2, 3) / t(2, 2),
    "pow": lambda: t(2, 3) ** t(5),
    "maximum": lambda: m.maximum(t(2, 3), t(4)),
    "minimum": lambda: m.minimum(t(2, 3), t(4)),
    "eq": lambda: t(2, 3) == t(4),
    "lt": lambda: t(2, 3) < t(4),
    "where": lambda: m.where(np.ones((2, 3), bool), t(4), 0.0),
    "masked_fill": lambda: t(2, 3).masked_fill(np.ones(4, bool), 0.0),
    "matmul": lambda: t(2, 3) @ t(2, 3),
    "matmul, vectors": lambda: t(3) @ t(2),
    "matmul, batches": lambda: t(2, 3, 4) @ t(5, 4, 2),
    "matmul, 0-d": lambda: t(2, 3) @ t(),
    "linear": lambda: m.linear(t(2, 3), t(4, 2)),
    "linear, bias": lambda: m.linear(t(2, 3), t(4, 3), t(3)),
    "einsum": lambda: m.einsum("ij,jk->ik", t(2, 3), t(4, 5)),
    "conv2d": lambda: m.conv2d(t(1, 3, 5, 5), t(2, 2, 3, 3)),
    "conv2d, 3-d": lambda: m.conv2d(t(3, 5, 5), t(2, 3, 3, 3)),
    "conv2d, bias": lambda: m.conv2d(t(1, 3, 5, 5), t(2, 3, 3, 3), t(1)),
    "cat": lambda: m.cat([t(2, 3), t(2, 4)]),
    "cat, ranks": lambda: m.cat([t(2, 3), t(3)]),
    "stack": lambda: m.stack([t(2, 3), t(3, 2)]),
    "reshape": lambda: t(2, 3).reshape(4, 2),
    "reshape, -1": lambda: t(2, 3).reshape(-1, 4),
    "expand": lambda: t(2, 3).expand(4, 3),
    "expand, fewer": lambda: t(2, 3).expand(3),
    "layer_norm": lambda: m.layer_norm(t(2, 3), (4,)),
    "layer_norm, weight": lambda: m.layer_norm(t(2, 3), (3,), t(2)),
    "layer_norm, bias": lambda: m.layer_norm(t(2, 3), (3,), t(3), t(1)),
    "rms_norm": lambda: m.rms_norm(t(2, 3), (2,)),
    "rms_norm, weight": lambda: m.rms_norm(t(2, 3), (3,), t(1)),
    "attention": lambda: m.scaled_dot_product_attention(t(1, 2, 3, 4), t(1, 2, 3, 5), t(1, 2, 3, 4)),
    "attention, values": lambda: m.scaled_dot_product_attention(t(1, 2, 3, 4), t(1, 2, 3, 4), t(1, 2, 4, 4)),
    "attention, heads": lambda: m.scaled_dot_product_attention(t(1, 4, 3, 4), t(1, 2, 3, 4), t(1, 2, 3, 4)),
    "attention, batch": lambda: m.scaled_dot_product_attention(t(2, 2, 3, 4), t(3, 2, 3, 4), t(3, 2, 3, 4)),
    "attention, ranks": lambda: m.scaled_dot_product_attention(t(2, 3, 4), t(3, 4), t(3, 4)),
    "attention, mask": lambda: m.scaled_dot_product_attention(
        t(2, 3, 4), t(2, 5, 4), t(2, 5, 4), np.ones((5, 3), bool)
    ),
    "cross_entropy": lambda: m.cross_entropy(t(2, 3), i(0, 1, 2)),
    "cross_entropy, 3-d": lambda: m.cross_entropy(t(2, 3, 4), i(0, 1)),
    "cross_entropy, 1-d": lambda: m.cross_entropy(t(3), i(0, 1)),
    "nll_loss": lambda: m.nll_loss(t(2, 3), i(0)),
    "mse_loss": lambda: m.mse_loss(t(2, 3), t(3)),
    "binary_cross_entropy_with_logits": lambda: m.binary_cross_entropy_with_logits(t(2, 3), t(2, 1)),
    "gather": lambda: t(2, 3).gather(0, i(1)),
    "scatter_add": lambda: t(2, 3).scatter_add(0, ag.Tensor(np.zeros((2, 3), np.int64)), t(1, 3)),
    "diagonal": lambda: m.einsum("ii->i", t(2, 3)),
}
SECOND = {  # what the message has as the second shape, where it is not simply the shapes of two tensors
    "where": "(4,)",
    "masked_fill": "(4,)",
    "matmul, 0-d": "()",
    "linear, bias": "(3,)",
    "reshape": "(4, 2)",
    "reshape, -1": "(-1, 4)",
    "expand": "(4, 3)",
    "expand, fewer": "(3,)",
    "layer_norm": "(2, 3)",
    "rms_norm": "(2, 3)",
    "attention, mask": "(5, 3)",
    "diagonal": "(2, 3)",
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_do_not_fit(name):
    with pytest.raises(ValueError) as error:
        SHAPES[name]()
    message = str(error.value)
    assert message.startswith(name.split(",")[0]), message
    assert "\n" not in message
    assert len(re.findall(r"\([-\d, ]*\)", message)) >= (1 if name == "diagonal" else 2), f"both shapes: {message}"
    assert SECOND.get(name, "(") in message, message


# call, words of the message
VALUES = {
    "sum dim": (lambda: t(2, 3).sum(2), "sum: dim 2", "(2, 3)", "-2 to 1"),
    "sum dim negative": (lambda: t(2, 3).sum(-3), "sum: dim -3", "(2, 3)"),
    "sum dims": (lambda: t(2, 3).sum((0, 5)), "sum: dim 5"),
    "sum duplicate": (lambda: t(2, 3).sum((0, -2)), "sum", "twice"),
    "mean dim": (lambda: t(2, 3).mean(2), "mean: dim 2"),
    "var dim": (lambda: t(2, 3).var(2), "var: dim 2"),
    "prod dim": (lambda: t(2, 3).prod(2), "prod: dim 2"),
    "0-d dim": (lambda: t().sum(1), "sum: dim 1", "()"),
    "amax dim": (lambda: t(2, 3).amax(2), "amax: dim 2"),
    "amax duplicate": (lambda: t(2, 3).amax((1, 1)), "amax", "twice"),
    "amax of nothing": (lambda: t(0, 3).amax(0), "amax", "(0, 3)", "at least one element"),
    "max of nothing": (lambda: t(0, 3).max(), "max", "(0, 3)"),
    "max dim": (lambda: t(2, 3).max(2), "max: dim 2"),
    "max dims": (lambda: t(2, 3).max((0, 1)), "max: dim (0, 1)", "one int"),
    "min of nothing": (lambda: t(2, 0).min(1), "min", "(2, 0)"),
    "argmax dim": (lambda: t(2, 3).argmax(-3), "argmax: dim -3"),
    "argmax dims": (lambda: t(2, 3).argmax((0, 1)), "argmax: dim (0, 1)", "one int"),
    "argmin of nothing": (lambda: t(0).argmin(), "argmin", "(0,)"),
    "logsumexp dim": (lambda: m.logsumexp(t(2, 3), 2), "logsumexp: dim 2"),
    "softmax dim": (lambda: m.softmax(t(2, 3), 2), "softmax: dim 2", "(2, 3)"),
    "softmax dims": (lambda: m.softmax(t(2, 3), (0, 1)), "softmax: dim (0, 1)", "one int"),
    "log_softmax dim": (lambda: m.log_softmax(t(2, 3), -3), "log_softmax: dim -3"),
    "log_softmax None": (lambda: m.log_softmax(t(2, 3), None), "log_softmax: dim None"),
    "cumsum dim": (lambda: m.cumsum(t(2, 3), 2), "cumsum: dim 2"),
    "permute dim": (lambda: t(2, 3).permute(0, 2), "permute: dim 2"),
    "permute few": (lambda: t(2, 3).permute(0), "permute", "(2, 3)", "2 dims"),
    "permute duplicate": (lambda: t(2, 3).permute(0, 0), "permute", "twice"),
    "transpose dim": (lambda: t(2, 3).transpose(0, 2), "transpose: dim 2"),
    "mT of a vector": (lambda: t(3).mT, "transpose", "(3,)"),
    "squeeze dim": (lambda: t(2, 3).squeeze(2), "squeeze: dim 2"),
    "unsqueeze dim": (lambda: t(2, 3).unsqueeze(3), "unsqueeze: dim 3", "-3 to 2"),
    "flip dim": (lambda: t(2, 3).flip(2), "flip: dim 2"),
    "flip duplicate": (lambda: t(2, 3).flip(0, 0), "flip", "twice"),
    "roll dim": (lambda: m.roll(t(2, 3), 1, 2), "roll: dim 2"),
    "roll numbers": (lambda: m.roll(t(2, 3), (1, 2), 0), "roll: 2 shifts for 1 dims"),
    "roll without dims": (lambda: m.roll(t(2, 3), (1, 2)), "roll: 2 shifts"),
    "pad odd": (lambda: m.pad(t(2, 3), (1, 2, 3)), "pad: (1, 2, 3)", "(2, 3)"),
    "pad many": (lambda: m.pad(t(2, 3), (1,) * 6), "pad: (1, 1, 1, 1, 1, 1)", "(2, 3)"),
    "pad mode": (lambda: m.pad(t(2, 3), (1, 1), "reflect"), "pad: mode 'reflect'", "'constant'"),
    "pad cuts all": (lambda: m.pad(t(2, 3), (-2, -2)), "pad: (-2, -2)", "(2, 3)"),
    "pad cuts and grows": (lambda: m.pad(t(2, 3), (-5, 4)), "pad: (-5, 4)", "(2, 3)"),
    "flatten dim": (lambda: m.flatten(t(2, 3), 2), "flatten: dim 2"),
    "flatten backwards": (lambda: m.flatten(t(2, 3, 4), 2, 1), "flatten: start_dim 2", "end_dim 1"),
    "cat nothing": (lambda: m.cat([]), "cat", "at least one"),
    "cat dim": (lambda: m.cat([t(2), t(2)], 1), "cat: dim 1"),
    "cat 0-d": (lambda: m.cat([t(), t()]), "cat", "without dimensions"),
    "stack nothing": (lambda: m.stack([]), "stack", "one or more"),
    "split dim": (lambda: m.split(t(2, 3), 1, 2), "split: dim 2"),
    "split size": (lambda: m.split(t(4), 0), "split: split_size 0"),
    "split sizes": (lambda: m.split(t(4), [1, 2]), "split: sizes [1, 2]", "4"),
    "split negative": (lambda: m.split(t(4), [5, -1]), "split: sizes [5, -1]"),
    "split 0-d": (lambda: m.split(t(), 1), "split", "without dimensions"),
    "chunk number": (lambda: m.chunk(t(4), 0), "chunk: chunks 0"),
    "tril of a vector": (lambda: m.tril(t(3)), "tril", "(3,)", "two dimensions"),
    "triu of a vector": (lambda: m.triu(t(3)), "triu", "(3,)"),
    "repeat few": (lambda: t(2, 3).repeat(2), "repeat: (2,)", "(2, 3)"),
    "repeat negative": (lambda: t(2, 3).repeat(2, -1), "repeat: (2, -1)"),
    "where condition": (lambda: m.where(t(2), t(2), t(2)), "where", "float64", "bool"),
    "masked_fill condition": (lambda: t(2).masked_fill(i(0, 1), 0.0), "masked_fill", "int64", "bool"),
    "clamp nothing": (lambda: m.clamp(t(2)), "clamp", "min, max or both"),
    "clamp tensor": (lambda: m.clamp(t(2), min=t(2)), "clamp", "minimum and maximum"),
    "gelu": (lambda: m.gelu(t(2), approximate="erf"), "gelu", "'erf'", "'none' or 'tanh'"),
    "dropout": (lambda: m.dropout(t(2), 1.5), "dropout: p 1.5"),
    "dropout NaN": (lambda: m.dropout(t(2), float("nan")), "dropout: p nan"),
    "linear weight": (lambda: m.linear(t(2, 3), t(3)), "linear", "(2, 3)", "(3,)"),
    "einsum operands": (lambda: m.einsum("ij,jk->ik", t(2, 3)), "einsum 'ij,jk->ik'", "2 operands", "1 given"),
    "einsum dims": (lambda: m.einsum("ijk->ik", t(2, 3)), "einsum 'ijk->ik'", "(2, 3)"),
    "einsum few letters": (lambda: m.einsum("i->i", t(2, 3)), "einsum 'i->i'", "(2, 3)"),
    "einsum unknown letter": (lambda: m.einsum("ij->ik", t(2, 3)), "einsum 'ij->ik'", "no operand has"),
    "einsum repeated output": (lambda: m.einsum("ij->ii", t(2, 3)), "einsum 'ij->ii'", "repeats"),
    "einsum ellipsis": (lambda: m.einsum("...i,...i->...i", t(2, 3), t(4, 3)), "einsum", "(2, 3)", "(4, 3)"),
    "einsum symbols": (lambda: m.einsum("i1->i", t(2, 3)), "einsum 'i1->i'", "1", "letters"),
    "einsum two ellipses": (lambda: m.einsum("...i...->i", t(2, 3)), "einsum", "one '...'"),
    "einsum two arrows": (lambda: m.einsum("i->j->i", t(2)), "einsum", "letters"),
    "conv2d groups": (lambda: m.conv2d(t(1, 4, 5, 5), t(3, 2, 3, 3), groups=2), "conv2d", "groups 2"),
    "conv2d no groups": (lambda: m.conv2d(t(1, 4, 5, 5), t(3, 2, 3, 3), groups=0), "conv2d", "groups 0"),
    "conv2d stride": (lambda: m.conv2d(t(1, 1, 5, 5), t(1, 1, 3, 3), stride=0), "stride 0", "at least 1"),
    "conv2d padding": (lambda: m.conv2d(t(1, 1, 5, 5), t(1, 1, 3, 3), padding=-1), "padding -1"),
    "conv2d padding name": (lambda: m.conv2d(t(1, 1, 5, 5), t(1, 1, 3, 3), padding="same"), "padding 'same'"),
    "conv2d dilation": (lambda: m.conv2d(t(1, 1, 5, 5), t(1, 1, 3, 3), dilation=(1, 0)), "dilation (1, 0)"),
    "conv2d kernel": (lambda: m.conv2d(t(1, 1, 2, 5), t(1, 1, 3, 3)), "conv2d: kernel (3, 3)", "(2, 5)"),
    "max_pool2d kernel": (lambda: m.max_pool2d(t(1, 1, 2, 2), 3), "max_pool2d: kernel (3, 3)", "(2, 2)"),
    "max_pool2d dims": (lambda: m.max_pool2d(t(2, 2), 2), "max_pool2d", "(2, 2)"),
    "max_pool2d padding": (lambda: m.max_pool2d(t(1, 1, 4, 4), 2, padding=2), "max_pool2d: padding (2, 2)"),
    "avg_pool2d stride": (lambda: m.avg_pool2d(t(1, 1, 4, 4), 2, stride=0), "stride 0"),
    "layer_norm shape": (lambda: m.layer_norm(t(2, 3), ()), "layer_norm", "(2, 3)"),
    "rms_norm shape": (lambda: m.rms_norm(t(3), (1, 3)), "rms_norm", "(1, 3)", "(3,)"),
    "attention two masks": (
        lambda: m.scaled_dot_product_attention(t(2, 3), t(2, 3), t(2, 3), np.ones((2, 2), bool), is_causal=True),
        "attention",
        "is_causal",
    ),
    "attention mask dtype": (
        lambda: m.scaled_dot_product_attention(t(2, 3), t(2, 3), t(2, 3), np.ones((2, 2), np.int64)),
        "attention: attn_mask",
        "int64",
    ),
    "attention mask rank": (
        lambda: m.scaled_dot_product_attention(t(2, 3), t(2, 3), t(2, 3), np.ones((1, 2, 2), bool)),
        "attention: attn_mask (1, 2, 2)",
    ),
    "attention heads": (
        lambda: m.scaled_dot_product_attention(t(1, 3, 4, 2), t(1, 2, 4, 2), t(1, 2, 4, 2), enable_gqa=True),
        "attention",
        "head counts",
    ),
    "attention dropout": (
        lambda: m.scaled_dot_product_attention(t(2, 3), t(2, 3), t(2, 3), dropout_p=-0.1),
        "dropout: p -0.1",
    ),
    "cross_entropy class": (lambda: m.cross_entropy(t(2, 3), i(0, 3)), "cross_entropy", "0 to 2"),
    "cross_entropy negative": (lambda: m.cross_entropy(t(2, 3), i(0, -1)), "cross_entropy", "0 to 2", "-100"),
    "cross_entropy dtype": (lambda: m.cross_entropy(t(2, 3), t(2)), "cross_entropy", "float64", "integers"),
    "cross_entropy reduction": (lambda: m.cross_entropy(t(2, 3), i(0, 1), reduction="avg"), "'avg'", "'mean'"),
    "cross_entropy smoothing": (
        lambda: m.cross_entropy(t(2, 3), i(0, 1), label_smoothing=-0.1),
        "label_smoothing -0.1",
    ),
    "cross_entropy 0-d": (lambda: m.cross_entropy(t(), i()), "cross_entropy"),
    "nll_loss class": (lambda: m.nll_loss(t(2, 3), i(0, 3)), "nll_loss", "0 to 2"),
    "nll_loss dtype": (lambda: m.nll_loss(t(2, 3), t(2)), "nll_loss", "float64"),
    "nll_loss reduction": (lambda: m.nll_loss(t(2, 3), i(0, 1), reduction=None), "nll_loss: reduction None"),
    "mse_loss reduction": (lambda: m.mse_loss(t(2), t(2), reduction="max"), "mse_loss: reduction 'max'"),
    "bce reduction": (lambda: m.binary_cross_entropy_with_logits(t(2), t(2), reduction="x"), "reduction 'x'"),
    "one_hot class": (lambda: m.one_hot(i(0, 3), 3), "one_hot", "0 to 2"),
    "gather dtype": (lambda: t(2, 3).gather(0, t(2, 3)), "gather", "float64", "integers"),
    "gather range": (lambda: t(2, 3).gather(1, i([3], [0])), "gather", "0 to 3", "3"),
    "gather negative": (lambda: t(2, 3).gather(1, i([-1], [0])), "gather", "-1 to 0"),
    "gather dim": (lambda: t(2, 3).gather(2, i([0])), "gather: dim 2"),
    "gather larger": (lambda: t(2, 3).gather(0, i([0, 0, 0, 0])), "gather", "(1, 4)", "(2, 3)"),
    "gather 0-d": (lambda: t().gather(0, ag.Tensor(np.array(0))), "gather", "without dimensions"),
    "scatter_add range": (lambda: t(2, 3).scatter_add(0, i([2]), t(1, 1)), "scatter_add", "2"),
    "scatter_add dtype": (lambda: t(3).scatter_add(0, t(3), t(3)), "scatter_add", "float64"),
    "index_select dtype": (lambda: t(2, 3).index_select(0, t(2)), "index_select", "float64"),
    "index_select dims": (lambda: t(2, 3).index_select(0, i([0], [1])), "index_select", "(2, 1)"),
    "index_select range": (lambda: t(2, 3).index_select(1, i(0, 3)), "index_select", "0 to 3", "0 to 2"),
    "index_select negative": (lambda: t(2, 3).index_select(1, i(-1)), "index_select", "-1"),
    "index_select dim": (lambda: t(2, 3).index_select(2, i(0)), "index_select: dim 2"),
    "embedding range": (lambda: m.embedding(i(0, 4), t(4, 2)), "embedding", "0 to 4", "0 to 3"),
    "embedding negative": (lambda: m.embedding(i(-1), t(4, 2)), "embedding", "-1"),
    "embedding dtype": (lambda: m.embedding(t(2), t(4, 2)), "embedding", "float64"),
    "embedding weight": (lambda: m.embedding(i(0), t(4)), "embedding", "(4,)"),
    "index by floats": (lambda: t(2, 3)[t(2)], "index", "float64", "integers or bools"),
    "index by a float": (lambda: t(2, 3)[1.0], "index", "integers or bools"),
    "index by a list of floats": (lambda: t(2, 3)[:, [0.5]], "index", "float64"),
    "cast": (lambda: t(2).to(np.float16), "cast", "float16", "float32"),
    "cast of integers": (lambda: i(2).to(np.complex64), "cast", "complex64"),
    "item": (lambda: t(2).item(), "item", "(2,)"),
}


@table(VALUES)
def test_bad_values(case):
    call, *words = case
    with pytest.raises(ValueError, match=".*".join(re.escape(word) for word in words)) as error:
        call()
    assert "\n" not in str(error.value)


POSITIONS = {
    "int": lambda: t(2, 3)[2],
    "negative int": lambda: t(2, 3)[0, -4],
    "too many": lambda: t(2, 3)[0, 0, 0],
    "array": lambda: t(2, 3)[i(0, 2)],
    "array behind slice": lambda: t(2, 3)[:, i(-4)],
    "mask": lambda: t(2, 3)[np.array([True, False, True])],
    "mask of another shape": lambda: t(2, 3)[np.ones((3, 2), bool)],
    "arrays that do not broadcast": lambda: t(2, 3)[i(0, 1), i(0, 1, 2)],
    "0-d": lambda: t()[0],
    "empty": lambda: t(0, 3)[0],
}


@table(POSITIONS)
def test_positions_out_of_range(case):
    with pytest.raises(IndexError, match=r"index into a tensor of shape \("):
        case()


def test_setitem():
    x = t(2, 3) * 1
    for index, value in ((0, t(4)), (slice(None), t(3, 3)), (i(0, 1), t(2, 2))):
        with pytest.raises(ValueError, match=r"setitem.*\(\d"):
            x[index] = value
        with ag.no_grad(), pytest.raises(ValueError, match=r"setitem.*\(\d"):
            x[index] = value
    for index in (2, i(5), (0, 0, 0)):
        with pytest.raises(IndexError):
            x[index] = 0.0
    np.testing.assert_array_equal(x.data, 0)
