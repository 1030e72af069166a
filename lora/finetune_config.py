"""What a fine-tuning run is: the fields of the command line, the presets, the schedule of the learning rate.

Refused, before any work: numbers out of range, a batch that does not divide, held-out data without data, and whatever
lora/config.py refuses of an adapter.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lora.config import ALL_LINEAR, LoraConfig
from lora.quantised import Format, Kernels
from minigpt.train_config import option

Method = Literal["full", "lora", "qlora", "bd-lora"]
METHODS: tuple[Method, ...] = get_args(Method)
# What may change when a run goes on: a run of one method becomes one of all, and files and machines differ.
FREE = ("folder", "resume", "method", "device", "checkpoint_every")


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    folder: Path = field(default=Path("runs/finetune"), metadata={"help": "folder of this run"})
    resume: bool = option(False, "continue the run in that folder; methods that are done are not run again")
    folder_of_base: Path = field(default=Path("runs/speedrun"), metadata={"help": "run whose model is fine-tuned"})
    hf: Path | None = field(default=None, metadata={"help": "folder of a Hugging Face model, instead of a run"})
    method: Literal["full", "lora", "qlora", "bd-lora", "all"] = option("all", "what is trained; all: one by one")
    # the data
    data: Path | None = field(default=None, metadata={"help": "JSONL to train on; none: Python's standard library"})
    held_out: Path | None = field(default=None, metadata={"help": "JSONL to judge by; none: a share of --data"})
    held_out_share: float = option(0.05, "that share; its examples are chosen by their prompts")
    template: Literal["plain", "chatml", "llama3"] = option("plain", "what marks the turns")
    context: int = option(0, "tokens in a row of packed examples; 0 for the model's context")
    # the adapters
    rank: int = option(8, "of lora and qlora; bd-lora takes the one with the nearest number of parameters")
    alpha: float = option(16.0, "the adapter's change is scaled by alpha / rank; bd-lora has the same scale")
    targets: str = option(ALL_LINEAR, "layers with an adapter: ends of their names, with commas between")
    blocks: int = option(2, "of bd-lora's block-diagonal factors")
    dropout: float = option(0.0, "of what goes into an adapter")
    base_format: Format = field(default="nf4-double", metadata={"help": "of qlora's base"})
    kernels: Kernels = field(default="torch", metadata={"help": "what multiplies by qlora's base"})
    # the optimizer
    batch: int = option(16, "rows in a step, over all ranks")
    accumulate: int = option(1, "a step's rows are worked off in this many parts")
    steps: int = option(200, "optimizer steps of each method")
    full_lr: float = option(3e-3, "peak learning rate of full fine-tuning")
    adapter_lr: float = option(2e-2, "peak learning rate of the adapters")
    optimizer: Literal["adamw", "adamw8bit"] = option("adamw", "adamw8bit: its states in 8 bits")
    beta1: float = option(0.9, "AdamW's memory of gradients")
    beta2: float = option(0.99, "AdamW's memory of squared gradients")
    eps: float = option(1e-8, "added to AdamW's denominator")
    weight_decay: float = option(0.0, "of all that is trained")
    warmup: int = option(20, "steps of linear warmup, before a linear decay")
    clip: float = option(1.0, "largest global gradient norm; 0 for no clipping")
    seed: int = option(0, "of the adapters' initial values and the order of the rows")
    # looking and saving
    eval_every: int = option(25, "steps between looks at the held-out loss")
    checkpoint_every: int = option(50, "steps between checkpoints")
    # the machine
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "bfloat16 is autocast; auto: where it is fast")
    activation_checkpointing: bool = option(False, "keep only the input of each block, compute the rest twice")

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "steps", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for name in ("context", "warmup", "clip", "weight_decay", "seed"):
            if not (0 <= getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or a positive number")
        for name in ("full_lr", "adapter_lr", "eps"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: expected a positive number")
        for name in ("beta1", "beta2"):
            if not (0 <= getattr(self, name) < 1):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to less than 1")
        if not (0 < self.held_out_share < 1):
            raise ValueError(f"held_out_share {self.held_out_share}: expected a share between 0 and 1")
        if self.held_out is not None and self.data is None:
            raise ValueError(f"held_out {self.held_out} without data: expected both, or none for the standard library")
        if self.blocks < 2:
            raise ValueError(f"blocks {self.blocks}: expected at least 2, one block is plain LoRA")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate {self.accumulate}: expected at most the batch, {self.batch}")
        self.adapter()

    @property
    def methods(self) -> tuple[Method, ...]:
        return METHODS if self.method == "all" else (self.method,)

    def adapter(self, rank: int = 0, blocks: int = 1) -> LoraConfig:
        """The adapter of lora and qlora, or one of another rank with the same scale, alpha / rank."""
        rank = rank or self.rank
        names = tuple(filter(None, map(str.strip, self.targets.split(","))))
        targets = ALL_LINEAR if names == (ALL_LINEAR,) else names
        alpha = self.alpha * rank / self.rank if self.rank else self.alpha
        return LoraConfig(rank=rank, alpha=alpha, targets=targets, dropout=self.dropout, blocks=blocks)

    def learning_rate(self, method: Method) -> float:
        """The peak."""
        return self.full_lr if method == "full" else self.adapter_lr


PRESETS = {
    "laptop": FinetuneConfig(),
    "smoke": FinetuneConfig(
        folder=Path("runs/finetune-smoke"), rank=4, alpha=8.0, batch=4, steps=6, warmup=2, eval_every=3,
        checkpoint_every=3,
    ),
}  # fmt: skip


def schedule(step: int, config: FinetuneConfig) -> float:
    """Share of the peak learning rate at update `step`, from 0 on: linear warmup, then linearly towards zero, which
    would come one step after the last."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return (config.steps - step) / max(1, config.steps - config.warmup)


def plain(config: FinetuneConfig) -> dict[str, Any]:
    """The config as values that JSON holds."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def deciding(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `plain` that decide a run's numbers."""
    return {name: value for name, value in fields.items() if name not in FREE}


def from_plain(fields: Mapping[str, Any], **changes: Any) -> FinetuneConfig:
    """The config that `plain` wrote, with changes."""
    names = ("folder", "folder_of_base", "data", "held_out", "hf")
    paths = {name: Path(fields[name]) for name in names if fields[name]}
    return replace(FinetuneConfig(**{**fields, **paths}), **changes)
