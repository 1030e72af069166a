"""What FSDP and tensor parallelism cost where there is nothing to share: a world of one, beside stage 2's plain GPT.

On CUDA with bfloat16 autocast, GPT-2 124M, timed by device events. The step is forward, backward, AdamW. FSDP has
float32 parameters as plain has, or computes with bfloat16 ones besides its float32 masters, as parallel/assembly.py
sets it up. Refused: timing steps whose loss or gradient norm differ from the plain GPT's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import timing
from minigpt.bench import random_gpt
from minigpt.config import GPTConfig
from minigpt.model import GPT
from parallel.comm import make_comm
from parallel.fsdp import FSDP
from parallel.mesh import Layout, Mesh
from parallel.model import StageGPT, materialise
from parallel.strategy import Strategy, global_norm
from parallel.tensor_parallel import parallelise

Make = Callable[[GPT, torch.device], tuple[nn.Module, Strategy | None]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # seen on a CPU: 1e-7 and 3e-4
BFLOAT16 = "FSDP, bfloat16 parameters"


def fsdp(model: GPT, device: torch.device, param_dtype: torch.dtype | None = None) -> tuple[nn.Module, Strategy]:
    stage, comm, values = StageGPT(model.config), make_comm(Mesh(Layout()).group("fsdp")), model.state_dict()
    return stage, FSDP([stage], comm, config=model.config, values=values, param_dtype=param_dtype, device=device)


def tensor_parallel(model: GPT, device: torch.device) -> tuple[nn.Module, None]:
    stage, mesh = StageGPT(model.config), Mesh(Layout())
    parallelise(stage, mesh, make_comm(mesh.group("tp")))
    materialise(stage, device)
    stage.load_state_dict(model.state_dict())
    return stage, None


COMPETITORS: dict[str, Make] = {
    "FSDP": fsdp,
    BFLOAT16: partial(fsdp, param_dtype=torch.bfloat16),
    "tensor parallelism": tensor_parallel,
    "plain": lambda model, device: (model, None),
}


class Step:
    """Forward, backward, finish, AdamW, at a rate so small that the loss stays. Returns the loss."""

    def __init__(self, model: nn.Module, strategy: Strategy | None, rows: tuple[Tensor, Tensor], dtype: torch.dtype):
        self.model, self.strategy, self.rows, self.dtype = model, strategy, rows, dtype
        named = strategy.parameters() if strategy else dict(model.named_parameters())
        self.parameters = list(named.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-9, fused=True)

    def gradients(self) -> Tensor:
        before = () if isinstance(self.model, GPT) else (None,)
        with torch.autocast(self.rows[0].device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(*before, *self.rows)
        loss.backward()
        if self.strategy:
            self.strategy.finish()
        return loss.detach()

    def __call__(self) -> Tensor:
        loss = self.gradients()
        self.optimizer.step()
        if self.strategy:
            self.strategy.stepped()
        self.optimizer.zero_grad()
        return loss

    def loss_and_norm(self) -> Tensor:
        """For the check; leaves no gradients."""
        loss = self.gradients()
        gradients = [p.grad for p in self.parameters]
        norm = global_norm(self.strategy) if self.strategy else nn.utils.get_total_norm(gradients)
        self.optimizer.zero_grad()
        return torch.stack([loss.float(), norm.float()])


def bench_one(
    config: GPTConfig, batch: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    model = random_gpt(config).to(device)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(config.vocab_size, (batch, config.context + 1), generator=generator).to(device)
    rows = (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    steps = {
        name: Step(*make(model, device), rows, dtype)
        for name, make in COMPETITORS.items()
        if dtype != torch.float32 or name != BFLOAT16
    }
    tolerance = TOLERANCE[dtype]
    check_all({name: step.loss_and_norm() for name, step in steps.items()}, tolerance)
    samples = timing.compare(steps, rounds=rounds, warmup=3, check=timing.close(tolerance), device=device, inner=1)
    baseline = samples["plain"]
    return [
        {
            "case": name, "dtype": str(dtype).removeprefix("torch."), "parameters": model.num_parameters(),
            "tokens": batch * config.context, "step_ms": 1e3 * taken.median,
            "over_plain": taken.median / baseline.median - 1, "samples": taken,
        }
        for name, taken in samples.items()
    ]  # fmt: skip


def check_all(results: dict[str, Tensor], tolerance: float) -> None:
    """Each number by itself: a norm is larger than a loss and would hide it. Raises ValueError."""
    *others, plain = results.values()
    for name, other in zip(results, others, strict=False):
        error = ((other - plain).abs() / plain.abs()).max().item()
        if not error <= tolerance:
            raise ValueError(
                f"check failed, nothing was timed: loss and gradient norm of {name} are {other.tolist()}, "
                f"plain {plain.tolist()}"
            )
