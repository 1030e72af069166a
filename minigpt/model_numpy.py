"""The GPT of `minigpt/model.py` on our own engine: same classes, same parameter names, so weights move both ways.

`diff minigpt/model.py minigpt/model_numpy.py` shows all that differs: imports, a dtype chosen at construction, no
autocast, no cache, no counting of parameters and FLOPs. Tokens are integer arrays.
Refused: a sequence longer than the context.

Shapes: B batch, T time, S keys in sight, C width, H query heads, G key/value heads, K head width, F MLP width,
V vocabulary.
"""

import math
from collections.abc import Callable

import numpy as np

import autograd as ag
from autograd import Tensor, nn
from autograd import functional as F
from autograd.checkpointing import checkpoint
from minigpt.config import GPTConfig, refuse_extras
from minigpt.masks import same_document, visible


def rotary_speeds(config: GPTConfig) -> np.ndarray:
    """Radians that channel pair i, that is (i, i + K/2), turns per token, float64 of shape (K/2,): base**(-2i/K).

    Rotary embedding, Su et al. 2021, section 3.4.2, with the halves of a head as the pairs. rope_factor > 1 is Llama
    3.1's scaling: pairs that turn less than rope_low times in rope_original tokens are slowed by the factor, those that
    turn more than rope_high times stay, between the two it is interpolated linearly in the number of turns.
    """
    speeds = config.rope_base ** (-np.arange(0, config.key_width, 2, dtype=np.float64) / config.key_width)
    turns = speeds * config.rope_original / (2 * math.pi)
    kept = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clip(0, 1)
    return speeds * (kept + (1 - kept) / config.rope_factor)


def rotary_tables(config: GPTConfig, dtype: type) -> tuple[Tensor, Tensor]:
    """cos_TK and sin_TK of the angle at each position of the context."""
    angles = np.outer(np.arange(config.context, dtype=np.float64), rotary_speeds(config))
    angles_TK = np.concatenate([angles, angles], axis=1)
    return Tensor(np.cos(angles_TK).astype(dtype)), Tensor(np.sin(angles_TK).astype(dtype))


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    half = x_BHTK.shape[-1] // 2
    turned_BHTK = ag.cat([-x_BHTK[..., half:], x_BHTK[..., :half]], dim=-1)
    return x_BHTK * cos_TK + turned_BHTK * sin_TK


def causal_attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, window: int = 0, mask_BTS: np.ndarray | None = None
) -> Tensor:
    """softmax(q k' / sqrt(K), only over what is visible) v; query head h reads key/value head h * G // H.

    Without a mask the last query stands at the last key and sees itself and what is before, at most `window` tokens;
    a mask (True: sees) replaces that rule.
    """
    (H, T), (G, S) = q_BHTK.shape[1:3], k_BGSK.shape[1:3]
    if mask_BTS is None and (window or 1 < T < S):
        positions_S = np.arange(S)
        mask_BTS = visible(positions_S[S - T :], positions_S, window)[None]
    if mask_BTS is not None:
        mask_BTS = mask_BTS[:, None]  # the same for all heads
    causal = mask_BTS is None and T > 1
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_BTS, is_causal=causal, enable_gqa=H != G
    )


NORMS = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, attention_fn: Callable, linear_cls: Callable, norm_cls: Callable):
        super().__init__()
        self.config, self.layer, self.attention_fn = config, layer, attention_fn
        inner_width, kv_width = config.heads * config.key_width, config.kv_heads * config.key_width
        self.query = linear_cls(config.width, inner_width, bias=config.qkv_bias)
        self.key = linear_cls(config.width, kv_width, bias=config.qkv_bias)
        self.value = linear_cls(config.width, kv_width, bias=config.qkv_bias)
        self.output = linear_cls(inner_width, config.width, bias=config.output_bias)
        if config.qk_norm:
            self.query_norm = norm_cls(config.key_width, eps=config.norm_eps)
            self.key_norm = norm_cls(config.key_width, eps=config.norm_eps)
        if config.has_value_embedding(layer):
            self.value_embedding = nn.Embedding(config.vocab_size, kv_width)

    def forward(self, x_BTC: Tensor, sight: "Sight") -> Tensor:
        B, T, _ = x_BTC.shape
        K = self.config.key_width
        q_BHTK, k_BGTK, v_BGTK = self.project(x_BTC)
        q_BHTK = q_BHTK.reshape(B, T, self.config.heads, K).transpose(1, 2)
        k_BGTK = k_BGTK.reshape(B, T, self.config.kv_heads, K).transpose(1, 2)
        if self.config.has_value_embedding(self.layer):
            v_BGTK = v_BGTK + self.value_embedding(sight.tokens_BT)
        v_BGTK = v_BGTK.reshape(B, T, self.config.kv_heads, K).transpose(1, 2)
        if self.config.qk_norm:
            q_BHTK, k_BGTK = self.query_norm(q_BHTK), self.key_norm(k_BGTK)
        if self.config.positions == "rotary":
            q_BHTK, k_BGTK = rotate(q_BHTK, *sight.cos_sin), rotate(k_BGTK, *sight.cos_sin)
        y_BHTK = self.attention_fn(q_BHTK, k_BGTK, v_BGTK, **sight.rules[self.config.window_of(self.layer)])
        return self.output(y_BHTK.transpose(1, 2).reshape(B, T, -1))

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, heads side by side; a method of its own for those who compute them together."""
        return self.query(x_BTC), self.key(x_BTC), self.value(x_BTC)


class Sight:
    """What all layers of one pass share: the tokens, where they stand, and what they may see.

    rules {window: keyword arguments of attention_fn}; plain causal attention needs none.
    """

    def __init__(
        self,
        config: GPTConfig,
        tokens_BT: np.ndarray,
        positions_BT: np.ndarray,
        separator: int | None = None,
    ):
        self.tokens_BT, self.positions_BT, self.separator = tokens_BT, positions_BT, separator
        self.cos_sin: tuple[Tensor, Tensor] | None = None
        self.rules = {window: self._rule(window) for window in {config.window_of(i) for i in range(config.layers)}}

    def _rule(self, window: int) -> dict:
        mask_BTS = self._mask(window)
        if mask_BTS is not None:
            return {"mask_BTS": mask_BTS}
        return {"window": window} if window else {}

    def _mask(self, window: int) -> np.ndarray | None:
        if self.separator is None:
            return None
        causal_BTS = visible(self.positions_BT, self.positions_BT, window)
        return causal_BTS & same_document(self.tokens_BT, self.separator)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, linear_cls: Callable):
        super().__init__()
        self.config = config
        self.up = linear_cls(config.width, config.mlp_width, bias=config.mlp_bias)
        if config.mlp == "swiglu":
            self.gate = linear_cls(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = linear_cls(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF, *gate_BTF = self.expand(x_BTC)
        if self.config.mlp == "swiglu":
            h_BTF = F.silu(*gate_BTF) * h_BTF
        elif self.config.mlp == "relu2":
            r_BTF = F.relu(h_BTF)
            h_BTF = r_BTF * r_BTF
        else:
            h_BTF = F.gelu(h_BTF, approximate="tanh" if self.config.mlp == "gelu_tanh" else "none")
        return self.down(h_BTF)

    def expand(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        """What goes up, and under SwiGLU the gate."""
        return (self.up(x_BTC), self.gate(x_BTC)) if self.config.mlp == "swiglu" else (self.up(x_BTC),)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, attention_fn: Callable, linear_cls: Callable, norm_cls: Callable):
        super().__init__()
        self.attention_norm = norm_cls(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer, attention_fn, linear_cls, norm_cls)
        self.mlp_norm = norm_cls(config.width, eps=config.norm_eps)
        self.mlp = MLP(config, linear_cls)

    def forward(self, x_BTC: Tensor, sight: Sight) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), sight)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class GPT(nn.Module):
    """The arguments stand for layers of later stages:

    attention_fn(q_BHTK, k_BGSK, v_BGSK, *, window=..., mask_BTS=...) -> y_BHTK is causal, see `causal_attention`; the
    keywords are given only where the config or `separator` asks for them. linear_cls(in, out, bias=bool) and
    norm_cls(width, eps=float) are modules with `.weight`; norm_cls None means the config's. activation_checkpointing
    keeps only each block's input for the backward pass and computes the rest again.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        attention_fn: Callable = causal_attention,
        linear_cls: Callable = nn.Linear,
        norm_cls: Callable | None = None,
        activation_checkpointing: bool = False,
        seed: int = 0,
        dtype: type = np.float32,
    ):
        super().__init__()
        refuse_extras(config, "the GPT in numpy")
        norm_cls = norm_cls or NORMS[config.norm]
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(
            [Block(config, layer, attention_fn, linear_cls, norm_cls) for layer in range(config.layers)]
        )
        self.norm = norm_cls(config.width, eps=config.norm_eps)
        if not config.tied:
            self.head = linear_cls(config.width, config.vocab_size, bias=False)
        if config.positions == "rotary":
            self.cos_TK, self.sin_TK = rotary_tables(config, dtype)
        self.initialise(seed, dtype)

    def initialise(self, seed: int, dtype: type) -> None:
        """Matrices normal with standard deviation 1/sqrt(inputs), embeddings 1; what ends a branch starts at zero.

        With the two projections back into the residual stream (and an untied head) at zero, each block starts as the
        identity and the first loss is log(V). An embedding that is also the head is drawn like a head, 1/sqrt(width).
        numpy draws the numbers: one seed gives both engines the same weights.
        """
        generator = np.random.default_rng(seed)
        for name, p in self.named_parameters():
            if name.endswith(("output.weight", "down.weight", "head.weight", "value_embedding.weight", ".bias")):
                p.data = np.zeros(p.shape, dtype)
            elif p.ndim == 2:
                std = 1.0 if "embedding" in name and not self.config.tied else p.shape[1] ** -0.5
                p.data = generator.normal(0.0, std, p.shape).astype(dtype)
            else:
                p.data = p.data.astype(dtype)

    def forward(
        self,
        tokens_BT: np.ndarray,
        targets_BT: np.ndarray | None = None,
        *,
        separator: int | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """logits_BTV; with targets the mean cross-entropy in nats instead.

        The gradient is that of the cross-entropy plus z_loss * mean(log Z squared), which keeps logits from drifting;
        the value is the cross-entropy alone.

        With a separator nothing sees a document other than its own.
        """
        logits_BTV = self.logits(self.hidden(tokens_BT, separator=separator))
        if targets_BT is None:
            return logits_BTV
        loss = F.cross_entropy(logits_BTV.reshape(-1, self.config.vocab_size), targets_BT.reshape(-1))
        if z_loss:
            z = z_loss * (ag.logsumexp(logits_BTV, dim=-1) ** 2).mean()
            loss = loss + (z - z.detach())
        return loss

    def hidden(self, tokens_BT: np.ndarray, *, separator: int | None = None) -> Tensor:
        """x_BTC after the last norm: what the head turns into logits."""
        T = tokens_BT.shape[1]
        if not 1 <= T <= self.config.context:
            raise ValueError(f"sequence of {T} tokens: expected 1 to the context, {self.config.context}")
        positions_BT = np.arange(T)[None]
        sight = Sight(self.config, tokens_BT, positions_BT, separator)
        x_BTC = self.embedding(tokens_BT)
        if self.config.positions == "learned":
            x_BTC = x_BTC + self.position_embedding(positions_BT)
        else:
            sight.cos_sin = (self.cos_TK[:T], self.sin_TK[:T])
        for block in self.blocks:
            if self.activation_checkpointing and ag.is_grad_enabled():
                x_BTC = checkpoint(block, x_BTC, sight)
            else:
                x_BTC = block(x_BTC, sight)
        return self.norm(x_BTC)

    def logits(self, x_BTC: Tensor) -> Tensor:
        """logits_BTV of hidden states."""
        logits_BTV = F.linear(x_BTC, self.embedding.weight) if self.config.tied else self.head(x_BTC)
        if self.config.softcap:
            logits_BTV = self.config.softcap * ag.tanh(logits_BTV / self.config.softcap)
        return logits_BTV
