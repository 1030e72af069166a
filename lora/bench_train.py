"""One training step of an adapter beside PEFT's: seconds and bytes, ours and transformers + PEFT by turns.

Both sides have the same weights, adapter, batch and loss function, and a fused AdamW over the adapter alone. Theirs
reads our files, and has torch's attention, no cache, and torch's GELU where transformers would spell it out. In
bfloat16 the frozen weights are bfloat16, the adapters float32, and autocast is on. Refused: timing a pair whose losses
or gradients differ.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import timing
from lora.bench_config import BenchConfig, peer
from lora.config import ALL_LINEAR, LoraConfig
from lora.lora import adapter_of, adapter_parameters, add_adapter
from lora.peft_files import save_adapter
from minigpt.bench import GPT2_124M, GPT2_KIND, random_gpt
from minigpt.config import GPTConfig
from minigpt.hf import save_pretrained
from minigpt.model import GPT, mean_cross_entropy
from parallel.memory import LiveBytes

RANK, ALPHA = 8, 16.0
LLAMA_KIND = {"mlp": "swiglu", "qk_norm": False, "softcap": 0.0, "tied": True}
TINY = {"vocab_size": 4096, "context": 1024, "layers": 5, "width": 384, "heads": 6}
GPT2_10M = GPTConfig(**TINY, kv_heads=6, mlp_width=1536, **GPT2_KIND)
LLAMA_10M = GPTConfig(**TINY, kv_heads=2, mlp_width=1024, **LLAMA_KIND)
# What PEFT adapts unless told otherwise: in a GPT-2 the one matrix of query, key and value, in a Llama query and value.
MODELS = {
    "gpt2-10m": (GPT2_10M, ("c_attn",)),
    "llama-10m": (LLAMA_10M, ("q_proj", "v_proj")),
    "gpt2-124m": (GPT2_124M, ("c_attn",)),
}
COMPILED = {"cpu": "gpt2-10m", "cuda": "gpt2-124m"}  # measured as torch compiles it, too: with all linear layers
# Relative, of the loss and of the norm of the difference of each gradient, which bfloat16 alone moves by some 4 %.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    gpt: GPTConfig
    targets: tuple[str, ...] | str
    dtype: torch.dtype
    shape: tuple[int, int]  # rows, tokens of each
    device: str
    compiled: bool

    def batch(self) -> Batch:
        rows, tokens = self.shape
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(self.gpt.vocab_size, (rows, tokens + 1), generator=generator).to(self.device)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def said(self) -> dict[str, Any]:
        targets = self.targets if isinstance(self.targets, str) else " ".join(self.targets)
        return {"model": self.model, "targets": targets, "dtype": str(self.dtype).removeprefix("torch.")}


def cases(config: BenchConfig) -> Iterator[Case]:
    """On a CPU in both dtypes and with few tokens, on CUDA in bfloat16."""
    on_gpu = config.device == "cuda"
    for name in ("gpt2-10m", "llama-10m") if config.quick else MODELS:
        gpt, attention = MODELS[name]
        shape = (16, 1024) if on_gpu else (1, 128) if name == "gpt2-124m" else (4, 128)
        if config.quick:
            heads = {"heads": 4, "kv_heads": min(4, gpt.kv_heads)}
            shape, gpt = (2, 12), replace(gpt, vocab_size=64, context=16, layers=2, width=48, mlp_width=64, **heads)
        for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
            yield Case(name, gpt, attention, dtype, shape, config.device, False)
            compiled = config.compile and name == COMPILED[config.device] and (on_gpu or dtype == torch.float32)
            yield Case(name, gpt, ALL_LINEAR, dtype, shape, config.device, compiled)


# ---- the two sides ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Side:
    """A model with an adapter. `loss(*batch)` is the mean cross-entropy, `named()` the gradients by PEFT's names."""

    case: Case
    model: nn.Module
    loss: Callable[..., Tensor]
    batch: Batch
    optimizer: torch.optim.Optimizer
    named: Callable[[], dict[str, Tensor]]

    def backward(self) -> Tensor:
        mixed = self.case.dtype == torch.bfloat16
        with torch.autocast(self.case.device, torch.bfloat16, enabled=mixed):
            loss = self.loss(*self.batch)
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        """Returns the loss before it."""
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """With the loss; none are left behind."""
        loss = self.backward()
        found = {name: gradient.float() for name, gradient in self.named().items()}
        self.optimizer.zero_grad()
        return loss, found

    def compiled(self) -> "Side":
        """The same, model and loss in one graph."""
        return replace(self, loss=torch.compile(self.loss))

    def held(self) -> list[Tensor]:
        """What stays from step to step: weights, tables, the optimizer's moments."""
        states = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *states]

    def held_bytes(self) -> int:
        """Each storage once."""
        storages = [x.untyped_storage() for x in self.held()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def pair(case: Case) -> dict[str, Side]:
    """Ours and theirs: the base and the adapter go over by files, so the formats are part of what is checked."""
    ours, batch = random_gpt(case.gpt), case.batch()
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        save_pretrained(ours, base)
        add_adapter(ours, LoraConfig(rank=RANK, alpha=ALPHA, targets=case.targets))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(2)
            for p in adapter_parameters(ours):  # B is zero before, and A would have no gradient
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        save_adapter(ours, adapter)
        theirs = _theirs(case, base, adapter)
    sides = {}
    for name, model, loss, named in (
        ("ours", ours, ours, partial(_our_gradients, ours)),
        ("PEFT", theirs, partial(_their_loss, theirs), partial(_their_gradients, theirs)),
    ):
        for p in model.parameters():
            p.data = p.data.to(case.device, torch.float32 if p.requires_grad else case.dtype)
        for holder in model.modules():  # the rotary tables stay in their dtypes
            holder._buffers.update({key: x.to(case.device) for key, x in holder._buffers.items() if x is not None})
        # So small a rate leaves the values where they are: each step is the first one, and can be compared.
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=True)
        sides[name] = Side(case, model.train(), loss, batch, optimizer, named)
    return sides


def _theirs(case: Case, base: Path, adapter: Path) -> nn.Module:
    transformers, peft = peer("transformers"), peer("peft")
    transformers.utils.logging.disable_progress_bar()
    options = {"activation_function": "gelu_pytorch_tanh"} if case.gpt.mlp == "gelu_tanh" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, attn_implementation="sdpa", dtype=torch.float32, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set by itself; tied embeddings are not merged here
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def _their_loss(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Without `labels`, for which transformers would shift and copy the logits."""
    return mean_cross_entropy(model(input_ids=tokens_BT, use_cache=False).logits.float(), targets_BT)


def _their_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _our_gradients(model: GPT) -> dict[str, Tensor]:
    found = {}
    for place, parts in adapter_of(model, "default").items():
        prefix = f"base_model.model.{place.theirs}"
        found[f"{prefix}.lora_A.default.weight"] = parts[0].A.grad
        found[f"{prefix}.lora_B.default.weight"] = torch.cat([part.B.grad for part in parts])
    return found


# ---- check and measure -----------------------------------------------------------------------------------------------


def check(ours: Side, theirs: Side) -> dict[str, float]:
    """The relative difference of the losses, and the largest of the gradients. Raises ValueError where one is large."""
    (loss, gradients), (their_loss, their_gradients) = ours.gradients(), theirs.gradients()
    dtype, who = ours.case.dtype, ", ".join(ours.case.said().values())
    if gradients.keys() != their_gradients.keys():
        odd = sorted(gradients.keys() ^ their_gradients.keys())
        raise ValueError(f"{who}: gradients of {', '.join(odd)} are on one side only, nothing was timed")
    loss_error = ((loss - their_loss).abs() / their_loss.abs()).item()
    errors = {name: ((gradients[name] - g).norm() / g.norm()).item() for name, g in their_gradients.items()}
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    if not loss_error <= LOSS_TOLERANCE[dtype]:
        raise ValueError(f"{who}: the losses {loss:.6f} and {their_loss:.6f} differ, nothing was timed")
    if not errors[worst] <= GRADIENT_TOLERANCE[dtype]:
        raise ValueError(f"{who}: the gradient of {worst} is {errors[worst]:.2g} off, nothing was timed")
    return {"loss_error": loss_error, "gradient_error": errors[worst]}


def step_bytes(side: Side) -> int:
    """What a step needs at its worst moment beyond what is held between steps: activations, gradients, copies."""
    if side.case.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        for x in (*side.held(), *side.batch):
            live.add(x)
        before = live.now()
        side.step()
        return live.peak - before


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    sides = pair(case)
    errors = check(sides["ours"], sides["PEFT"])
    steps, memory = {}, {}
    for name, side in sides.items():
        side.step()  # the moments are there from now on
        memory[name] = {"held_mb": side.held_bytes() / 1e6, "step_mb": step_bytes(side) / 1e6}
        steps[name, "eager"] = side.step
    if case.compiled:
        for name, side in sides.items():
            steps[name, "compiled"] = side.compiled().step
    tolerance = LOSS_TOLERANCE[case.dtype]
    taken = timing.compare(steps, rounds=rounds, warmup=2, check=timing.close(tolerance), device=case.device, inner=1)
    tokens, trained = case.shape[0] * case.shape[1], sum(p.numel() for p in adapter_parameters(sides["ours"].model))
    size = sides["ours"].model.num_parameters()
    return [
        case.said() | {
            "by": name, "how": how, "parameters": size, "trained": trained, "tokens": tokens,
            "step_ms": 1e3 * samples.median, "tokens_per_s": tokens / samples.median,
            "vs_peft": taken["PEFT", how].median / samples.median if name == "ours" else None,
            **(memory[name] if how == "eager" else {}), **errors, "samples": samples,
        }
        for (name, how), samples in taken.items()
    ]  # fmt: skip


def rows(config: BenchConfig) -> Iterator[dict[str, Any]]:
    for case in cases(config):
        yield from measure(case, config.rounds)
