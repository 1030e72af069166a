"""cuda.ops inside torch: gradients, torch.library and torch.compile, the Linear layer and stage 2's GPT with it."""

import pytest
import torch
from torch import nn

pytest.importorskip("cuda._simt", reason="make native builds the kernels")

from cuda import matmul_ops, ops
from cuda.linear import Linear
from minigpt.config import GPTConfig
from minigpt.model import GPT
from tests.cuda.products import DEVICES, TOLERANCE, check, normal, reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(
    "a_shape, b_shape",
    [
        ((7, 10), (10, 6)),
        ((3, 7, 10), (3, 10, 6)),
        ((3, 7, 10), (10, 6)),
        ((7, 10), (3, 10, 6)),
        ((1, 7, 10), (3, 10, 6)),
    ],
)
def test_gradients_equal_torchs(device, activation, a_shape, b_shape):
    leaves = [
        normal(*shape, device=device, grad=True)
        for shape in (a_shape, b_shape, (6,), (7, 3 + 3 * (activation != "swiglu")))
    ]
    a, b, bias, c = leaves
    got = ops.matmul(a, b, bias=bias, c=c, alpha=0.5, beta=2.0, activation=activation)
    weights = normal(*got.shape, device=device)
    gradients = torch.autograd.grad((got * weights).sum(), leaves)
    want = reference(a, b, c, bias, 0.5, 2.0, activation)
    wanted = torch.autograd.grad((want * weights).sum(), leaves)
    for gradient, wish in zip(gradients, wanted, strict=True):
        check(gradient, wish, 1e-5)


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_gradients_in_bfloat16_through_every_layout(a_transposed, b_transposed):
    a, b = normal(24, 40, dtype=torch.bfloat16, grad=True), normal(40, 16, dtype=torch.bfloat16, grad=True)
    x = a.mT.contiguous().mT if a_transposed else a
    y = b.mT.contiguous().mT if b_transposed else b
    weights = normal(24, 16, dtype=torch.bfloat16)
    gradients = torch.autograd.grad(ops.matmul(x, y), (a, b), weights)
    wanted = torch.autograd.grad(reference(a, b), (a, b), weights.double())
    for gradient, wish in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        check(gradient, wish, 2 * TOLERANCE[torch.bfloat16])


def test_second_derivatives():
    a, b = normal(3, 4, grad=True), normal(4, 5, grad=True)

    def of(product):
        first = torch.autograd.grad(product(a, b).tanh().sum(), (a, b), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), (a, b))

    for got, want in zip(of(ops.matmul), of(torch.matmul), strict=True):
        check(got, want, 1e-5)


def test_a_gradient_that_is_expanded_or_not_asked_for():
    a, b = normal(5, 8, grad=True), normal(8, 6)
    ops.matmul(a, b).sum().backward()
    check(a.grad, b.sum(1).expand(5, 8), 1e-6)
    assert b.grad is None


# ---- torch.library and torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, activation, dtype):
    a, b = (normal(*s, dtype=dtype, device=device, grad=True) for s in ((2, 8, 16), (16, 6)))
    bias = normal(6, dtype=dtype, device=device, grad=True)
    result = torch.library.opcheck(matmul_ops._matmul, (a, b, None, bias, 0.5, 0.0, activation, torch.float32, None))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile(device):
    a, b = normal(5, 16, device=device, grad=True), normal(16, 6, device=device, grad=True)

    def f(a, b):
        return ops.matmul(a, b.mT.contiguous().mT, activation="gelu").relu().sum()

    compiled = torch.compile(f, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    want = torch.autograd.grad(f(a, b), (a, b))
    for got, wish in zip(torch.autograd.grad(compiled(a, b), (a, b)), want, strict=True):
        check(got, wish, 1e-6)
    x = normal(9, 16, device=device)  # another size: compiled again, with the size as a symbol
    check(compiled(x, b), f(x, b), 1e-6)


# ---- Linear, and the GPT of stage 2 with it --------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(10,), (4, 10), (2, 3, 10)])
def test_linear_equals_torchs(bias, shape):
    ours, theirs = Linear(10, 6, bias=bias), nn.Linear(10, 6, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x, y = normal(*shape, grad=True), normal(*shape)
    y = x.detach().clone().requires_grad_()
    for layer, at in ((ours, x), (theirs, y)):
        layer(at).square().sum().backward()
    check(ours(x), theirs(x), 1e-6)
    check(x.grad, y.grad, 1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        check(p.grad, q.grad, 1e-5)


CONFIG = GPTConfig(
    vocab_size=33, context=12, layers=2, width=24, heads=2, kv_heads=1, mlp_width=40, mlp="swiglu", qkv_bias=True
)


@pytest.mark.parametrize("device", DEVICES)
def test_gpt_with_our_linear_layers(device):
    ours, theirs = (GPT(CONFIG, linear_cls=cls).to(device) for cls in (Linear, nn.Linear))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + (p.ndim == 1))
    ours.load_state_dict(theirs.state_dict())
    tokens, targets = torch.randint(33, (2, 2, 11)).to(device)
    check(ours(tokens), theirs(tokens), 1e-5)
    for model in (ours, theirs):
        for start in (0, 1):  # gradients of two micro-batches add up
            (model(tokens[start, None], targets[start, None]) / 2).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        check(p.grad, q.grad, 2e-5)


def test_gpt_under_autocast_multiplies_in_bfloat16():
    model = GPT(CONFIG, linear_cls=Linear)
    tokens = torch.randint(33, (2, 11))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
        assert model.blocks[0].mlp.up(normal(2, 24)).dtype == torch.bfloat16
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
