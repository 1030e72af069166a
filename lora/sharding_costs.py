"""What an adapter costs each rank of a tp group, in closed formulas: numbers kept, multiply-adds, collectives, bytes.

`python -m lora.sharding_costs` prints them for the seven projections of Llama 3 with 8 and 70 billion parameters. All
of it is exact and none of it is time, for which there is lora/sharding_latency.py. Refused: shapes that W does not
divide, and so more ranks than key/value heads.

Letters: d width, I inputs, O outputs, r rank, W ranks, S tokens of a pass, b bytes of a number that travels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common import cli
from lora.sharding import SHARDINGS, Sharding
from lora.targets import ROW
from minigpt.config import GPTConfig
from parallel.costs import bytes_sent

# Shapes alone count here; Grattafiori et al. 2024, table 3.
LLAMA_8B = GPTConfig(
    vocab_size=128_256, layers=32, width=4096, heads=32, kv_heads=8, mlp="swiglu", mlp_width=14_336, qk_norm=False
)
LLAMA_70B = GPTConfig(
    vocab_size=128_256, layers=80, width=8192, heads=64, kv_heads=8, mlp="swiglu", mlp_width=28_672, qk_norm=False
)
MODELS = {"8B": LLAMA_8B, "70B": LLAMA_70B}


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear layer of a block, as one process has it."""

    name: str
    inputs: int
    outputs: int

    @property
    def row(self) -> bool:
        return self.name in ROW


@dataclass(frozen=True, slots=True)
class Calls:
    """`count` collectives of one kind; payload is the bytes of the largest tensor of each, S in parallel/README.md."""

    name: str
    count: int
    payload: int

    def sent(self, ranks: int) -> float:
        """Bytes that a mean rank sends for all of them, with an algorithm that sends no more than it must."""
        return self.count * bytes_sent(self.name, self.payload, ranks)


def projections(config: GPTConfig) -> list[Projection]:
    """Of a block: seven with SwiGLU, else six."""
    d, F = config.width, config.mlp_width
    inner, kv = config.heads * config.key_width, config.kv_heads * config.key_width
    gate = [Projection("gate", d, F)] if config.mlp == "swiglu" else []
    return [
        Projection("query", d, inner), Projection("key", d, kv), Projection("value", d, kv),
        Projection("output", inner, d), *gate, Projection("up", d, F), Projection("down", F, d),
    ]  # fmt: skip


def factor_sizes(p: Projection, sharding: Sharding, rank: int, ranks: int, each: int = 1) -> tuple[int, int]:
    """Numbers of this projection's A and B that one rank keeps; and its multiply-adds a token, since each number is
    used once. `each`: blocks of a rank. Raises ValueError for what W, or W each, does not divide."""
    r, W, I, O = rank, ranks, p.inputs, p.outputs
    split = {"inputs": I} if p.row else {"outputs": O}
    if sharding != "replicated":
        split["rank"] = r
    if sharding == "s-lora" and p.row:
        split["outputs"] = O
    parts = W * each if sharding == "block-diagonal" else W
    for what, size in split.items():
        if size % parts:
            raise ValueError(f"{what} {size} of {p.name} over {W} ranks: expected a multiple of {parts}")
    if sharding == "replicated":
        return (r * I // W, r * O) if p.row else (r * I, r * O // W)
    if sharding == "s-lora":
        return r * I // W, r * O // W
    return (r * I // W // parts, r * O // W) if p.row else (r * I // W, r * O // W // parts)


def parameters_per_rank(config: GPTConfig, sharding: Sharding, rank: int, ranks: int, each: int = 1) -> int:
    """Of an adapter of all projections of all layers. Raises ValueError where ranks would have to share heads: then
    they keep the same rows, more than these formulas say."""
    for name in ("heads", "kv_heads"):
        if (size := getattr(config, name)) % ranks:
            raise ValueError(f"{name} {size} over {ranks} ranks: expected a multiple of {ranks}")
    return config.layers * sum(sum(factor_sizes(p, sharding, rank, ranks, each)) for p in projections(config))


def macs_per_token(config: GPTConfig, sharding: Sharding, rank: int, ranks: int, each: int = 1) -> int:
    """Multiply-adds of one rank for one token forward: as many as it has numbers. Backward costs twice that."""
    return parameters_per_rank(config, sharding, rank, ranks, each)


def whole_parameters(ps: Sequence[Projection], rank: int, blocks: int = 1) -> int:
    """Of a whole adapter of these layers; with blocks, of one that has a block-diagonal factor in each."""
    return sum(rank * (p.inputs // blocks + p.outputs if p.row else p.inputs + p.outputs // blocks) for p in ps)


def base_forward(config: GPTConfig, tokens: int, number: int) -> list[Calls]:
    """The frozen blocks' own: two sums a layer. The embedding and the loss have theirs besides."""
    return [Calls("all_reduce", 2 * config.layers, tokens * config.width * number)]


def forward_calls(
    config: GPTConfig, sharding: Sharding, *, rank: int, tokens: int, number: int = 4, fused: bool = False
) -> list[Calls]:
    """What an adapter adds to a forward pass. `fused`: query, key and value gather together, and gate and up, as vLLM
    does and lora/sharded.py does not."""
    if sharding != "s-lora":
        return []
    columns = sum(not p.row for p in projections(config))
    together = [3, columns - 3] if fused else [1] * columns
    gathers = [Calls("all_gather", config.layers, tokens * rank * number * layers) for layers in together]
    return _joined([*gathers, Calls("all_reduce", 2 * config.layers, tokens * rank * number)])


def backward_calls(
    config: GPTConfig, sharding: Sharding, *, rank: int, tokens: int, number: int = 4
) -> list[Calls]:  # fmt: skip
    """Likewise to a backward pass, whatever the first layer's input needs."""
    if sharding != "s-lora":
        return []
    columns = sum(not p.row for p in projections(config))
    size = tokens * rank * number
    return [Calls("reduce_scatter", columns * config.layers, size), Calls("all_reduce", 2 * config.layers, size)]


def gradient_sums(config: GPTConfig, sharding: Sharding, *, rank: int, number: int = 4) -> list[Calls]:
    """Likewise to a step of the optimizer: gradients of factors that all ranks have, one call each."""
    if sharding != "replicated":
        return []
    sizes = [rank * (p.outputs if p.row else p.inputs) for p in projections(config)]
    return _joined([Calls("all_reduce", config.layers, size * number) for size in sizes])


def _joined(calls: list[Calls]) -> list[Calls]:
    """Those of one name and payload together."""
    counts: dict[tuple[str, int], int] = {}
    for call in calls:
        counts[call.name, call.payload] = counts.get((call.name, call.payload), 0) + call.count
    return [Calls(name, count, payload) for (name, payload), count in counts.items()]


def count(calls: list[Calls]) -> int:
    return sum(call.count for call in calls)


def sent(calls: list[Calls], ranks: int) -> float:
    """Bytes that a mean rank sends."""
    return sum(call.sent(ranks) for call in calls)


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CostsConfig:
    ranks: int = field(default=8, metadata={"help": "of the tp group"})
    rank: int = field(default=16, metadata={"help": "of the adapter; a block-diagonal one also at 2 and 4 times it"})
    tokens: int = field(default=1024, metadata={"help": "of one forward pass"})
    number: int = field(default=4, metadata={"help": "bytes of an adapter's number that travels; vLLM's and ours: 4"})
    base_number: int = field(default=2, metadata={"help": "bytes of a number of the frozen model's sums"})

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise ValueError(f"ranks {self.ranks}: expected at least 2")
        for name in ("rank", "tokens", "number", "base_number"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for sharding in SHARDINGS:
            for model in MODELS.values():
                parameters_per_rank(model, sharding, self.rank, self.ranks)  # says what does not divide


def rows(config: CostsConfig) -> list[dict[str, float | int | str]]:
    """One a model and way: exact numbers of one rank. `ratio` is that of parameters to s-lora's at `config.rank`."""
    found = []
    for name, model in MODELS.items():
        unit = parameters_per_rank(model, "s-lora", config.rank, config.ranks)
        for sharding in SHARDINGS:
            for factor in (1, 2, 4) if sharding == "block-diagonal" else (1,):
                rank = factor * config.rank
                calls = forward_calls(model, sharding, rank=rank, tokens=config.tokens, number=config.number)
                own = sent(base_forward(model, config.tokens, config.base_number), config.ranks)
                parameters = parameters_per_rank(model, sharding, rank, config.ranks)
                found.append({
                    "model": name, "way": sharding, "rank": rank, "parameters": parameters, "ratio": parameters / unit,
                    "macs_per_token": macs_per_token(model, sharding, rank, config.ranks), "collectives": count(calls),
                    "bytes_sent": sent(calls, config.ranks), "share_of_base_bytes": sent(calls, config.ranks) / own,
                })  # fmt: skip
    return found


def aligned(table: Sequence[Sequence[str]], left: int = 1) -> str:
    """Text in columns; the first ones are flush left, the others flush right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        [cell.ljust(width) if column < left else cell.rjust(width)
         for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in table
    ]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)


def table(config: CostsConfig) -> str:
    head = ["model", "way", "rank", "parameters", "of s-lora's", "MACs/token", "collectives", "MB sent", "of base's"]
    body = [
        [row["model"], row["way"], str(row["rank"]), f"{row['parameters']:,}", f"{row['ratio']:.4f}",
         f"{row['macs_per_token']:,}", str(row["collectives"]), f"{row['bytes_sent'] / 1e6:,.1f}",
         f"{row['share_of_base_bytes']:.2%}"]
        for row in rows(config)
    ]  # fmt: skip
    return aligned([head, *body], left=2)


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(CostsConfig, argv, prog=cli.program(), description="what sharded adapters cost, in formulas")
    print(f"one of {config.ranks} ranks; adapters of all seven projections of every layer; a forward pass of "
          f"{config.tokens:,} tokens")  # fmt: skip
    print(table(config))
    print(f"collectives: beyond the {2 * LLAMA_8B.layers} of 8B and {2 * LLAMA_70B.layers} of 70B that the frozen "
          "blocks have; bytes: sent by a rank in a ring")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
