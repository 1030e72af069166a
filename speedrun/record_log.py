"""The log of one race, as it is committed: a line for what ran, one for each step, one for what was reached.

Every line ends in a link, the SHA-256 of the line and of the link before it, so whoever changes a number breaks the
chain there. The first line has the digest of the program's own source, config, data, machine. Refused: lines without
their link, out of order, or cut off; numbers that contradict each other. speedrun/logbook.py makes such a log.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.log import atomic_write, jsonable

FORMAT = "groundup race 1"
NAME = "race.jsonl"  # in the folder of a run
ROOT = Path(__file__).resolve().parent.parent
DEPTH = 200  # of the continued fraction
STAGES = ("common", "minigpt", "cuda", "parallel", "speedrun")  # whose code a race runs


@dataclass(frozen=True, slots=True)
class RaceLog:
    about: dict[str, Any]  # track, config, data_digest, sources, sittings, machine, ...; see logbook.about
    steps: list[dict[str, Any]]  # step, loss, seconds, and what a look at held-out text found
    result: dict[str, Any]  # bits_per_byte, train_seconds, steps, tokens, ...; see logbook.result


def write_log(path: Path, log: RaceLog) -> None:
    """Raises ValueError for numbers that contradict each other."""
    if faults := contradictions(log):
        raise ValueError(f"{path}: {'; '.join(faults)}")
    lines, link = [], ""
    for row in ({"format": FORMAT, **log.about}, *log.steps, log.result):
        text = json.dumps(jsonable(row))
        link = linked(link, text)
        lines.append(f'{text[:-1]}, "link": "{link}"}}\n')
    atomic_write(path, "".join(lines))


def linked(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()[:16]


def read_log(path: Path) -> RaceLog:
    """Raises ValueError naming file and line where the log is not what was written, or contradicts itself."""
    log = read_chain(path)
    if faults := contradictions(log):
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return log


def read_chain(path: Path) -> RaceLog:
    """The log as it stands, whatever its numbers say. Raises ValueError naming file and line of the first broken link.

    Any change, removal, or exchange of lines breaks the chain; whoever makes all links anew after it does not.
    """
    path = Path(path)
    # Bytes, and only the newline that was written: other ways to read lines overlook a changed line end.
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    if len(lines) < 3:
        raise ValueError(f"{path}: {len(lines)} whole lines: expected the log of a race, with at least one step")
    rows, link = [], ""
    for number, line in enumerate(lines, start=1):
        text, mark, end = line.decode(errors="replace").rpartition(', "link": "')
        link = linked(link, f"{text}}}")
        if not mark or end != f'{link}"}}':
            raise ValueError(f"{path}, line {number}: changed, or the one before it is gone: its link does not fit")
        rows.append(parsed(f"{text}}}", f"{path}, line {number}"))
    if rest:
        raise ValueError(f"{path}, line {len(lines) + 1}: changed, or cut off: expected the end of the log")
    about, *steps, result = rows
    if about.pop("format", None) != FORMAT:
        raise ValueError(f"{path}, line 1: expected the format {FORMAT!r}")
    if any("step" not in row for row in steps) or "steps" not in result:
        raise ValueError(f"{path}: expected a step in each line but the first and the last, which has the result")
    return RaceLog(about, steps, result)


def parsed(text: str, where: str) -> dict[str, Any]:
    """Raises ValueError for JSON that a reader could take for something else: the last of two equal keys counts."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: no JSON: expected a line that a race wrote") from None
    if json.dumps(row) != text:
        raise ValueError(f"{where}: JSON that no race wrote: expected each key once, and numbers as Python writes them")
    return row


def contradictions(log: RaceLog) -> list[str]:
    """What cannot be of one run, each with its line and field; by the log's own numbers alone."""
    steps, result, end = log.steps, log.result, f"line {len(log.steps) + 2}"
    faults = [
        f"line {line}, step: step {row.get('step')} in the place of step {line - 1}"
        for line, row in enumerate(steps, start=2)
        if row.get("step") != line - 1
    ][:1]
    if result.get("steps") != len(steps):
        faults.append(f"{end}, steps: a result after {result.get('steps')} steps, {len(steps)} of them in the log")
    for line, row in enumerate(steps, start=2):
        faults += [f"line {line}, {text}" for text in strange(row)]
    seconds, told = math.fsum(number(row, "seconds") for row in steps), number(result, "train_seconds")
    if not abs(seconds - told) <= 1e-6 * max(1.0, abs(seconds)):
        faults.append(f"{end}, train_seconds: train_seconds {told}, while the steps took {seconds}")
    last = steps[-1].get("held_out_bits_per_byte") if steps else None
    if last is None or last != result.get("bits_per_byte"):
        reached = result.get("bits_per_byte")
        faults.append(f"{end}, bits_per_byte: bits_per_byte {reached}, while the last step found {last}")
    return faults


def strange(row: Mapping[str, Any]) -> list[str]:
    """What no step of a run can say: "field: why"."""
    faults = []
    if not number(row, "seconds") > 0:
        faults.append(f"seconds: step {row.get('step')} took no time or less, {row.get('seconds')}")
    for name in ("loss", "train_bits_per_byte", "held_out_look", "held_out_bits_per_byte"):
        if (name in row or name == "loss") and not (0 <= number(row, name) < math.inf):
            faults.append(f"{name}: {row.get(name)} at step {row.get('step')}, expected a finite number of at least 0")
    return faults


def number(row: Mapping[str, Any], name: str) -> float:
    """The value as a float, finite; nan where it is missing or anything else."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return math.nan
    return float(value)


def seconds_to(target: float, steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds on the clock at the first step after which held-out text was at or below the target, in bits per byte.

    Not interpolated: the time is that of the whole step that was looked at. A look on the way sees some windows of the
    held-out text, the last one all of it. None where no look was as low.
    """
    clock = 0.0
    for row in steps:
        clock += row["seconds"]
        if row.get("held_out_look", math.inf) <= target or row.get("held_out_bits_per_byte", math.inf) <= target:
            return clock
    return None


# ---- the program's own source ----------------------------------------------------------------------------------------


def is_source(path: Path) -> bool:
    """Whether a path from the root is code of a stage that a race runs."""
    return path.parts[0] in STAGES and path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")


def source_files(root: Path = ROOT) -> list[Path]:
    """All code of the stages that a race runs, sorted."""
    paths = (path for stage in STAGES for path in (root / stage).rglob("*"))
    return sorted(path for path in paths if is_source(path.relative_to(root)) and path.is_file())


def source_digests(root: Path = ROOT) -> dict[str, str]:
    """{posix path from the root: SHA-256 of the file}."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in source_files(root)
    }


def digest_of(digests: Mapping[str, str]) -> str:
    """One SHA-256 of names and digests."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- several seeds ---------------------------------------------------------------------------------------------------


def one_sided_p(values: Sequence[float], target: float) -> float:
    """The probability of a mean as far below the target, if the true one were the target: Student's t, one-sided.

    Raises ValueError for fewer than two values; equal ones below the target give 0.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values: expected at least 2 seeds for a p-value")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if deviation == 0:
        return 0.0 if mean < target else 1.0
    return student_tail((target - mean) / (deviation / math.sqrt(n)), n - 1)


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t."""
    tail = 0.5 * incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return tail if t >= 0 else 1 - tail


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), regularised, by its continued fraction 1 / (1 + d1 / (1 + d2 / (1 + ..., from far inside outwards."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    value = 1.0
    for m in range(DEPTH, 0, -1):
        value = 1 - (a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)) / value
        value = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / value
    value = 1 - (a + b) * x / (a + 1) / value
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / (a * value)
