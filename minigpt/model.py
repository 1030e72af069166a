"""The GPT in torch; `minigpt/model_numpy.py` is the same text on our own engine, with the same parameter names.

One definition: by its config it is GPT-2 (learned positions, LayerNorm, biases, GELU), Llama (rotary, RMSNorm, SwiGLU,
grouped heads), Qwen3 (QK-norm, heads wider than width / heads) or our own (ReLU², soft-cap, untied zero head).
Layers and the functions between them are constructor arguments, so that later stages can put theirs in.
Refused: a sequence longer than the context, more tokens than the cache has room for.

Shapes: B batch, T time, S keys in sight, C width, H query heads, G key/value heads, K head width, F MLP width,
V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.config import GPTConfig
from minigpt.extras import GATE_WIDTH, Bigrams, Skips, Smear, gate
from minigpt.kv_cache import KVCache
from minigpt.masks import Documents, same_document, visible


def rotary_speeds(config: GPTConfig) -> Tensor:
    """Radians that channel pair i, that is (i, i + K/2), turns per token, float64 of shape (K/2,): base**(-2i/K).

    Rotary embedding, Su et al. 2021, section 3.4.2, with the halves of a head as the pairs. rope_factor > 1 is Llama
    3.1's scaling: pairs that turn less than rope_low times in rope_original tokens are slowed by the factor, those that
    turn more than rope_high times stay, between the two it is interpolated linearly in the number of turns.
    """
    speeds = config.rope_base ** (-torch.arange(0, config.key_width, 2, dtype=torch.float64) / config.key_width)
    turns = speeds * config.rope_original / (2 * math.pi)
    kept = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    speeds = speeds * (kept + (1 - kept) / config.rope_factor)
    windows = [int(window) for window in config.rope_windows.split(",") if window]
    for old, new in pairwise(windows):  # YaRN, Peng et al. 2023: what turns less than once in the old window slows down
        kept = ((speeds * old / (2 * math.pi) - 1) / 31).clamp(0, 1)
        speeds = speeds * (kept + (1 - kept) * old / new)
    return speeds


def rotary_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos_TK and sin_TK in float64 of the angle at each position of the context."""
    angles = torch.outer(torch.arange(config.context, dtype=torch.float64), rotary_speeds(config))
    angles_TK = torch.cat([angles, angles], dim=1)
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    half = x_BHTK.shape[-1] // 2
    turned_BHTK = torch.cat([-x_BHTK[..., half:], x_BHTK[..., :half]], dim=-1)
    return x_BHTK * cos_TK + turned_BHTK * sin_TK


def causal_attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, window: int = 0, mask_BTS: Tensor | None = None
) -> Tensor:
    """softmax(q k' / sqrt(K), only over what is visible) v; query head h reads key/value head h * G // H.

    Without a mask the last query stands at the last key and sees itself and what is before, at most `window` tokens;
    a mask (True: sees) replaces that rule.
    """
    (H, T), (G, S) = q_BHTK.shape[1:3], k_BGSK.shape[1:3]
    if mask_BTS is None and (window or 1 < T < S):
        positions_S = torch.arange(S, device=q_BHTK.device)
        mask_BTS = visible(positions_S[S - T :], positions_S, window)[None]
    if mask_BTS is not None:
        mask_BTS = mask_BTS[:, None]  # the same for all heads
    causal = mask_BTS is None
    if T == 1:  # `causal and T > 1` would be a symbol where this is compiled for any T, and torch wants a bool
        causal = False
    if causal and q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16 and T <= SHORT:
        return short_attention(q_BHTK, k_BGSK, v_BGSK)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_BTS, is_causal=causal, enable_gqa=H != G
    )


SHORT = 512  # tokens; beyond that all scores at once take too much memory


def short_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """The same, causal, with all scores spelled out and the softmax in float32: of short bfloat16 sequences on a CPU,
    torch's own backward pass is three to five times slower than these products."""
    (H, T, K), G = q_BHTK.shape[1:], k_BGTK.shape[1]
    future_TS = torch.full((T, T), -math.inf, device=q_BHTK.device).triu(1)
    k_BHTK, v_BHTK = (x if G == H else x.repeat_interleave(H // G, dim=1) for x in (k_BGTK, v_BGTK))
    exact = torch.promote_types(q_BHTK.dtype, torch.float32)
    scores_BHTS = (q_BHTK @ k_BHTK.mT).to(exact) / math.sqrt(K) + future_TS
    return scores_BHTS.softmax(dim=-1).to(v_BHTK.dtype) @ v_BHTK


class RMSNorm(nn.RMSNorm):
    """torch's, with the gain in the dtype of x: autocast leaves gains in float32, and mixed dtypes have no kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


NORMS = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}


def activate(kind: str, h_BTF: Tensor, gate_BTF: Tensor | None = None) -> Tensor:
    """Between the two matrices of an MLP; `kind` is GPTConfig.mlp, of which "swiglu" has a gate."""
    if kind == "swiglu":
        return F.silu(gate_BTF) * h_BTF
    if kind == "relu2":
        r_BTF = F.relu(h_BTF)
        return r_BTF * r_BTF
    return F.gelu(h_BTF, approximate="tanh" if kind == "gelu_tanh" else "none")


class Parts(NamedTuple):
    """What a GPT is made of; see there."""

    attention_fn: Callable = causal_attention
    linear_cls: Callable = nn.Linear
    norm_cls: Callable = RMSNorm
    embedding_cls: Callable = nn.Embedding
    rotary_fn: Callable = rotate
    activation_fn: Callable = activate


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, parts: Parts):
        super().__init__()
        self.config, self.layer = config, layer
        self.attention_fn, self.rotary_fn, linear_cls = parts.attention_fn, parts.rotary_fn, parts.linear_cls
        inner_width, kv_width = config.heads * config.key_width, config.kv_heads * config.key_width
        self.query = linear_cls(config.width, inner_width, bias=config.qkv_bias)
        self.key = linear_cls(config.width, kv_width, bias=config.qkv_bias)
        self.value = linear_cls(config.width, kv_width, bias=config.qkv_bias)
        self.output = linear_cls(inner_width, config.width, bias=config.output_bias)
        if config.qk_norm:
            self.query_norm = parts.norm_cls(config.key_width, eps=config.norm_eps)
            self.key_norm = parts.norm_cls(config.key_width, eps=config.norm_eps)
        if config.has_value_embedding(layer):
            if not config.value_tables:
                self.value_embedding = parts.embedding_cls(config.vocab_size, kv_width)
            if config.value_gate:
                self.value_gate = nn.Linear(min(GATE_WIDTH, config.width), config.kv_heads, bias=False)
        if config.attention_gate:
            self.attention_gate = nn.Linear(min(GATE_WIDTH, config.width), config.heads, bias=False)

    def forward(self, x_BTC: Tensor, sight: "Sight") -> Tensor:
        B, T, _ = x_BTC.shape
        K = self.config.key_width
        q_BHTK, k_BGTK, v_BGTK = self.project(x_BTC)
        q_BHTK = q_BHTK.reshape(B, T, self.config.heads, K).transpose(1, 2)
        k_BGTK = k_BGTK.reshape(B, T, self.config.kv_heads, K).transpose(1, 2)
        v_BTGK = v_BGTK.reshape(B, T, self.config.kv_heads, K)
        if self.config.has_value_embedding(self.layer):
            e_BTGK = self.token_values(sight).to(v_BTGK.dtype).view(v_BTGK.shape)
            if self.config.value_gate:
                e_BTGK = gate(x_BTC, self.value_gate)[..., None] * e_BTGK
            v_BTGK = v_BTGK + e_BTGK
        v_BGTK = v_BTGK.transpose(1, 2)
        if self.config.qk_norm:
            q_BHTK, k_BGTK = self.query_norm(q_BHTK), self.key_norm(k_BGTK)
        if self.config.positions == "rotary":
            cos_sin = [table.to(q_BHTK.dtype) for table in sight.cos_sin]  # autocast: half the memory to move
            q_BHTK, k_BGTK = self.rotary_fn(q_BHTK, *cos_sin), self.rotary_fn(k_BGTK, *cos_sin)
        if sight.cache is not None:
            k_BGTK, v_BGTK = sight.cache.append(self.layer, sight.positions_BT, k_BGTK, v_BGTK)
        y_BHTK = self.attention_fn(q_BHTK, k_BGTK, v_BGTK, **sight.rules[sight.windows[self.layer]])
        y_BTHK = y_BHTK.transpose(1, 2)
        if self.config.attention_gate:
            y_BTHK = gate(x_BTC, self.attention_gate)[..., None] * y_BTHK
        return self.output(y_BTHK.reshape(B, T, -1))

    def token_values(self, sight: "Sight") -> Tensor:
        """(B, T, G K), of this layer's own table or a shared one."""
        shared = self.config.value_table(self.layer)
        table = self.value_embedding if shared is None else sight.value_embeddings[shared]
        return table(sight.tokens_BT)

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
        tokens_BT: Tensor,
        positions_BT: Tensor,
        cache: KVCache | None = None,
        separator: int | None = None,
        documents: Documents | None = None,
        window: int | None = None,
    ):
        self.tokens_BT, self.positions_BT, self.cache, self.separator = tokens_BT, positions_BT, cache, separator
        self.documents = documents
        self.cos_sin: tuple[Tensor, Tensor] | None = None
        self.value_embeddings: nn.ModuleList | None = None  # those that layers share
        self.windows = [config.window_of(layer, window) for layer in range(config.layers)]
        self.rules = {window: self._rule(window) for window in set(self.windows)}

    def _rule(self, window: int) -> dict:
        if self.documents is not None and self.documents.starts is not None:
            return {"starts": self.documents.starts, "window": window}
        mask_BTS = self._mask(window)
        if mask_BTS is not None:
            return {"mask_BTS": mask_BTS}
        return {"window": window} if window else {}

    def _mask(self, window: int) -> Tensor | None:
        if self.cache is not None:
            return self.cache.mask(self.positions_BT, window)
        if self.documents is not None:
            return self.documents.mask(window)
        if self.separator is None:
            return None
        causal_BTS = visible(self.positions_BT, self.positions_BT, window)
        return causal_BTS & same_document(self.tokens_BT, self.separator)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, parts: Parts):
        super().__init__()
        self.config, self.activation_fn, linear_cls = config, parts.activation_fn, parts.linear_cls
        self.up = linear_cls(config.width, config.mlp_width, bias=config.mlp_bias)
        if config.mlp == "swiglu":
            self.gate = linear_cls(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = linear_cls(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(self.activation_fn(self.config.mlp, *self.expand(x_BTC)))

    def expand(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        """What goes up, and under SwiGLU the gate."""
        return (self.up(x_BTC), self.gate(x_BTC)) if self.config.mlp == "swiglu" else (self.up(x_BTC),)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, parts: Parts):
        super().__init__()
        if config.attends(layer):
            self.attention_norm = parts.norm_cls(config.width, eps=config.norm_eps)
            self.attention = Attention(config, layer, parts)
        else:
            self.attention = None
        self.mlp_norm = parts.norm_cls(config.width, eps=config.norm_eps)
        self.mlp = MLP(config, parts)

    def forward(self, x_BTC: Tensor, sight: Sight) -> Tensor:
        if self.attention is not None:
            x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), sight)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


# What a GPT begins with at zero, by the ends of names.
ZERO = (
    "output.weight", "down.weight", "head.weight", "value_embedding.weight", "bigram_embedding.weight", "_gate.weight",
    "smear.weight", ".bias",
)  # fmt: skip


def initial_values(shapes: Mapping[str, tuple[int, ...]], tied: bool, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of each parameter of a GPT, in the order given, which has to be the model's own.

    Matrices are normal with standard deviation 1/sqrt(inputs), embeddings 1, gains 1; what ends a branch starts at
    zero. With the two projections back into the residual stream (and an untied head) at zero, each block starts as the
    identity and the first loss is log(V). An embedding that is also the head is drawn like a head, 1/sqrt(width).
    numpy draws the numbers, in float64: one seed gives both engines the same weights.
    """
    generator = np.random.default_rng(seed)
    for name, shape in shapes.items():
        if name.endswith(ZERO) or name.startswith(("skips.", "value_embeddings.")):
            yield name, torch.zeros(shape)
        elif len(shape) == 2:
            std = 1.0 if "embedding" in name and not tied else shape[1] ** -0.5
            yield name, torch.from_numpy(generator.normal(0.0, std, shape))
        else:
            yield name, torch.ones(shape)


def mean_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, z_loss: float = 0.0) -> Tensor:
    """In nats. The gradient is that of the cross-entropy plus z_loss * mean(log Z squared), which keeps logits from
    drifting; the value is the cross-entropy alone."""
    loss = F.cross_entropy(logits_BTV.reshape(-1, logits_BTV.shape[-1]), targets_BT.reshape(-1))
    if z_loss:
        z = z_loss * logits_BTV.logsumexp(dim=-1).square().mean()
        loss = loss + (z - z.detach())
    return loss


class GPT(nn.Module):
    """The arguments stand for layers of later stages:

    attention_fn(q_BHTK, k_BGSK, v_BGSK, *, window=..., mask_BTS=...) -> y_BHTK is causal, see `causal_attention`; the
    keywords are given only where the config, a cache, `separator` or `documents` ask for them; documents with `starts`
    give these in place of a mask.
    linear_cls(in, out, bias=bool), norm_cls(width, eps=float) and embedding_cls(numbers, width) are modules with
    `.weight`; norm_cls None means the config's. rotary_fn and activation_fn are like `rotate` and `activate`.
    loss_fn(x_BTC, weight_VC, targets_BT, softcap=, z_loss=) is the mean cross-entropy of hidden states, in place of
    `logits` and `mean_cross_entropy`. activation_checkpointing keeps only each block's input for the backward pass and
    computes the rest again. seed None leaves the weights as the layers made them, for a model that gets its own from a
    file.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        attention_fn: Callable = causal_attention,
        linear_cls: Callable = nn.Linear,
        norm_cls: Callable | None = None,
        embedding_cls: Callable = nn.Embedding,
        rotary_fn: Callable = rotate,
        activation_fn: Callable = activate,
        loss_fn: Callable | None = None,
        activation_checkpointing: bool = False,
        seed: int | None = 0,
    ):
        super().__init__()
        norm_cls = norm_cls or NORMS[config.norm]
        parts = Parts(attention_fn, linear_cls, norm_cls, embedding_cls, rotary_fn, activation_fn)
        self.config, self.activation_checkpointing, self.loss_fn = config, activation_checkpointing, loss_fn
        self.embedding = embedding_cls(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embedding = embedding_cls(config.context, config.width)
        self.bigrams = Bigrams(config, embedding_cls) if config.bigrams else None
        self.smear = Smear(config) if config.smear else None
        self.blocks = nn.ModuleList([Block(config, layer, parts) for layer in range(config.layers)])
        if config.value_tables:
            kv_width = config.kv_heads * config.key_width
            tables = [embedding_cls(config.vocab_size, kv_width) for _ in range(config.value_tables)]
            self.value_embeddings = nn.ModuleList(tables)
        self.skips = Skips(config) if config.x0_skip or config.unet_skips or config.backout else None
        self.norm = norm_cls(config.width, eps=config.norm_eps)
        if not config.tied:
            self.head = linear_cls(config.width, config.vocab_size, bias=False)
        if config.positions == "rotary":
            cos_TK, sin_TK = rotary_tables(config)
            self.register_buffer("cos_TK", cos_TK, persistent=False)
            self.register_buffer("sin_TK", sin_TK, persistent=False)
        if seed is not None:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """See `initial_values`."""
        parameters = dict(self.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        for name, value in initial_values(shapes, self.config.tied, seed):
            parameters[name].copy_(value)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        separator: int | None = None,
        documents: Documents | None = None,
        window: int | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """logits_BTV; with targets `mean_cross_entropy` instead.

        With a cache the tokens follow those that it holds, which they can see, and are added to it. With a separator
        nothing sees a document other than its own; with `documents` each besides stands where it would stand alone.
        `window` stands in for the config's in this pass.
        """
        x_BTC = self.hidden(tokens_BT, cache=cache, separator=separator, documents=documents, window=window)
        if targets_BT is not None and self.loss_fn is not None:
            weight_VC = self.embedding.weight if self.config.tied else self.head.weight
            return self.loss_fn(x_BTC, weight_VC, targets_BT, softcap=self.config.softcap, z_loss=z_loss)
        logits_BTV = self.logits(x_BTC)
        return logits_BTV if targets_BT is None else mean_cross_entropy(logits_BTV, targets_BT, z_loss)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        cache: KVCache | None = None,
        separator: int | None = None,
        documents: Documents | None = None,
        window: int | None = None,
    ) -> Tensor:
        """x_BTC after the last norm: what the head turns into logits."""
        given = {"a cache": cache, "a separator": separator, "documents": documents}
        given = {what: value for what, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: expected one of them, a cache holds one document a row")
        if documents is not None and any(x.shape != tokens_BT.shape for x in documents[:2]):
            shapes = [tuple(x.shape) for x in documents[:2]]
            raise ValueError(f"positions and documents of shapes {shapes}: expected {tuple(tokens_BT.shape)} of both")
        T, held = tokens_BT.shape[1], cache.longest if cache is not None else 0
        if not 1 <= T <= self.config.context - held:
            there = f" after {held} in the cache" if held else ""
            raise ValueError(f"sequence of {T} tokens{there}: expected 1 to the context, {self.config.context}")
        if documents is not None:
            positions_BT = documents.positions_BT
        else:
            positions_BT = torch.arange(T, device=tokens_BT.device)[None] if cache is None else cache.positions(T)
        sight = Sight(self.config, tokens_BT, positions_BT, cache, separator, documents, window)
        x_BTC = self.embed(sight)
        if self.config.positions == "rotary":  # one table for all heads, (B, 1, T, K)
            sight.cos_sin = tuple(t[positions_BT][:, None].to(x_BTC.dtype) for t in (self.cos_TK, self.sin_TK))
        if self.config.value_tables:
            sight.value_embeddings = self.value_embeddings
        past = [x_BTC]
        for layer, block in enumerate(self.blocks):
            x_BTC = self.skips(x_BTC, layer, past) if self.skips is not None else x_BTC
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTC = checkpoint(block, x_BTC, sight, use_reentrant=False)
            else:
                x_BTC = block(x_BTC, sight)
            past.append(x_BTC)
        if cache is not None:
            cache.advance(T)
        return self.norm(self.skips.end(x_BTC, past) if self.skips is not None else x_BTC)

    def embed(self, sight: Sight) -> Tensor:
        """x_BTC that enters the first block."""
        tokens_BT, positions_BT, T = sight.tokens_BT, sight.positions_BT, sight.tokens_BT.shape[1]
        if sight.cache is not None and self.config.reads_the_token_before:
            # Two: smear looks at the one before together with its bigram. They are embedded again, and cut off.
            tokens_BT, positions_BT = sight.cache.append_tokens(tokens_BT, before=2)
        x_BTC = self.embedding(tokens_BT)
        if self.config.positions == "learned":
            x_BTC = x_BTC + self.position_embedding(positions_BT.clamp(min=0))
        if self.config.reads_the_token_before:
            first_BT = (positions_BT <= 0).expand(tokens_BT.shape)  # where there is none before
            if sight.separator is not None:
                first_BT = first_BT | (tokens_BT == sight.separator)
            x_BTC = self.bigrams(tokens_BT, first_BT) + x_BTC if self.config.bigrams else x_BTC
            x_BTC = self.smear(x_BTC, first_BT) if self.config.smear else x_BTC
        return x_BTC if tokens_BT is sight.tokens_BT else x_BTC[:, -T:]

    def logits(self, x_BTC: Tensor) -> Tensor:
        """logits_BTV of hidden states, float32 at least: exp and tanh of half-precision logits lose the loss."""
        logits_BTV = F.linear(x_BTC, self.embedding.weight) if self.config.tied else self.head(x_BTC)
        if logits_BTV.dtype in (torch.bfloat16, torch.float16):
            logits_BTV = logits_BTV.float()
        if self.config.softcap:
            logits_BTV = self.config.softcap * torch.tanh(logits_BTV / self.config.softcap)
        return logits_BTV

    def num_parameters(self) -> int:
        """Numbers in all parameters, frozen ones too; tied weights count once."""
        return sum(p.numel() for p in self.parameters())

    def num_flops_per_token(self, T: int | None = None, window: int | None = None) -> int:
        """6 N + 12 H K S of each layer with attention: a training step on sequences of T tokens; T None: the context.

        N counts the weights that are matrix multiplied: not gains, biases and embedding lookups, but the head, tied or
        not; 2 FLOPs forward and 4 backward each. Attention: scores and mixing are 2 H K S multiply-adds forward, twice
        that backward, over S = T keys, or the window of a sliding layer, for which `window` may stand in; as if not
        causal, the usual convention (PaLM, Chowdhery et al. 2022, appendix B).
        """
        T = self.config.context if T is None else T
        inner_width = self.config.heads * self.config.key_width
        matrices = sum(
            p.numel() for name, p in self.blocks.named_parameters() if p.ndim == 2 and "embedding" not in name
        )
        head = self.config.vocab_size * self.config.width
        attending = filter(self.config.attends, range(self.config.layers))
        seen = sum(min(T, self.config.window_of(layer, window) or T) for layer in attending)
        return 6 * (matrices + head) + 12 * inner_width * seen
