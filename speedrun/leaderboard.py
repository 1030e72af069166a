"""speedrun/LEADERBOARD.md from the committed records: `python -m speedrun.leaderboard`, with `--check` only compared.

Values are ranked where they can be compared: on one track, one kind of machine, one text. Refused a rank, and named
with the reason: a record that does not pass `speedrun.verify`. What that compares with git is left out, since the table
must not depend on how much history a clone has.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import cli
from common.log import atomic_write
from speedrun.checks import value_of, within
from speedrun.record import RECORDS
from speedrun.record_log import RaceLog, one_sided_p
from speedrun.tracks import TRACKS, Track
from speedrun.verify import P_VALUE, verify_record

BOARD = RECORDS.parent / "LEADERBOARD.md"
HEAD = """# Leaderboard

Made from the logs under `records/` by `python -m speedrun.leaderboard`; `python -m speedrun.verify` checks a log or a
record again. The rules of the tracks are in [README.md](README.md). Values are means over the seeds, with their
standard deviation. Seconds are those of the whole run on the clock, compiling not among them; *first look* is the clock
when held-out text was first seen at or below the target, in some windows of it, not interpolated, as a mean over the
seeds that saw it. p is the probability of so low a mean, were the true one the target (Student's t, one-sided).
"""


@dataclass(frozen=True, slots=True)
class Record:
    """Several seeds of one track, machine and text."""

    name: str
    track: Track
    logs: Sequence[RaceLog]
    links: Sequence[str]  # to the logs, from the folder of the board

    @property
    def values(self) -> list[float]:
        return [value_of(log, self.track) for log in self.logs]

    @property
    def seconds(self) -> list[float]:
        return [log.result["train_seconds"] for log in self.logs]

    def is_of(self, seconds: float, target: float) -> bool:
        """Whether it is one of the race for what can be reached in so many seconds."""
        return all(within(log, seconds) for log in self.logs) and one_sided_p(self.values, target) < P_VALUE

    @property
    def group(self) -> tuple[str, str]:
        """Of records that can be compared."""
        about = self.logs[0].about
        machine = about["machine"] + (f", {about['ranks']} ranks" if about["ranks"] > 1 else "")
        return machine, about["data_digest"]


def read_records(folder: Path) -> tuple[list[Record], list[str]]:
    """(Records that pass, a line for each that does not), by the names of their folders."""
    records, refused = [], []
    for place in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        logs, findings = verify_record(place)
        name = f"{place.parent.name}/{place.name}"
        if wrong := [finding.text for finding in findings if finding.good is False]:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            refused.append(f"* **{name}**: {wrong[0]}{more}")
            continue
        if place.parent.name not in TRACKS:
            refused.append(f"* **{name}**: no such track, expected one of {', '.join(TRACKS)}")
            continue
        links = [f"{folder.name}/{name}/{path.name}" for path in sorted(place.glob("*.jsonl"))]
        records.append(Record(place.name, TRACKS[place.parent.name], logs, links))
    return records, refused


def page(records: Sequence[Record], refused: Sequence[str]) -> str:
    """The whole file."""
    lines = [HEAD]
    for track in TRACKS.values():
        lines += [f"## {track.name}\n"]
        mine = [record for record in records if record.track.name == track.name]
        for machine, digest in sorted({record.group for record in mine}):
            lines += [f"### {machine}, text {digest[:12]}\n"]
            lines += tables([record for record in mine if record.group == (machine, digest)], track)
        if not mine:
            lines += ["No records yet.\n"]
    if refused:
        lines += ["## Not listed\n", "These do not pass `python -m speedrun.verify`:\n", *refused, ""]
    return "\n".join(lines)


def tables(records: Sequence[Record], track: Track) -> list[str]:
    """The races of a track: for a value in each of its times, and for the time to its target."""
    lines = []
    for seconds, target in track.races:
        timely = [record for record in records if record.is_of(seconds, target)]
        lines += [f"Fewest {track.unit} after {seconds:g} s of training, target {target:g}:\n"]
        lines += table(sorted(timely, key=lambda record: statistics.fmean(record.values)), track, target)
    lines += [f"Fewest seconds of training to {track.target:g} {track.unit}:\n"]
    return lines + table(sorted(records, key=lambda record: statistics.fmean(record.seconds)), track, track.target)


def table(ranked: Sequence[Record], track: Track, target: float) -> list[str]:
    if not ranked:
        return ["No records yet.\n"]
    heads = ("rank", "name", track.unit, f"p against {target:g}", "seconds", "first look", "seeds", "hardware",
             "date", "commit", "logs")  # fmt: skip
    rows = [" | ".join(row(rank, record, target)) for rank, record in enumerate(ranked, start=1)]
    marks = ["--:", "---", "--:", "--:", "--:", "--:", "--:", "---", "---", "---", "---"]
    return [*(f"| {line} |" for line in (" | ".join(heads), " | ".join(marks), *rows)), ""]


def row(rank: int, record: Record, target: float) -> list[str]:
    about, values = record.logs[-1].about, record.values
    looks = [log.result["seconds_to_target"] for log in record.logs if log.result["seconds_to_target"] is not None]
    hardware = about["machine"] + (f" x {about['ranks']}" if about["ranks"] > 1 else "")
    links = [f"[{log.about['seed']}]({link})" for log, link in zip(record.logs, record.links, strict=True)]
    return [
        str(rank),
        record.name,
        spread(values, 4),
        f"{one_sided_p(values, target):.1e}",
        spread(record.seconds, 1),
        f"{math.fsum(looks) / len(looks):.1f}" if looks else "–",
        str(len(values)),
        f"{hardware}, torch {about['torch']}",
        max(log.about["date"] for log in record.logs),
        str(about["commit"])[:12] + (" and changes" if about["dirty"] else ""),
        " ".join(links),
    ]


def spread(values: Sequence[float], digits: int) -> str:
    return f"{math.fsum(values) / len(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


@dataclass(frozen=True, slots=True)
class LeaderboardConfig:
    records: Path = field(default=RECORDS, metadata={"help": "folder of the records"})
    out: Path = field(default=BOARD, metadata={"help": "the file"})
    check: bool = field(default=False, metadata={"help": "write nothing; exit 1 when the file is not what it would be"})


def main() -> int:
    config = cli.parse(LeaderboardConfig, prog=cli.program(), description="make the leaderboard from the records")
    text = page(*read_records(config.records))
    if config.check:
        stale = not config.out.exists() or config.out.read_text() != text
        print(f"{config.out}: {'not what the records give' if stale else 'what the records give'}")
        return int(stale)
    atomic_write(config.out, text)
    print(config.out)
    return 0


if __name__ == "__main__":
    cli.run(main)
