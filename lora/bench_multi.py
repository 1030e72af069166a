"""Tokens per second of decoding with many adapters in one batch, beside what people do without: part of `lora.bench`.

Competitors: mixed batches by each kind of kernels; a pass for each adapter over its own rows; one adapter for all rows,
beside the weights and merged into them; no adapter. Popularities of adapters are those of punica (Chen et al. 2023,
section 6): identical, distinct, uniform, zipf, skewed. Tokens are given, so that all compute the same; on a GPU each
competitor also runs as one CUDA graph, without the host. Refused: timing ways whose logits differ.

Shapes: B rows, T time, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common import timing
from lora.adapter_cache import Factors
from lora.bench_config import BenchConfig
from lora.multi import MultiLora
from lora.multi_layers import split
from minigpt.config import GPTConfig
from minigpt.kv_cache import KVCache
from minigpt.model import GPT

POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed")
ZIPF = 1.5  # each group is so many times as large as the one before
LLAMA = {"qk_norm": False, "mlp": "swiglu", "softcap": 0.0}


@dataclass(frozen=True, slots=True)
class Setting:
    """`batch` rows read `prompt` tokens each and then `steps` tokens one by one, with as many adapters as rows."""

    model: GPTConfig
    batch: int
    rank: int
    prompt: int
    steps: int
    dtype: torch.dtype
    tolerance: float  # of logits, as a share of the largest
    kernels: tuple[str, ...]


QUICK = Setting(
    GPTConfig(vocab_size=64, context=16, layers=1, width=32, heads=2, kv_heads=1, mlp_width=48, **LLAMA),
    batch=4, rank=4, prompt=4, steps=2, dtype=torch.float32, tolerance=1e-4, kernels=("torch",),
)  # fmt: skip
CPU = Setting(
    GPTConfig(vocab_size=512, context=64, layers=2, width=256, heads=8, kv_heads=4, mlp_width=704, **LLAMA),
    batch=8, rank=16, prompt=16, steps=4, dtype=torch.float32, tolerance=1e-4, kernels=("torch",),
)  # fmt: skip
GPU = Setting(  # the layers of Llama 3 8B, eight of them
    GPTConfig(vocab_size=32_000, context=256, layers=8, width=4096, heads=32, kv_heads=8, mlp_width=14_336, **LLAMA),
    batch=64, rank=16, prompt=128, steps=8, dtype=torch.bfloat16, tolerance=2**-5, kernels=("torch", "triton", "cuda"),
)  # fmt: skip


def group_sizes(popularity: str, batch: int) -> list[int]:
    """How many rows of the batch each adapter has."""
    if popularity == "identical":
        return [batch]
    if popularity == "distinct":
        return [1] * batch
    if popularity == "uniform":
        groups = math.isqrt(batch - 1) + 1
        return [batch // groups + (i < batch % groups) for i in range(groups)]
    if popularity == "skewed":
        return [1, batch - 1] if batch > 1 else [1]
    if popularity != "zipf":
        raise ValueError(f"popularity {popularity!r}: expected one of {', '.join(POPULARITIES)}")
    sizes: list[int] = []
    while sum(sizes) < batch:
        sizes.append(min(math.ceil(ZIPF ** len(sizes)), batch - sum(sizes)))
    return sizes


def names_of(popularity: str, batch: int) -> list[str]:
    """The adapter of each row, in no order: requests do not come sorted."""
    names = [f"adapter{group}" for group, size in enumerate(group_sizes(popularity, batch)) for _ in range(size)]
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).tolist()
    return [names[row] for row in order]


def random_model(setting: Setting, device: str) -> GPT:
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(setting.model, seed=None).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(setting.dtype)
    return model


def fill(server: MultiLora, setting: Setting) -> None:
    """As many random adapters of all linear layers of the blocks as there are rows; all go into their pages."""
    generator = torch.Generator().manual_seed(1)
    names = [f"adapter{row}" for row in range(setting.batch)]
    for name in names:
        layers = {}
        for layer, (inputs, outputs) in server.cache.sizes.items():
            if layer != "head":
                A_rI = torch.randn(setting.rank, inputs, generator=generator) / math.sqrt(inputs)
                B_Or = torch.randn(outputs, setting.rank, generator=generator) / math.sqrt(setting.rank)
                layers[layer] = Factors(A_rI, B_Or, 0.5)
        server.cache.add(name, layers)
    server.cache.acquire(names)


def merged(plain: GPT, server: MultiLora, name: str) -> GPT:
    """The plain model's own weights become those with the adapter."""
    (page,) = server.cache.pages_of(name)
    for layer, pool in server.cache.pools.items():
        change = pool.scales[page] * (pool.B_POR[page].float() @ pool.A_PRI[page].float())
        weight = plain.get_submodule(layer).weight.data
        weight.copy_(weight.float() + change)
    return plain


class Decoding:
    """Reads the prompts once; a call reads the steps after them, all through the head; the last logits_BV."""

    def __init__(self, model: GPT, tokens_BT: Tensor, prompt: int):
        self.model, self.tokens_BT, self.prompt = model, tokens_BT, prompt
        self.prompts = KVCache(len(tokens_BT), tokens_BT.shape[1], tokens_BT.device)
        with torch.no_grad():
            model.hidden(tokens_BT[:, :prompt], cache=self.prompts)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        cache = copy.copy(self.prompts)  # the same memory, but it goes on from the end of the prompts each time
        for step_B in self.tokens_BT[:, self.prompt :].unbind(1):
            logits_BV = self.model.logits(self.model.hidden(step_B[:, None], cache=cache))[:, 0]
        return logits_BV


class Bench:
    """The models, and what each competitor runs."""

    def __init__(self, setting: Setting, device: str):
        self.setting, self.device = setting, device
        plain = random_model(setting, device)
        self.server = MultiLora(copy.deepcopy(plain), pages=setting.batch, page_rank=setting.rank)
        fill(self.server, setting)
        self.merged = merged(plain, self.server, "adapter0")
        shape = (setting.batch, setting.prompt + setting.steps)
        self.tokens_BT = torch.randint(setting.model.vocab_size, shape, generator=torch.Generator().manual_seed(2))
        self.tokens_BT = self.tokens_BT.to(device)

    def served(self, names: list[str | None], kernels: str, rows: list[int] | None = None) -> Callable[[], Tensor]:
        tokens_BT = self.tokens_BT if rows is None else self.tokens_BT[rows]

        def select() -> None:
            self.server.compute_with(kernels)
            self.server.select(names)

        select()
        decoding = Decoding(self.server.model, tokens_BT, self.setting.prompt)

        def run() -> Tensor:
            select()
            return decoding()

        return run

    def loop(self, names: list[str]) -> Callable[[], Tensor]:
        groups = split(names)
        runs = [self.served([name] * len(rows), "torch", rows) for name, rows in groups.items()]
        back = torch.tensor([row for rows in groups.values() for row in rows]).argsort().to(self.device)
        return lambda: torch.cat([run() for run in runs])[back]

    def competitors(self, names: list[str]) -> dict[str, Callable[[], Tensor]]:
        one, none = ["adapter0"] * len(names), [None] * len(names)
        found = {f"mixed, {kernels}": self.served(names, kernels) for kernels in self.setting.kernels}
        found["loop over adapters"] = self.loop(names)
        found["one adapter"] = self.served(one, "torch")
        found["one adapter, merged"] = Decoding(self.merged, self.tokens_BT, self.setting.prompt)
        return found | {"no adapter": self.served(none, "torch")}

    def graph(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """All launches of a call recorded once, to be repeated by the device alone; it has run before, so that what is
        compiled is compiled. What it reads stays alive beside it: the keys and values of `run`, and the rows' tables,
        since the next selection makes others."""
        run()
        torch.cuda.synchronize()
        graph, read = torch.cuda.CUDAGraph(), (run, self.server.rows.groups, self.server.rows.indices_KB)
        with torch.cuda.graph(graph):
            logits_BV = run()

        def replay(read=read) -> Tensor:
            graph.replay()
            return logits_BV

        return replay

    def check(self, results: dict[str, Tensor]) -> bool:
        """Mixed batches are the loop's, in which each row's adapter shows; one adapter is what it is merged."""
        close, groups = timing.close(self.setting.tolerance), {"mixed": {}, "one": {}}
        for name, logits_BV in results.items():
            groups["one" if name.startswith("one") else "mixed"][name] = logits_BV
        none_BV = next(groups["mixed"].pop(name) for name in results if name.startswith("no adapter"))
        some_BV = next(iter(groups["mixed"].values()))
        least = (some_BV - none_BV).abs().amax(1).min() / some_BV.abs().max()
        return all(close(group) for group in groups.values()) and bool(least > 2 * self.setting.tolerance)


def rows(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """A row for each popularity and competitor, one after the other. `config.device` is "cpu" or "cuda"."""
    setting = QUICK if config.quick else GPU if config.device == "cuda" else CPU
    bench = Bench(setting, config.device)
    for popularity in POPULARITIES:
        yield from _timed(bench, config, popularity, bench.competitors(names_of(popularity, setting.batch)))
    for popularity in POPULARITIES if config.device == "cuda" else ():
        competitors = bench.competitors(names_of(popularity, setting.batch))
        competitors.pop("loop over adapters")  # of 64 passes: more launches than a graph should have
        graphs = {f"{name}, CUDA graph": bench.graph(run) for name, run in competitors.items()}
        yield from _timed(bench, config, popularity, graphs)


def _timed(bench: Bench, config: BenchConfig, popularity: str, runs: dict[str, Callable]) -> Iterator[dict[str, Any]]:
    setting = bench.setting
    samples = timing.compare(runs, rounds=config.rounds, warmup=1, check=bench.check, device=config.device, inner=1)
    medians = {name.removesuffix(", CUDA graph"): taken.median for name, taken in samples.items()}
    beside = {"beside_one": "one adapter", "beside_merged": "one adapter, merged", "beside_loop": "loop over adapters"}
    for name, taken in samples.items():
        yield {
            "popularity": popularity, "case": name, "rows": setting.batch, "rank": setting.rank,
            "adapters": len(group_sizes(popularity, setting.batch)), "width": setting.model.width,
            "layers": setting.model.layers, "dtype": str(setting.dtype).removeprefix("torch."),
            "tokens_per_s": setting.batch * setting.steps / taken.median,
            **{key: medians[other] / taken.median for key, other in beside.items() if other in medians},
            "samples": taken,
        }  # fmt: skip
