"""Random models of the three families, theirs and ours with the same weights, and random adapters made by peft."""

import copy
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from minigpt.hf import load_pretrained
from minigpt.model import GPT
from tests.minigpt.test_hf import gpt2, in_float64, llama, qwen3, random_hf, tokens

peft = pytest.importorskip("peft")
FAMILIES = {"gpt2": gpt2(n_inner=11), "llama": llama(), "qwen3": qwen3(head_dim=6, tie_word_embeddings=True)}
FAMILIES["gpt2 untied"] = gpt2(tie_word_embeddings=False)
BLOCKY = {"llama even": llama(vocab_size=32)}  # a head that blocks divide
ATTENTION = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "qwen3": ["q_proj", "k_proj", "o_proj"]}
EVERYTHING = {
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte", "wpe"],
    "gpt2 untied": ["c_attn", "c_fc", "wte", "lm_head"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"],
}
TOKENS = tokens(T=11)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


@cache
def base(family: str) -> tuple[nn.Module, GPT]:
    """In float64, theirs and ours."""
    theirs = random_hf((FAMILIES | BLOCKY)[family])
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_pretrained(Path(folder)).eval()


@dataclass
class Pair:
    """Fresh copies each time, since adapters change the model that they are put into."""

    family: str
    dtype: torch.dtype = torch.float64

    def theirs(self) -> nn.Module:
        model = copy.deepcopy(base(self.family)[0]).to(self.dtype)
        return in_float64(model) if self.dtype == torch.float64 else model

    def ours(self) -> GPT:
        model = copy.deepcopy(base(self.family)[1])
        for parameter in model.parameters():  # not the rotary tables, which are float64 always
            parameter.data = parameter.data.to(self.dtype)
        return model

    def adapted(self, **options) -> nn.Module:
        """A model with an adapter whose factors are all random."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out is set by itself; tied embeddings are not merged here
            model = peft.get_peft_model(self.theirs(), peft.LoraConfig(**options))
        return randomised(model).eval()

    def loaded(self, folder: Path) -> nn.Module:
        if "use_bdlora" in (folder / "adapter_config.json").read_text():
            bd_lora_config()  # or skips
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(self.theirs(), str(folder)).eval()


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 5) -> nn.Module:
    """Every adapter's A and B normal, of whichever library."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".adapters." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def save_theirs(model: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def bd_lora_config(**options):
    """PEFT's BdLoraConfig; older ones have none, and the test is skipped."""
    if not hasattr(peft, "BdLoraConfig"):
        pytest.skip(f"peft {peft.__version__} has no BdLoraConfig")
    return peft.BdLoraConfig(**options)


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest of theirs; NaN stays NaN."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
