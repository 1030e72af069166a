"""The attention ladder beside Triton and torch's backends in the same process: `python -m cuda.bench_attention`.

On a GPU: forward and backward by head width, mask and number of tokens, results compared with a peer's before anything
is timed; TFLOP/s and the ratio to the fastest peer. "triton" is ours too, what ops.attention takes under that name. The
run keeps to a budget of time and says what it left out. On a CPU nothing is timed: the checked model counts what each
step moves and computes, and cuda/replay.py says how busy the tensor cores could be. Results go to results/cuda/.
Refused: timing what is wrong; then the exit code is 1.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from common import cli, plots, timing
from common.cli import UserError
from common.results import save_result
from cuda import attention_ops, modules, timeline
from cuda.attention_ops import BACKWARD, EVERYTHING, FORWARD
from cuda.measure import attention, counters, ladder
from cuda.measure.attention import Shape
from cuda.measure.ladder import Budget

TOLERANCE = 3e-2  # of the largest element: two kernels that round probabilities to bf16 at different places
PEAK = 989.4e12  # FLOP/s, NVIDIA's data sheet of the H100 SXM, dense
COUNTED = (64, 192)  # head width, tokens: what a CPU counts
OURS = (*FORWARD, *BACKWARD, "triton")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto is CUDA where there is one"})
    head_dims: str = field(default="64,128,256", metadata={"help": "head widths"})
    tokens: str = field(default="512,1024,2048,4096,8192,16384", metadata={"help": "queries and keys"})
    forward: str = field(default="3,4,5,6,7,8,9", metadata={"help": "steps of the forward ladder; empty: none"})
    backward: str = field(default="2,3,4,5", metadata={"help": "steps of the backward ladder; empty: none"})
    triton: str = field(default="64,128", metadata={"help": "head widths of ours in Triton; empty: none"})
    rounds: int = field(default=5, metadata={"help": "samples of each competitor, taken in turn"})
    budget_s: float = field(default=120.0, metadata={"help": "seconds that a run on a GPU may take"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.budget_s > 0:
            raise ValueError(f"rounds {self.rounds}, budget_s {self.budget_s}: expected positive numbers")
        for name in ("head_dims", "triton"):
            if not set(numbers(name, getattr(self, name))) <= set(attention_ops.HEAD_DIMS):
                raise ValueError(f"{name} {getattr(self, name)!r}: expected some of {attention_ops.HEAD_DIMS}")
        numbers("tokens", self.tokens)
        for name, steps in (("forward", FORWARD), ("backward", BACKWARD)):
            self.steps(name, steps)

    def steps(self, name: Literal["forward", "backward"], ladder: tuple[str, ...]) -> list[str]:
        chosen = numbers(name, getattr(self, name))
        if any(not 1 <= number <= len(ladder) for number in chosen):
            raise ValueError(f"{name} {getattr(self, name)!r}: expected numbers from 1 to {len(ladder)}")
        return [ladder[number - 1] for number in chosen]


def numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if any(not part.isdigit() or int(part) < 1 for part in parts):
        raise ValueError(f"{name} {text!r}: expected positive numbers, as 1,2,3")
    return [int(part) for part in parts]


@dataclass(slots=True)
class Run:
    config: BenchConfig
    budget: Budget
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def measure(self, shape: Shape, backward: bool) -> None:
        """All competitors at one problem."""
        kind = "backward" if backward else "forward"
        if not self.budget.allows(f"{kind} {shape}", 4.0):
            return
        inputs = attention.operands(shape, "cuda")
        competitors = {}
        for step in self.config.steps(kind, BACKWARD if backward else FORWARD):
            one = attention.ours(shape, None, step) if backward else attention.ours(shape, step, None)
            competitors[step] = one
        if shape.head_dim in numbers("triton", self.config.triton):  # each width takes its seconds to compile
            competitors["triton"] = attention.ours(shape, None, None, kernels="triton")
        everyone = competitors | attention.peers(shape, inputs)
        functions: dict[str, Any] = {}
        for name, one in everyone.items():
            try:
                functions[name] = attention.backward_of(one, inputs) if backward else lambda one=one: one(*inputs[:3])
                functions[name]()
            except Exception as error:  # a head width that a step of the ladder does not have; what a compiler raises
                functions.pop(name, None)
                first_line = str(error).partition("\n")[0]
                print(f"{name} does not take {kind} {shape}: {first_line}", flush=True)
                if name == "triton":
                    self.failures.append(f"triton, {kind} {shape}: {type(error).__name__}: {error}")
        self.drop_wrong_triton(f"{kind} {shape}", functions)
        self.keep(shape, kind, functions)

    def drop_wrong_triton(self, what: str, functions: dict[str, Any]) -> None:
        """A wrong result of ours in Triton costs its own row, not everybody's."""
        if "triton" not in functions or len(functions) == 1:
            return
        *_, baseline = functions
        results = {name: functions[name]() for name in ("triton", baseline)}
        if not timing.close(TOLERANCE)(results):
            del functions["triton"]
            self.failures.append(f"triton, {what}: the result is far from that of {baseline}")
            print(f"FAILED, not timed: {self.failures[-1]}", flush=True)

    def keep(self, shape: Shape, kind: str, functions: dict[str, Any]) -> None:
        options = {"rounds": self.config.rounds, "warmup": 2, "device": "cuda"}
        try:
            taken = timing.compare(functions, check=timing.close(TOLERANCE), **options)
        except ValueError as error:
            self.failures.append(f"{kind} {shape}: {error}")
            print(f"FAILED, not timed: {self.failures[-1]}", flush=True)
            return
        flops = shape.flops(kind == "backward")
        best = min((s.median for name, s in taken.items() if name not in OURS), default=None)
        for name, samples in taken.items():
            row = {"step": name, "pass": kind, "head_dim": shape.head_dim, "tokens": shape.tokens,
                   "mask": "causal" if shape.causal else "full", "us": 1e6 * samples.median,
                   "tflops": flops / samples.median / 1e12, "of_peak": flops / samples.median / PEAK}  # fmt: skip
            if best is not None:
                row["of_best_peer"] = best / samples.median
            self.rows.append(row | {"samples": samples})
            ratio = f"{100 * row['of_best_peer']:6.1f} % of the best peer" if best is not None else ""
            print(
                f"{kind:8} {shape!s:24} {name:22} {row['us']:10.1f} us {row['tflops']:7.1f} TFLOP/s {ratio}", flush=True
            )

    def save(self) -> None:
        settings = {key: getattr(self.config, key) for key in BenchConfig.__dataclass_fields__}
        settings |= {"skipped": self.budget.skipped, "failed": self.failures}
        print(save_result("cuda", "attention", self.rows, config=settings, device="cuda", root=self.config.out))
        for width in sorted({row["head_dim"] for row in self.rows}):
            for kind in ("forward", "backward"):
                path = self.config.out / "cuda" / f"attention_{kind}_{width}.png"
                if draw(self.rows, width, kind, path):
                    print(path)


def draw(rows: list[dict[str, Any]], head_dim: int, kind: str, path: Path) -> bool:
    """TFLOP/s by tokens: peers and the last step, full and causal."""
    last = (FORWARD if kind == "forward" else BACKWARD)[-1]
    series: dict[str, tuple] = {}
    for row in rows:
        peer = row["step"] not in (*FORWARD, *BACKWARD)
        if row["head_dim"] == head_dim and row["pass"] == kind and (peer or row["step"] == last):
            xs, ys = series.setdefault(f"{row['step']}, {row['mask']}", ([], []))
            xs.append(row["tokens"])
            ys.append(row["tflops"])
    if not series:
        return False
    plots.curve(
        path, series, xlabel="tokens", ylabel="TFLOP/s", title=f"attention {kind}, head width {head_dim}", log_x=True
    )
    return True


def bench_cuda(config: BenchConfig) -> int:
    if torch.cuda.get_device_capability() != (9, 0):
        raise UserError(f"{torch.cuda.get_device_name()}: expected a Hopper GPU, compute capability 9.0")
    run = Run(config, Budget(config.budget_s))
    lengths = sorted(numbers("tokens", config.tokens), reverse=True)  # the headline first: the budget may end
    try:
        for backward in (False, True):
            for width in sorted(numbers("head_dims", config.head_dims), key=lambda width: width != 128):
                for tokens in lengths:
                    for causal in (False, True):
                        if config.steps("backward" if backward else "forward", BACKWARD if backward else FORWARD):
                            run.measure(Shape.of(width, tokens, causal), backward)
    finally:
        if run.rows:
            run.save()
    return 1 if run.failures or not run.rows else 0


# ---- without a GPU ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counted:
    """What counters.summary wants to know of a problem."""

    flops: float


def count(kind: str, step: str) -> dict[str, Any]:
    """What one step asks of a GPU, by the checked model, and of a Hopper step of the forward ladder how busy the tensor
    cores of its block could be."""
    head_dim, tokens = COUNTED
    module = modules.load("_simt_checked")
    q, k, v, d_o = (torch.randn(1, 2, tokens, head_dim).bfloat16() for _ in range(4))
    o, lse = attention_ops.attention(q, k, v, return_lse=True)
    numbers_of = {"scale": head_dim**-0.5, "softcap": 0.0, "left": EVERYTHING, "right": EVERYTHING}
    module.take_counters()
    with module.options(counters=True):
        if kind == "forward":
            scores = torch.empty(1, 2, tokens, tokens) if step == FORWARD[0] else None
            module.run("attention_forward", step=step, q=q, k=k, v=v, o=torch.empty_like(q), lse=torch.empty_like(lse),
                       scores=scores, **numbers_of)  # fmt: skip
        else:
            module.run("attention_backward", step=step, q=q, k=k, v=v, o=o, lse=lse, d_o=d_o, dq=torch.empty_like(q),
                       dk=torch.empty_like(k), dv=torch.empty_like(v), delta=torch.empty_like(lse),
                       dq_sum=torch.empty(2 * (tokens + 128) * head_dim), deterministic=False,
                       turns=torch.empty(2 * (tokens // 64 + 1), dtype=torch.int32), **numbers_of)  # fmt: skip
    flops = 4 * 2 * tokens**2 * head_dim * (2.5 if kind == "backward" else 1)
    row = {"pass": kind, "step": step, "head_dim": head_dim, "tokens": tokens}
    row |= counters.summary(module.take_counters(), Counted(flops))
    if kind == "forward" and step in FORWARD[3:]:
        row["tensor_cores_busy"] = timeline.play(step, timeline.Config())[1]
    return row


def bench_cpu(config: BenchConfig) -> int:
    print("no GPU is measured: these are counts by the checked CPU model, not times", flush=True)
    rows = []
    for kind, steps in (("forward", FORWARD), ("backward", BACKWARD)):
        for step in steps:
            rows.append(count(kind, step))
            row = rows[-1]
            busy = f"{row['tensor_cores_busy']:5.0%} busy" if "tensor_cores_busy" in row else ""
            done = f"{row['bytes_per_kflop']:9.2f} B/kFLOP {row['wgmma']:5} wgmma {row['mma']:6} mma"
            print(f"{kind:8} {step:14} {done} {busy}", flush=True)
    print(save_result("cuda", "attention_counters", rows, config=config, device="cpu", root=config.out))
    return 0


def main() -> int:
    config = cli.parse(BenchConfig, prog=cli.program(), description="the speed of attention beside torch's backends")
    device = ladder.device_of(config.device)
    return bench_cuda(config) if device == "cuda" else bench_cpu(config)


if __name__ == "__main__":
    cli.run(main)
