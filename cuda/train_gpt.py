"""Stage 2's training with our kernels in place of torch's: `python -m cuda.train_gpt --kernels cuda --preset tiny`.

Products, attention, norms, rotary embedding, activations, embeddings, loss, AdamW, Muon's products and the gradient
norm are handed to minigpt as arguments; it imports nothing from here. On a CPU the kernels run on the model, those in
Triton (`--kernels triton`) by its interpreter: right, and slow. Everything else - data, folders, resuming - is `python
-m minigpt.train`. Refused: float32 with kernels in CUDA C++, since attention takes 16 bits.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from common import cli
from cuda import layers, linear, ops, optim
from cuda.device import KERNELS
from minigpt.model import GPT
from minigpt.optim import Muon, Updates
from minigpt.train import Result, configured, train
from minigpt.train_config import PRESETS as STAGE_2
from minigpt.train_config import TrainConfig, option

WIDTHS = {"cuda": ops.HEAD_DIMS, "triton": ops.TRITON_HEAD_DIMS}  # of heads, that attention has
LINEAR = {"cuda": linear.Linear, "triton": linear.TritonLinear}
EMBEDDINGS = {"cuda": layers.Embedding, "triton": layers.TritonEmbedding}
NORMS = {
    "cuda": {"rmsnorm": layers.RMSNorm, "layernorm": layers.LayerNorm},
    "triton": {"rmsnorm": layers.TritonRMSNorm, "layernorm": layers.TritonLayerNorm},
}


@dataclass(frozen=True, slots=True)
class KernelsConfig(TrainConfig):
    kernels: Literal["torch", "cuda", "triton"] = option(
        "cuda", "whose kernels: torch's, or ours in CUDA C++ or Triton"
    )

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.kernels == "cuda" and self.dtype == "float32":
            raise ValueError(f"dtype float32 with kernels {self.kernels}: expected bfloat16, attention takes 16 bits")
        width = self.head_width or self.width // self.heads
        if self.kernels != "torch" and width not in WIDTHS[self.kernels]:
            known = ", ".join(map(str, WIDTHS[self.kernels]))
            raise ValueError(f"head width {width} with kernels {self.kernels}: expected one of {known}; --head-width")


def preset(name: str, **changes: Any) -> KernelsConfig:
    of_stage_2 = {f: getattr(STAGE_2[name], f) for f in TrainConfig.__dataclass_fields__}
    return KernelsConfig(**(of_stage_2 | {"dtype": "bfloat16", "folder": Path(f"runs/kernels-{name}")} | changes))


PRESETS = {  # head widths that attention has; tiny is what the CPU model can run while one waits, text included
    "tiny": preset(
        "tiny", corpus="cuda/README.md", tokenizer="bytes", heads=1, kv_heads=1, head_width=64, batch=2, context=32,
        steps=2, warmup=1, eval_windows=2, eval_stride=32,
    ),
    "gpu": preset(
        "laptop", layers=12, width=768, heads=6, kv_heads=6, head_width=128, mlp_width=2048, context=1024, batch=32,
        steps=200, eval_stride=512, folder=Path("runs/kernels-gpu"),
    ),
}  # fmt: skip


def linear_cross_entropy(
    x_BTC: Tensor, weight_VC: Tensor, targets_BT: Tensor, *, softcap: float, z_loss: float, kernels: str
) -> Tensor:
    """GPT's `loss_fn`: the logits never exist whole. Under autocast in its type, but for the gradient of the weight."""
    return ops.linear_cross_entropy(x_BTC, weight_VC, targets_BT, softcap=softcap, z_loss=z_loss, kernels=kernels)


def activate(kind: str, h_BTF: Tensor, gate_BTF: Tensor | None = None, *, kernels: str = "cuda") -> Tensor:
    """minigpt.model.activate by our kernels."""
    if kind == "swiglu":
        return ops.swiglu(gate_BTF, h_BTF, kernels=kernels)
    if kind == "relu2":
        return ops.relu2(h_BTF, kernels=kernels)
    return ops.gelu(h_BTF, approximate="tanh" if kind == "gelu_tanh" else "none", kernels=kernels)


def gpt_arguments(kernels: str, norm: str = "rmsnorm") -> dict[str, Any]:
    """Arguments of minigpt.model.GPT; `norm` is GPTConfig.norm. Raises ValueError for kernels that do not exist."""
    if kernels == "torch":
        return {}
    if kernels not in KERNELS:
        raise ValueError(f"kernels {kernels!r}: expected one of torch, {', '.join(KERNELS)}")
    functions = {
        "attention_fn": ops.causal_attention,
        "rotary_fn": ops.rotary,
        "activation_fn": activate,
        "loss_fn": linear_cross_entropy,
    }
    classes = {"linear_cls": LINEAR[kernels], "norm_cls": NORMS[kernels][norm], "embedding_cls": EMBEDDINGS[kernels]}
    return classes | {name: partial(function, kernels=kernels) for name, function in functions.items()}


def updates(kernels: str) -> Updates:
    """Optimizers and clipping."""
    if kernels == "torch":
        return Updates()
    multiply = partial(ops.matmul, kernels=kernels)
    return Updates(
        partial(optim.AdamW, kernels=kernels),
        partial(Muon, multiply=multiply),
        partial(optim.clip_grad_norm_, kernels=kernels),
    )


def train_with(config: KernelsConfig, **others: Any) -> Result:
    """minigpt.train.train with these kernels; see there."""
    build = partial(GPT, **gpt_arguments(config.kernels, config.norm))
    return train(config, build=build, updates=updates(config.kernels), **others)


def main() -> None:
    config = configured(None, presets=PRESETS, default_preset="tiny")
    result = train_with(config)
    print(
        f"kernels {config.kernels}: held-out text {result.bits_per_byte:.4f} bits per byte after {config.steps} steps, "
        f"{result.train_seconds:.1f} s; see {config.folder}/metrics.jsonl"
    )


if __name__ == "__main__":
    cli.run(main)
