"""Race logs as a race would leave them, without one: numbers that fit together, to be bent by tests."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

from minigpt.train_config import plain
from speedrun.config import RaceConfig
from speedrun.logbook import in_bits, nats_per_bit, tokens_of
from speedrun.record_log import RaceLog, digest_of, seconds_to, write_log
from speedrun.schedule import plan
from speedrun.tracks import TRACKS

CONFIG = RaceConfig(
    track="laptop", layers=1, width=8, heads=2, kv_heads=2, mlp_width=8, context=16, eval_stride=8, batch=4,
    batches="4,8", steps=6, warmup=2, eval_every=2,
)  # fmt: skip
SOURCES = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("speedrun/a.py", "minigpt/b.py")}
MACHINE = {"torch": "2.13.0", "device": "cpu", "dtype": "float32", "threads": 2, "ranks": 1}


def made(seed: int = 0, bits: float = 1.3, seconds: float = 240.0, **about) -> RaceLog:
    """A race of six steps that took `seconds` and ended at `bits` per byte."""
    config = replace(CONFIG, seed=seed)
    source = digest_of(SOURCES)
    sitting = {"step": 0, "source": source, "name": "a-cpu-2threads", **MACHINE}
    first = {
        "track": config.track, "seed": seed, "config": plain(config), "data_digest": "d" * 64 + "+" + "e" * 64,
        "vocabulary": 2048, "held_out_tokens": 400, "held_out_bytes": 1200, "machine": "a-cpu-2threads", **MACHINE,
        "source": source, "source_at_end": source, "changed_files": [], "sources": SOURCES, "sittings": [sitting],
        "date": "2026-01-02", "commit": "c" * 40, "dirty": False, "command": "python -m speedrun.train",
        "versions": {"python": "3.11.7"}, "python": "3.11.7", **about,
    }  # fmt: skip
    steps = [row(step, config, bits, seconds / config.steps) for step in range(config.steps)]
    nats, track = nats_per_bit(first), TRACKS[config.track]
    result = {
        "bits_per_byte": bits, "nats_per_token": bits * nats, "train_seconds": seconds, "compile_seconds": 30.0,
        "seconds_to_target": seconds_to(in_bits(track, nats), steps), "steps": config.steps,
        "tokens": sum(tokens_of(step, config) for step in range(config.steps)), "parameters": 1000,
    }  # fmt: skip
    return RaceLog(first, steps, result)


def row(step: int, config: RaceConfig, bits: float, seconds: float) -> dict:
    now, loss = plan(step, config), 6.0 - step / 2
    tokens = now.rows * now.context
    told = {"step": step + 1, "loss": loss, "train_bits_per_byte": loss / math.log(2) / ((3 * tokens + 1) / tokens)}
    told |= {"lr_share": now.lr_share, "seconds": seconds, "tokens_per_s": tokens / seconds}
    if step + 1 == config.steps:
        return told | {"held_out_bits_per_byte": bits}
    return told | ({"held_out_look": bits + (config.steps - step) / 100} if (step + 1) % config.eval_every == 0 else {})


def write_record(folder: Path, logs: list[RaceLog]) -> None:
    for log in logs:
        write_log(folder / f"{log.about['seed']}.jsonl", log)
