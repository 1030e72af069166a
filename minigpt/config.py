"""What a GPT is: the fields that decide its architecture, from GPT-2 to Llama 3 and Qwen3.

Plain numbers without torch, so that the numpy model reads the same ones. Refused: numbers out of range, head counts
that do not divide, options that contradict each other.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True, slots=True)
class GPTConfig:
    vocab_size: int = 256
    context: int = 256  # the longest sequence
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 4  # heads: multi-head attention; 1: multi-query; between: grouped-query
    head_width: int = 0  # 0: width / heads
    positions: Literal["rotary", "learned"] = "rotary"
    rope_base: float = 10_000.0
    rope_factor: float = 1.0  # Llama 3's scaling: slow channels turn this many times slower; 1 for none
    rope_low: float = 1.0  # channels that turn less often than this in rope_original tokens are slow,
    rope_high: float = 4.0  # those that turn more often than this keep their speed
    rope_original: int = 8192
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    mlp: Literal["swiglu", "relu2", "gelu", "gelu_tanh"] = "relu2"
    mlp_width: int = 512
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's projection back
    mlp_bias: bool = False
    qk_norm: bool = True
    tied: bool = False  # the head is the embedding matrix
    softcap: float = 15.0  # logits become softcap * tanh(logits / softcap); 0 leaves them alone
    window: int = 0  # a sliding layer sees its own token and window - 1 before it; 0: all layers see everything
    window_pattern: str = "S"  # S sliding, L long (everything), repeated over the layers
    value_embeddings: bool = False  # every second layer, the last among them, adds an embedding of the token to v
    # What racing recipes add; see minigpt/extras.py. The model in numpy, pipelines and tensor parallelism refuse them.
    value_gate: bool = False  # of each head's value embedding, by the token
    value_tables: int = 0  # shared by the first and the last layers, 0, 1, 2 ... 0, 1, 2; 0: every second has its own
    attention_gate: bool = False  # of each head's result, by the token
    without_attention: str = ""  # "7,9": layers that are an MLP alone
    x0_skip: bool = False  # each block sees the embedding again
    unet_skips: bool = False  # each block of the second half sees what left its partner in the first
    backout: bool = False  # the head sees less of what left the block in the middle
    smear: bool = False  # each token carries some of the one before
    bigrams: int = 0  # rows of a table of embeddings for pairs of tokens; 0 for none
    rope_windows: str = (
        ""  # "128,384": rotary speeds were stretched when training went from the first window to the next
    )

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if (choices := get_args(hint)) and getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected {' or '.join(map(repr, choices))}")
        for name in ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "mlp_width", "rope_original"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.head_width < 0 or self.head_width % 2:
            raise ValueError(f"head_width {self.head_width}: expected an even number, or 0 for width / heads")
        if not self.head_width and (self.width % self.heads or self.width // self.heads % 2):
            raise ValueError(f"width {self.width} over {self.heads} heads: expected an even whole head width")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads}: expected a divisor of heads, {self.heads}")
        for name in ("rope_base", "norm_eps", "rope_low"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: expected a positive number")
        if not (1 <= self.rope_factor < math.inf):
            raise ValueError(f"rope_factor {self.rope_factor}: expected 1 (no scaling) or more")
        if not (self.rope_low < self.rope_high < math.inf):
            raise ValueError(f"rope_high {self.rope_high}: expected more than rope_low, {self.rope_low}")
        if not (0 <= self.softcap < math.inf):
            raise ValueError(f"softcap {self.softcap}: expected a positive number, or 0 for none")
        if self.window < 0:
            raise ValueError(f"window {self.window}: expected a positive number of tokens, or 0 for none")
        if self.bigrams == 1 or self.bigrams < 0:
            raise ValueError(f"bigrams {self.bigrams}: expected 2 rows or more, or 0 for none")
        if self.value_gate and not self.value_embeddings:
            raise ValueError("value_gate without value_embeddings: expected both, there is nothing to gate")
        if not all(part.isdecimal() and int(part) < self.layers for part in self.without_attention.split(",") if part):
            raise ValueError(
                f"without_attention {self.without_attention!r}: expected layers from 0 to {self.layers - 1}, like '1,2'"
            )
        if all(not self.attends(layer) for layer in range(self.layers)):
            raise ValueError(f"without_attention {self.without_attention!r}: expected a layer that has it")
        self._check_value_tables()
        if not all(part.isdecimal() and int(part) > 0 for part in self.rope_windows.split(",") if self.rope_windows):
            raise ValueError(f"rope_windows {self.rope_windows!r}: expected numbers of tokens, like '128,384'")
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise ValueError(f"window_pattern {self.window_pattern!r}: expected letters S and L, like 'SSSL'")

    def _check_value_tables(self) -> None:
        if not 0 <= 2 * self.value_tables <= self.layers:
            raise ValueError(
                f"value_tables {self.value_tables}: expected at most half of the layers, {self.layers}, or 0"
            )
        if self.value_tables and not self.value_embeddings:
            raise ValueError("value_tables without value_embeddings: expected both")
        read = [layer for layer in range(self.layers) if self.value_table(layer) is not None]
        if silent := [layer for layer in read if not self.attends(layer)]:
            raise ValueError(f"without_attention {self.without_attention!r}: layers {silent} read one of the "
                             f"{self.value_tables} value_tables, expected others")  # fmt: skip

    @property
    def key_width(self) -> int:
        """Channels of one head."""
        return self.head_width or self.width // self.heads

    def window_of(self, layer: int, window: int | None = None) -> int:
        """How many tokens this layer sees, its own among them; 0 for all. `window` may stand in for the config's."""
        slides = self.window_pattern[layer % len(self.window_pattern)] == "S"
        return (self.window if window is None else window) if slides else 0

    @property
    def extras(self) -> list[str]:
        """The fields of racing recipes that are on."""
        return [name for name in EXTRAS if getattr(self, name)]

    @property
    def reads_the_token_before(self) -> bool:
        """Whether what enters the first block is of a token and those before it."""
        return self.smear or bool(self.bigrams)

    def attends(self, layer: int) -> bool:
        return layer not in {int(part) for part in self.without_attention.split(",") if part}

    def value_table(self, layer: int) -> int | None:
        """Which of the shared tables it reads."""
        place = layer if layer < self.value_tables else layer - (self.layers - self.value_tables)
        return place if 0 <= place < self.value_tables else None

    def has_value_embedding(self, layer: int) -> bool:
        """Whether it reads a table, of its own or a shared one."""
        if self.value_tables:
            return self.value_table(layer) is not None
        return self.value_embeddings and self.attends(layer) and (self.layers - 1 - layer) % 2 == 0


EXTRAS = (
    "value_gate", "value_tables", "attention_gate", "without_attention", "x0_skip", "unet_skips", "backout", "smear",
    "bigrams", "rope_windows",
)  # fmt: skip


def refuse_extras(config: GPTConfig, what: str) -> None:
    """Raises ValueError for a GPT that `what` has no code for."""
    if config.extras:
        raise ValueError(f"{', '.join(config.extras)}: {what} has none of the racing recipes' parts, expected them off")
