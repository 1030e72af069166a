"""The GPT in torch; `minigpt/model_numpy.py` is the same text on our own engine, with the same parameter names.

Pre-norm RMSNorm, rotary positions, grouped key/value heads, optional QK-norm, SwiGLU or ReLU² MLP, no biases, optional
tied embeddings and logit soft-cap. The attention and linear layers are constructor arguments, so that later stages can
put theirs in. Refused: a sequence longer than the context.

Shapes: B batch, T time, C width, H query heads, G key/value heads, K head width, F MLP width, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import GPTConfig


def rotary_tables(context: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos_TK and sin_TK in float64: channel pair i, that is (i, i + K/2), turns by t * base**(-2i/K) at position t.

    Rotary embedding, Su et al. 2021, section 3.4.2, with the halves of a head as the pairs.
    """
    speeds = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), speeds)
    angles_TK = torch.cat([angles, angles], dim=1)
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    half = x_BHTK.shape[-1] // 2
    turned_BHTK = torch.cat([-x_BHTK[..., half:], x_BHTK[..., :half]], dim=-1)
    return x_BHTK * cos_TK + turned_BHTK * sin_TK


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q k' / sqrt(K), only positions up to one's own) v; query head h reads key/value head h * G // H."""
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=grouped)


class RMSNorm(nn.RMSNorm):
    """torch's, with the gain in the dtype of x: autocast leaves gains in float32, and mixed dtypes have no kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, attention_fn: Callable, linear_cls: Callable):
        super().__init__()
        self.config, self.attention_fn = config, attention_fn
        kv_width = config.kv_heads * config.head_width
        self.query = linear_cls(config.width, config.width, bias=False)
        self.key = linear_cls(config.width, kv_width, bias=False)
        self.value = linear_cls(config.width, kv_width, bias=False)
        self.output = linear_cls(config.width, config.width, bias=False)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_width, eps=config.norm_eps)
            self.key_norm = RMSNorm(config.head_width, eps=config.norm_eps)

    def forward(self, x_BTC: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        K = self.config.head_width
        q_BHTK = self.query(x_BTC).reshape(B, T, self.config.heads, K).transpose(1, 2)
        k_BGTK = self.key(x_BTC).reshape(B, T, self.config.kv_heads, K).transpose(1, 2)
        v_BGTK = self.value(x_BTC).reshape(B, T, self.config.kv_heads, K).transpose(1, 2)
        if self.config.qk_norm:
            q_BHTK, k_BGTK = self.query_norm(q_BHTK), self.key_norm(k_BGTK)
        q_BHTK, k_BGTK = rotate(q_BHTK, cos_TK, sin_TK), rotate(k_BGTK, cos_TK, sin_TK)
        y_BHTK = self.attention_fn(q_BHTK, k_BGTK, v_BGTK)
        return self.output(y_BHTK.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, linear_cls: Callable):
        super().__init__()
        self.config = config
        self.up = linear_cls(config.width, config.mlp_width, bias=False)
        if config.mlp == "swiglu":
            self.gate = linear_cls(config.width, config.mlp_width, bias=False)
        self.down = linear_cls(config.mlp_width, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.config.mlp == "swiglu":
            h_BTF = F.silu(self.gate(x_BTC)) * self.up(x_BTC)
        else:
            r_BTF = F.relu(self.up(x_BTC))
            h_BTF = r_BTF * r_BTF
        return self.down(h_BTF)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, attention_fn: Callable, linear_cls: Callable):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, attention_fn, linear_cls)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config, linear_cls)

    def forward(self, x_BTC: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), cos_TK, sin_TK)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class GPT(nn.Module):
    """attention_fn(q_BHTK, k_BGTK, v_BGTK) -> y_BHTK is causal; linear_cls(in, out, bias=False) has a `.weight`."""

    def __init__(
        self,
        config: GPTConfig,
        *,
        attention_fn: Callable = causal_attention,
        linear_cls: Callable = nn.Linear,
        seed: int = 0,
    ):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([Block(config, attention_fn, linear_cls) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        if not config.tied:
            self.head = linear_cls(config.width, config.vocab_size, bias=False)
        cos_TK, sin_TK = rotary_tables(config.context, config.head_width, config.rope_base)
        self.register_buffer("cos_TK", cos_TK, persistent=False)
        self.register_buffer("sin_TK", sin_TK, persistent=False)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Matrices normal with standard deviation 1/sqrt(inputs), embeddings 1; what ends a branch starts at zero.

        With the two projections back into the residual stream (and an untied head) at zero, each block starts as the
        identity and the first loss is log(V). numpy draws the numbers: one seed gives both engines the same weights.
        """
        generator = np.random.default_rng(seed)
        for name, p in self.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight", "head.weight")):
                p.copy_(torch.zeros(p.shape))
            elif p.ndim == 2:
                std = 1.0 if name == "embedding.weight" else p.shape[1] ** -0.5
                p.copy_(torch.from_numpy(generator.normal(0.0, std, p.shape)))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """logits_BTV; with targets the mean cross-entropy in nats instead."""
        T = tokens_BT.shape[1]
        if not 1 <= T <= self.config.context:
            raise ValueError(f"sequence of {T} tokens: expected 1 to the context, {self.config.context}")
        x_BTC = self.embedding(tokens_BT)
        cos_TK, sin_TK = self.cos_TK[:T].to(x_BTC.dtype), self.sin_TK[:T].to(x_BTC.dtype)
        for block in self.blocks:
            x_BTC = block(x_BTC, cos_TK, sin_TK)
        x_BTC = self.norm(x_BTC)
        logits_BTV = F.linear(x_BTC, self.embedding.weight) if self.config.tied else self.head(x_BTC)
        if logits_BTV.dtype in (torch.bfloat16, torch.float16):  # exp and tanh of half-precision logits lose the loss
            logits_BTV = logits_BTV.float()
        if self.config.softcap:
            logits_BTV = self.config.softcap * torch.tanh(logits_BTV / self.config.softcap)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.reshape(-1, self.config.vocab_size), targets_BT.reshape(-1))

    def num_parameters(self) -> int:
        """Trainable numbers; tied weights count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int | None = None) -> int:
        """6 N + 12 L C T for a training step on sequences of T tokens (the context when not given).

        N counts the weights that are matrix multiplied: not the gains, not the embedding lookup, but the head, tied or
        not; 2 FLOPs forward and 4 backward each. Attention: scores and mixing are 2 C T multiply-adds forward, twice
        that backward, counted as if not causal, the usual convention (PaLM, Chowdhery et al. 2022, appendix B).
        """
        T = self.config.context if T is None else T
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        head = self.config.vocab_size * self.config.width
        return 6 * (matrices + head) + 12 * self.config.layers * self.config.width * T
