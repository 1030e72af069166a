"""One GPT trained twice, in torch and on our own engine, from the same weights: `python -m minigpt.twins`.

Both read the same batches of real text, and each has its own engine's backward pass, clipping and AdamW. The loss
curves are drawn on top of each other and their largest distance is printed; a result goes to
results/minigpt/twins_*.json, the picture beside it. Refused: numbers below 1.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from autograd.optim import AdamW, clip_grad_norm_
from common import cli, plots
from common.dist import World
from common.log import format_duration
from common.results import save_result
from minigpt.batches import batch
from minigpt.data import TokenData, load_data
from minigpt.model import GPT
from minigpt.model_numpy import GPT as NumpyGPT
from minigpt.train_config import TrainConfig, schedule
from minigpt.trainer import Trainer


@dataclass(frozen=True, slots=True)
class TwinsConfig:
    corpus: str = field(default="stdlib", metadata={"help": "text, as of minigpt.train"})
    tokenizer: str = field(default="bpe:512", metadata={"help": "tokenizer, as of minigpt.train"})
    steps: int = field(default=200, metadata={"help": "optimizer steps of both"})
    width: int = field(default=64, metadata={"help": "channels of the residual stream"})
    layers: int = field(default=2, metadata={"help": "transformer blocks"})
    dtype: str = field(default="float32", metadata={"help": "float32, or float64 where the two agree to 1e-9"})
    seed: int = field(default=0, metadata={"help": "of weights and batches"})
    out: Path = field(default=Path("results"), metadata={"help": "where results are kept"})

    def __post_init__(self) -> None:
        for name in ("steps", "width", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype {self.dtype!r}: expected 'float32' or 'float64'")

    def training(self) -> TrainConfig:
        return TrainConfig(
            corpus=self.corpus, tokenizer=self.tokenizer, steps=self.steps, width=self.width, layers=self.layers,
            mlp="swiglu", mlp_width=2 * self.width, context=64, batch=8, optimizer="adamw", learning_rate=3e-3,
            embedding_lr=0.0, head_lr=0.0, gain_lr=0.0, value_embeddings=False,
            weight_decay=0.1, schedule="cosine", warmup=10, seed=self.seed, dtype="float32", device="cpu",
        )  # fmt: skip


def torch_losses(config: TrainConfig, data: TokenData, dtype: str) -> list[float]:
    """The mean cross-entropy of each step's batch, before the step."""
    model = GPT(config.model_config(data.tokenizer.vocab_size), seed=config.seed).to(getattr(torch, dtype))
    trainer = Trainer(config, model, data, World(0, 1, 0, torch.device("cpu"), None), None)
    batches = ([torch.from_numpy(part) for part in trainer.make_batch(step)] for step in range(config.steps))
    return [trainer.update(*rows)[0]["loss"] for rows in batches]


def numpy_losses(config: TrainConfig, data: TokenData, dtype: str) -> list[float]:
    """The same on our engine."""
    model = NumpyGPT(config.model_config(data.tokenizer.vocab_size), seed=config.seed, dtype=getattr(np, dtype))
    parameters, losses = list(model.parameters()), []
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups[0]["params"].remove(model.embedding.weight)  # embeddings do not decay
    groups[1]["params"].append(model.embedding.weight)
    optimizer = AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps)
    for step in range(config.steps):
        rows = {"row": step * config.batch, "rows": config.batch}
        loss = model(*batch(data.train, seed=config.seed, context=config.context, **rows))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        optimizer.step()
        losses.append(float(loss.data))
    return losses


def largest_distance(ours: list[float], theirs: list[float]) -> float:
    """NaN where either is: numpy's max keeps it, Python's may pass over it."""
    return float(np.abs(np.subtract(ours, theirs)).max())


def draw(path: Path, theirs: list[float], ours: list[float], dtype: str) -> None:
    """torch as a line, our engine as points upon it: two lines would be one."""
    distance = largest_distance(ours, theirs)
    steps = range(1, len(ours) + 1)
    plots.curve(
        path, {"torch": (steps, theirs)}, points={"our engine on numpy, every fourth step": (steps[::4], ours[::4])},
        xlabel="step", ylabel="training loss, nats a token",
        title=f"one GPT on two engines, {dtype}: at most {distance:.0e} nats apart",
    )  # fmt: skip


def main() -> None:
    config = cli.parse(TwinsConfig, prog=cli.program(), description="train on numpy and on torch, side by side")
    training = config.training()
    data = load_data(config.corpus, config.tokenizer)
    print(data.describe())
    losses, seconds = {}, {}
    for name, run in (("torch", torch_losses), ("our engine on numpy", numpy_losses)):
        began = time.perf_counter()
        losses[name] = run(training, data, config.dtype)
        seconds[name] = time.perf_counter() - began
        print(f"{name}: loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f} in {format_duration(seconds[name])}")
    ours, theirs = losses["our engine on numpy"], losses["torch"]
    distance = largest_distance(ours, theirs)
    print(f"largest distance of the two losses in {config.steps} steps: {distance:.2e} nats")
    row = {"dtype": config.dtype, "steps": config.steps, "first_loss": ours[0], "last_loss": ours[-1]}
    row |= {"largest_distance": distance, "numpy_s": seconds["our engine on numpy"], "torch_s": seconds["torch"]}
    row |= {"numpy_losses": ours, "torch_losses": theirs}
    result = save_result("minigpt", "twins", [row], config=config, root=config.out)
    picture = config.out / "minigpt" / "twins.png"
    draw(picture, theirs, ours, config.dtype)
    print(result, picture, sep="\n")


if __name__ == "__main__":
    cli.run(main)
