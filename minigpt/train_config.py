"""What a training run is: the fields of the command line, the presets, the schedule of the learning rates.

Plain numbers without torch. Refused, before any work: numbers out of range, a batch that does not divide, and whatever
the model's own config refuses.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from minigpt.config import GPTConfig


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class TrainConfig:
    folder: Path = field(default=Path("runs/minigpt"), metadata={"help": "folder of this run"})
    resume: bool = option(False, "continue the run in that folder from its newest checkpoint")
    corpus: str = option("stdlib", "'stdlib', 'python', a text folder or file, shards, fineweb10B:N, hf:owner/name")
    tokenizer: str = option("auto", "'bytes', 'bpe:N', a path, or 'auto': bpe:2048 for text, shards bring theirs")
    # the model
    layers: int = option(4, "transformer blocks")
    width: int = option(192, "channels of the residual stream")
    heads: int = option(2, "query heads")
    kv_heads: int = option(2, "key/value heads, a divisor of heads")
    head_width: int = option(0, "channels of a head; 0 for width / heads")
    positions: Literal["rotary", "learned"] = option("rotary", "how a token knows where it stands")
    rope_base: float = option(100.0, "the slowest rotary channel turns by about 1/rope_base a token")
    norm: Literal["rmsnorm", "layernorm"] = option("rmsnorm", "normalisation before each branch")
    mlp: Literal["swiglu", "relu2", "gelu", "gelu_tanh"] = option("swiglu", "activation of the MLP")
    mlp_width: int = option(512, "hidden channels of the MLP")
    bias: bool = option(False, "biases in the linear layers of the blocks")
    qk_norm: bool = option(True, "normalise queries and keys")
    tied: bool = option(False, "the head is the embedding matrix")
    softcap: float = option(15.0, "logits become softcap * tanh(logits / softcap); 0 for none")
    window: int = option(0, "tokens that a sliding layer sees; 0 for all")
    window_pattern: str = option("S", "S sliding, L long, repeated over the layers")
    value_embeddings: bool = option(True, "every second layer adds an embedding of the token to its values")
    vocab_multiple: int = option(64, "the vocabulary is padded to a multiple of this")
    document_mask: bool = option(False, "no attention across documents")
    # the data
    context: int = option(128, "tokens in a window")
    batch: int = option(8, "windows in a step, over all ranks")
    accumulate: int = option(1, "a rank's share of the batch is worked off in this many parts")
    steps: int = option(1000, "optimizer steps")
    # the optimizer
    optimizer: Literal["adamw", "muon"] = option("muon", "of the matrices in the blocks; the rest has AdamW")
    muon_lr: float = option(0.014, "peak of Muon, for the matrices")
    learning_rate: float = option(1e-3, "peak of AdamW, for the matrices where it has them")
    embedding_lr: float = option(0.1, "peak for the embeddings; 0 for learning_rate")
    head_lr: float = option(0.01, "peak for the head; 0 for learning_rate")
    gain_lr: float = option(0.01, "peak for gains and biases; 0 for learning_rate")
    momentum: float = option(0.95, "of Muon")
    beta1: float = option(0.9, "AdamW's memory of gradients")
    beta2: float = option(0.99, "AdamW's memory of squared gradients")
    eps: float = option(1e-8, "added to AdamW's denominator")
    weight_decay: float = option(0.0, "decay of the matrices and the head; gains and biases do not decay")
    embedding_decay: float = option(0.0, "decay of the embeddings")
    schedule: Literal["cosine", "wsd"] = option("wsd", "after the warmup: a cosine, or stable and then a linear decay")
    warmup: int = option(20, "steps of linear warmup")
    cooldown: float = option(0.6, "share of the steps in wsd's decay")
    floor: float = option(0.0, "the schedule ends at this share of the peak")
    clip: float = option(1.0, "largest global gradient norm; 0 for no clipping")
    z_loss: float = option(0.0, "weight of mean(log Z squared) in the loss")
    ema: float = option(0.0, "decay of an average of the weights that is evaluated and sampled; 0 for none")
    seed: int = option(0, "of the initial weights and the order of the data")
    # looking and saving
    eval_every: int = option(100, "steps between looks at held-out text")
    eval_windows: int = option(64, "windows in such a look; the last step evaluates all of the text")
    eval_stride: int = option(64, "by how much the windows of the evaluation advance")
    checkpoint_every: int = option(100, "steps between checkpoints")
    keep: int = option(2, "checkpoints kept, the newest")
    # the machine
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "bfloat16 is autocast; auto: where it is fast")
    compile: bool = option(False, "torch.compile the model")
    activation_checkpointing: bool = option(False, "keep only the input of each block, compute the rest twice")
    peak_tflops: float = option(0.0, "of the device in this dtype, for the MFU; 0 measures a matrix product")

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "steps", "eval_every", "eval_windows", "eval_stride", "checkpoint_every",
                     "keep", "vocab_multiple"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for name in ("warmup", "weight_decay", "embedding_decay", "clip", "seed", "z_loss", "embedding_lr", "head_lr",
                     "gain_lr", "peak_tflops"):  # fmt: skip
            if not (0 <= getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or a positive number")
        for name in ("learning_rate", "muon_lr", "eps"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: expected a positive number")
        for name in ("beta1", "beta2", "momentum", "ema"):
            if not (0 <= getattr(self, name) < 1):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to less than 1")
        for name in ("floor", "cooldown"):
            if not (0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 1")
        if self.eval_stride > self.context:
            raise ValueError(f"eval_stride {self.eval_stride}: expected 1 to the context, {self.context}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is not divisible by accumulate {self.accumulate}")
        self.model_config(256)

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model for a tokenizer of this vocabulary, which is padded: odd sizes are slow to multiply."""
        shared = {f.name for f in fields(GPTConfig)} & {f.name for f in fields(self)}
        padded = -(-vocab_size // self.vocab_multiple) * self.vocab_multiple
        biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), self.bias)
        return GPTConfig(vocab_size=padded, **biases, **{name: getattr(self, name) for name in shared})


FREE = ("device", "keep", "checkpoint_every", "peak_tflops")

PRESETS = {
    "laptop": TrainConfig(),
    "tiny": TrainConfig(
        folder=Path("runs/tiny"), tokenizer="bpe:512", layers=2, width=32, mlp="relu2", mlp_width=64, context=64,
        steps=60, warmup=5, eval_every=20, eval_windows=16, checkpoint_every=20,
    ),
}  # fmt: skip


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at update `step`, from 0 on: linear warmup, then a cosine or stable and decay.

    The cosine ends at `floor` in the last step; wsd falls linearly over the last `cooldown` of all steps, towards
    `floor` one step after the last, so that no step is wasted on a rate of zero.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    last = config.steps - 1
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, last - config.warmup)
        return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return config.floor + (1 - config.floor) * min(max(left, 0.0), 1.0)


def plain(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint keeps of the config, as values that JSON holds."""
    return {name: value for name, value in asdict(config).items() if name not in ("folder", "resume")}


def deciding(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `plain` that decide a run's numbers: the others may change when it is resumed."""
    return {name: value for name, value in fields.items() if name not in FREE}
