"""How fast the GPT trains and samples, beside peers in the same process: `python -m minigpt.bench`.

Training: one step - forward, backward, clipping, AdamW - of the configuration that nanoGPT calls its CPU run (block 64,
batch 12, 4 layers, 4 heads, 128 wide), ours beside the same function written with plain torch modules, both also
compiled. Sampling: a GPT-2 of that kind with and without cache, beside transformers' generate. On CUDA: GPT-2 124M at
1,024 tokens in bfloat16, with its MFU. Results go to results/minigpt/. Refused: timing steps whose losses disagree.
Tokenizers are measured by `python -m minigpt.bench_tokenizer`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import cli, timing
from common.cli import UserError
from common.results import save_result
from minigpt.config import GPTConfig
from minigpt.generate import generate
from minigpt.hf import save_pretrained
from minigpt.model import GPT
from minigpt.sampling import Sampling

GPT2_KIND = {
    "positions": "learned", "norm": "layernorm", "norm_eps": 1e-5, "mlp": "gelu_tanh", "qk_norm": False, "softcap": 0.0,
    "tied": True, "qkv_bias": True, "output_bias": True, "mlp_bias": True,
}  # fmt: skip
SMALL = GPTConfig(vocab_size=65, context=64, layers=4, width=128, heads=4, kv_heads=4, mlp_width=512, **GPT2_KIND)
GPT2_124M = GPTConfig(
    vocab_size=50304, context=1024, layers=12, width=768, heads=12, kv_heads=12, mlp_width=3072, **GPT2_KIND
)
SAMPLED = GPTConfig(vocab_size=512, context=256, layers=4, width=128, heads=4, kv_heads=4, mlp_width=512, **GPT2_KIND)
HOPPER_BF16 = 989.4e12  # FLOP/s dense, NVIDIA's data sheets of the H100 SXM and the H200


@dataclass(frozen=True, slots=True)
class BenchConfig:
    what: Literal["all", "training", "sampling"] = field(default="all", metadata={"help": "which part"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where to run"})
    rounds: int = field(default=15, metadata={"help": "samples of each competitor, taken in turn"})
    batch: int = field(default=0, metadata={"help": "sequences in a training step; 0: 12 on a CPU, 32 on CUDA"})
    compile: bool = field(default=True, metadata={"help": "measure torch.compile too"})
    new_tokens: int = field(default=100, metadata={"help": "tokens in a sample"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def __post_init__(self) -> None:
        for name in ("rounds", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.batch < 0:
            raise ValueError(f"batch {self.batch}: expected a positive number, or 0 for the usual one")
        if self.new_tokens >= SAMPLED.context:
            raise ValueError(f"new_tokens {self.new_tokens}: expected less than {SAMPLED.context}, the context")


class PlainBlock(nn.Module):
    """What a good tutorial writes: one projection for q, k, v, torch's attention, GELU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.output = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """The baseline, with the weights of `model`."""

    def __init__(self, model: GPT):
        super().__init__()
        config = model.config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.load_state_dict(_plain_state(model))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits = F.linear(self.norm(self.blocks(x)), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _plain_state(model: GPT) -> dict[str, Tensor]:
    """Our weights under the baseline's names; q, k, v one under another."""
    ours, state = model.state_dict(), {}
    names = {"attention_norm": "norm1", "mlp_norm": "norm2", "attention.output": "output", "mlp.up": "mlp.0"}
    names |= {"mlp.down": "mlp.2"}
    for layer in range(model.config.layers):
        for kind in ("weight", "bias"):
            parts = [ours[f"blocks.{layer}.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"blocks.{layer}.qkv.{kind}"] = torch.cat(parts)
            for old, new in names.items():
                state[f"blocks.{layer}.{new}.{kind}"] = ours[f"blocks.{layer}.{old}.{kind}"]
    shared = {"embedding.weight": "embedding.weight", "position_embedding.weight": "positions.weight"}
    shared |= {f"norm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")}
    return state | {new: ours[old] for old, new in shared.items()}


def random_gpt(config: GPTConfig) -> GPT:
    """Nothing at zero: the branches must matter for the check."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05 + (p.ndim == 1))
    return model


def training_step(model: nn.Module, forward: Callable, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Callable:
    """A function that makes one step and returns the loss before it and the norm of its gradient, which a check can
    compare; at a learning rate so small that both stay put."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    device = rows[0].device.type

    def step() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = forward(*rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    return step


def bench_training(config: BenchConfig, device: str) -> list[dict[str, Any]]:
    on_gpu = device == "cuda"
    shape, dtype = (GPT2_124M, torch.bfloat16) if on_gpu else (SMALL, torch.float32)
    batch = config.batch or (32 if on_gpu else 12)
    ours = random_gpt(shape).to(device)
    plain = PlainGPT(ours).to(device)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(shape.vocab_size, (batch, shape.context + 1), generator=generator).to(device)
    rows = (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    models = {"ours": ours, "plain torch": plain}
    steps = {name: training_step(model, model, rows, dtype) for name, model in models.items()}
    if config.compile:
        for name, model in models.items():
            compiled = torch.compile(model)
            steps[f"{name}, compiled"] = training_step(model, compiled, rows, dtype)
    tolerance = 1e-2 if on_gpu else 1e-5
    samples = timing.compare(
        steps, rounds=config.rounds, warmup=3, check=timing.close(tolerance), device=device, inner=None
    )
    peak = timing.gemm_peak(str(dtype).removeprefix("torch."), device)
    flops, tokens = ours.num_flops_per_token(), batch * shape.context
    baseline = samples["plain torch"].median
    hopper = on_gpu and any(name in torch.cuda.get_device_name() for name in ("H100", "H200"))
    return [
        {
            "case": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "step_ms": 1e3 * taken.median,
            "tokens_per_s": tokens / taken.median, "beside_plain": baseline / taken.median, "gemm_peak_flops": peak,
            "of_peak": flops * tokens / taken.median / peak, "parameters": ours.num_parameters(), "samples": taken,
            **({"mfu_of_data_sheet": flops * tokens / taken.median / HOPPER_BF16} if hopper else {}),
        }
        for name, taken in samples.items()
    ]  # fmt: skip


def bench_sampling(config: BenchConfig, device: str) -> list[dict[str, Any]]:
    """Greedy, one prompt of 32 tokens and eight ragged ones; transformers gets our weights through minigpt.hf."""
    import transformers

    model = random_gpt(SAMPLED).to(device).eval()
    with torch.no_grad():  # larger logits: a tie between two tokens would make the check a matter of rounding
        model.embedding.weight.mul_(10)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(512, (32 + 8 * row,), generator=generator).tolist() for row in range(8)]
    options = {"max_new_tokens": config.new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def ours(rows: list[list[int]], use_cache: bool) -> Tensor:
        steps = generate(
            model, rows, max_new_tokens=config.new_tokens, sampling=Sampling(temperature=0), use_cache=use_cache
        )
        return torch.tensor(list(steps)).T

    def peer(rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        return theirs.generate(padded, attention_mask=mask, **options)[:, longest:].cpu()

    rows = []
    for group in (prompts[:1], prompts):
        functions = {
            "ours, cache": lambda group=group: ours(group, True),
            "ours, no cache": lambda group=group: ours(group, False),
            "transformers": lambda group=group: peer(group),
        }
        samples = timing.compare(
            functions, rounds=config.rounds, warmup=1, check=timing.close(0), device=device, inner=1
        )
        count = config.new_tokens * len(group)
        rows += [
            {
                "case": name, "rows": len(group), "new_tokens": config.new_tokens, "tokens_per_s": count / taken.median,
                "beside_transformers": samples["transformers"].median / taken.median, "samples": taken,
            }
            for name, taken in samples.items()
        ]  # fmt: skip
    return rows


def main() -> None:
    config = cli.parse(BenchConfig, prog=cli.program(), description="training and sampling speed beside peers")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no CUDA device")
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    for name, bench in (("training", bench_training), ("sampling", bench_sampling)):
        if config.what not in ("all", name):
            continue
        rows = bench(config, device)
        for row in rows:
            print("  ".join(f"{key} {value:,.3g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in row.items() if key != "samples"))  # fmt: skip
        print(save_result("minigpt", name, rows, config=config, device=device, root=config.out))


if __name__ == "__main__":
    cli.run(main)
