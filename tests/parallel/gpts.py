"""Small GPTs and batches for the tests of stage 4, and what one process computes with them.

`single` is stage 2's own GPT in float64 with plain torch optimizers: the truth that every layout is held against.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from minigpt.config import GPTConfig
from minigpt.model import GPT

# Odd where it may be: 3 layers, a vocabulary and an MLP that powers of two do not divide more than needed.
SMALL = GPTConfig(
    vocab_size=88, context=24, layers=3, width=24, heads=4, kv_heads=2, head_width=8, mlp="swiglu", mlp_width=40,
    value_embeddings=True, softcap=15.0,
)  # fmt: skip
GPT2_LIKE = replace(
    SMALL, positions="learned", norm="layernorm", mlp="gelu", qkv_bias=True, output_bias=True, mlp_bias=True,
    qk_norm=False, tied=True, kv_heads=4, value_embeddings=False, softcap=0.0,
)  # fmt: skip
CONFIGS = {"ours": SMALL, "gpt2": GPT2_LIKE}


def batch(config: GPTConfig, rows: int, T: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """tokens_BT and targets_BT."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, T + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def stir(named: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Whole values for each parameter by name, none of them zero: the initial zeros would hide wrong gradients."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, p in named.items():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        values[name] = 1 + 0.1 * noise if p.ndim == 1 and "bias" not in name else noise / max(1, p.shape[-1]) ** 0.5
    return values


def stirred_gpt(config: GPTConfig, seed: int = 1) -> GPT:
    """In float64, all parameters random."""
    model = GPT(config).double()
    values = stir(dict(model.named_parameters()), seed=seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    return model


def single(
    config: GPTConfig, batches: list[tuple[Tensor, Tensor]], make_optimizer, accumulate: int = 1, clip: float = 0.0,
    frozen: tuple[str, ...] = (), seed: int = 1,
) -> tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]:  # fmt: skip
    """(losses, gradients of each step by name, weights at the end) of one process that has all rows of each batch."""
    model = stirred_gpt(config, seed)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    trained: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained)
    losses, gradients = [], []
    for tokens_BT, targets_BT in batches:
        total = 0.0
        for part, wanted in zip(tokens_BT.chunk(accumulate), targets_BT.chunk(accumulate), strict=True):
            loss = model(part, wanted) / accumulate
            loss.backward()
            total += loss.item()
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        losses.append(total)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {name: p.detach().clone() for name, p in model.named_parameters()}


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number (at least 1e-3); NaN where there is one."""
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-3)).item()
