"""A GPT trained by our kernels is the one that torch's train: every gradient, then a whole run, on the CPU model.

Gradients of bfloat16 are rounded; so both are held to float32, and ours must be no further from it than torch's.
"""

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("cuda._simt", reason="make native builds the kernels")

from cuda import train_gpt
from cuda.train_gpt import PRESETS, KernelsConfig, gpt_arguments, train_with, updates
from minigpt.config import GPTConfig
from minigpt.model import GPT
from minigpt.optim import make_optimizers
from tests.cuda.attention_cases import error
from tests.cuda.products import DEVICES

CONFIGS = {
    "ours": {"mlp": "relu2", "qk_norm": True, "softcap": 15.0, "value_embeddings": True},
    "llama": {"mlp": "swiglu", "kv_heads": 1, "heads": 2, "softcap": 0.0, "tied": True},
    "gpt-2": {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "qk_norm": False, "qkv_bias": True,
              "output_bias": True, "mlp_bias": True, "softcap": 0.0},
    "window": {"mlp": "gelu_tanh", "window": 5, "window_pattern": "SL"},
}  # fmt: skip
TARGETS = {"z_loss": 1e-3}
KERNELS = ("cuda", "triton") if find_spec("triton") else ("cuda",)


def model(kernels: str, config: GPTConfig, device: str) -> GPT:
    made = GPT(config, **gpt_arguments(kernels, config.norm), seed=3).to(device)
    with torch.no_grad():  # matrices that start at zero would hide what flows through them
        for p in made.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_gradient(kernels, kind, device):
    config = GPTConfig(**{"vocab_size": 96, "layers": 2, "width": 64, "heads": 1, "kv_heads": 1, "head_width": 64,
                          "mlp_width": 72, "context": 24} | CONFIGS[kind])  # fmt: skip
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    targets = tokens.roll(-1, 1)
    options = TARGETS | ({"separator": 5} if kind == "llama" else {})
    found = {}
    for name, by, half in (("exact", "torch", False), ("torch", "torch", True), ("ours", kernels, True)):
        gpt = model(by, config, device)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = gpt(tokens, targets, **options)
        loss.backward()
        found[name] = {n: p.grad for n, p in gpt.named_parameters()} | {"loss": loss.detach()}
    assert set(found["ours"]) == set(found["exact"])
    for name, exact in found["exact"].items():
        if name.endswith("key.bias"):  # a shift of all scores of a query changes nothing: the gradient is zero
            scale = found["exact"][name.replace("key", "value")].norm()
            assert found["ours"][name].norm() <= 0.02 * scale, name
            continue
        ours, theirs = (error(found[by][name], exact) for by in ("ours", "torch"))
        assert ours <= 1.3 * theirs + 2e-3, f"{name}: {ours:.3g}, torch {theirs:.3g}"


@pytest.mark.parametrize("ours", KERNELS)
def test_a_step_of_all_optimizers(ours):
    """Three updates from the same gradients: Muon by our products, AdamW and clipping by our kernels."""
    config = replace(PRESETS["tiny"], steps=3, clip=0.5, weight_decay=0.1)
    models = [GPT(config.model_config(96), seed=0) for _ in range(2)]
    kinds = ("torch", ours)
    made = [make_optimizers(m, config, torch.float32, updates(k)) for m, k in zip(models, kinds, strict=True)]
    for step in range(3):
        norms = []
        for m, optimizers, kernels in zip(models, made, kinds, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in m.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            norms.append(updates(kernels).clip_grad_norm(list(m.parameters()), config.clip).item())
            for optimizer in optimizers:
                optimizer.step()
        assert math.isclose(*norms, rel_tol=1e-6)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name


def test_a_run_ends_with_the_same_loss(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i * i}\n" for i in range(300)))
    losses = []
    for kernels in ("torch", *KERNELS):
        config = replace(PRESETS["tiny"], kernels=kernels, corpus=str(text), folder=tmp_path / kernels, context=32)
        losses.append(train_with(config).bits_per_byte)
    for loss in losses[1:]:
        assert math.isclose(losses[0], loss, rel_tol=1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="dtype float32 with kernels cuda: expected bfloat16"):
        replace(PRESETS["tiny"], dtype="float32")
    with pytest.raises(ValueError, match=r"head width 32 with kernels cuda: expected one of 64, 96.*--head-width"):
        replace(PRESETS["tiny"], head_width=32)
    assert replace(PRESETS["tiny"], kernels="torch", head_width=32, dtype="float32").head_width == 32
    with pytest.raises(ValueError, match=r"head width 40 with kernels triton: expected one of .*64.*--head-width"):
        replace(PRESETS["tiny"], kernels="triton", head_width=40)
    assert replace(PRESETS["tiny"], kernels="triton", dtype="float32").dtype == "float32"
    with pytest.raises(ValueError, match="kernels 'metal': expected one of torch, cuda, triton"):
        gpt_arguments("metal")
    assert isinstance(PRESETS["gpu"], KernelsConfig) and set(train_gpt.PRESETS) == {"tiny", "gpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_curves_of_200_steps_coincide(tmp_path):
    """Step by step: two runs of the same data that differ in rounding alone."""
    small = {"layers": 4, "width": 384, "heads": 3, "kv_heads": 3, "batch": 8, "context": 512, "mlp_width": 1024}
    curves = []
    for kernels in ("torch", *KERNELS):
        config = replace(PRESETS["gpu"], kernels=kernels, folder=tmp_path / kernels, **small)
        train_with(config)
        lines = (tmp_path / kernels / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert all(len(curve) == 200 for curve in curves)
    for curve in curves[1:]:
        assert all(abs(one - other) <= 0.02 * one for one, other in zip(curves[0], curve, strict=True))
