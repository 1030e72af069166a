"""What a finished run reached: bits per byte beside compressors on the same bytes, speed beside the machine's own peak.

Everything is computed here and now: the compressors run, the matrix products are timed. Refuses nothing.
"""

import bz2
import json
import lzma
import zlib
from typing import Any

import torch

from common.dist import World
from common.log import atomic_write, format_duration, jsonable, read_jsonl
from common.timing import gemm_peak
from minigpt.checkpoint import FOLDER
from minigpt.compare import plot_run
from minigpt.sample import sample_text
from minigpt.sampling import Sampling
from speedrun.config import RaceConfig
from speedrun.model import exported
from speedrun.schedule import plan
from speedrun.spent import draw, mean_ms, parts_as_lines

PROMPT = "def "


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors at their strongest setting on the same text."""
    packed = {
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
        "bz2 -9": bz2.compress(text, 9),
        "zlib -9": zlib.compress(text, 9),
    }
    return {name: 8 * len(data) / len(text) for name, data in packed.items()}


def machine_peak(dtype: torch.dtype, world: World) -> float:
    """Measured FLOP/s of a large matrix product, times the ranks."""
    return world.world_size * gemm_peak(str(dtype).removeprefix("torch."), world.device)


def summarise(run: Any, wall_seconds: float) -> dict[str, Any]:
    """The numbers of a finished run, written to summary.json in its folder; loss.png is drawn again beside xz."""
    config, data, world = run.config, run.data, run.world
    # Shards may come without their text: then there is nothing to compress.
    others = compressors(data.held_out_text) if data.held_out_text is not None else {}
    plot_run(config.folder, reference={name: others[name] for name in ("xz -9e",) if name in others})
    plans = [plan(step, config) for step in range(config.steps)]
    tokens = sum(now.rows * now.context for now in plans)
    flops = sum(run.model.num_flops_per_token(now.context, now.window) * now.rows * now.context for now in plans)
    flops /= run.seconds
    peak = machine_peak(run.dtype, world)
    parts = mean_ms(read_jsonl(config.folder / "timing.jsonl"))
    draw(config.folder / "breakdown.png", parts, "Where the time of a step goes")
    summary = {
        "bits_per_byte": run.bits_per_byte,
        "held_out_bytes": data.held_out_bytes,
        "compressors": others,
        "corpus": data.name,
        "data_digest": data.digest,
        "vocabulary": data.tokenizer.vocab_size,
        "parameters": run.model.num_parameters(),
        "dtype": str(run.dtype).removeprefix("torch."),
        "device": world.device.type,
        "ranks": world.world_size,
        "threads": torch.get_num_threads(),
        "steps": config.steps,
        "tokens": tokens,
        "train_seconds": run.seconds,
        "compile_seconds": run.warm_seconds,
        "wall_seconds": wall_seconds,
        "tokens_per_s": tokens / run.seconds,
        "flops": flops,
        "gemm_peak_flops": peak,
        "of_peak": flops / peak,
        "parts_ms": parts,
    }
    atomic_write(config.folder / "summary.json", json.dumps(jsonable(summary), indent=1, allow_nan=False) + "\n")
    return summary


def as_lines(summary: dict[str, Any], config: RaceConfig) -> str:
    s = summary
    beside = ", ".join(f"{name} {value:.3f}" for name, value in s["compressors"].items())
    beside = f" ({beside} on the same)" if beside else ""
    ranks = f" on {s['ranks']} ranks" if s["ranks"] > 1 else ""
    return "\n".join(
        [
            f"bits per byte  {s['bits_per_byte']:.4f} on {s['held_out_bytes']:,} held-out bytes{beside}",
            f"model          {s['parameters']:,} parameters, {s['dtype']}, a vocabulary of {s['vocabulary']:,} tokens",
            f"training       {s['steps']:,} steps, {s['tokens']:,} tokens in {format_duration(s['train_seconds'])}, "
            f"compiled in {format_duration(s['compile_seconds'])}; this sitting with evaluation and all "
            f"{format_duration(s['wall_seconds'])}",
            f"speed          {s['tokens_per_s']:,.0f} tokens/s, {s['flops'] / 1e9:,.1f} GFLOP/s, {s['of_peak']:.1%} "
            f"of the GEMM peak measured here, {s['gemm_peak_flops'] / 1e9:,.0f} GFLOP/s{ranks}",
            f"a step takes   {sum(s['parts_ms'].values()):.2f} ms on rank 0",
            *parts_as_lines(s["parts_ms"]),
            "files          "
            + "  ".join(str(config.folder / name) for name in ("report.html", "loss.png", "metrics.jsonl", FOLDER)),
        ]
    )


def sample(run: Any) -> str:
    text = sample_text(exported(run.model), run.data.tokenizer, PROMPT, length=120, sampling=Sampling(temperature=0.8))
    return "sample         temperature 0.8, seed 0:\n" + PROMPT + text
