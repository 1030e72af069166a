"""How fast the matmul ladder is, beside Triton and cuBLAS in the same process: `python -m cuda.bench_matmul`.

On a GPU: each step and cuBLAS, by size; results are checked against float64, then timed by turns on random numbers, in
short samples after a rest ("burst") and for seconds on end ("sustained"), with power and clock beside each row. The run
keeps to a budget of time and says what it left out. `--tune` measures the tilings of the last step instead, and writes
the table for cuda/dispatch.py. On a CPU nothing is timed: the checked model counts what each step moves and computes.
The row "triton" is ours too, what ops.matmul takes under kernels="triton"; in bf16, and not in the ratios' peers.
Results go to results/cuda/. Refused: timing what is wrong; then the rest is measured, and the exit code is 1.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from common import cli, timing
from common.cli import UserError
from common.results import save_result
from cuda import dispatch
from cuda.measure import counters, ladder, pictures, power, products, tilings
from cuda.measure.ladder import Budget, Rates
from cuda.measure.products import Competitor, Operands, Shape

SIZES = {
    "cpu": "256",
    "cuda": "512,1024,1536,2048,3072,4096,6144,8192,16384,"  # squares
    # GPT-2's and Llama's: out and in of the MLP, the logits
    "8192x3072x768,8192x768x3072,8192x50304x768,16384x14336x4096,16384x4096x14336",
}
HEADLINE = ("mma_sync_08", "tma_store_15", "best_16")  # measured at shapes that are not square
SUSTAINED = ("best_16",)
SUSTAINED_FLOPS = 2 * 4096**3  # smaller ones do not heat the card
SUSTAINED_ROUNDS = 2
SETTLES_S = 0.5  # of a sustained sample, before power and clock are read


@dataclass(frozen=True, slots=True)
class BenchConfig:
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto is CUDA where there is one"})
    sizes: str = field(default="", metadata={"help": "n or m x n x k, as 512,8192x3072x768; empty: the usual ones"})
    steps: str = field(default="all", metadata={"help": "all, or names or numbers: 1,8,best_16"})
    triton: bool = field(default=True, metadata={"help": "our kernels in Triton are a competitor too"})
    rounds: int = field(default=5, metadata={"help": "samples of each competitor, taken in turn"})
    rest_s: float = field(default=0.05, metadata={"help": "seconds of rest before each burst sample"})
    sustained_s: float = field(default=2.0, metadata={"help": "seconds of a sustained sample; 0: none"})
    budget_s: float = field(default=200.0, metadata={"help": "seconds that a run on a GPU may take"})
    tune: bool = field(default=False, metadata={"help": "measure the tilings of step 16, write --table"})
    table: Path = field(default=tilings.TABLE, metadata={"help": "the table that --tune writes"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds {self.rounds}: expected at least 1")
        for name in ("rest_s", "sustained_s"):
            if not (0 <= getattr(self, name) <= 60):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 60 seconds")
        if not (self.budget_s > 0):
            raise ValueError(f"budget_s {self.budget_s}: expected a positive number of seconds")
        if self.sizes:
            products.parse_shapes(self.sizes)
        products.parse_steps(self.steps)

    def shapes(self, device: str) -> tuple[Shape, ...]:
        return products.parse_shapes(self.sizes or SIZES[device])


def chosen(steps: tuple[str, ...], module: str) -> list[str]:
    """Those of the steps that the module has."""
    built = products.steps_of(module)
    found = [step for step in steps if step in built]
    if not found:
        raise UserError(f"none of {', '.join(steps)} is in cuda.{module}, which has {', '.join(built)}: make native")
    return found


@dataclass(slots=True)
class Run:
    """A run on a GPU: what was found so far, which is filed even when it breaks off."""

    config: BenchConfig
    budget: Budget
    steps: list[str]
    cache_bytes: int
    device: str = "cuda"
    rates: Rates = field(default_factory=Rates)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    baselines: dict[str, str] = field(default_factory=dict)
    bytes_per_s: float | None = None

    def all_shapes(self) -> None:
        self.bytes_per_s = timing.copy_bandwidth(self.device)
        print(f"copies: {self.bytes_per_s / 1e12:.2f} TB/s, read and written", flush=True)
        self.probe()
        shapes = self.config.shapes("cuda")
        lasting = self.config.sustained_s and set(SUSTAINED) & set(self.steps)
        hot = [shape for shape in shapes if lasting and shape.square and shape.flops >= SUSTAINED_FLOPS]
        reserve = len(hot) * self.sustained_estimate()
        for shape in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                self.burst(shape, dtype, reserve)
        for shape in hot:
            self.sustained(shape)

    def ours(self, shape: Shape, dtype: torch.dtype) -> list[Competitor]:
        wanted = [step for step in self.steps if shape.square or step in HEADLINE]
        triton = [products.triton_product(dtype)] if self.config.triton and dtype == torch.bfloat16 else []
        return [products.our_step(step, shape) for step in wanted if products.dtype_of(step) == dtype] + triton

    def operands(self, shape: Shape, dtype: torch.dtype) -> Operands:
        return Operands(shape, dtype, products.set_count(shape, dtype, self.cache_bytes), self.device)

    def probe(self) -> None:
        """One quick sample of everything, to know what is affordable."""
        for dtype in (torch.float32, torch.bfloat16):
            if competitors := self.ours(ladder.PROBE, dtype):
                operands = Operands(ladder.PROBE, dtype, 1, self.device)
                everyone = [*competitors, products.torch_product(dtype)]
                with power.PowerMeter() as meter:
                    options = {"regime": "probe", "rounds": 1, "rates": self.rates, "failures": self.failures}
                    ladder.measure(everyone, operands, meter, **options)

    def burst(self, shape: Shape, dtype: torch.dtype, reserve: float) -> None:
        ours = self.rates.affordable(self.ours(shape, dtype), shape)
        seconds = [self.rates.seconds(one, shape) for one in ours]
        guess = ladder.estimate([*seconds, min(seconds, default=0.0)], self.config.rounds, self.config.rest_s)
        if not ours or not self.budget.allows(f"{dtype} at {shape}", guess, reserve):
            return
        operands = self.operands(shape, dtype)
        best = ladder.best_of_lt(operands, self.rates)
        self.baselines[f"{shape} {dtype}"] = best.name
        with power.PowerMeter(power.current_reader(), rest_s=self.config.rest_s) as meter:
            options = {"rounds": self.config.rounds, "rates": self.rates, "failures": self.failures}
            everyone = [*ours, products.torch_product(dtype), best]
            self.keep(ladder.measure(everyone, operands, meter, regime="burst", **options))

    def sustained_estimate(self) -> float:
        competitors = len(set(SUSTAINED) & set(self.steps)) + 2
        return ladder.SETUP_S + SUSTAINED_ROUNDS * competitors * 1.2 * self.config.sustained_s

    def sustained(self, shape: Shape) -> None:
        if not self.budget.allows(f"sustained at {shape}", self.sustained_estimate()):
            return
        operands = self.operands(shape, torch.bfloat16)
        ours = [products.our_step(step, shape) for step in self.steps if step in SUSTAINED]
        everyone = [*ours, products.torch_product(torch.bfloat16), ladder.best_of_lt(operands, self.rates)]
        with power.PowerMeter(power.current_reader(), skip_s=min(SETTLES_S, self.config.sustained_s / 2)) as meter:
            options = {"rounds": SUSTAINED_ROUNDS, "rates": self.rates, "failures": self.failures}
            timed = {"regime": "sustained", "seconds": self.config.sustained_s}
            self.keep(ladder.measure(everyone, operands, meter, **timed, **options))

    def keep(self, rows: list[dict[str, Any]]) -> None:
        ladder.add_ratios(rows)
        for row in rows:
            ladder.print_row(row)
        self.rows += rows

    def save(self) -> None:
        notes = {
            "skipped": self.budget.skipped, "failed": self.failures, "baselines": self.baselines,
            "copy_bytes_per_s": self.bytes_per_s, "float32": "without TF32",
        }  # fmt: skip
        settings = {key: getattr(self.config, key) for key in BenchConfig.__dataclass_fields__} | notes
        filed = save_result("cuda", "matmul", self.rows, config=settings, device=self.device, root=self.config.out)
        print(filed)
        about = {"size": str(ladder.PICTURE), "bytes_per_s": self.bytes_per_s, "device": filed.stem.split("_")[1]}
        for path in pictures.draw(self.rows, self.config.out / "cuda", **about):
            print(path)


def cache_of_device() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def bench_cuda(config: BenchConfig) -> int:
    if torch.cuda.get_device_capability() != (9, 0):
        raise UserError(f"{torch.cuda.get_device_name()}: expected a Hopper GPU, compute capability 9.0")
    torch.set_float32_matmul_precision("highest")
    steps = chosen(products.parse_steps(config.steps), "_sm90")
    run = Run(config, Budget(config.budget_s), steps, cache_of_device())
    try:
        run.all_shapes()
    finally:
        if run.rows:
            run.save()
    return 1 if run.failures or not run.rows else 0


def tune_cuda(config: BenchConfig) -> int:
    chosen((dispatch.STEPS[-1],), "_sm90")
    failures: list[str] = []
    options = {"rounds": config.rounds, "cache_bytes": cache_of_device(), "failures": failures}
    rows = tilings.sweep(config.shapes("cuda"), Budget(config.budget_s), **options)
    settings = {key: getattr(config, key) for key in BenchConfig.__dataclass_fields__} | {"failed": failures}
    filed = save_result("cuda", "tilings", rows, config=settings, device="cuda", root=config.out)
    print(filed, tilings.write_table(filed, config.table, (*dispatch.TILINGS, *dispatch.ROW_COLUMN)), sep="\n")
    return 0


def count_cpu(config: BenchConfig) -> int:
    steps = chosen(products.parse_steps(config.steps), "_simt_checked")
    rows = counters.ladder(steps, config.shapes("cpu"))
    print(save_result("cuda", "ladder_counters", rows, config=config, device="cpu", root=config.out))
    return 0


def main() -> int:
    config = cli.parse(BenchConfig, prog=cli.program(), description="the speed of the matmul ladder beside cuBLAS")
    device = ladder.device_of(config.device)
    if device == "cpu" and config.tune:
        raise UserError("tune: tilings are timed on a GPU, and device is cpu")
    if device == "cpu":
        return count_cpu(config)
    return tune_cuda(config) if config.tune else bench_cuda(config)


if __name__ == "__main__":
    cli.run(main)
