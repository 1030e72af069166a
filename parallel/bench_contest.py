"""Who takes part in a benchmark of training steps, what all of them train, and the check before anything is timed.

One process with all rows is the truth: each contestant's gradients of the first step, loss and gradients of three steps
have to be its own up to float32. Refused, by ValueError on every rank: gradients that differ, are missing, or NaN.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.dist import World
from minigpt.config import GPTConfig
from minigpt.model import GPT
from minigpt.optim import group_names, optimizers_of
from parallel.config import ParallelConfig
from parallel.pieces import Piece

Rows = tuple[Tensor, Tensor]  # tokens_BT, targets_BT
CHECKED_STEPS = 3
GRADIENT_ERROR, LOSS_ERROR = 1e-4, 1e-5  # the largest that pass, of the largest number; gradients seen: 2e-6


@dataclass(frozen=True, slots=True)
class Workload:
    """A GPT without what DTensor cannot cut on its own: QK-norm, a soft-cap, value embeddings."""

    config: ParallelConfig
    vocabulary: int = 2048

    @property
    def model(self) -> GPTConfig:
        return self.config.model_config(self.vocabulary)

    def rows(self) -> Rows:
        """The whole batch."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.config.batch, self.config.context + 1)
        text = torch.randint(self.model.vocab_size, shape, generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def values(self) -> dict[str, Tensor]:
        """Whole weights, none of them zero: zeros would hide wrong gradients."""
        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in GPT(self.model, seed=None).named_parameters()}
        noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {n: 1 + 0.1 * x if x.ndim == 1 else x / x.shape[1] ** 0.5 for n, x in noise.items()}

    def gpt(self) -> GPT:
        model = GPT(self.model, seed=None)
        model.load_state_dict(self.values())
        return model

    def with_layout(self, **changes) -> "Workload":
        return replace(self, config=replace(self.config, **changes))


MICROBATCHES = 4  # of the pipelines
PLAIN = {
    "mlp": "relu2", "qk_norm": False, "softcap": 0.0, "value_embeddings": False, "optimizer": "adamw",
    "learning_rate": 1e-4, "embedding_lr": 0.0, "head_lr": 0.0, "gain_lr": 0.0, "clip": 0.0, "device": "cpu",
    "dtype": "float32", "eval_stride": 1,
}  # fmt: skip
WORKLOAD = Workload(ParallelConfig(
    layers=4, width=256, heads=4, kv_heads=4, mlp_width=1024, context=128, batch=8, **PLAIN
))  # fmt: skip
QUICK = Workload(ParallelConfig(
    layers=4, width=32, heads=4, kv_heads=4, mlp_width=64, context=16, batch=8, **PLAIN
), vocabulary=64)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contestant:
    """`gradients` returns the mean loss of this rank's rows, None where it sees none; `found` gives this rank's
    gradients before `apply`, each with the piece of the whole that it is."""

    gradients: Callable[[], Tensor | None]
    apply: Callable[[], None]
    found: Callable[[], Iterable[tuple[str, Tensor | None, Piece]]]

    def step(self) -> None:
        self.gradients()
        self.apply()


def with_optimizer(
    parameters: Mapping[str, nn.Parameter], workload: Workload, gradients: Callable[[], Tensor | None]
) -> Contestant:
    """A contestant with the trainer's optimizers, for whole parameters (or DTensors) by their names in the GPT."""
    with torch.device("meta"):
        kinds = group_names(GPT(workload.model, seed=None))
    here = {kind: [name for name in names if name in parameters] for kind, names in kinds.items()}
    optimizers = optimizers_of(parameters, here, workload.config)

    def apply() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def found() -> Iterator[tuple[str, Tensor | None, Piece]]:
        for name, p in parameters.items():
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            yield name, gradient, Piece.whole(tuple(p.shape))

    return Contestant(gradients, apply, found)


def backward(model: nn.Module, rows: Rows) -> Callable[[], Tensor]:
    def gradients() -> Tensor:
        loss = model(*rows)
        loss.backward()
        return loss.detach()

    return gradients


@dataclass(frozen=True, slots=True)
class Truth:
    losses: list[float]
    gradients: dict[str, Tensor]


def one_process(workload: Workload) -> Truth:
    model = workload.gpt()
    parameters = dict(model.named_parameters())
    alone = with_optimizer(parameters, workload, backward(model, workload.rows()))
    losses, gradients = [], {}
    for _ in range(CHECKED_STEPS):
        losses.append(alone.gradients().item())
        gradients = gradients or {name: p.grad.clone() for name, p in parameters.items()}
        alone.apply()
    return Truth(losses, gradients)


def check(name: str, contestant: Contestant, truth: Truth) -> float:
    """Makes CHECKED_STEPS steps on all ranks. Returns the largest error of a gradient on any rank, relative to the
    largest number of its parameter's; raises ValueError on all ranks."""
    worst, amounts = 0.0, dict.fromkeys(truth.gradients, 0)
    for step in range(CHECKED_STEPS):
        loss = contestant.gradients()
        if step == 0:
            worst = _gradient_error(contestant, truth, amounts)
        contestant.apply()
        _check_loss(name, step, loss, truth.losses[step])
    return _check_gradients(name, worst, amounts, truth)


def _gradient_error(contestant: Contestant, truth: Truth, amounts: dict[str, int]) -> float:
    """Of this rank; counts in `amounts` the numbers that it has."""
    errors = [0.0]
    for name, gradient, piece in contestant.found():
        if gradient is not None:
            whole = truth.gradients[name]
            difference = gradient.detach().reshape(-1) - piece.of(whole).reshape(-1)
            errors.append((difference.abs().max() / whole.abs().max()).item() if difference.numel() else 0.0)
            amounts[name] += gradient.numel()
    return max(errors) if all(error == error for error in errors) else float("nan")


def _check_gradients(name: str, worst: float, amounts: dict[str, int], truth: Truth) -> float:
    seen = torch.tensor(list(amounts.values()), dtype=torch.float64)
    dist.all_reduce(seen)
    missing = [n for (n, want), got in zip(truth.gradients.items(), seen, strict=True) if not got >= want.numel()]
    if missing:
        raise ValueError(f"check failed, nothing was timed: {name} has no whole gradient of {missing[0]}")
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, worst)
    if wrong := [error for error in errors if not error <= GRADIENT_ERROR]:
        raise ValueError(
            f"check failed, nothing was timed: a gradient of {name} is {wrong[0]:.1e} off, expected at most "
            f"{GRADIENT_ERROR:g} of the largest number"
        )
    return max(errors)


def _check_loss(name: str, step: int, loss: Tensor | None, want: float) -> None:
    total = torch.tensor([0.0 if loss is None else loss.item(), loss is not None], dtype=torch.float64)
    dist.all_reduce(total)
    got = (total[0] / total[1]).item()
    if not abs(got - want) <= LOSS_ERROR * abs(want):
        raise ValueError(
            f"check failed, nothing was timed: loss {got:.7g} of {name} in step {step}, one process has {want:.7g}"
        )


def world_of(rank: int, ranks: int) -> World:
    return World(rank, ranks, rank, torch.device("cpu"), "gloo")
