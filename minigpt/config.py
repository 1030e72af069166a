"""What a model is and what a training run is: the fields of the command line, the presets, the learning rate.

Plain numbers without torch, so that the numpy model reads the same ones. Refused, before any work: numbers out of
range, heads that do not divide the width, a batch that does not divide.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from minigpt.data import VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class GPTConfig:
    vocab_size: int = 256
    context: int = 256
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 4
    mlp: Literal["swiglu", "relu2"] = "relu2"
    mlp_width: int = 512
    qk_norm: bool = True
    tied: bool = False
    softcap: float = 15.0  # logits become softcap * tanh(logits / softcap); 0 leaves them alone
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width {self.width} over {self.heads} heads: expected an even whole head width")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads}: expected a divisor of heads, {self.heads}")
        if self.mlp not in ("swiglu", "relu2"):
            raise ValueError(f"mlp {self.mlp!r}: expected 'swiglu' or 'relu2'")
        for name in ("rope_base", "norm_eps"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: expected a positive number")
        if not (0 <= self.softcap < math.inf):
            raise ValueError(f"softcap {self.softcap}: expected a positive number, or 0 for none")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class TrainConfig:
    folder: Path = field(default=Path("runs/minigpt"), metadata={"help": "folder of this run"})
    resume: bool = option(False, "continue the run in that folder from its checkpoint")
    corpus: str = option("stdlib", "'stdlib', or the path of a folder or text file")
    layers: int = option(4, "transformer blocks")
    width: int = option(128, "channels of the residual stream")
    heads: int = option(2, "query heads")
    kv_heads: int = option(2, "key/value heads, a divisor of heads")
    mlp: Literal["swiglu", "relu2"] = option("swiglu", "activation of the MLP")
    mlp_width: int = option(352, "hidden channels of the MLP")
    qk_norm: bool = option(True, "normalise queries and keys")
    tied: bool = option(False, "the head is the embedding matrix")
    softcap: float = option(15.0, "logits become softcap * tanh(logits / softcap); 0 for none")
    rope_base: float = option(100.0, "the slowest rotary channel turns by about 1/rope_base a token")
    context: int = option(128, "tokens in a window")
    batch: int = option(4, "windows in a step, over all ranks")
    accumulate: int = option(1, "a rank's share of the batch is worked off in this many parts")
    steps: int = option(1000, "optimizer steps")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    warmup: int = option(50, "steps of linear warmup")
    floor: float = option(0.05, "the cosine ends at this share of the peak")
    weight_decay: float = option(0.1, "decay of the matrices; gains do not decay")
    beta2: float = option(0.99, "AdamW's memory of squared gradients")
    clip: float = option(1.0, "largest global gradient norm; 0 for no clipping")
    seed: int = option(0, "of the initial weights and the order of the data")
    eval_every: int = option(100, "steps between looks at held-out text")
    eval_windows: int = option(64, "windows in such a look; the last step evaluates all of the text")
    eval_stride: int = option(64, "by how much the windows of the evaluation advance")
    checkpoint_every: int = option(100, "steps between checkpoints")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "bfloat16 is autocast; auto: where it is fast")
    compile: bool = option(False, "torch.compile the model")

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "steps", "eval_every", "eval_windows", "eval_stride", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for name in ("warmup", "weight_decay", "clip", "seed"):
            if not (0 <= getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or a positive number")
        if not (0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate {self.learning_rate}: expected a positive number")
        if not (0 <= self.floor <= 1):
            raise ValueError(f"floor {self.floor}: expected 0 to 1")
        if not (0 <= self.beta2 < 1):
            raise ValueError(f"beta2 {self.beta2}: expected 0 to less than 1")
        if self.eval_stride > self.context:
            raise ValueError(f"eval_stride {self.eval_stride}: expected 1 to the context, {self.context}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is not divisible by accumulate {self.accumulate}")
        self.model_config()

    def model_config(self) -> GPTConfig:
        shared = {f.name for f in fields(GPTConfig)} & {f.name for f in fields(self)}
        return GPTConfig(vocab_size=VOCAB_SIZE, **{name: getattr(self, name) for name in shared})

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"


PRESETS = {
    "laptop": TrainConfig(),
    "tiny": TrainConfig(
        folder=Path("runs/tiny"), layers=2, width=32, mlp="relu2", mlp_width=64, context=64, eval_stride=64,
        batch=8, steps=60, warmup=5, learning_rate=1e-2, eval_every=20, eval_windows=16, checkpoint_every=20,
    ),
}  # fmt: skip


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of update `step`, counted from 0: linear to the peak in `warmup` steps, then a cosine down to floor * peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.learning_rate * (config.floor + (1 - config.floor) * (1 + math.cos(math.pi * min(share, 1.0))) / 2)


def plain(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide a run's numbers, as values a checkpoint may hold."""
    return {name: value for name, value in asdict(config).items() if name not in ("folder", "resume")}
