"""Race logs as a race would leave them, without one: numbers that fit together, to be bent by tests."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from minigpt.train_config import plain
from speedrun.config import RaceConfig
from speedrun.logbook import in_bits, tokens_of
from speedrun.model import build
from speedrun.record_log import RaceLog, digest_of, seconds_to, write_log
from speedrun.schedule import plan
from speedrun.tracks import TRACKS, nats_per_bit

CONFIG = RaceConfig(
    track="laptop", layers=1, width=8, heads=2, kv_heads=2, mlp_width=8, context=16, eval_stride=8, batch=4,
    batches="4,8", steps=6, warmup=2, eval_every=2,
)  # fmt: skip
SOURCES = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("speedrun/a.py", "minigpt/b.py")}
RUN = {"commit": "c" * 40, "dirty": False, "command": "python -m speedrun.train"}
MACHINE = {
    "torch": "2.13.0",
    "device": "cpu",
    "dtype": "float32",
    "threads": 2,
    "ranks": 1,
    "kernels": "kernels: torch",
}


def made(seed: int = 0, bits: float = 0.0, seconds: float = 240.0, steps: int = 6, **about) -> RaceLog:
    """A race that took `seconds` and ended at `bits` per byte, by default about 1.3."""
    bits = bits or 1.3 + seed / 1000
    config = replace(CONFIG, seed=seed, steps=steps)
    source, day = digest_of(SOURCES), about.get("date", "2026-01-02")
    sitting = {"step": 0, "began": f"{day}T03:00:00+00:00", "source": source, "name": "a-cpu-2threads", **MACHINE}
    sitting |= {name: about.get(name, value) for name, value in RUN.items()}
    first = {
        "track": config.track, "seed": seed, "config": plain(config), "data_digest": "d" * 64 + "+" + "e" * 64,
        "vocabulary": 2048, "held_out_tokens": 400, "held_out_bytes": 2000, "machine": "a-cpu-2threads", **MACHINE,
        "source": source, "source_at_end": source, "changed_files": [], "sources": SOURCES, "sittings": [sitting],
        "date": day, "ended": f"{day}T03:20:00+00:00", **RUN,
        "versions": {"python": "3.11.7"}, "python": "3.11.7", **about,
    }  # fmt: skip
    middle = (config.steps - 1) / 2
    each = [seconds / config.steps + (seed + 1) * 1e-3 * (step - middle) / middle for step in range(config.steps)]
    rows = [row(step, config, bits, each[step]) for step in range(config.steps)]
    nats, track = nats_per_bit(first), TRACKS[config.track]
    result = {
        "bits_per_byte": bits, "nats_per_token": bits * nats, "train_seconds": seconds, "compile_seconds": 30.0,
        "seconds_to_target": seconds_to(in_bits(track, nats), rows), "steps": config.steps,
        "tokens": sum(tokens_of(step, config) for step in range(config.steps)),
        "parameters": build(config, 2048).num_parameters(),
    }  # fmt: skip
    return RaceLog(first, rows, result)


def row(step: int, config: RaceConfig, bits: float, seconds: float) -> dict:
    """Loss and bytes of a batch are the seed's; they rise and fall by no rule that two seeds share."""
    chance = np.random.default_rng((config.seed, step))
    now, loss = plan(step, config), max(3.5, 6.0 - step / 2) + chance.integers(1000) / 1e5
    tokens = now.rows * now.context
    size = 5 * tokens + int(chance.integers(-tokens // 2, tokens // 2))
    told = {"step": step + 1, "loss": loss, "train_bits_per_byte": loss / math.log(2) / (size / tokens)}
    told |= {"lr_share": now.lr_share, "seconds": seconds}
    if step + 1 == config.steps:
        return told | {"held_out_bits_per_byte": bits}
    return told | ({"held_out_look": bits + (config.steps - step) / 100} if (step + 1) % config.eval_every == 0 else {})


def write_record(folder: Path, logs: list[RaceLog]) -> None:
    for log in logs:
        write_log(folder / f"{log.about['seed']}.jsonl", log)
