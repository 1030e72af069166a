"""A model of a forward pass on W ranks with an adapter, in three ways: measured products and collectives, added up.

    python -m lora.sharding_latency --model 8B --ranks 8 --tokens 16

Every matrix product of a rank is timed by itself here, at its real size, and every kind of collective at two sizes,
which give it a latency and a bandwidth. Their sum is a model, not a measurement: nothing overlaps in it, attention and
norms are left out, and what all ways have alike is as fast in each. Refused: GPUs that are not there, unless latency
and bandwidth are given; the table says so then.

Letters: d width, I inputs, O outputs, r rank, W ranks, S tokens of a pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from common import cli
from common.dist import spawn
from common.log import cpu_threads
from common.results import save_result
from common.timing import Samples, compare
from lora.sharding import SHARDINGS, Sharding
from lora.sharding_costs import (
    MODELS,
    Calls,
    aligned,
    base_forward,
    factor_sizes,
    forward_calls,
    parameters_per_rank,
    projections,
)  # fmt: skip
from minigpt.config import GPTConfig
from parallel.comm import make_comm
from parallel.costs import Link
from parallel.mesh import Layout, Mesh

Product = tuple[int, int]  # inputs and outputs, of S tokens
SIZES = (1 << 12, 1 << 22)  # bytes of the collectives that are timed
INNER = {1 << 12: 50, 1 << 22: 5}  # calls a sample; every rank makes as many


@dataclass(frozen=True, slots=True)
class LatencyConfig:
    model: Literal["8B", "70B"] = field(default="8B", metadata={"help": "whose shapes"})
    ranks: int = field(default=8, metadata={"help": "of the tp group"})
    rank: int = field(default=16, metadata={"help": "of S-LoRA's adapter and of the replicated one"})
    multiple: int = field(
        default=2, metadata={"help": "the block-diagonal adapter's rank over that: on 8 ranks 2 is about as big"}
    )
    tokens: int = field(default=16, metadata={"help": "of one forward pass"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "of the frozen model"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "gloo, or NCCL with a GPU for each rank"})
    latency_us: float = field(default=0.0, metadata={"help": "of a collective, given instead of measured"})
    gigabytes_per_s: float = field(default=0.0, metadata={"help": "of its largest tensor, given likewise"})
    rounds: int = field(default=7, metadata={"help": "samples of each time"})
    save: bool = field(default=False, metadata={"help": "write the table to a JSON file"})
    out: Path = field(default=Path("results"), metadata={"help": "the folder of the results"})

    def __post_init__(self) -> None:
        for name, least in (("ranks", 2), ("rank", 1), ("multiple", 1), ("tokens", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")
        given = (self.latency_us, self.gigabytes_per_s)
        if not (given == (0, 0) or all(0 < value < float("inf") for value in given)):
            raise ValueError(
                f"latency_us {given[0]} and gigabytes_per_s {given[1]}: expected both positive, or neither"
            )
        for sharding in SHARDINGS:
            parameters_per_rank(MODELS[self.model], sharding, self.rank_of(sharding), self.ranks)

    def rank_of(self, sharding: Sharding) -> int:
        return self.rank * self.multiple if sharding == "block-diagonal" else self.rank


def base_products(config: GPTConfig, ranks: int) -> list[Product]:
    """Of one layer on one rank: the frozen projections."""
    return [(p.inputs // ranks, p.outputs) if p.row else (p.inputs, p.outputs // ranks) for p in projections(config)]


def adapter_products(config: GPTConfig, sharding: Sharding, rank: int, ranks: int) -> list[Product]:
    """Of one layer on one rank: A's and B's, with one block a rank where they are block-diagonal."""
    found = []
    for p, (I, O) in zip(projections(config), base_products(config, ranks), strict=True):
        own = rank // ranks if sharding == "block-diagonal" else rank
        of_A = rank // ranks if sharding == "s-lora" and not p.row else own
        of_B = O // ranks if sharding == "s-lora" and p.row else O
        assert (I * of_A, own * of_B) == factor_sizes(p, sharding, rank, ranks), (p, sharding)
        found += [(I, of_A), (own, of_B)]
    return found


def collective_seconds(calls: Sequence[Calls], links: Mapping[str, Link]) -> float:
    return sum(call.count * (links[call.name].alpha + call.payload * links[call.name].beta) for call in calls)


def modelled(
    config: LatencyConfig, products: Mapping[str, Mapping[Product, float]], links: Mapping[str, Link]
) -> list[dict[str, Any]]:
    """A row of each way; seconds of a forward pass. `products` {"base", "adapter": {product: seconds}}."""
    model, rows = MODELS[config.model], []
    base = model.layers * sum(products["base"][p] for p in base_products(model, config.ranks))
    number = torch.finfo(getattr(torch, config.dtype)).bits // 8
    base_calls = collective_seconds(base_forward(model, config.tokens, number), links)
    for sharding in SHARDINGS:
        rank = config.rank_of(sharding)
        own = model.layers * sum(products["adapter"][p] for p in adapter_products(model, sharding, rank, config.ranks))
        calls = collective_seconds(forward_calls(model, sharding, rank=rank, tokens=config.tokens), links)
        rows.append({
            "model": config.model, "way": sharding, "rank": rank, "base_products_s": base,
            "base_collectives_s": base_calls, "products_s": own, "collectives_s": calls,
            "total_s": base + base_calls + own + calls,
        })  # fmt: skip
    slora = next(row["total_s"] for row in rows if row["way"] == "s-lora")
    return [row | {"speedup_over_s_lora": slora / row["total_s"]} for row in rows]


# ---- what is measured ------------------------------------------------------------------------------------------------


def measure_products(config: LatencyConfig) -> dict[str, dict[Product, Samples]]:
    """Frozen layers in the model's dtype, adapters in float32, as lora/sharded.py has them."""
    model = MODELS[config.model]
    own = {p for s in SHARDINGS for p in adapter_products(model, s, config.rank_of(s), config.ranks)}
    wanted = {"base": (set(base_products(model, config.ranks)), config.dtype), "adapter": (own, "float32")}
    return {
        kind: {product: _product(product, config, getattr(torch, dtype)) for product in sorted(products)}
        for kind, (products, dtype) in wanted.items()
    }


def _product(product: Product, config: LatencyConfig, dtype: torch.dtype) -> Samples:
    inputs, outputs = product
    x = torch.randn(config.tokens, inputs, device=config.device).to(dtype)
    weight = torch.randn(outputs, inputs, device=config.device).to(dtype)
    call = torch.no_grad()(partial(F.linear, x, weight))
    return compare({"it": call}, rounds=config.rounds, warmup=2, check=None, device=config.device)["it"]


def measure_links(rank: int, ranks: int, device: str, rounds: int) -> dict[str, Link]:
    """Latency and seconds a byte of the largest tensor, of each collective; all ranks call it."""
    comm = make_comm(Mesh(Layout(tp=ranks), rank, ranks).group("tp"))
    device = f"{device}:{rank}" if device == "cuda" else device
    links = {}
    for name in ("all_reduce", "all_gather"):
        times = []
        for size in SIZES:
            whole = torch.randn(size // 4, device=device)
            part = whole[: len(whole) // ranks].clone()
            call = {"all_reduce": partial(comm.all_reduce, whole, "mean"),
                    "all_gather": partial(comm.all_gather, part, whole[: len(part) * ranks])}[name]  # fmt: skip
            found = compare({"it": call}, rounds=rounds, warmup=2, check=None, device=device, inner=INNER[size])
            times.append(found["it"].median)
        beta = max(0.0, (times[1] - times[0]) / (SIZES[1] - SIZES[0]))
        links[name] = Link(max(0.0, times[0] - beta * SIZES[0]), beta)
    return links


def find_links(config: LatencyConfig) -> tuple[dict[str, Link], str]:
    """Of each collective, and where they come from. Raises ValueError where they can be neither taken nor measured."""
    if config.latency_us:
        link = Link(config.latency_us * 1e-6, 1e-9 / config.gigabytes_per_s)
        return {"all_reduce": link, "all_gather": link}, "given, not measured"
    if config.device == "cuda" and torch.cuda.device_count() < config.ranks:
        raise ValueError(f"{config.ranks} ranks on {torch.cuda.device_count()} GPUs: expected as many GPUs, or "
                         "latency_us and gigabytes_per_s")  # fmt: skip
    backend = "nccl" if config.device == "cuda" else "gloo"
    found = spawn(measure_links, config.ranks, config.device, config.rounds, backend=backend, timeout_s=300)
    place = f"{config.ranks} GPUs" if config.device == "cuda" else f"{cpu_threads()} CPU threads"
    return found[0], f"measured, {config.ranks} ranks of {backend} on {place} of this machine"


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(LatencyConfig, argv, prog=cli.program(), description="a model of the time of a forward pass")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds none here, expected cpu")
    links, origin = find_links(config)
    samples = measure_products(config)
    medians = {kind: {product: x.median for product, x in found.items()} for kind, found in samples.items()}
    rows = [row | {"collective_times": origin} for row in modelled(config, medians, links)]
    print(f"a model of one forward pass of {config.model}: {config.tokens} tokens on {config.ranks} ranks; products "
          f"measured on {config.device}; collectives {origin}:")  # fmt: skip
    print("  " + ", ".join(f"{n} {1e6 * x.alpha:.1f} us + {1e9 * x.beta:.4f} ns a byte" for n, x in links.items()))
    print(table(rows))
    if config.save:
        taken = [{"what": f"{kind} product", "inputs": i, "outputs": o, "samples": x}
                 for kind, found in samples.items() for (i, o), x in found.items()]  # fmt: skip
        taken += [{"what": name, "alpha_s": x.alpha, "beta_s": x.beta} for name, x in links.items()]
        print(save_result("lora", "sharding_latency", [*rows, *taken], config=config, device=config.device,
                          root=config.out))  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ("base_products_s", "base_collectives_s", "products_s", "collectives_s", "total_s")
    head = ["way", "rank", *(f"{c.removesuffix('_s').replace('_', ' ')}, ms" for c in columns), "over s-lora"]
    body = [
        [row["way"], str(row["rank"]), *(f"{1e3 * row[c]:.2f}" for c in columns), f"{row['speedup_over_s_lora']:.2f}x"]
        for row in rows
    ]
    return aligned([head, *body])


if __name__ == "__main__":
    cli.run(main)
