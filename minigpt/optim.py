"""Which optimizer steps which parameter: Muon or AdamW for the matrices of the blocks, AdamW for everything else.

Learning rates are set per group as a share of the group's peak (`schedule` in minigpt/train_config.py). Refused: Muon
parameters that are not matrices.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minigpt.train_config import TrainConfig

# Odd polynomials a x + b x³ + c x⁵ that, one after another, drive singular values to 1: Polar Express (Amsel et al.
# 2025), the best ones of five steps for values down to a thousandth of the largest.
POLAR_STEPS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)


def orthogonalize(
    g_NRC: Tensor, dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Tensor:
    """N matrices with the singular vectors of g and singular values near 1: the polar factor, by Newton-Schulz steps.

    Matrix products only, in `dtype`; bfloat16 is enough, since the result is a direction. Returns the dtype of g.
    """
    x_NRC = g_NRC.to(dtype)
    tall = g_NRC.shape[1] > g_NRC.shape[2]
    if tall:
        x_NRC = x_NRC.mT.contiguous()
    # The polynomials want the largest value below 1, and rounding in bfloat16 must not lift it above.
    x_NRC = x_NRC / (1.02 * x_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLAR_STEPS:  # sums apart from products: torch's baddbmm is three times slower on a CPU in bfloat16
        s_NRR = multiply(x_NRC, x_NRC.mT)
        p_NRR = b * s_NRR + c * multiply(s_NRR, s_NRR)
        x_NRC = a * x_NRC + multiply(p_NRR, x_NRC)
    return (x_NRC.mT if tall else x_NRC).to(g_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix moves alike (Jordan et al. 2024).

    buffer += (1 - momentum) (g - buffer); u = g + momentum (buffer - g), Nesterov's look ahead;
    p -= lr (max(1, rows / columns)^0.5 orthogonalize(u) + weight_decay p).
    Matrices of one shape are orthogonalised in one batched product. Raises ValueError for a parameter of another kind.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        # Of the products; not among the options of a group, which a checkpoint keeps.
        self.dtype, self.multiply = dtype, multiply
        for group in self.param_groups:
            if wrong := [tuple(p.shape) for p in group["params"] if p.ndim != 2]:
                raise ValueError(f"Muon got parameters of shape {wrong[0]}: expected matrices only")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(p.shape), []).append(p)
            for same in by_shape.values():
                self._update(same, **{name: value for name, value in group.items() if name != "params"})

    def _update(self, same: list[Tensor], *, lr: float, momentum: float, weight_decay: float, **_) -> None:
        for p in same:
            if "buffer" not in self.state[p]:
                self.state[p]["buffer"] = torch.zeros_like(p)
        buffers, gradients = [self.state[p]["buffer"] for p in same], [p.grad for p in same]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        rows, columns = same[0].shape
        updates = list(orthogonalize(torch.stack(ahead), self.dtype, self.multiply).unbind())
        if weight_decay:
            torch._foreach_mul_(same, 1 - lr * weight_decay)
        torch._foreach_add_(same, updates, alpha=-lr * math.sqrt(max(1, rows / columns)))


def group_names(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trained parameters: "matrices" of the blocks, "embedding" tables, the "head", and "rest", which are
    gains, biases, gates and weights of skips: those do not decay, since pulling a gain towards zero would shrink its
    whole channel."""
    groups: dict[str, list[str]] = {"matrices": [], "embedding": [], "head": [], "rest": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or name.startswith("skips.") or "_gate." in name:
            kind = "rest"
        elif "embedding" in name:
            kind = "embedding"
        else:
            kind = "head" if name.startswith("head") else "matrices"
        groups[kind].append(name)
    return groups


class Updates(NamedTuple):
    """How parameters are changed; later stages put their own kernels in. Called as torch's are."""

    adamw_cls: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=True)
    muon_cls: Callable[..., torch.optim.Optimizer] = Muon
    clip_grad_norm: Callable[[list[Tensor], float], Tensor] = torch.nn.utils.clip_grad_norm_


def make_optimizers(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.bfloat16, updates: Updates | None = None
) -> list[torch.optim.Optimizer]:
    """Those of `optimizers_of`, for all trained parameters of a model."""
    return optimizers_of(dict(model.named_parameters()), group_names(model), config, dtype, updates)


def optimizers_of(
    parameters: Mapping[str, nn.Parameter],
    names: Mapping[str, list[str]],
    config: TrainConfig,
    dtype: torch.dtype = torch.bfloat16,
    updates: Updates | None = None,
) -> list[torch.optim.Optimizer]:
    """Muon and AdamW, as far as they have something to do, for parameters in the groups of `group_names`.

    Every group keeps its peak as `peak_lr`; the trainer sets lr to a share of it before each step. `dtype` is what the
    hardware multiplies fast, for Muon.
    """
    peaks = {"embedding": config.embedding_lr, "head": config.head_lr, "rest": config.gain_lr}
    decays = {"rest": 0.0, "embedding": config.embedding_decay}
    adamw, muon = [], []
    for kind, members in names.items():
        peak = peaks.get(kind) or config.learning_rate
        group = {"params": [parameters[name] for name in members], "lr": peak, "peak_lr": peak}
        group["weight_decay"] = decays.get(kind, config.weight_decay)
        (muon if kind == "matrices" and config.optimizer == "muon" else adamw).append(group)
    if muon:
        muon[0] |= {"lr": config.muon_lr, "peak_lr": config.muon_lr}
    adamw = [group for group in adamw if group["params"]]
    muon = [group for group in muon if group["params"]]
    updates = updates or Updates()
    optimizers = [
        updates.muon_cls(group, lr=config.muon_lr, momentum=config.momentum, dtype=dtype) for group in [muon] if group
    ]
    betas = (config.beta1, config.beta2)
    if adamw:
        optimizers.append(updates.adamw_cls(adamw, lr=config.learning_rate, betas=betas, eps=config.eps))
    return optimizers
