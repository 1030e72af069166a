"""Files finished races: `python -m speedrun.record --folder runs/a runs/b --name first`, a folder for each seed.

Writes results/speedrun/cpu_<machine>_<date>.json with the summaries and curves, and copies loss.png of the first run
beside it as loss_cpu.png (on a GPU: cuda_..., loss_cuda.png): what the READMEs show comes from there. With a name these
are <name>_<machine>_<date>.json and loss_<name>.png, so that no other race's are replaced, and the race logs become a
record, speedrun/records/<track>/<name>/<seed>.jsonl. Refused, with nothing written: a folder without a finished run;
runs that differ in more than the seed; a seed twice; a record that is there; a run of no track; a log that does not
pass speedrun.verify.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli
from common.log import atomic_write, read_jsonl
from common.results import save_result
from speedrun.checks import verify_log, verify_rules
from speedrun.record_log import NAME, read_log
from speedrun.verify import differences

FILES = ("summary.json", "config.json", "metrics.jsonl", "loss.png")
RECORDS = Path("speedrun/records")
WORD = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True)
class RecordConfig:
    folder: Path | Sequence[Path]  # of a finished run, or of several
    out: Path = Path("results")  # where results are kept
    name: str = ""  # of the record; empty for none
    records: Path = RECORDS  # where records are kept


def record(config: RecordConfig) -> list[Path]:
    """The files written. Raises ValueError, before any is, for what the head of this file says."""
    folders = [config.folder] if isinstance(config.folder, Path) else list(config.folder)
    for folder in folders:
        if missing := [name for name in FILES if not (folder / name).exists()]:
            raise ValueError(f"{folder} holds no finished speedrun: expected {', '.join(missing)}")
    if len(folders) > 1 and not config.name:
        raise ValueError(f"{len(folders)} runs without a name: expected --name for the record of several seeds")
    logs = logs_of(folders, config) if config.name else {}
    for path, text in logs.items():
        atomic_write(path, text)
    return [*logs, *file_results(folders, config.out, config.name)]


def logs_of(folders: Sequence[Path], config: RecordConfig) -> dict[Path, bytes]:
    """{where it goes: race log}, of runs that belong together; see `record` for errors."""
    if not WORD.fullmatch(config.name):
        raise ValueError(f"name {config.name!r}: expected lower case letters, digits and '-'")
    if missing := [folder for folder in folders if not (folder / NAME).exists()]:
        raise ValueError(f"{missing[0]} holds no finished race: expected {NAME}, which its last step writes")
    logs = [read_log(folder / NAME) for folder in folders]
    track = logs[0].about["track"]
    if not track:
        raise ValueError(f"{folders[0]} is a run of no track: expected a race with --track, or no --name")
    if faults := differences(logs):
        raise ValueError(f"not the seeds of one record: {'; '.join(faults)}")
    for folder, log in zip(folders, logs, strict=True):
        findings = verify_log(folder / NAME)[1] + verify_rules(log)
        if wrong := [finding.text for finding in findings if finding.good is False]:
            raise ValueError(f"{folder / NAME} does not pass speedrun.verify: {'; '.join(wrong)}")
    target = config.records / track / config.name
    if target.exists():
        raise ValueError(f"{target} is there: expected another --name, a record stays as it is")
    return {
        target / f"{log.about['seed']}.jsonl": (folder / NAME).read_bytes()
        for folder, log in zip(folders, logs, strict=True)
    }


def file_results(folders: Sequence[Path], out: Path, name: str) -> list[Path]:
    """One JSON with a row for each run, and the first one's picture."""
    abouts = [json.loads((folder / "config.json").read_text()) for folder in folders]
    rows = [row_of(folder) for folder in folders]
    if len(rows) > 1:
        rows = [{"seed": about["config"]["seed"], **row} for about, row in zip(abouts, rows, strict=True)]
    device = rows[0]["device"]
    run = {"sittings": [sitting for about in abouts for sitting in about["sittings"]], **abouts[0]["config"]}
    result = save_result("speedrun", name or device, rows, config=run, device=device, root=out)
    picture = out / "speedrun" / f"loss_{name or device}.png"
    atomic_write(picture, (folders[0] / "loss.png").read_bytes())
    return [result, picture]


def row_of(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    compressors = {name.split()[0]: bits for name, bits in summary.pop("compressors").items()}
    metrics = read_jsonl(folder / "metrics.jsonl")
    looks = [[row["step"], row["held_out_look"]] for row in metrics if "held_out_look" in row]
    return {**summary, **compressors, "held_out_looks": looks}


def main() -> None:
    parser = argparse.ArgumentParser(prog=cli.program(), description="file finished races", allow_abbrev=False)
    parser.add_argument("--folder", nargs="+", type=Path, default=[Path("runs/speedrun")], help="of finished runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results are kept")
    parser.add_argument("--name", default="", help="of the record that these runs make, one seed each")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where records are kept")
    arguments = parser.parse_args()
    for path in record(RecordConfig(**vars(arguments))):
        print(path)


if __name__ == "__main__":
    cli.run(main)
