"""Whose kernels do which part of a race: `python -m speedrun.winners` prints what was measured, and who won.

Benchmarks of stage 3 leave results/cuda/{attention,fused,matmul}_<device>_<date>.json. For each part of a model, at
the measured shape nearest to the config's, the least time of forward and backward pass wins: torch's own, ours in CUDA
C++, ours in Triton. Operations are measured one by one, so what torch.compile gains by fusing two of them is not seen.
Refused: kernels that do not run here, when a config names them; under "auto" these, and all on a device of which
nothing was measured, are torch's. A file of times that is damaged.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common import cli
from common.cli import UserError
from common.results import device_name
from speedrun.config import RaceConfig
from speedrun.presets import from_command_line

WHOSE = ("torch", "cuda", "triton")
# Names of bench_matmul and bench_fused for each; attention has its own rule.
PRODUCTS = {"cuBLAS": "torch", "best_16": "cuda", "triton": "triton"}
FUSED = {"ours": "cuda", "triton": "triton"}
NORMS = {"rmsnorm": "rms_norm", "layernorm": "layer_norm"}
LOSS = "linear + cross_entropy"
# What is read of their rows.
COLUMNS = {
    "attention": {"step", "pass", "mask", "head_dim", "tokens", "us"},
    "fused": {"operation", "by", "pass", "us"},
    "matmul": {"step", "dtype", "regime", "m", "n", "k", "us"},
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Whose kernels do each part: torch, cuda or triton. `loss` counts where the loss is fused with the head."""

    attention: str = "torch"
    linear: str = "torch"
    norm: str = "torch"
    rotary: str = "torch"
    activation: str = "torch"
    embedding: str = "torch"
    adamw: str = "torch"
    loss: str = "torch"

    def ours(self) -> set[str]:
        return set(asdict(self).values()) - {"torch"}

    def __str__(self) -> str:
        ours = [f"{part} {whose}" for part, whose in asdict(self).items() if whose != "torch"]
        return f"kernels: {', '.join(ours)}; the rest torch" if ours else "kernels: torch"


@dataclass(frozen=True, slots=True)
class Row:
    """Of one part: microseconds, forward and backward, of each that was measured."""

    part: str
    case: str
    us: Mapping[str, float]

    def winner(self, able: Iterable[str] = WHOSE) -> str:
        """The fastest of those that are able to run; torch where it was not measured itself."""
        times = {whose: self.us[whose] for whose in WHOSE if whose in self.us and whose in able}
        return min(times, key=times.get) if "torch" in times else "torch"


# ---- the choice ------------------------------------------------------------------------------------------------------


def named(config: RaceConfig) -> Choice:
    """By the names in the config alone; torch for "auto"."""
    whose = config.kernels if config.kernels != "auto" else "torch"
    parts = dict.fromkeys(("linear", "norm", "rotary", "activation", "embedding", "adamw"), whose)
    attention = config.attention if config.attention != "auto" else "torch"
    return Choice(attention=attention, **parts, loss=fused_by(whose, WHOSE) if config.fused_loss else "torch")


def fused_by(wanted: str, able: Iterable[str]) -> str:
    """Torch has no fused loss: ours then, and in CUDA C++ where that runs."""
    return wanted if wanted != "torch" else "cuda" if "cuda" in able else "triton"


def choose(config: RaceConfig, device: torch.device, dtype: torch.dtype) -> tuple[Choice, str]:
    """For a run on `device` in `dtype`, and a line that says what was chosen and why.

    Raises UserError for kernels that the config names and that do not run there.
    """
    choice, why = named(config), ""
    asked = {config.attention, config.kernels} & {"cuda", "triton"}
    for whose in sorted(asked):
        if problem := missing(whose, device):
            raise UserError(f"kernels {whose}: {problem}")
    if "auto" in (config.attention, config.kernels) and device.type == "cuda":
        choice, why = by_measurement(config, choice, device, dtype)
    if config.fused_loss and choice.loss not in asked:
        able = [whose for whose in ("cuda", "triton") if not missing(whose, device)]
        if not able:
            raise UserError(f"fused_loss: {missing('cuda', device)}")
        choice = replace(choice, loss=choice.loss if choice.loss in able else able[0])
    return choice, f"{choice}{why}"


def by_measurement(config: RaceConfig, choice: Choice, device: torch.device, dtype: torch.dtype) -> tuple[Choice, str]:
    """`choice` with the winners for what is "auto"."""
    name = device_name(device)
    if dtype != torch.bfloat16:
        return choice, f" ({str(dtype)[6:]} was not measured)"
    rows = measured(config, name, Path(config.measured))
    if not rows:
        return choice, f" (nothing measured of {name} in {config.measured}/cuda: make gpu)"
    problems = {whose: missing(whose, device) for whose in ("cuda", "triton")}
    able = ["torch", *(whose for whose, problem in problems.items() if not problem)]
    winners = {row.part: row.winner(able) for row in rows if row.part != "loss" or config.fused_loss}
    if "loss" in winners:
        loss = next(row for row in rows if row.part == "loss")
        winners["loss"] = min((whose for whose in able[1:]), key=lambda who: loss.us.get(who, math.inf), default="cuda")
    auto = {part: whose for part, whose in winners.items() if getattr(config, setting(part)) == "auto"}
    unable = "".join(f"; {whose}: {problem}" for whose, problem in problems.items() if problem)
    return replace(choice, **auto), f" (measured on {name}{unable})"


def setting(part: str) -> str:
    """The field of a config that decides about a part."""
    return "attention" if part == "attention" else "kernels"


def missing(whose: str, device: torch.device) -> str:
    """Why these kernels do not run on a device, and what to do; empty where they do."""
    from cuda.device import place  # which a run on torch's own kernels never needs

    try:
        place(device, kernels=whose)
    except RuntimeError as error:
        return str(error)
    return ""


# ---- what was measured -----------------------------------------------------------------------------------------------


def measured(config: RaceConfig, device: str, root: Path) -> list[Row]:
    """The rows of a device, named as in its files, for the shapes of a config."""
    found = [
        of_attention(rows_of(root, "attention", device), config),
        *of_fused(rows_of(root, "fused", device), config),
    ]
    found.append(of_products(rows_of(root, "matmul", device), config))
    return [row for row in found if row is not None]


def rows_of(root: Path, name: str, device: str) -> list[dict[str, Any]]:
    """Of the newest file of a benchmark on a device."""
    paths = sorted((root / "cuda").glob(f"{name}_{device}_*.json"))  # dates sort as text
    if not paths:
        return []
    try:
        rows = json.loads(paths[-1].read_text())["rows"]
        if all(COLUMNS[name] <= row.keys() for row in rows):
            return rows
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    columns = ", ".join(sorted(COLUMNS[name]))
    raise ValueError(f"{paths[-1]}: damaged: expected JSON with rows of {columns}; cuda.bench_{name} makes it anew")


def of_attention(rows: list[dict[str, Any]], config: RaceConfig) -> Row | None:
    """At the config's head width. Ours skip what a window and documents hide, so they are at least as fast as causal;
    torch has to be given a mask, and computes all scores: it is at most as fast as without one."""
    from cuda.attention_ops import DEFAULT, HEAD_DIMS, TRITON_HEAD_DIMS

    width = config.head_width or config.width // config.heads
    masked = bool(config.window or config.windows or config.documents)
    rows = [row for row in rows if row["head_dim"] == width]
    if not rows:
        return None
    tokens = min({row["tokens"] for row in rows}, key=lambda tokens: abs(math.log(tokens / config.context)))
    taken = {(row["step"], row["pass"], row["mask"]): row["us"] for row in rows if row["tokens"] == tokens}

    def both(forward: str, backward: str, mask: str = "causal") -> float:
        return taken.get((forward, "forward", mask), math.inf) + taken.get((backward, "backward", mask), math.inf)

    us = {
        "torch": min(both(name, name, "full" if masked else "causal") for name in ("torch flash", "cuDNN")),
        "cuda": both(*DEFAULT["sm_90"]) if width in HEAD_DIMS else math.inf,
        "triton": both("triton", "triton") if width in TRITON_HEAD_DIMS else math.inf,
    }
    what = "causal, torch full" if masked else "causal"
    return Row("attention", f"{what}, head width {width}, {tokens} tokens", finite(us))


def of_fused(rows: list[dict[str, Any]], config: RaceConfig) -> list[Row]:
    """What moves memory: the order is taken to be that of the measured size."""
    operations = {"norm": NORMS[config.norm], "activation": config.mlp.removesuffix("_tanh"), "embedding": "embedding",
                  "adamw": "adamw", "loss": LOSS}  # fmt: skip
    if config.positions == "rotary":
        operations["rotary"] = "rotary"
    found = []
    for part, operation in operations.items():
        taken = {(row["by"], row["pass"]): row["us"] for row in rows if row["operation"] == operation}
        passes = {which for _, which in taken}
        compiled = config.compile and any(by == "torch.compile" for by, _ in taken)
        names = {"torch.compile" if compiled else "torch": "torch", **FUSED}
        us = {who: sum(taken.get((by, which), math.inf) for which in passes) for by, who in names.items()}
        if passes:
            found.append(Row(part, operation + ", with --fused-loss" * (part == "loss"), finite(us)))
    return found


def of_products(rows: list[dict[str, Any]], config: RaceConfig) -> Row | None:
    """The products of all blocks, each at the speed of the measured one that is nearest."""
    shapes: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        if row["dtype"] == "bfloat16" and row["regime"] == "burst" and row["step"] in PRODUCTS:
            shapes.setdefault((row["m"], row["n"], row["k"]), {})[PRODUCTS[row["step"]]] = row["us"]
    if not shapes:
        return None
    us = dict.fromkeys(WHOSE, 0.0)
    for wanted in products(config):
        near = min(shapes, key=lambda shape: sum(abs(math.log(a / b)) for a, b in zip(shape, wanted, strict=True)))
        for whose in us:
            us[whose] += shapes[near].get(whose, math.inf) * math.prod(wanted) / math.prod(near)
    return Row("linear", f"products of {config.layers} blocks, forward", finite(us))


def products(config: RaceConfig) -> list[tuple[int, int, int]]:
    """(rows, outputs, inputs) of the linear layers."""
    K = config.head_width or config.width // config.heads
    C, F, m = config.width, config.mlp_width, config.batch * config.context // config.accumulate
    ups = 2 if config.mlp == "swiglu" else 1
    attention = [(config.heads * K, C), (config.kv_heads * K, C), (config.kv_heads * K, C), (C, config.heads * K)]
    return config.layers * [(m, n, k) for n, k in [*attention, *ups * [(F, C)], (C, F)]]


def finite(us: Mapping[str, float]) -> dict[str, float]:
    return {whose: value for whose, value in us.items() if value < math.inf}


# ---- the table -------------------------------------------------------------------------------------------------------


def devices(root: Path) -> list[str]:
    """Those of which the benchmarks have left times."""
    names = (
        path.stem.split("_") for name in ("attention", "fused", "matmul") for path in (root / "cuda").glob(f"{name}_*")
    )
    return sorted({parts[1] for parts in names if len(parts) == 3})


def table(config: RaceConfig, root: Path, show: Callable[[str], None] = print) -> None:
    """All devices, and what a race with this config would use there."""
    show("CPU: torch; ours run there by a model or an interpreter, to be checked, not to be fast")
    for device in devices(root):
        show(f"\n{device}\n{'part':12}{'measured':44}{'torch':>10}{'cuda':>10}{'triton':>10}  us, fastest")
        for row in measured(config, device, root):
            times = "".join(f"{row.us[whose]:10.1f}" if whose in row.us else f"{'-':>10}" for whose in WHOSE)
            show(f"{row.part:12}{row.case:44}{times}  {row.winner()}")
    if not devices(root):
        show(f"no GPU is measured in {root}/cuda: a race on one uses torch's kernels until `make gpu` has run there")


def main() -> None:
    config = from_command_line()
    table(config, Path(config.measured))


if __name__ == "__main__":
    cli.run(main)
