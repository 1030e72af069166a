"""What one race log says, held against itself, its config and the rules of its track; speedrun/verify.py prints it.

Nothing is read but the log, and nothing is computed that a race computes. speedrun/doubts.py has what speaks against a
log whose numbers fit together. Refused: nothing, all is found and told.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from speedrun import doubts
from speedrun.config import RaceConfig
from speedrun.logbook import UNITS, in_bits, tokens_of
from speedrun.record_log import RaceLog, contradictions, digest_of, number, read_chain, seconds_to
from speedrun.schedule import plan
from speedrun.tracks import TRACKS, Track, is_on, nats_per_bit

CORES = 2  # of a race on a CPU
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
        if unknown := sorted(about["config"].keys() - {field.name for field in fields(RaceConfig)}):
            raise ValueError(f"config has {', '.join(unknown)}, which this program has not: verify with the log's own")
        config = RaceConfig(**about["config"])
        found += checked("config", list(of_config(about, config)), "one that the program accepts")
        if not found[-1].good:
            return log, found
        found += checked("schedule", list(of_plan(log, config)), "steps, rates, tokens and looks are the config's")
        found += checked("result", list(of_result(log, config)), "follows from the steps")
        found += checked("sittings", list(of_sittings(about)), f"{len(about['sittings'])}, on one program and machine")
        if not found[-1].good:
            return log, found
        found += checked("command", list(doubts.of_commands(about)), "its flags are the config's")
        found += checked("speed", list(doubts.of_speed(log, config)), "no step faster than such machines are")
        found += clock(log)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        found.append(Finding(False, f"line 1: not what a race writes: {type(error).__name__}: {error}"))
    return log, found


# ---- one log ---------------------------------------------------------------------------------------------------------


def of_config(about: dict[str, Any], config: RaceConfig) -> Iterator[str]:
    defaults = RaceConfig()
    for name, value in about["config"].items():
        wanted = type(getattr(defaults, name))
        if type(value) is not wanted and (type(value), wanted) != (int, float):
            yield f"line 1, config: {name} {value!r}, expected {wanted.__name__}"
    for name in ("seed", "track"):
        if about[name] != getattr(config, name):
            yield f"line 1, {name}: {about[name]!r}, while the config says {getattr(config, name)!r}"
    for name in ("data_digest", "machine", "device", "dtype", "torch", "date", "source"):
        if not isinstance(about[name], str):
            yield f"line 1, {name}: {about[name]!r}, expected a text"
    for name in ("held_out_bytes", "held_out_tokens", "vocabulary", "ranks", "threads"):
        if type(about.get(name)) is not int or about[name] < 1:
            yield f"line 1, {name}: {about.get(name)!r}, expected a whole number of at least 1"
            return
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe" and about["vocabulary"] > int(size):
        yield f"line 1, vocabulary: {about['vocabulary']}, while the config's tokenizer is {config.tokenizer}"


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
        looks = {name for name in ("held_out_look", "held_out_bits_per_byte") if name in row}
        due = {"held_out_bits_per_byte"} if step == config.steps else set()
        due |= {"held_out_look"} if step % config.eval_every == 0 and not due else set()
        if looks != due:
            yield f"line {line}: {' and '.join(looks) or 'no look'}, expected {' and '.join(due) or 'no look'}"
        if not plausible(row, tokens):
            yield (f"line {line}, train_bits_per_byte: {row.get('train_bits_per_byte')} at a loss of {row['loss']}: "
                   f"expected a whole number of bytes in {tokens} tokens")  # fmt: skip


def plausible(row: dict[str, Any], tokens: int) -> bool:
    """Whether the bytes of the step's targets are a whole number, where that can be seen, else above 0."""
    size = doubts.bytes_of(row, tokens)
    return size > 0 and (not doubts.exact(size) or abs(size - round(size)) <= doubts.ROUNDING * size)


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
    if not all(type(step) is int for step in starts):
        yield f"line 1, sittings: they begin at steps {starts}, expected whole numbers"
        return
    if starts[:1] != [0] or sorted(set(starts)) != starts or not starts[-1] < about["config"]["steps"]:
        yield f"line 1, sittings: they begin at steps {starts}, expected 0 and then later ones"
        return
    if digest_of(about["sources"]) != about["source"]:
        yield "line 1, source: not the digest of the files in sources"
    digests = {about["source"], about["source_at_end"], *(sitting["source"] for sitting in sittings)}
    if len(digests) > 1 or about["changed_files"]:
        changed = ", ".join(about["changed_files"]) or "files that are not named"
        yield f"line 1, sources: the program changed during the run: {changed}"
    for name in ("torch", "device", "dtype", "threads", "ranks", "kernels", "name"):
        values = {str(sitting.get(name)) for sitting in sittings} | {
            str(about.get("machine" if name == "name" else name))
        }
        if len(values) > 1:
            yield f"line 1, {name}: {' and '.join(sorted(values))}, expected one machine"
    for name in ("commit", "dirty", "command"):
        if about.get(name) != sittings[-1].get(name):
            yield f"line 1, {name}: {about.get(name)!r}, while the last sitting says {sittings[-1].get(name)!r}"
    if about["python"] != about["versions"]["python"]:
        yield f"line 1, python: {about['python']!r}, while versions say {about['versions']['python']!r}"


def clock(log: RaceLog) -> list[Finding]:
    """Seconds of the steps against the times of the sittings, which are those of any clock on the wall."""
    if "ended" not in log.about or not all("began" in sitting for sitting in log.about["sittings"]):
        return [Finding(None, "clock: the log has no times of day to compare the seconds with")]
    wall, faults = doubts.wall_seconds(log), list(doubts.of_clock(log))
    seconds, compiling = log.result["train_seconds"], log.result["compile_seconds"]
    fine = f"{wall:.0f} s from begin to end, {seconds:.0f} of them on the clock, {compiling:.0f} compiling"
    return checked("clock", faults, fine)


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
    found += checked("text", list(doubts.of_text(log)), "what held-out text cost fits what training text cost")
    if found[-1].good and len(log.steps) < doubts.FEW:
        found[-1] = Finding(None, f"text: {len(log.steps)} steps, too few to tell what held-out text can cost")
    if track.races:
        limits = [seconds for seconds, _ in track.races]
        kept = next((limit for limit in limits if within(log, limit)), None)
        of = f"time: {log.result['train_seconds']:.1f} of {kept or limits[-1]:g} s"
        found.append(Finding(True, of) if kept else Finding(None, f"{of}: only for the race to the target"))
    about = log.about
    digest = f"{about['data_digest'][:12]}, held out {about['held_out_bytes']:,} bytes, Python {about['python']}"
    return [*found, Finding(None, f"data: digest {digest}: whose text that is, only who has it can say")]


def within(log: RaceLog, seconds: float) -> bool:
    return log.result["train_seconds"] <= seconds


def of_track(log: RaceLog, track: Track) -> Iterator[str]:
    about, config = log.about, log.about["config"]
    if not is_on(track, config["corpus"]):
        yield f"line 1, corpus: {config['corpus']!r}, expected {track.corpus!r}"
    if track.tokenizer and config["tokenizer"] != track.tokenizer:
        yield f"line 1, tokenizer: {config['tokenizer']!r}, expected {track.tokenizer!r}"
    if track.device and about["device"] != track.device:
        yield f"line 1, device: {about['device']}, expected {track.device}"
    if about["device"] == "cpu" and not about["threads"] * about["ranks"] <= CORES:
        yield f"line 1, threads: {about['threads']} on each of {about['ranks']} ranks, expected {CORES} cores"
    if about["device"] == "cuda" and not about["ranks"] <= track.gpus:
        yield f"line 1, ranks: {about['ranks']} GPUs, expected at most {track.gpus}"
    if track.held_out and about["held_out_tokens"] != track.held_out:
        yield f"line 1, held_out_tokens: {about['held_out_tokens']:,}, expected {track.held_out:,}"
