"""`check`: forward, first and second derivative of one function against torch, in one call.

The function is written once, as `lambda m, x, y: m.maximum(x, y)`; m is `ours` (autograd.functional and the modules of
operations) or `theirs` (torch.nn.functional, then torch). NaN and inf are accepted only where torch has them too.
"""

import numpy as np
import pytest
import torch

import autograd as ag
from autograd import conv, elementwise, functional, indexing, linalg, reduce, shape

torch.set_num_threads(1)
NAN, INF = float("nan"), float("inf")


class Library:
    """One name for the functions of several modules, and `array(values, x)` for a constant in the dtype of x."""

    def __init__(self, make, *modules):
        self.make, self.modules = make, modules

    def array(self, values, like=None):
        values = np.array(values)
        single = values.dtype == np.float64 and like is not None and like.dtype in (np.float32, torch.float32)
        return self.make(values.astype(np.float32) if single else values)

    def __getattr__(self, name):
        for module in self.modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)


ours = Library(ag.Tensor, functional, elementwise, reduce, shape, indexing, linalg, conv)
theirs = Library(torch.from_numpy, torch.nn.functional, torch)

# The same values laid out otherwise in memory.
LAYOUTS = {
    "transposed": lambda x: np.array(x.T, order="C").T,
    "strided": lambda x: np.repeat(x, 2, -1)[..., ::2] if x.ndim else x,
    "reversed": lambda x: np.flip(np.flip(x).copy()),
}


def rand(*shape, seed=0, low=None, high=None) -> np.ndarray:
    """Normal numbers, or uniform ones from low to high; the same at each run."""
    rng = np.random.default_rng([seed, *shape])
    return np.asarray(rng.standard_normal(shape) if low is None else rng.uniform(low, high, shape))


def table(cases: dict):
    """pytest.mark.parametrize over {name: case}."""
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def _tuple(result):
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _arrays(tensors):
    return [None if t is None else np.asarray(t.data) for t in tensors]


def _tensors(arrays, dtype, layout):
    """Our Tensors of copies of the arrays, floating ones in `dtype` and with gradient."""
    copies = [layout(np.array(a, dtype if a.dtype.kind == "f" else None)) for a in arrays]
    return [ag.Tensor(a, requires_grad=a.dtype.kind == "f") for a in copies]


def _floating(outputs):
    return [o for o in outputs if o.is_floating_point()]


def _ours(fn, arrays, upstream, weights, dtype, layout, second):
    """Outputs, first gradients by the plain and by the differentiable path, second gradients: lists of arrays."""
    inputs = _tensors(arrays, dtype, layout)
    outputs = _tuple(fn(ours, *inputs))
    wanted = [t for t in inputs if t.requires_grad]
    seeds = [ag.Tensor(g.astype(dtype), requires_grad=True) for g in upstream]
    first = ag.grad(_floating(outputs), wanted, seeds, retain_graph=True, allow_unused=True)
    result = [_arrays(outputs), _arrays(first), None, [None] * (len(wanted) + len(seeds))]
    if second:
        first = ag.grad(_floating(outputs), wanted, seeds, create_graph=True, allow_unused=True)
        result[2] = _arrays(first)
        used = [(g, ag.Tensor(w)) for g, w in zip(first, weights, strict=True) if g is not None and g.requires_grad]
        if used:
            gradients, weights = zip(*used, strict=True)
            result[3] = _arrays(ag.grad(gradients, wanted + seeds, weights, allow_unused=True))
    for tensor, array in zip(inputs, arrays, strict=True):
        np.testing.assert_array_equal(tensor.data, array.astype(tensor.dtype), "an input was changed")
    return result


def _theirs(fn, arrays, second):
    """The same by torch in float64, with the random upstream gradients and weights that both sides use."""
    rng = np.random.default_rng(7)
    inputs = [torch.from_numpy(np.array(a, order="C")).requires_grad_(a.dtype.kind == "f") for a in arrays]
    outputs = _tuple(fn(theirs, *inputs))
    wanted = [t for t in inputs if t.requires_grad]
    upstream = [rng.uniform(0.5, 1.5, tuple(o.shape)) for o in _floating(outputs)]
    weights = [rng.uniform(0.5, 1.5, tuple(t.shape)) for t in wanted]
    seeds = [torch.from_numpy(np.asarray(g)).requires_grad_() for g in upstream]
    first = torch.autograd.grad(_floating(outputs), wanted, seeds, create_graph=second, allow_unused=True)
    last = []
    if second:
        used = [(g, torch.from_numpy(np.asarray(w))) for g, w in zip(first, weights, strict=True)]
        used = [(g, w) for g, w in used if g is not None and g.requires_grad]
        last = [None] * (len(wanted) + len(seeds))
        if used:
            last = torch.autograd.grad([g for g, _ in used], wanted + seeds, [w for _, w in used], allow_unused=True)
    numpy = [[None if t is None else t.numpy(force=True) for t in tensors] for tensors in (outputs, first, last)]
    return numpy, upstream, weights


def _compare(found, expected, what, tolerance, dtype=np.float64):
    """Shapes, dtypes and values. A gradient that one side does not have counts as zeros."""
    assert len(found) == len(expected), what
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        name = f"{what} {i}"
        if f is None or e is None:
            present = next((x for x in (f, e) if x is not None), np.zeros(0))
            assert (np.abs(present) <= tolerance).all(), f"{name}: {f} for {e}"
            continue
        wanted = dtype if e.dtype == np.float64 else e.dtype
        assert (f.shape, f.dtype) == (e.shape, wanted), f"{name}: {f.shape} {f.dtype}, torch {e.shape} {wanted}"
        scale = max(1, np.max(np.abs(e[np.isfinite(e)]), initial=0)) if dtype == np.float32 else 1
        np.testing.assert_allclose(f, e, rtol=tolerance, atol=tolerance * scale, equal_nan=True, err_msg=name)


def check(
    fn,
    *inputs,
    reference=None,
    layout=lambda x: x,
    second=True,
    single=True,
    inplace=True,
    tolerance=1e-10,
    single_tolerance=2e-5,
):
    """`fn(m, *tensors)` in ours against torch's (or against `reference(m, *tensors)`): values and derivatives.

    inputs    arrays, or shapes of random normal ones; floating arrays get gradients
    layout    what is done to our arrays' memory (LAYOUTS)
    second    also the second derivative: a random functional of the first gradients is differentiated by all inputs and
              by the upstream gradient. The first derivative is then compared by both paths, fused and definition.
    single    also in float32: results and gradients must be float32 and near the float64 ones
    inplace   also that a write to an input or output between forward and backward is an error or changes nothing
    """
    arrays = [rand(*a, seed=i) if isinstance(a, tuple) else np.asarray(a) for i, a in enumerate(inputs)]
    with np.errstate(all="ignore"):
        (outputs, first, last), upstream, weights = _theirs(reference or fn, arrays, second)
        found = _ours(fn, arrays, upstream, weights, np.float64, layout, second)
        _compare(found[0], outputs, "output", tolerance)
        _compare(found[1], first, "gradient", tolerance)
        if second:
            _compare(found[2], first, "gradient with create_graph", tolerance)
            _compare(found[3], last, "second derivative", tolerance)
        if single:
            found = _ours(fn, arrays, upstream, weights, np.float32, layout, False)
            _compare(found[0], outputs, "float32 output", single_tolerance, np.float32)
            _compare(found[1], first, "float32 gradient", single_tolerance, np.float32)
        if inplace:
            _check_inplace(fn, arrays, upstream, first, layout, tolerance)


def _check_inplace(fn, arrays, upstream, expected, layout, tolerance):
    """Never a silently wrong gradient: overwrites each input and each output in turn, between forward and backward."""
    number_of_outputs = 1
    victim = 0
    while victim < len(arrays) + number_of_outputs:
        inputs = _tensors(arrays, np.float64, layout)
        outputs = _tuple(fn(ours, *inputs))
        number_of_outputs = len(outputs)
        tensor = (*inputs, *outputs)[victim]
        value = {"b": not tensor.data.any(), "f": 0.37}.get(tensor.dtype.kind, 0)
        victim += 1
        try:
            with ag.no_grad():
                tensor.fill_(value)
        except ValueError as error:
            assert "read-only" in str(error)
            continue
        try:
            wanted = [t for t in inputs if t.requires_grad]
            found = ag.grad(_floating(outputs), wanted, [ag.Tensor(g) for g in upstream], allow_unused=True)
        except RuntimeError as error:
            assert "changed in place" in str(error)
            continue
        what = f"after a write to tensor {victim - 1} of inputs and outputs: gradient"
        _compare(_arrays(found), expected, what, tolerance)


def check_forward(fn, *arrays, tolerance=0.0):
    """Values, shapes and dtypes alone: for results without gradients, and for inputs of any dtype as they are."""
    with np.errstate(all="ignore"):
        found = _tuple(fn(ours, *(ag.Tensor(np.array(a)) for a in arrays)))
        expected = _tuple(fn(theirs, *(torch.from_numpy(np.array(a)) for a in arrays)))
    for f, e in zip(found, expected, strict=True):
        e = e.numpy(force=True)
        assert (f.shape, f.dtype) == (e.shape, e.dtype), f"{f.shape} {f.dtype}, torch {e.shape} {e.dtype}"
        np.testing.assert_allclose(f.data, e, rtol=tolerance, atol=tolerance, equal_nan=True)
