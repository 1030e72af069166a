"""The cases of the benchmark of fused operations: what each computes by us, twice, and by torch, and the bytes to move.

A memory-bound operation cannot be faster than a copy of as many bytes: each input read once, each output written once.
What is small beside the tensors (gains, statistics of rows) is not counted. Sizes are those of a GPT: N tokens, C
channels, V words.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda import fused_ops, loss_ops, optim
from minigpt.model import rotate

BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Case:
    """`ours` and `torchs` take the inputs; `backward` says that their gradients are what is timed. Ours takes `kernels`
    too, where `triton` is not another function."""

    name: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    bytes: int
    backward: bool = False
    triton: Callable[..., Any] | None = None

    def in_triton(self) -> Callable[..., Any]:
        return self.triton or partial(self.ours, kernels="triton")

    def run(self, function: Callable[..., Any]) -> Callable[[], Any]:
        """The call that is timed."""
        if not self.backward:
            return lambda: function(*self.inputs)
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in self.inputs]
        y = function(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        generator = torch.Generator(y.device).manual_seed(0)  # every competitor has the same
        upstream = (
            torch.ones_like(y) if y.ndim == 0 else torch.randn(y.shape, generator=generator, device=y.device).to(y)
        )
        return lambda: torch.autograd.grad(y, wanted, upstream, retain_graph=True)


def cases(device: str, tokens: int, width: int, words: int) -> Iterator[Case]:
    """All of them, one after the other: the operands of one are gone when the next is made."""
    N, C, V = tokens, width, words
    row = N * C * 2  # bytes of one tensor of activations in bf16

    def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, gain, bias = normal(N, C), normal(C, dtype=torch.float32), normal(C, dtype=torch.float32)
    pairs = [
        ("rms_norm", (x, gain), fused_ops.rms_norm, lambda x, g: F.rms_norm(x, (C,), g.to(x.dtype), 1e-6)),
        ("layer_norm", (x, gain, bias), fused_ops.layer_norm,
         lambda x, g, b: F.layer_norm(x, (C,), g.to(x.dtype), b.to(x.dtype))),
    ]  # fmt: skip
    for name, inputs, ours, torchs in pairs:
        yield Case(name, inputs, ours, torchs, 2 * row)
        yield Case(name, inputs, ours, torchs, 3 * row, True)
    residual = normal(N, C)
    yield Case(
        "rms_norm of a sum", (x, residual, gain), lambda x, r, g, **k: fused_ops.rms_norm(x, g, residual=r, **k)[0],
        lambda x, r, g: F.rms_norm(x + r, (C,), g.to(x.dtype), 1e-6), 4 * row,
    )  # fmt: skip
    for name, ours, torchs in (
        ("swiglu", fused_ops.swiglu, lambda gate, up: F.silu(gate) * up),
        ("gelu", fused_ops.gelu, F.gelu),
        ("relu2", fused_ops.relu2, lambda x: F.relu(x).square()),
        ("softmax", fused_ops.softmax, lambda x: x.softmax(-1)),
    ):
        inputs = (x, residual) if name == "swiglu" else (x,)
        yield Case(name, inputs, ours, torchs, (len(inputs) + 1) * row)
        yield Case(name, inputs, ours, torchs, (2 * len(inputs) + 1) * row, True)
    heads, K = max(1, C // 128), min(C, 128)
    q = normal(1, N, heads, K).transpose(1, 2)
    angle = torch.rand(N, K // 2, device=device) * 6
    cos, sin = (torch.cat([t, t], -1).to(BF16) for t in (angle.cos(), angle.sin()))
    for backward in (False, True):
        yield Case(
            "rotary",
            (q,),
            lambda q, **k: fused_ops.rotary(q, cos, sin, **k),
            lambda q: rotate(q, cos, sin),
            2 * row,
            backward,
        )
    del q, residual
    yield from _of_words(device, min(N, 8192), V, normal)
    yield from _of_parameters(device, 12 * C * C)


def _of_words(device: str, N: int, V: int, normal: Callable[..., Tensor]) -> Iterator[Case]:
    logits, targets = normal(N, V), torch.randint(V, (N,), device=device)

    def torchs(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)

    def torchs_in_place(logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(torchs(leaf), leaf)[0]

    def ours(x: Tensor, **k: Any) -> Tensor:
        return loss_ops.cross_entropy(x, targets, **k)

    yield Case("cross_entropy", (logits,), ours, torchs, N * V * 2)
    yield Case("cross_entropy", (logits,), ours, torchs, 2 * N * V * 2, True)
    yield Case("cross_entropy and gradient, in place", (logits.clone(),),
               lambda x, **k: loss_ops.cross_entropy_(x, targets, **k),
               torchs_in_place, 2 * N * V * 2)  # fmt: skip
    del logits
    table, tokens = normal(V, 256, dtype=torch.float32), torch.randint(V, (4 * N,), device=device)
    moved = 4 * N * 256 * 4
    yield Case("embedding", (tokens, table), loss_ops.embedding, F.embedding, 2 * moved)
    yield Case("embedding", (tokens, table), loss_ops.embedding, F.embedding, moved + V * 256 * 4, True)


def _of_parameters(device: str, count: int) -> Iterator[Case]:
    """24 matrices with float32 gradients: read p, g, m, v, write p, m, v. Each side has its own."""

    def parameters() -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)  # both sides alike
        made = [torch.randn(count // 24, device=device, generator=generator).requires_grad_() for _ in range(24)]
        for p in made:
            p.grad = torch.randn(p.shape, device=device, generator=generator)
        return made

    mine, theirs, third = parameters(), parameters(), parameters()
    ours, triton = optim.AdamW(mine, lr=1e-3), optim.AdamW(third, lr=1e-3, kernels="triton")
    torchs = torch.optim.AdamW(theirs, lr=1e-3, fused=True)
    size = 4 * (count // 24) * 24
    yield Case("adamw", (), ours.step, torchs.step, 7 * size, triton=triton.step)
    yield Case("grad_norm", (), lambda **k: optim.grad_norm(mine, 1.0, **k)[0],
               lambda: torch.nn.utils.get_total_norm([p.grad for p in theirs]), size)  # fmt: skip


def loss_of_a_head(device: str, tokens: int, width: int, words: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """{who: a call that gives loss, dx and dW} of x W' and its mean cross-entropy, forward and backward: ours never has
    the logits."""
    x = torch.randn(tokens, width, device=device).to(BF16).requires_grad_()
    weight = (torch.randn(words, width, device=device) / width**0.5).to(BF16).requires_grad_()
    targets = torch.randint(words, (tokens,), device=device)

    def unfused(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.mT).float(), targets)

    def fused(x: Tensor, weight: Tensor, **k: Any) -> Tensor:
        return loss_ops.linear_cross_entropy(x, weight, targets, **k)

    def call(loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            value = loss(x, weight)
            return (value.detach(), *torch.autograd.grad(value, (x, weight)))

        return run

    return {"ours": call(fused), "triton": call(partial(fused, kernels="triton")), "torch": call(unfused)}
