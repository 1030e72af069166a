"""Checks race logs again: `python -m speedrun.verify LOG [LOG ...]`, or the folder of a record, which is several seeds.

Each line says what was compared and whether it holds; exit status 1 if anything is wrong. What a log cannot show is
said too, in HIDDEN. `--rerun N` computes the first N steps again, and which batches all of them had; what is left then
only the same seeds show, raced again.
"""

import argparse
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import cli
from minigpt.corpus import load_corpus
from speedrun import doubts
from speedrun.checks import SHOWN, Finding, checked, close, value_of, verify_log, verify_rules, within
from speedrun.config import RaceConfig
from speedrun.record_log import NAME, RaceLog, one_sided_p
from speedrun.rerun import Rerun, rerun
from speedrun.schedule import plan
from speedrun.sources import commit_of
from speedrun.tracks import TRACKS

P_VALUE = 0.01  # of a record's seeds against the target
HIDDEN = """\
No arithmetic on a log finds: held-out bits per byte, or seconds, that were changed a little and linked anew; a machine
other than the one it names; seeds that were raced and left out; a program changed while it ran and put back."""
AGAIN = "--rerun N computes the first N steps again, and which batches all of them had."
WORDS = {True: "ok   ", False: "WRONG", None: "open "}


# ---- the program that ran --------------------------------------------------------------------------------------------


def verify_sources(about: dict[str, Any]) -> Finding:
    """Whether a commit of this checkout is the program that the log names."""
    named = about.get("commit")
    try:
        commit, files = commit_of(about["sources"], named)
    except ValueError as error:
        return Finding(None, f"program: cannot be compared: {error}")
    if commit is None:
        names = ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")
        return Finding(
            False, f"program: no commit here has these files; beside {str(named)[:12]}: {names or 'a mixture'}"
        )
    also = "" if commit == named else f", while the log names {str(named)[:12]}"
    return Finding(True, f"program: {len(about['sources'])} files, all those of commit {commit[:12]}{also}")


def verify_text(about: dict[str, Any]) -> list[Finding]:
    """Whether a text that is made of files of the Python in use is the one of this Python, where that is the same."""
    corpus, python = about["config"]["corpus"], platform.python_version()
    if corpus not in ("stdlib", "python") or about["python"] != python:
        return []
    here = load_corpus(corpus)
    if about["data_digest"].partition("+")[0] != here.digest:
        return [Finding(None, f"data: of Python {python} too, but {corpus} here has the digest {here.digest[:12]}")]
    size = len(here.held_out_text)
    faults = [f"line 1, held_out_bytes: {about['held_out_bytes']:,}, while they are {size:,} here"]
    return checked("data", faults if size != about["held_out_bytes"] else [], f"the {corpus} of Python {python} here")


# ---- several seeds ---------------------------------------------------------------------------------------------------


def differences(logs: Sequence[RaceLog]) -> list[str]:
    """What the seeds of one record do not have in common, though they should; seeds that come twice, or are one run."""
    first, faults = logs[0].about, []
    for log in logs[1:]:
        about = log.about
        names = about["config"].keys() | first["config"].keys()
        parts = [name for name in sorted(names - {"seed"}) if about["config"].get(name) != first["config"].get(name)]
        parts += [
            name
            for name in ("track", "data_digest", "source", "machine", "device", "dtype", "ranks", "threads", "torch")
            if about.get(name) != first.get(name)
        ]
        faults += [
            f"{name} of seed {about['seed']} is not that of seed {first['seed']}: "
            f"{about['config'].get(name, about.get(name))!r} and {first['config'].get(name, first.get(name))!r}"
            for name in parts
        ]
    seeds = [log.about["seed"] for log in logs]
    faults += [f"seed {seed} comes {seeds.count(seed)} times" for seed in sorted(set(seeds)) if seeds.count(seed) > 1]
    return faults or list(doubts.of_twins(logs))


def verify_seeds(logs: Sequence[RaceLog]) -> list[Finding]:
    """A record: one program, config, machine and text under several seeds, together below the track's target."""
    found = checked("seeds", differences(logs), f"{len(logs)} runs that differ in nothing but the seed")
    track = TRACKS.get(logs[0].about["track"])
    if track is None or not all(finding.good for finding in found):
        return found
    values = [value_of(log, track) for log in logs]
    if len(values) < 2:
        return [*found, Finding(False, "target: 1 seed, expected at least 2 for a p-value")]
    p, mean = one_sided_p(values, track.target), math.fsum(values) / len(values)
    text = f"target: {mean:.4f} {track.unit} over {len(values)} seeds, p = {p:.2g} below {track.target:g}"
    found.append(Finding(True, text) if p < P_VALUE else Finding(False, f"{text}, expected p < {P_VALUE}"))
    for seconds, target in track.races[1:]:
        if all(within(log, seconds) for log in logs) and not all(within(log, track.limit_seconds) for log in logs):
            below = f"target: in {seconds:g} s p = {one_sided_p(values, target):.2g} below {target:g}"
            listed = one_sided_p(values, target) < P_VALUE
            found.append(Finding(True, below) if listed else Finding(None, f"{below}: no record of that race"))
    seeds = ", ".join(str(log.about["seed"]) for log in logs)
    return [*found, Finding(None, f"seeds: {seeds}: whether others were raced and left out, no log says")]


def verify_record(folder: Path) -> tuple[list[RaceLog], list[Finding]]:
    """All of a record that needs nothing but its own files: each log, their rules, the seeds together, their names."""
    logs, found = [], []
    paths = sorted(folder.glob("*.jsonl"))
    for path in paths:
        log, findings = verify_log(path)
        if log is not None and all(finding.good is not False for finding in findings):
            findings += verify_rules(log)
            logs.append(log)
            place = (log.about["track"], f"{log.about['seed']}.jsonl")
            if place != (folder.parent.name, path.name):
                findings.append(Finding(False, f"name: expected it at {'/'.join((place[0], folder.name, place[1]))}"))
        found += [Finding(finding.good, f"{path.name}, {finding.text}") for finding in findings]
    if not paths:
        found.append(Finding(False, "no logs: expected one for each seed"))
    if logs and len(logs) == len(paths):
        found += verify_seeds(logs)
    return logs, found


# ---- the program -----------------------------------------------------------------------------------------------------


def verify_rerun(log: RaceLog, steps: int) -> list[Finding]:
    """The first steps, computed again here."""
    try:
        again = rerun(log, steps)
    except (ValueError, cli.UserError) as error:
        return [Finding(False, f"rerun: not done: {error}")]
    faults = [
        f"line {row['step'] + 1}, loss: {row['loss']}, while step {row['step']} gives {loss} here"
        for row, loss in zip(log.steps, again.losses, strict=False)
        if not close(row["loss"], loss, again.tolerance)
    ]
    measure = f"to {again.tolerance:g} relative ({again.why})" if again.tolerance else f"bit for bit ({again.why})"
    found = checked("rerun", faults, f"the losses of {steps} steps come again {measure}")
    return found + checked("batches", list(other_batches(log, again)), f"all {len(log.steps)} are those of the seed")


def other_batches(log: RaceLog, again: Rerun) -> Iterator[str]:
    """Steps whose bytes, as their loss and bits per byte tell them, are not those of the seed's batches."""
    config = RaceConfig(**log.about["config"])
    for row, size in zip(log.steps, again.sizes, strict=True):
        now = plan(row["step"] - 1, config)
        told = doubts.bytes_of(row, now.rows * now.context)
        if not abs(told - size) <= doubts.ROUNDING * size:
            yield f"line {row['step'] + 1}, train_bits_per_byte: of {told:,.1f} bytes, while the batch has {size:,}"


def show(path: Path, findings: Sequence[Finding]) -> bool:
    """Prints them; whether none is wrong."""
    print(path)
    for finding in findings:
        print(f"  {WORDS[finding.good]}  {finding.text}")
    return all(finding.good is not False for finding in findings)


def main() -> int:
    parser = argparse.ArgumentParser(prog=cli.program(), description="check race logs again", allow_abbrev=False)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs, or folders of records")
    parser.add_argument("--rerun", type=int, default=0, metavar="N", help="run the first N steps of each log again")
    arguments = parser.parse_args()
    fine = []
    for path in arguments.logs:
        path = path / NAME if (path / NAME).exists() else path  # of a run's folder its log
        if path.is_dir():
            logs, findings = verify_record(path)
        else:
            log, findings = verify_log(path)
            logs = [log] if log is not None and all(finding.good is not False for finding in findings) else []
            findings += [each for log in logs for each in verify_rules(log)]
        for log in logs[:1]:  # seeds of a record share their text and program
            findings += [*verify_text(log.about), verify_sources(log.about)]
        findings += [each for log in logs if arguments.rerun for each in verify_rerun(log, arguments.rerun)]
        fine.append(show(path, findings))
    print(HIDDEN if arguments.rerun else f"{HIDDEN}\n{AGAIN}")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    cli.run(main)
