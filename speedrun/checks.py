"""What one race log says, held against itself, its config and the rules of its track; speedrun/verify.py prints it.

Nothing is read but the log, and nothing is computed that a race computes. Refused: nothing, all is found and told.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedrun.config import RaceConfig
from speedrun.logbook import UNITS, in_bits, nats_per_bit, tokens_of
from speedrun.record_log import RaceLog, contradictions, digest_of, number, read_chain, seconds_to
from speedrun.schedule import plan
from speedrun.tracks import TRACKS, Track

CORES = 2  # of a race on a CPU
GPUS = {"one-gpu": 1, "fineweb": 8}  # at most
SHOWN = 3  # findings of one kind; the rest is counted


@dataclass(frozen=True, slots=True)
class Finding:
    good: bool | None  # None: nobody can say here
    text: str


def checked(name: str, faults: Sequence[str], fine: str) -> list[Finding]:
    """One finding where there is no fault, else one for each of the first."""
    found = [Finding(False, f"{name}: {fault}") for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        found.append(Finding(False, f"{name}: and {len(faults) - SHOWN} more of these"))
    return found or [Finding(True, f"{name}: {fine}")]


def verify_log(path: Path) -> tuple[RaceLog | None, list[Finding]]:
    """One log by itself: its links, numbers, config, sittings. The log is None where its lines were changed."""
    try:
        log = read_chain(path)
    except ValueError as error:
        return None, [Finding(False, f"links: {str(error).removeprefix(f'{path}, ').removeprefix(f'{path}: ')}")]
    steps, about = log.steps, log.about
    found = checked("links", [], f"{len(steps) + 2} lines, none changed since the chain was made")
    if faults := contradictions(log):
        return log, found + checked("numbers", faults, "")
    found += checked("numbers", [], f"{len(steps)} steps, seconds and result of one run, all finite")
    try:
        config = RaceConfig(**about["config"])
        found += checked("config", list(of_config(about, config)), "one that the program accepts")
        found += checked("schedule", list(of_plan(log, config)), "steps, rates, tokens and looks are the config's")
        found += checked("result", list(of_result(log, config)), "follows from the steps")
        found += checked("sittings", list(of_sittings(about)), f"{len(about['sittings'])}, on one program and machine")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        found.append(Finding(False, f"line 1: not what a race writes: {type(error).__name__}: {error}"))
    return log, found


# ---- one log ---------------------------------------------------------------------------------------------------------


def of_config(about: dict[str, Any], config: RaceConfig) -> Iterator[str]:
    for name in ("seed", "track"):
        if about[name] != getattr(config, name):
            yield f"line 1, {name}: {about[name]!r}, while the config says {getattr(config, name)!r}"
    for name in ("data_digest", "machine", "device", "dtype", "torch", "date", "source"):
        if not isinstance(about[name], str):
            yield f"line 1, {name}: {about[name]!r}, expected a text"
    for name in ("held_out_bytes", "held_out_tokens", "vocabulary", "ranks", "threads"):
        if not number(about, name) >= 1:
            yield f"line 1, {name}: {about.get(name)!r}, expected at least 1"


def of_plan(log: RaceLog, config: RaceConfig) -> Iterator[str]:
    """What the config and the number of a step decide."""
    if config.steps != len(log.steps):
        yield f"line {len(log.steps) + 2}, steps: {len(log.steps)} in the log, while the config says {config.steps}"
        return
    for line, row in enumerate(log.steps, start=2):
        step, wanted = line - 1, plan(line - 2, config)
        if not close(number(row, "lr_share"), wanted.lr_share, 1e-9):
            yield f"line {line}, lr_share: {row.get('lr_share')}, while the schedule says {wanted.lr_share}"
        tokens = wanted.rows * wanted.context
        if not close(number(row, "tokens_per_s") * row["seconds"], tokens, 1e-6):
            told = f"{row.get('tokens_per_s')} tokens/s in {row['seconds']} s"
            yield f"line {line}, tokens_per_s: {told}, while the step has {tokens} tokens"
        looks = {name for name in ("held_out_look", "held_out_bits_per_byte") if name in row}
        due = {"held_out_bits_per_byte"} if step == config.steps else set()
        due |= {"held_out_look"} if step % config.eval_every == 0 and not due else set()
        if looks != due:
            yield f"line {line}: {' and '.join(looks) or 'no look'}, expected {' and '.join(due) or 'no look'}"
        if not plausible(row, tokens):
            yield (f"line {line}, train_bits_per_byte: {row.get('train_bits_per_byte')} at a loss of {row['loss']}: "
                   f"expected a whole number of bytes in {tokens} tokens")  # fmt: skip


def plausible(row: dict[str, Any], tokens: int) -> bool:
    """Loss and bits per byte together tell how many bytes the step's targets have, which is a whole number.

    The mean was taken in float32, so only where that is exact enough; else it must be a number above 0.
    """
    size = tokens * row["loss"] / math.log(2) / (number(row, "train_bits_per_byte") or math.nan)
    rounding = 2e-7 * size
    return size > 0 and (not rounding < 0.1 or abs(size - round(size)) <= rounding)


def of_result(log: RaceLog, config: RaceConfig) -> Iterator[str]:
    result, nats, track = log.result, nats_per_bit(log.about), TRACKS.get(config.track)
    wanted: dict[str, float | None] = {
        "tokens": sum(tokens_of(step, config) for step in range(config.steps)),
        "nats_per_token": result["bits_per_byte"] * nats,
        "seconds_to_target": seconds_to(in_bits(track, nats), log.steps) if track else None,
    }
    for name, value in wanted.items():
        told = result.get(name, "missing")
        fits = told is None if value is None else close(number(result, name), value, 1e-9)
        if not fits:
            yield f"line {len(log.steps) + 2}, {name}: {told}, while the steps give {value}"
    for name in ("parameters", "compile_seconds"):
        if not number(result, name) >= 0:
            yield f"line {len(log.steps) + 2}, {name}: {result.get(name)!r}, expected a number of at least 0"


def of_sittings(about: dict[str, Any]) -> Iterator[str]:
    sittings = about["sittings"]
    starts = [sitting["step"] for sitting in sittings]
    if starts[:1] != [0] or sorted(set(starts)) != starts or not starts[-1] < about["config"]["steps"]:
        yield f"line 1, sittings: they begin at steps {starts}, expected 0 and then later ones"
    if digest_of(about["sources"]) != about["source"]:
        yield "line 1, source: not the digest of the files in sources"
    digests = {about["source"], about["source_at_end"], *(sitting["source"] for sitting in sittings)}
    if len(digests) > 1 or about["changed_files"]:
        changed = ", ".join(about["changed_files"]) or "files that are not named"
        yield f"line 1, sources: the program changed during the run: {changed}"
    for name in ("torch", "device", "dtype", "threads", "ranks", "name"):
        values = {sitting[name] for sitting in sittings} | {about["machine" if name == "name" else name]}
        if len(values) > 1:
            yield f"line 1, {name}: {' and '.join(sorted(map(str, values)))}, expected one machine"


def close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * max(abs(one), abs(other))


# ---- the rules of a track --------------------------------------------------------------------------------------------


def value_of(log: RaceLog, track: Track) -> float:
    """What the track's target is about."""
    return log.result[UNITS[track.unit]]


def verify_rules(log: RaceLog) -> list[Finding]:
    """The rules of the log's own track that one run can keep."""
    track = TRACKS.get(log.about["track"])
    if track is None:
        return [Finding(None, f"track: {log.about['track']!r}, so no rules: expected one of {', '.join(TRACKS)}")]
    found = checked("track", list(of_track(log, track)), f"{track.name}, its text and machine")
    if track.limit_seconds:
        seconds = log.result["train_seconds"]
        kept = f"{seconds:.1f} of {track.limit_seconds:g} s"
        late = f"{kept}: only for the race to the target, not for that of {track.limit_seconds:g} s"
        found.append(Finding(True, f"time: {kept}") if within(log, track) else Finding(None, f"time: {late}"))
    about = log.about
    digest = f"{about['data_digest'][:12]}, held out {about['held_out_bytes']:,} bytes, Python {about['python']}"
    return [*found, Finding(None, f"data: digest {digest}: whose text that is, only who has it can say")]


def within(log: RaceLog, track: Track) -> bool:
    return log.result["train_seconds"] <= track.limit_seconds


def of_track(log: RaceLog, track: Track) -> Iterator[str]:
    about, config = log.about, log.about["config"]
    if config["corpus"].partition(":")[0] != track.corpus.partition(":")[0]:
        yield f"line 1, corpus: {config['corpus']!r}, expected {track.corpus!r}"
    if track.tokenizer and config["tokenizer"] != track.tokenizer:
        yield f"line 1, tokenizer: {config['tokenizer']!r}, expected {track.tokenizer!r}"
    if track.device and about["device"] != track.device:
        yield f"line 1, device: {about['device']}, expected {track.device}"
    if about["device"] == "cpu" and not about["threads"] * about["ranks"] <= CORES:
        yield f"line 1, threads: {about['threads']} on each of {about['ranks']} ranks, expected {CORES} cores"
    if about["device"] == "cuda" and not about["ranks"] <= GPUS.get(track.name, 0):
        yield f"line 1, ranks: {about['ranks']} GPUs, expected at most {GPUS.get(track.name, 0)}"
    if track.held_out and about["held_out_tokens"] != track.held_out:
        yield f"line 1, held_out_tokens: {about['held_out_tokens']:,}, expected {track.held_out:,}"
