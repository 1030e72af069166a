"""Where each parameter of a GPT lies in a checkpoint of transformers: names, shapes, and the way there and back.

Most tensors have another name only. GPT-2's linear layers keep their weights as (in, out), ours are (out, in), and its
query, key and value are one matrix. Buffers that old versions saved are known by name and skipped.
"""

import re

import torch
from torch import Tensor

from minigpt.config import GPTConfig
from minigpt.hf_config import GPT2, family_of

# What old versions of transformers saved beside the parameters: causal masks and rotary speeds.
GPT2_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
LLAMA_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

GPT2_NAMES = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "blocks": "transformer.h",
    "attention_norm": "ln_1",
    "attention.query": "attn.c_attn",  # one matrix: query, key and value beside each other
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


class Layout:
    """Where each parameter of a GPT lies in a checkpoint of its family: `places` maps their names to lists of ours."""

    def __init__(self, config: GPTConfig, parameters: dict[str, Tensor]):
        self.tied, self.gpt2, self.parameters = config.tied, family_of(config) == GPT2, parameters
        self.places: dict[str, list[str]] = {}
        for name in parameters:
            self.places.setdefault(self.theirs(name), []).append(name)

    def theirs(self, name: str) -> str:
        names = GPT2_NAMES if self.gpt2 else LLAMA_NAMES
        module, _, leaf = name.rpartition(".")
        if not module.startswith("blocks."):
            return f"{names.get(module, module)}.{leaf}"
        _, layer, inner = module.split(".", 2)
        return f"{names['blocks']}.{layer}.{names.get(inner, inner)}.{leaf}"

    def place(self, name: str) -> str | None:
        """The whole name of what a file calls `name`, which may lack the prefix; None for a buffer to skip."""
        prefix, buffer = ("transformer.", GPT2_BUFFER) if self.gpt2 else ("model.", LLAMA_BUFFER)
        place = name if name.startswith((prefix, "lm_head.")) else prefix + name
        return None if buffer.fullmatch(place) else place

    def turned(self, name: str) -> bool:
        """GPT-2's linear layers keep their weights as (in, out)."""
        return self.gpt2 and name.endswith(".weight") and (".attention." in name or ".mlp." in name)

    def shape(self, place: str) -> list[int]:
        parts = [list(self.parameters[name].shape) for name in self.places[place]]
        parts = [shape[::-1] if self.turned(self.places[place][0]) else shape for shape in parts]
        return [*parts[0][:-1], sum(shape[-1] for shape in parts)] if len(parts) > 1 else parts[0]

    def bytes(self, place: str) -> int:
        return sum(self.parameters[name].nbytes for name in self.places[place])

    def join(self, place: str) -> Tensor:
        """The tensor of the checkpoint; a contiguous parameter that lies there as it is, is not copied."""
        parts = [self.parameters[name].detach() for name in self.places[place]]
        parts = [part.T if self.turned(self.places[place][0]) else part for part in parts]
        return (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).contiguous()

    def split(self, place: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """Our parameters out of the checkpoint's tensor, each in memory of its own."""
        names = self.places[place]
        parts = tensor.split(tensor.shape[-1] // len(names), dim=-1)
        parts = [part.T if self.turned(names[0]) else part for part in parts]
        own = {"dtype": dtype, "device": device, "copy": True, "memory_format": torch.contiguous_format}
        return {name: part.to(**own) for name, part in zip(names, parts, strict=True)}
