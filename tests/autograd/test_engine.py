"""The engine: order, accumulation, freeing, higher derivatives, hooks, in-place writes, anomalies, checkpointing.

Gradients are compared with torch or with closed formulas; what must fail is seen to fail, with the message that helps.
"""

import gc
import weakref

import numpy as np
import pytest
import torch

import autograd as ag
from autograd import Tensor, nn
from autograd import functional as F
from autograd.anomaly import AnomalyError
from autograd.checkpointing import checkpoint
from autograd.gradcheck import gradcheck, gradgradcheck
from autograd.graph import record


def leaf(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


def assert_close(found, expected, tolerance=1e-12):
    found = found.data if isinstance(found, Tensor) else np.asarray(found)
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= tolerance


# -- order and depth --
def test_a_chain_of_100_000_nodes():
    x = leaf(3)
    y = x
    for _ in range(100_000):
        y = y + x
    y.sum().backward()
    assert_close(x.grad, np.full(3, 100_001.0))


def test_a_diamond_is_visited_once_per_node():
    x = leaf(2)
    calls = []
    y = x * 2
    y.register_hook(lambda g: calls.append(g.data.copy()))
    for _ in range(30):  # 2**30 paths
        y = y + y
    y.sum().backward()
    assert len(calls) == 1
    assert_close(x.grad, np.full(2, 2.0 * 2**30), 0)


# -- accumulation and ownership --
def test_backward_accumulates_into_grad():
    x = leaf(4)
    (x * x).sum().backward()
    (x * 3).sum().backward()
    assert_close(x.grad, 2 * x.data + 3)


def test_gradients_of_two_leaves_never_share_memory():
    a, b = leaf(5), leaf(5, seed=1)
    (a + b).sum().backward()
    a.grad.mul_(10)
    assert_close(b.grad, np.ones(5))


def test_a_leaf_keeps_an_array_that_nobody_else_holds_and_copies_any_other():
    made, held = [], []

    def double(x, hold):
        def vjp(g):
            made.append(result := g * 2)
            held.extend([result.data] if hold else [])
            made[-1] = id(result.data)
            return result

        return record("double", x.data * 2, (x,), (vjp,))

    for hold in (False, True):
        x = leaf(3)
        double(x, hold).sum().backward()
        assert (id(x.grad.data) == made[-1]) is not hold


def test_the_given_gradient_is_not_kept_or_changed():
    x = leaf(3)
    given = Tensor(np.ones(3))
    (x + 0).backward(given)
    (x * 2).backward(given)
    assert_close(given, np.ones(3), 0)
    x.grad.zero_()
    assert_close(given, np.ones(3), 0)


def test_a_gradient_that_a_hook_keeps_is_not_changed_by_the_next_backward():
    x = leaf(3)
    kept = []
    x.register_hook(kept.append)
    for _ in range(2):
        (x * 2).sum().backward()
    assert_close(kept[0], np.full(3, 2.0), 0)
    assert_close(x.grad, np.full(3, 4.0), 0)


def test_a_broadcast_gradient_is_writable_and_its_own():
    x = leaf(3, 4)
    x.sum().backward()
    x.grad.mul_(2)  # a view of a single 1 would raise, or scale every element many times
    assert_close(x.grad, np.full((3, 4), 2.0), 0)


def test_dtypes_of_gradients_follow_the_leaf():
    a = Tensor(np.ones(3, np.float32), requires_grad=True)
    b = Tensor(np.ones(3), requires_grad=True)
    (a * b).sum().backward()
    assert (a.grad.dtype, b.grad.dtype) == (np.float32, np.float64)


# -- freeing --
def test_a_second_backward_says_that_the_graph_was_freed():
    y = (leaf(3) * 2).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time.*retain_graph=True"):
        y.backward()


def test_retain_graph_allows_a_second_backward():
    x = leaf(3)
    y = (x.exp() * x).sum()
    y.backward(retain_graph=True)
    once = x.grad.data.copy()
    y.backward()
    assert_close(x.grad, 2 * once)


@pytest.mark.parametrize(
    "operation", [Tensor.exp, lambda x: F.softmax(x, 0), lambda x: F.layer_norm(x, 3), Tensor.prod]
)
def test_an_abandoned_graph_is_freed_without_the_garbage_collector(operation):
    gc.disable()
    try:
        y = operation(leaf(3))
        node = weakref.ref(y)
        del y
        assert node() is None
    finally:
        gc.enable()


# -- roots --
def test_backward_of_a_vector_needs_a_gradient_of_its_shape():
    y = leaf(3) * 2
    with pytest.raises(RuntimeError, match=r"shape \(3,\) needs a gradient"):
        y.backward()
    with pytest.raises(ValueError, match=r"gradient of shape \(2,\) for a tensor of shape \(3,\)"):
        y.backward(Tensor(np.ones(2)))
    with pytest.raises(ValueError, match="dtype float32"):
        y.backward(Tensor(np.ones(3, np.float32)))


def test_backward_without_a_graph():
    with pytest.raises(RuntimeError, match="does not require grad"):
        Tensor([1.0]).backward()


def test_no_grad_and_detach_record_nothing():
    x = leaf(3)
    with ag.no_grad():
        assert not (x * 2).requires_grad
        with ag.enable_grad():
            assert (x * 2).requires_grad
    assert not x.detach().requires_grad
    (x.detach() * x).sum().backward()
    assert_close(x.grad, x.data)


# -- grad() and higher derivatives --
def test_grad_matches_torch_on_intermediate_and_leaf_inputs():
    x = leaf(3, 2)
    h = x.tanh()
    y = (h * h * x).sum()
    found = ag.grad(y, [x, h])
    tx = torch.tensor(x.data, requires_grad=True)
    th = tx.tanh()
    expected = torch.autograd.grad((th * th * tx).sum(), [tx, th])
    for f, e in zip(found, expected, strict=True):
        assert_close(f, e)
    assert x.grad is None


def test_grad_of_an_unused_input():
    x, z = leaf(2), leaf(2)
    with pytest.raises(RuntimeError, match="do not depend on input 1"):
        ag.grad((x * 2).sum(), [x, z])
    assert ag.grad((x * 2).sum(), [x, z], allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match="input 0 .* does not require grad"):
        ag.grad((x * 2).sum(), [Tensor([1.0])])


def test_grad_of_several_outputs_adds_them():
    x = leaf(3)
    (found,) = ag.grad([(x * 2).sum(), x * x], x, [None, Tensor(np.ones(3))])
    assert_close(found, 2 + 2 * x.data)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_derivatives_of_high_order_match_closed_forms(order):
    x = Tensor(np.array([0.3, -0.7, 1.1]), requires_grad=True)
    sine, power = x.sin(), x**6
    for _ in range(order):
        (sine,) = ag.grad(sine.sum(), x, create_graph=True)
        (power,) = ag.grad(power.sum(), x, create_graph=True)
    assert_close(sine, np.sin(x.data + order * np.pi / 2))
    factor = np.prod([6.0 - i for i in range(order)])
    assert_close(power, factor * x.data ** (6 - order))


def test_hessian_of_a_network_matches_torch():
    x, w1, w2 = leaf(4, 3), leaf(5, 3, seed=1), leaf(2, 5, seed=2)
    labels = np.array([0, 1, 1, 0])

    def loss(lib, x, w1, w2, labels):
        return lib.cross_entropy(lib.linear(lib.gelu(lib.linear(x, w1)), w2), labels)

    tensors = [torch.tensor(t.data, requires_grad=True) for t in (w1, w2)]
    expected = torch.autograd.functional.hessian(
        lambda a, b: loss(torch.nn.functional, torch.tensor(x.data), a, b, torch.tensor(labels)), tuple(tensors)
    )
    first = ag.grad(loss(F, x, w1, w2, Tensor(labels)), [w1, w2], create_graph=True)
    for i, gradient in enumerate(first):
        for index in np.ndindex(gradient.shape):
            row = ag.grad(gradient[index], [w1, w2], retain_graph=True)
            for j in (0, 1):
                assert_close(row[j], expected[i][j][index], 1e-10)


def test_gradient_penalty_reaches_the_parameters_through_backward():
    x, w = leaf(4, 3), leaf(5, 3, seed=1)
    (gx,) = ag.grad(F.linear(x, w).tanh().sum(), x, create_graph=True)
    (gx * gx).sum().backward()
    tx, tw = (torch.tensor(t.data, requires_grad=True) for t in (x, w))
    (tg,) = torch.autograd.grad(torch.nn.functional.linear(tx, tw).tanh().sum(), tx, create_graph=True)
    (tg * tg).sum().backward()
    assert_close(w.grad, tw.grad)
    assert_close(x.grad, tx.grad)


# -- hooks --
def test_a_hook_sees_the_whole_gradient_and_may_replace_it():
    x = leaf(3)
    h = x * 2
    seen = []
    remove = h.register_hook(lambda g: seen.append(g.data.copy()))
    h.register_hook(lambda g: g * 10)
    (h + h * 3).sum().backward(retain_graph=True)
    assert_close(seen[0], np.full(3, 4.0))
    assert_close(x.grad, np.full(3, 80.0))
    remove()
    (h + h * 3).sum().backward()
    assert len(seen) == 1


def test_a_hook_on_a_leaf_and_its_errors():
    x = leaf(3)
    x.register_hook(lambda g: g * 0 + 7)
    (x * x).sum().backward()
    assert_close(x.grad, np.full(3, 7.0))
    x.register_hook(lambda g: g[:2])
    with pytest.raises(ValueError, match=r"expected None or a tensor of shape \(3,\)"):
        (x * x).sum().backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        Tensor([1.0]).register_hook(print)


def test_retain_grad():
    x = leaf(3)
    h = x * 2
    h.retain_grad()
    (h * h).sum().backward()
    assert_close(h.grad, 4 * x.data)


# -- in-place writes --
@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.mul_(2),
        lambda t: t.zero_(),
        lambda t: t.copy_(Tensor(np.zeros(3))),
        lambda t: t.__setitem__(0, 5.0),
        lambda t: t.detach().sub_(1),  # the detached tensor has the same memory
        lambda t: t[1:].div_(2),  # and so has a view
        lambda t: t.reshape(3, 1).fill_(0),
    ],
)
def test_a_write_to_a_value_that_backward_needs_is_named(write):
    x = leaf(3)
    y = x.exp()
    z = (y * y).sum()
    with ag.no_grad():
        write(y)
    with pytest.raises(
        RuntimeError, match=r"backward of (mul|exp).*shape \(3,\).*changed in place.*version 1, expected 0"
    ):
        z.backward()


def test_a_write_to_a_value_that_backward_does_not_need_is_allowed():
    x, c = leaf(3), Tensor(np.full(3, 2.0))
    y = x * c  # the derivative by x needs c, not x
    with ag.no_grad():
        x.add_(1)
    y.sum().backward()
    assert_close(x.grad, np.full(3, 2.0))
    y = x * c
    c.add_(1)
    with pytest.raises(RuntimeError, match="by add_"):
        y.sum().backward()


def test_an_optimizer_step_between_forward_and_backward_is_noticed():
    layer = nn.Linear(3, 2)
    optimizer = ag.optim.SGD(layer.parameters(), lr=0.1)
    x = Tensor(np.ones((4, 3), np.float32))
    layer(x).sum().backward()
    loss = layer(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="by SGD"):
        loss.backward()


def test_in_place_operations_are_recorded():
    def compute(x, w):
        y = x * 2
        y += w
        y *= y
        y[0] = w[1] * 3
        y -= 1
        y /= w
        return (y * y).sum()

    x, w = leaf(3), leaf(3, seed=1)
    compute(x, w).backward()
    tx, tw = (torch.tensor(t.data, requires_grad=True) for t in (x, w))
    y = tx * 2 + tw
    y = y * y
    y = torch.cat([(tw[1] * 3)[None], y[1:]])
    (((y - 1) / tw) ** 2).sum().backward()
    assert_close(x.grad, tx.grad)
    assert_close(w.grad, tw.grad)


def test_writing_rows_into_a_buffer_is_recorded():
    x, buffer = leaf(2, 3), Tensor(np.zeros((2, 3)))
    for i in range(2):
        buffer[i] = x[1 - i] * (i + 1)
    (buffer * buffer).sum().backward()
    assert_close(x.grad, 2 * x.data * np.array([[4.0], [1.0]]))


def test_a_view_that_is_gone_does_not_forbid_a_write():
    x = leaf(3, 3)
    h = x * 1
    h.reshape(9)
    h.mul_(2)
    view = h[0]
    with pytest.raises(RuntimeError, match="shares memory"):
        h.mul_(2)
    del view
    for _ in range(100):
        h[0]
    h.sum().backward()
    assert_close(x.grad, np.full((3, 3), 2.0))


def test_a_rule_may_call_itself():
    def doubled(a):
        return record("doubled", a.data * 2, (a,), (lambda g: doubled(g),))

    x = leaf(3)
    doubled(x).sum().backward()
    assert_close(x.grad, np.full(3, 2.0))


def test_refused_writes():
    x = leaf(3)
    with pytest.raises(RuntimeError, match="leaf that requires grad"):
        x.add_(1)
    y = x * 2
    with pytest.raises(RuntimeError, match="shares memory"):
        y[1:].add_(1)
    with pytest.raises(ValueError, match=r"add_ on a tensor of shape \(3,\)"):
        Tensor(np.zeros(3)).add_(Tensor(np.zeros(4)))
    with pytest.raises(ValueError, match="read-only"):
        x.numpy()[0] = 1


# -- anomalies --
def test_detect_anomaly_names_the_first_operation_and_its_line():
    x = Tensor(np.array([1.0, -2.0, 4.0]), requires_grad=True)
    with pytest.raises(AnomalyError) as error, ag.detect_anomaly():
        y = x * 2
        z = y.log()  # the line to be named
        (z + 1).sum()
    text = str(error.value)
    assert text.startswith("log made the first NaN, at test_engine.py:")
    assert "# the line to be named" in text and "min -4 max 8" in text


def test_detect_anomaly_in_backward_names_the_forward_line():
    x = Tensor(np.array([0.0, 4.0]), requires_grad=True)
    with (
        pytest.raises(AnomalyError, match="backward pass of sqrt, recorded at test_engine.py:.*the square root"),
        ag.detect_anomaly(),
    ):
        y = x.sqrt()  # the square root
        (y * 0.0).sum().backward()


def test_detect_anomaly_allows_an_inf_that_was_given():
    scores = leaf(2, 2)
    with ag.detect_anomaly():
        masked = scores.masked_fill(Tensor(np.array([[False, True], [False, False]])), -np.inf)
        F.softmax(masked, -1).sum().backward()
    assert np.isfinite(scores.grad.data).all()


# -- checkpointing --
@pytest.mark.parametrize("through", ["backward", "grad"])
def test_checkpoint_gives_the_same_gradients_with_dropout_and_captured_tensors(through):
    layer = nn.Linear(4, 4, dtype=np.float64)
    results = []
    for wrap in (lambda f, *a: f(*a), checkpoint):
        ag.manual_seed(1)
        x = leaf(3, 4)
        captured = x.sin()
        h = x * 2
        y = wrap(lambda h, c=captured: F.dropout(layer(h).tanh(), 0.4) * c.sum(), h)
        y = (y * F.dropout(y, 0.5)).sum()
        inputs = [x, layer.weight, layer.bias]
        if through == "grad":
            first = ag.grad(y, inputs, create_graph=True)
            total = sum((g * g).sum() for g in first)
            results.append([g.data for g in (*first, *ag.grad(total, inputs))])
        else:
            layer.zero_grad()
            y.backward()
            results.append([t.grad.data.copy() for t in inputs])
    for plain, again in zip(*results, strict=True):
        assert_close(again, plain)


def test_checkpoint_runs_twice_and_keeps_no_intermediate():
    runs, inner = [], []

    def function(x):
        runs.append(1)
        y = x.exp()
        inner.append(weakref.ref(y))
        return y.tanh()

    x = leaf(3)
    y = checkpoint(function, x)
    assert inner[0]() is None and len(runs) == 1
    y.sum().backward()
    assert len(runs) == 2
    assert_close(x.grad, (1 - np.tanh(np.exp(x.data)) ** 2) * np.exp(x.data))
    with ag.no_grad():
        assert not checkpoint(function, x).requires_grad
    with pytest.raises(ValueError, match="expected one Tensor"):
        checkpoint(lambda x: (x, x), x)


# -- gradcheck itself --
def test_gradcheck_passes_on_right_and_fails_on_wrong_rules():
    def wrong_first(x):
        return record("wrong", np.sin(x.data), (x,), (lambda g: g * x.cos() * 1.01,))

    def wrong_second(x):  # the first derivative is right, but its own derivative is cut off
        return record("wrong", np.sin(x.data), (x,), (lambda g: g * x.detach().cos(),))

    x = leaf(3)
    assert gradcheck(Tensor.sin, x) and gradgradcheck(Tensor.sin, x)
    with pytest.raises(AssertionError, match="input 0 at"):
        gradcheck(wrong_first, x)
    assert gradcheck(wrong_second, x)
    with pytest.raises(AssertionError):
        gradgradcheck(wrong_second, x)
    with pytest.raises(AssertionError):
        gradcheck(lambda x: record("nan", np.sin(x.data), (x,), (lambda g: g * np.nan,)), x)
    with pytest.raises(ValueError, match="float64"):
        gradcheck(Tensor.sin, Tensor(np.ones(2, np.float32), requires_grad=True))
    with pytest.raises(ValueError, match="no input requires grad"):
        gradcheck(Tensor.sin, Tensor(np.ones(2)))


# -- the Tensor itself --
def test_construction():
    assert Tensor([1.0, 2.0]).dtype == np.float32
    assert Tensor([1, 2]).dtype == np.int64
    assert Tensor(np.ones(2)).dtype == np.float64
    with pytest.raises(ValueError, match="dtype complex128"):
        Tensor(np.ones(2, complex))
    with pytest.raises(ValueError, match="only float32 and float64 have gradients"):
        Tensor([1, 2], requires_grad=True)
    with pytest.raises(ValueError, match="a Tensor already"):
        Tensor(Tensor([1.0]))
    with pytest.raises(ValueError, match=r"item\(\) of a tensor of shape \(2,\)"):
        Tensor([1.0, 2.0]).item()
    with pytest.raises(ValueError):
        bool(Tensor([1.0, 2.0]))


def test_numbers_beside_tensors_keep_torchs_dtypes():
    for array in (np.array(2.0, np.float32), np.array([1, 2]), np.array([True, False]), np.ones((2, 2), np.float32)):
        for number in (True, 2, 2.5, np.float64(2.5), np.int64(3)):
            plain = number.item() if isinstance(number, np.generic) else number
            expected = (torch.tensor(array) * plain).numpy()
            for found in (Tensor(array) * number, number * Tensor(array)):
                assert found.dtype == expected.dtype
                assert np.array_equal(found.data, expected)


def test_comparison_with_none_and_logic():
    x = Tensor([1.0, -1.0])
    assert (x == None) is False and (x != None) is True  # noqa: E711
    assert ((x > 0) & True).tolist() == (True & (x > 0)).tolist() == [True, False]
    assert (False | (x > 0)).tolist() == [True, False] and (~(x > 0)).tolist() == [False, True]


def test_repr_and_iteration():
    x = Tensor([[1.0, 2.0]], requires_grad=True)
    assert repr(x) == "Tensor([[1., 2.]], dtype=float32, requires_grad=True)"
    assert "op=mul" in repr(x * 2)
    assert [row.shape for row in x] == [(2,)]
    assert len(x) == 1 and float(x.sum()) == 3.0
