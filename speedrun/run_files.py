"""The files of a run as the report reads them: finished, stopped, or still going.

What is not there yet is None or empty. Refused, by name: a folder that is no run, files that are broken.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from common.log import read_jsonl
from speedrun.config import RaceConfig
from speedrun.logbook import in_bits
from speedrun.record_log import RaceLog, read_log, seconds_to
from speedrun.tracks import NATS, TRACKS, Track, nats_per_bit

LOOKS = ("held_out_look", "held_out_bits_per_byte")  # at some windows; at all of the text
UNIT = "_ms"
ABSENT = "absent"  # of a config field that came later
AXES = ("steps", "tokens", "seconds")


@dataclass(frozen=True, slots=True)
class RunFiles:
    folder: Path
    label: str
    about: dict[str, Any]  # config.json
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    summary: dict[str, Any]  # of summary.json, or what of it the race log has; empty until the run has ended
    race: RaceLog | None
    fault: str  # what is wrong with race.jsonl

    @property
    def config(self) -> dict[str, Any]:
        return self.about["config"]

    @property
    def step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def bits_per_byte(self) -> float | None:
        """On all held-out text, once the run has ended."""
        return float(self.summary["bits_per_byte"]) if self.summary else None

    @property
    def judged(self) -> tuple[str, int]:
        """Of a finished run: the digest of its text, and how many held-out tokens count on its track, 0 for all."""
        return self.summary["data_digest"].partition("+")[0], self.track.held_out if self.track else 0

    def state(self) -> str:
        steps = self.config["steps"]
        return "finished" if self.summary else f"at step {self.step:,} of {steps:,}, no summary yet"

    def race_config(self) -> RaceConfig | None:
        """Fields that came later have their defaults. None where they do not make a race of today's program."""
        known = {field.name for field in fields(RaceConfig)}
        try:
            return RaceConfig(**{name: value for name, value in self.config.items() if name in known})
        except (TypeError, ValueError):
            return None

    def places(self) -> dict[str, dict[int, float]]:
        """On each of AXES, where the steps stand that have a time: seconds are those of the clock."""
        steps = [row["step"] for row in self.timing]
        seconds = [float(row["step_ms"]) / 1e3 for row in self.timing]
        tokens = [float(row["tokens_per_s"]) * each for row, each in zip(self.timing, seconds, strict=True)]
        values = (steps, [round(value) for value in accumulate(tokens)], accumulate(seconds))
        return {axis: dict(zip(steps, each, strict=True)) for axis, each in zip(AXES, values, strict=True)}

    def looks(self) -> list[tuple[int, float]]:
        """(step, bits per byte) of held-out text; of the last step, all of it."""
        return [(row["step"], float(row[name])) for row in self.metrics for name in LOOKS if name in row]

    def parts(self) -> dict[str, float]:
        """What each part of a step took in the mean over all steps that say so, in ms; empty where none does."""
        rows = [found for row in self.timing if (found := parts_of(row))]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}

    @property
    def track(self) -> Track | None:
        return TRACKS.get(self.config.get("track", ""))

    def nats(self) -> float | None:
        """Nats per token, on all held-out text, where the track counts in them; the race log has them."""
        return self.race.result["nats_per_token"] if self.race and self.track and self.track.unit == NATS else None

    def target(self) -> float | None:
        """Of the run's track, in bits per byte. None on no track, and of a target in nats until there is a race log,
        which knows how many bytes the tokens have."""
        if self.track is None or (self.track.unit == NATS and self.race is None):
            return None
        return in_bits(self.track, nats_per_bit(self.race.about) if self.race else math.nan)

    def seconds_to(self, target: float) -> float | None:
        """On the clock, up to the first look at held-out text that is not above the target."""
        looks = {row["step"]: row for row in self.metrics}
        rows = [looks.get(row["step"], {}) | {"seconds": float(row["step_ms"]) / 1e3} for row in self.timing]
        return seconds_to(target, rows)

    def memory(self) -> int | None:
        """The most bytes held at any step."""
        return max((row["memory_bytes"] for row in self.timing if row.get("memory_bytes")), default=None)


def parts_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Where the time of a step went, in ms, by a line of timing.jsonl: forward_ms, backward_ms, ..."""
    names = [name for name in row if name.endswith(UNIT) and name != f"step{UNIT}"]
    return {name.removesuffix(UNIT): float(row[name]) for name in names}


def read_run(folder: Path, label: str) -> RunFiles:
    """Raises ValueError naming the folder or the file."""
    about = read_object(folder / "config.json")
    if about is None or not isinstance(about.get("config"), dict) or "steps" not in about["config"]:
        raise ValueError(f"{folder} is no run: expected a folder with the config.json that speedrun.train writes")
    rows = [read_jsonl(path) if path.exists() else [] for path in (folder / "metrics.jsonl", folder / "timing.jsonl")]
    for name, needed, found in zip(("metrics", "timing"), (("step", "loss"), ("step", "step_ms")), rows, strict=True):
        if wrong := next((row for row in found if not row.keys() >= {*needed}), None):
            raise ValueError(f"{folder / name}.jsonl: {str(wrong)[:60]}: expected {' and '.join(needed)} in each line")
    race, fault = None, ""
    if (folder / "race.jsonl").exists():
        try:
            race = read_log(folder / "race.jsonl")
        except ValueError as error:
            fault = str(error)
    summary = read_object(folder / "summary.json") or (told_by(race) if race else {})
    return RunFiles(folder, label, about, *rows, summary, race, fault)


def told_by(race: RaceLog) -> dict[str, Any]:
    """Of a run without a summary, as those of an ablation are."""
    names = ("data_digest", "vocabulary", "device", "ranks", "threads", "dtype")
    return {**{name: race.about[name] for name in names if name in race.about}, **race.result}


def read_object(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises ValueError naming it when it holds no JSON object."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return found


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """The best first: finished ones by their bits per byte, then the others by how far they are.

    Raises ValueError naming what is no run, or is named twice.
    """
    if not folders:
        raise ValueError("no runs: expected at least one folder")
    if twice := [folder for i, folder in enumerate(folders) if folder.resolve() in {f.resolve() for f in folders[:i]}]:
        raise ValueError(f"{twice[0]} is named twice: expected each run once")
    runs = [read_run(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]
    return sorted(runs, key=lambda run: (not run.summary, run.bits_per_byte if run.summary else -run.step))


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The ends of their paths, as long as it takes to tell them apart. They are different ones."""
    parts = [folder.resolve().parts for folder in folders]
    ends = (["/".join(part[-count:]) for part in parts] for count in range(1, max(map(len, parts)) + 1))
    return next(labels for labels in ends if len({*labels}) == len(labels))


def differing(runs: Sequence[RunFiles]) -> dict[str, list[Any]]:
    """{field: value of each run} of those config fields in which the runs differ; ABSENT where a run has no such."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    values = {
        name: [run.config.get(name, ABSENT) for run in runs] for name in names if name not in ("folder", "resume")
    }
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}
