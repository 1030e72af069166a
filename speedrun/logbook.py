"""From the folder of a run to its race log: what runs is noted when a sitting begins, the log is written at the end.

A run that was killed and resumed has several sittings and one log over all of them: its steps come from metrics.jsonl
and timing.jsonl, which are cut to the checkpoint that is resumed, and so are its sittings. Program files that changed
between the first sitting's start and the end are named in the log. Refused: folders whose files do not fit together.
"""

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.log import atomic_write, command, git_state, read_jsonl, versions
from common.results import device_name, portable
from minigpt.train_config import plain
from speedrun.config import RaceConfig
from speedrun.record_log import NAME, RaceLog, digest_of, seconds_to, source_digests, write_log
from speedrun.schedule import plan
from speedrun.state import Run, machine
from speedrun.tracks import TRACKS, Track, nats_per_bit, predicted

SITTINGS = "sittings.json"
KEPT = ("loss", "train_bits_per_byte", "lr_share", "held_out_look", "held_out_bits_per_byte")
UNITS = {"bits per byte": "bits_per_byte", "nats per token": "nats_per_token"}  # of a track: the field of a result


def begin_sitting(run: Run) -> None:
    """Rank 0 notes, before the first step of a sitting, what runs and where; sittings that left no step are dropped."""
    if run.world.rank:
        return
    path = run.config.folder / SITTINGS
    earlier = json.loads(path.read_text()) if path.exists() else []
    now = {"step": run.step, "began": clock_on_the_wall(), **git_state()}
    now |= {"command": portable(command()), "name": device_name(run.world.device), **machine(run)}
    now |= {"versions": versions(), "sources": source_digests()}
    kept = [sitting for sitting in earlier if sitting["step"] < run.step]
    atomic_write(path, json.dumps([*kept, now], indent=1) + "\n")
    (run.config.folder / NAME).unlink(missing_ok=True)


def finish_log(run: Run) -> Path:
    """Rank 0 writes race.jsonl, unless it is there; its path. Call it once the last step is done.

    Raises ValueError where metrics, times and sittings are not of one whole run.
    """
    path = run.config.folder / NAME
    if run.world.rank == 0 and not path.exists():  # a finished run that is resumed again keeps its log
        first, steps = about(run), joined(run.config.folder)
        write_log(path, RaceLog(first, steps, result(run, first, steps)))
    return path


def joined(folder: Path) -> list[dict[str, Any]]:
    """A row for each step: what the seed decided, and seconds on the clock.

    On a GPU losses are read every so many steps, and the seconds of a step are the mean over those.
    """
    metrics, timing = (read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "timing"))
    if [row["step"] for row in metrics] != [row["step"] for row in timing]:
        raise ValueError(f"{folder}: metrics.jsonl and timing.jsonl have other steps: expected one run's")
    return [
        {"step": row["step"], **{name: row[name] for name in KEPT if name in row}} | {"seconds": time["step_ms"] / 1e3}
        for row, time in zip(metrics, timing, strict=True)
    ]


def about(run: Run) -> dict[str, Any]:
    """What ran, on what, where. Tokens and bytes of the held-out text are those that its evaluation predicts."""
    sittings = json.loads((run.config.folder / SITTINGS).read_text())
    first, last, end = sittings[0], sittings[-1], source_digests()
    told = {
        "track": run.config.track,
        "seed": run.config.seed,
        "config": portable(plain(run.config)),
        "data_digest": run.data.digest,
        "vocabulary": run.data.tokenizer.vocab_size,
        **predicted(run.data),
        "machine": last["name"],
        "choice": asdict(run.choice),
        "source": digest_of(first["sources"]),
        "source_at_end": digest_of(end),
        "changed_files": sorted(set().union(*(differing_files(first["sources"], each) for each in
                                              [*(sitting["sources"] for sitting in sittings), end]))),
        "sources": first["sources"],
    }  # fmt: skip
    told |= {"date": last["began"][:10], "ended": clock_on_the_wall()}
    told |= {name: last[name] for name in ("commit", "dirty", "command", "versions", *machine(run))}
    told["python"] = last["versions"]["python"]
    told["sittings"] = [
        {name: value for name, value in sitting.items() if name != "sources"}
        | {"source": digest_of(sitting["sources"])}
        for sitting in sittings
    ]
    return told


def clock_on_the_wall() -> str:
    """2026-01-02T03:04:05+00:00, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def differing_files(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def result(run: Run, about: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What was reached. Seconds of training are those on the clock; seconds of compiling are not on it.

    seconds_to_target: see record_log.seconds_to; None without a track, or where its target was not reached.
    """
    config, track = run.config, TRACKS.get(run.config.track)
    nats = nats_per_bit(about)
    return {
        "bits_per_byte": run.bits_per_byte,
        "nats_per_token": run.bits_per_byte * nats,
        "train_seconds": run.seconds,
        "compile_seconds": run.warm_seconds,
        "seconds_to_target": seconds_to(in_bits(track, nats), steps) if track else None,
        "steps": config.steps,
        "tokens": sum(tokens_of(step, config) for step in range(config.steps)),
        "parameters": run.model.num_parameters(),
    }


def tokens_of(step: int, config: RaceConfig) -> int:
    """That a step trains on, over all ranks."""
    now = plan(step, config)
    return now.rows * now.context


def in_bits(track: Track, nats: float) -> float:
    """The target of a track in bits per byte; nats: see tracks.nats_per_bit."""
    return track.target / nats if UNITS[track.unit] == "nats_per_token" else track.target
