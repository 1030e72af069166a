"""Checkpoints against transformers: its random models of each family, read and written, logits and gradients compared.

transformers rounds RMSNorm, the rotary tables and (eager) softmax to float32 even in a float64 model. The float64
comparisons therefore replace RMSNorm and rotary tables of their model by the same definitions in float64 and use its
sdpa attention; that the definitions are the same is part of the float32 comparison, which runs their code untouched.
"""

import json
import math
import os
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from minigpt.hf import load_pretrained, save_pretrained
from minigpt.model import causal_attention, rotary_tables

CONTEXT = 40
GPT2 = {"vocab_size": 31, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 4}
LLAMA = {"vocab_size": 31, "max_position_embeddings": CONTEXT, "hidden_size": 16, "intermediate_size": 20}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
ROPE = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 16}
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]

gpt2 = partial(GPT2Config, **GPT2, bos_token_id=None, eos_token_id=None)
llama, qwen2, qwen3 = (partial(config, **LLAMA) for config in (LlamaConfig, Qwen2Config, Qwen3Config))
CASES = {
    "gpt2": gpt2(),
    "gpt2 n_inner, eps": gpt2(n_inner=11, layer_norm_epsilon=0.05),
    "gpt2 exact gelu": gpt2(activation_function="gelu"),
    "gpt2 untied": gpt2(tie_word_embeddings=False),
    "llama": llama(),
    "llama multi-head": llama(num_key_value_heads=4),
    "llama multi-query": llama(num_key_value_heads=1),
    "llama wide heads, eps": llama(head_dim=6, rms_norm_eps=0.05),
    "llama tied": llama(tie_word_embeddings=True),
    "llama attention_bias": llama(attention_bias=True),
    "llama mlp_bias": llama(mlp_bias=True),
    "llama scaled": llama(rope_parameters=ROPE),
    "qwen2": qwen2(),
    "qwen2 windows": qwen2(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": qwen3(),
    "qwen3 wide heads, tied": qwen3(head_dim=10, tie_word_embeddings=True, rope_parameters={"rope_theta": 77.0}),
    "qwen3 multi-head, bias": qwen3(num_key_value_heads=4, attention_bias=True),
    "qwen3 windows": qwen3(num_hidden_layers=3, use_sliding_window=True, sliding_window=7, layer_types=MIXED),
    "qwen3 one window": qwen3(num_hidden_layers=3, use_sliding_window=True, sliding_window=3, max_window_layers=0),
}
ONE_EACH = ["gpt2 n_inner, eps", "llama scaled", "qwen2 windows", "qwen3 windows", "qwen3 wide heads, tied"]


def random_hf(config, attention="sdpa"):
    """Every parameter random, gains and biases too, in float64."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 2 else 0.4) + (p.ndim == 1))
    return model


def float64_norm(self, x):
    return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def float64_speed(i: int, width: int, rope: dict) -> float:
    """Radians per token of pair i; Llama 3's scaling as its authors wrote it, in wavelengths."""
    speed = rope["rope_theta"] ** (-2 * i / width)
    if rope["rope_type"] == "default":
        return speed
    wavelength, original = 2 * math.pi / speed, rope["original_max_position_embeddings"]
    if wavelength < original / rope["high_freq_factor"]:
        return speed
    if wavelength > original / rope["low_freq_factor"]:
        return speed / rope["factor"]
    smooth = (original / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    return (1 - smooth) * speed / rope["factor"] + smooth * speed


def in_float64(model):
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(float64_norm, module)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            half, rope = len(module.inv_freq), module.config.rope_parameters
            speeds = torch.tensor([float64_speed(i, 2 * half, rope) for i in range(half)], dtype=torch.float64)
            torch.testing.assert_close(speeds.float(), module.inv_freq.float(), rtol=1e-6, atol=0)

            def tables(x, position_ids, speeds=speeds):
                angles = position_ids[..., None] * torch.cat([speeds, speeds])
                return angles.cos(), angles.sin()

            module.forward = tables
    return model


def tokens(T: int = 37, B: int = 2):
    return torch.randint(31, (B, T), generator=torch.Generator().manual_seed(T))


def assert_close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = (ours - theirs).abs().max().item()
    assert error <= tolerance, error


def changed(folder: Path, file: str = "config.json", **changes) -> None:
    """Rewrites config.json; a value of None removes the field."""
    config = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    """A function that saves transformers' random model of a config and returns the folder."""

    def save(config, name="theirs", **arguments) -> Path:
        random_hf(config).save_pretrained(tmp_path / name, **arguments)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name, tmp_path):
    theirs = random_hf(CASES[name])
    theirs.save_pretrained(tmp_path, max_shard_size="3KB" if "multi" in name else "1GB")
    assert ("multi" in name) == (tmp_path / "model.safetensors.index.json").exists()
    ours, theirs = load_pretrained(tmp_path), in_float64(theirs)
    for T in (37, 8, 1):
        assert_close(ours(tokens(T)), theirs(tokens(T)).logits, 1e-8)
    ours = load_pretrained(tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert_close(ours(tokens()), theirs(tokens()).logits, 1e-4)


@pytest.mark.parametrize("name", ONE_EACH)
def test_gradients_equal_those_of_transformers(name, tmp_path):
    """Their gradients are put where their parameters are and read as a checkpoint: so they get our names."""
    theirs = in_float64(random_hf(CASES[name]))
    theirs.save_pretrained(tmp_path / "parameters")
    targets = tokens().roll(-1, dims=1)
    nn.functional.cross_entropy(theirs(tokens()).logits.flatten(0, 1), targets.flatten()).backward()
    ours = load_pretrained(tmp_path / "parameters")
    ours(tokens(), targets).backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    gradients = load_pretrained(tmp_path / "gradients").state_dict()
    for parameter, p in ours.named_parameters():
        assert p.requires_grad and gradients[parameter].any(), parameter
        assert_close(p.grad, gradients[parameter], 1e-8)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_we_save_transformers_loads_and_we_load_to_the_last_bit(name, saved, tmp_path):
    ours = load_pretrained(saved(CASES[name]))
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=3000 if "multi" in name else 2**30)
    assert ("multi" in name) == (tmp_path / "ours" / "model.safetensors.index.json").exists()
    assert not list((tmp_path / "ours").glob(".*"))  # no temporary file is left
    for file in (tmp_path / "ours").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    again = load_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()) and theirs.dtype == torch.float64
    assert theirs.config.architectures == [type(theirs).__name__] == [type(random_hf(CASES[name])).__name__]
    assert_close(again(tokens()), in_float64(theirs)(tokens()).logits, 1e-8)


@torch.no_grad()
def test_rope_scaling_and_windows_matter(saved):
    """Otherwise the comparisons above would prove nothing about them."""
    no_window = {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}
    no_scaling = {"rope_parameters": {"rope_theta": 50.0}}
    for name, switched_off in (("llama scaled", no_scaling), ("qwen3 windows", no_window)):
        folder = saved(CASES[name], name)
        logits = load_pretrained(folder)(tokens())
        changed(folder, **switched_off)
        assert (load_pretrained(folder)(tokens()) - logits).abs().max() > 0.01


@torch.no_grad()
def test_without_layer_types_the_layers_from_max_window_layers_on_slide(saved):
    folder = saved(CASES["qwen3 windows"])
    logits = load_pretrained(folder)(tokens())
    changed(folder, layer_types=None, max_window_layers=1)
    assert torch.equal(load_pretrained(folder)(tokens()), logits)
    assert_close(in_float64(AutoModelForCausalLM.from_pretrained(folder))(tokens()).logits, logits, 1e-8)
    changed(folder, max_window_layers=2)
    assert not torch.equal(load_pretrained(folder)(tokens()), logits)


@torch.no_grad()
def test_old_buffers_are_skipped_and_the_prefix_may_be_absent(saved):
    folder = saved(gpt2())
    ours = load_pretrained(folder)

    def as_openai_saved_it(tensors):
        for name in [*tensors]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"], tensors["h.1.attn.masked_bias"] = torch.ones(1, 1, 40, 40), torch.tensor(-1e4)

    rewritten(folder, as_openai_saved_it)
    changed(folder, n_ctx=CONTEXT)
    assert torch.equal(load_pretrained(folder)(tokens()), ours(tokens()))
    folder = saved(llama(), "llama")
    rewritten(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    load_pretrained(folder)


@pytest.mark.parametrize("config", [gpt2(), llama(tie_word_embeddings=True)], ids=["gpt2", "llama"])
def test_a_tied_head_may_be_there_and_must_be_the_embedding(config, saved):
    folder = saved(config)
    embedding = "transformer.wte.weight" if config.model_type == "gpt2" else "model.embed_tokens.weight"
    rewritten(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    model = load_pretrained(folder)
    assert model.config.tied and not hasattr(model, "head")
    rewritten(folder, lambda tensors: tensors["lm_head.weight"][3, 5].add_(1e-9))
    with pytest.raises(ValueError, match=f"lm_head.weight differs from {embedding}, but tie_word_embeddings is true"):
        load_pretrained(folder)


def test_loading_draws_nothing_and_owns_its_memory(saved, monkeypatch):
    folder = saved(llama())
    before = load_pretrained(folder)
    monkeypatch.setattr(np.random, "default_rng", None)
    calls = []
    model = load_pretrained(folder, attention_fn=lambda *a, **k: calls.append(1) or causal_attention(*a, **k))
    weights = folder / "model.safetensors"
    with open(weights, "r+b") as file:  # in place: what is still mapped would change
        file.write(b"\xff" * weights.stat().st_size)
    assert torch.equal(model(tokens()), before(tokens())) and len(calls) == 2
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(model.cos_TK, rotary_tables(model.config)[0]) and model.cos_TK.dtype == torch.float64


def test_dtypes(saved, tmp_path):
    folder = saved(qwen3())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model = load_pretrained(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        save_pretrained(model, tmp_path / "ours")  # each replaces the one before
        assert {p.dtype for p in load_pretrained(tmp_path / "ours").parameters()} == {dtype}
        assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    rewritten(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}))
    with pytest.raises(ValueError, match="tensors of dtypes F16, F64: expected one, or the argument dtype"):
        load_pretrained(folder)
    assert load_pretrained(folder, dtype=torch.float32).head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype torch.int8: expected one of torch.float64"):
        load_pretrained(folder, dtype=torch.int8)


def test_saving_over_an_older_checkpoint_leaves_nothing_of_it(saved, tmp_path):
    model, folder = load_pretrained(saved(llama())), tmp_path / "ours"
    save_pretrained(model, folder, max_shard_bytes=1)
    assert len(list(folder.glob("model-*"))) == len(load_file(tmp_path / "theirs/model.safetensors"))  # one tensor each
    load_pretrained(folder)
    tokenizer = types.SimpleNamespace(save=lambda path: path.write_text("{}"))
    save_pretrained(model, folder, tokenizer=tokenizer)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    umask = os.umask(0o022)
    os.umask(umask)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_save_that_fails_leaves_the_older_checkpoint(saved, tmp_path, monkeypatch):
    model, folder = load_pretrained(saved(llama())), tmp_path / "ours"
    save_pretrained(model, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr("minigpt.hf.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model, folder, max_shard_bytes=1000)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
