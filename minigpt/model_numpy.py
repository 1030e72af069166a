"""The GPT of `minigpt/model.py` on our own engine: same classes, same parameter names, so weights move both ways.

`diff minigpt/model.py minigpt/model_numpy.py` shows all that differs: imports, a dtype chosen at construction, no
autocast, no counting of parameters and FLOPs. Tokens are integer arrays. Refused: a sequence longer than the context.

Shapes: B batch, T time, C width, H query heads, G key/value heads, K head width, F MLP width, V vocabulary.
"""

from collections.abc import Callable

import numpy as np

import autograd as ag
from autograd import Tensor, nn
from autograd import functional as F
from minigpt.config import GPTConfig


def rotary_tables(context: int, head_width: int, base: float, dtype: type) -> tuple[Tensor, Tensor]:
    """cos_TK and sin_TK: channel pair i, that is (i, i + K/2), turns by t * base**(-2i/K) at position t.

    Rotary embedding, Su et al. 2021, section 3.4.2, with the halves of a head as the pairs.
    """
    speeds = base ** (-np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    angles = np.outer(np.arange(context, dtype=np.float64), speeds)
    angles_TK = np.concatenate([angles, angles], axis=1)
    return Tensor(np.cos(angles_TK).astype(dtype)), Tensor(np.sin(angles_TK).astype(dtype))


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    half = x_BHTK.shape[-1] // 2
    turned_BHTK = ag.cat([-x_BHTK[..., half:], x_BHTK[..., :half]], dim=-1)
    return x_BHTK * cos_TK + turned_BHTK * sin_TK


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q k' / sqrt(K), only positions up to one's own) v; query head h reads key/value head h * G // H."""
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=grouped)


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
            self.query_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)
            self.key_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)

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
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, attention_fn, linear_cls)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
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
        dtype: type = np.float32,
    ):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([Block(config, attention_fn, linear_cls) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        if not config.tied:
            self.head = linear_cls(config.width, config.vocab_size, bias=False)
        self.cos_TK, self.sin_TK = rotary_tables(config.context, config.head_width, config.rope_base, dtype)
        self.initialise(seed, dtype)

    def initialise(self, seed: int, dtype: type) -> None:
        """Matrices normal with standard deviation 1/sqrt(inputs), embeddings 1; what ends a branch starts at zero.

        With the two projections back into the residual stream (and an untied head) at zero, each block starts as the
        identity and the first loss is log(V). numpy draws the numbers: one seed gives both engines the same weights.
        """
        generator = np.random.default_rng(seed)
        for name, p in self.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight", "head.weight")):
                p.data = np.zeros(p.shape, dtype)
            elif p.ndim == 2:
                std = 1.0 if name == "embedding.weight" else p.shape[1] ** -0.5
                p.data = generator.normal(0.0, std, p.shape).astype(dtype)
            else:
                p.data = p.data.astype(dtype)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """logits_BTV; with targets the mean cross-entropy in nats instead."""
        T = tokens_BT.shape[1]
        if not 1 <= T <= self.config.context:
            raise ValueError(f"sequence of {T} tokens: expected 1 to the context, {self.config.context}")
        x_BTC = self.embedding(tokens_BT)
        cos_TK, sin_TK = self.cos_TK[:T], self.sin_TK[:T]
        for block in self.blocks:
            x_BTC = block(x_BTC, cos_TK, sin_TK)
        x_BTC = self.norm(x_BTC)
        logits_BTV = F.linear(x_BTC, self.embedding.weight) if self.config.tied else self.head(x_BTC)
        if self.config.softcap:
            logits_BTV = self.config.softcap * ag.tanh(logits_BTV / self.config.softcap)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.reshape(-1, self.config.vocab_size), targets_BT.reshape(-1))
