"""The log of one race, as it is committed: a line for what ran, one for each step, one for what was reached.

Every line ends in a link, the SHA-256 of the line and of the link before it, so whoever changes a number breaks the
chain there. The first line has the digest of the program's own source, config, data, machine. Refused: lines without
their link, out of order, or cut off; numbers that contradict each other.
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
ROOT = Path(__file__).resolve().parent.parent
DEPTH = 200  # of the continued fraction
STAGES = ("common", "minigpt", "cuda", "parallel", "speedrun")  # whose code a race runs


@dataclass(frozen=True, slots=True)
class RaceLog:
    about: dict[str, Any]  # format, track, config, data_digest, source, versions, device, ...
    steps: list[dict[str, Any]]  # step, loss, seconds, and what a look at held-out text found
    result: dict[str, Any]  # bits_per_byte, train_seconds, steps, tokens, ...


def write_log(path: Path, log: RaceLog) -> None:
    """Raises ValueError for numbers that contradict each other."""
    if faults := contradictions(log):
        raise ValueError(f"{path}: {'; '.join(faults)}")
    lines, link = [], ""
    for row in ({"format": FORMAT, **log.about}, *log.steps, log.result):
        text = json.dumps(jsonable(row), sort_keys=True)
        link = linked(link, text)
        lines.append(f'{text[:-1]}, "link": "{link}"}}\n')
    atomic_write(path, "".join(lines))


def linked(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()[:16]


def read_log(path: Path) -> RaceLog:
    """Raises ValueError naming file and line where the log is not what was written."""
    rows, link = [], ""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    if len(lines) < 3:
        raise ValueError(f"{path}: {len(lines)} lines: expected the log of a race, with at least one step")
    for number, line in enumerate(lines, start=1):
        text, mark, end = line.rpartition(', "link": "')
        link = linked(link, f"{text}}}")
        if not mark or end != f'{link}"}}':
            raise ValueError(f"{path}, line {number}: changed, or the one before it is gone: its link does not fit")
        rows.append(json.loads(f"{text}}}"))
    about, *steps, result = rows
    if about.pop("format", None) != FORMAT:
        raise ValueError(f"{path}, line 1: expected the format {FORMAT!r}")
    log = RaceLog(about, steps, result)
    if faults := contradictions(log):
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return log


def contradictions(log: RaceLog) -> list[str]:
    """What cannot be of one run."""
    faults, steps = [], [row.get("step") for row in log.steps]
    if steps != list(range(1, len(steps) + 1)):
        odd = next(i for i, step in enumerate(steps, start=1) if step != i)
        faults.append(f"step {steps[odd - 1]} in the place of step {odd}")
    if log.result.get("steps") != len(steps):
        faults.append(f"a result after {log.result.get('steps')} steps, {len(steps)} of them in the log")
    seconds = math.fsum(row.get("seconds", math.nan) for row in log.steps)
    told = log.result.get("train_seconds", math.nan)
    if not abs(seconds - told) <= 1e-6 * max(1.0, abs(seconds)):
        faults.append(f"train_seconds {told}, while the steps took {seconds}")
    wrong = [row["step"] for row in log.steps if not (row.get("seconds", -1) >= 0)]
    if wrong:
        faults.append(f"step {wrong[0]} took no time or less")
    last = log.steps[-1].get("held_out_bits_per_byte") if log.steps else None
    if last != log.result.get("bits_per_byte"):
        faults.append(f"bits_per_byte {log.result.get('bits_per_byte')}, while the last step found {last}")
    return faults


# ---- the program's own source ----------------------------------------------------------------------------------------


def source_files(root: Path = ROOT) -> list[Path]:
    """All code of the stages that a race runs, sorted."""
    return sorted(
        path
        for stage in STAGES
        for path in (root / stage).rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h") and path.is_file()
    )


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
