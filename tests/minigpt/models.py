"""A GPT for tests: float64, and nothing at zero or one, so that every part of it shows in the logits."""

import torch

from minigpt.config import GPTConfig
from minigpt.model import GPT


def random_gpt(spread: float = 0.3, **config) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**config)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * spread + (p.ndim == 1))
    return model
