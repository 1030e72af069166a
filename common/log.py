"""The record of a run: config.json, metrics.jsonl, timing.jsonl, and one live progress line.

metrics.jsonl holds only values that the seed decides, so a run that was killed and resumed leaves the same bytes as one
that never stopped; wall-clock values go to timing.jsonl. Refused: metrics of a step that is already on file, bare NaN.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, Self

from common.cli import program

REDRAW_S = 0.1  # a terminal is redrawn at most this often
PLAIN_S = 10.0  # without a terminal: a line when this much time ...
PLAIN_SHARE = 0.05  # ... or this share of the run has passed
BAR_WIDTH = 20
ROOT = Path(__file__).resolve().parent.parent


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Writes the whole file or nothing: a temporary file beside it, fsync, rename. Makes the folder where it lacks."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private (0600), and the rename would keep that.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def versions() -> dict[str, str]:
    """Python and those of numpy, torch, triton that are installed; read from their metadata, without importing them."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "torch", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_threads() -> int:
    """How many CPU threads this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_state() -> dict[str, Any]:
    """{"commit": hash, "dirty": bool}; both None outside a git checkout.

    Dirty asks about code: generated results and Markdown do not count, or the second benchmark of a series would always
    be called dirty because of the first one's file.
    """
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results", ":(exclude)*.md")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def command() -> str:
    """The command line of this process, as `python -m module arguments` where it was started so."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    start = ["python", "-m", program()] if spec is not None else ["python", program()]
    return shlex.join(start + sys.argv[1:])


def jsonable(value: Any) -> Any:
    """`value` in types that JSON has: numpy and torch scalars and arrays become numbers and lists, paths become text,
    and nan, inf, -inf become those words, which `float()` reads back. Raises TypeError for anything else."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Path):
        return value.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, neither imported here
        return jsonable(value.tolist())
    raise TypeError(f"no JSON for {value!r} of type {type(value).__name__}")


def read_jsonl(path: Path | str) -> list[dict]:
    """The objects of a JSONL file, one a line. A last line that a kill cut short is ignored; any other line that is not
    a JSON object raises ValueError naming file and line."""
    return [record for _, record in _read_lines(Path(path))]


def _read_lines(path: Path) -> list[tuple[bytes, dict]]:
    """Each whole line as (bytes without newline, object)."""
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)  # what follows the final newline: empty, or a line without its newline
        if last and not line:
            break
        try:
            record = json.loads(line)
        except ValueError:
            if last:
                break
            raise ValueError(f"{path}, line {number}: not JSON: {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
        rows.append((line, record))
    return rows


def _cut(path: Path, start_step: int) -> None:
    """Drops the lines of steps after `start_step`, and a torn last line; the bytes of the others stay as they are."""
    rows = _read_lines(path) if start_step > 0 and path.exists() else []
    for number, (_, record) in enumerate(rows, start=1):
        if not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected a whole number as 'step', got {record.get('step')!r}")
    kept = [line + b"\n" for line, record in rows if record["step"] <= start_step]
    atomic_write(path, b"".join(kept))


def format_duration(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`, `2d 03:04:05`; `--:--` for what is not a duration."""
    if not (0 <= seconds < math.inf):
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class View(Protocol):
    """Who shows the progress of a run. All calls come from rank 0; the steps in them do not fall."""

    def filed(self, step: int, values: Mapping[str, Any]) -> None:
        """These metrics or times were just written to the files."""

    def show(self, step: int, shown: Mapping[str, Any]) -> None:
        """The run has come to this step, and its caller wants these values seen."""

    def message(self, text: str) -> None:
        """Prints text, of one or more lines, where it stays."""

    def close(self) -> None:
        """Shows the last state and leaves the terminal as it was found; also after an exception."""


class RunLog:
    """Writes one run's folder and shows its progress; `with RunLog(...) as log`.

    Steps count from 1: step n is on file once n updates are done; `start_step` is the step of the checkpoint that is
    resumed, and 0 starts the folder's files anew. Write the metrics of a step before saving its checkpoint: a line is
    handed to the kernel at once, so what the checkpoint knows, the log knows too. `enabled=False` (ranks other than 0)
    writes and prints nothing.
    """

    def __init__(
        self,
        folder: Path | str,
        config: Any,
        *,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        view: View | None = None,
    ) -> None:
        """`config` is a dataclass or a mapping; `view` shows the progress, None is one line.

        Raises ValueError unless 0 <= start_step <= total_steps.
        """
        if not (0 <= start_step <= total_steps):
            raise ValueError(f"start_step must be within 0..total_steps = {total_steps}, got {start_step}")
        self.folder, self.config, self.enabled = Path(folder), config, enabled
        self.start_step = start_step
        self._files: dict[str, Any] = {}
        self._view = _ProgressLine(total_steps, start_step) if view is None else view

    def __enter__(self) -> Self:
        if not self.enabled:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"config": self.config, "versions": versions(), "platform": platform.platform()}
        sitting = {"git": git_state(), "command": command(), "start_step": self.start_step}
        about["sittings"] = [*(self._earlier_sittings() if self.start_step else []), sitting]
        for name in ("metrics", "timing"):
            _cut(self.folder / f"{name}.jsonl", self.start_step)
        atomic_write(self.folder / "config.json", json.dumps(jsonable(about), indent=2, allow_nan=False) + "\n")
        for name in ("metrics", "timing"):
            self._files[name] = open(self.folder / f"{name}.jsonl", "ab")  # closed in __exit__
        return self

    def _earlier_sittings(self) -> list[dict[str, Any]]:
        """Of a resumed run: by which commands and commits it got where it is."""
        path = self.folder / "config.json"
        return json.loads(path.read_text()).get("sittings", []) if path.exists() else []

    def __exit__(self, *_: object) -> None:
        self._view.close()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def metrics(self, step: int, **values: Any) -> None:
        """Appends one line of values that the seed decides. ValueError for a step that the resumed file already has."""
        self._append("metrics", step, values)

    def timing(self, step: int, **values: Any) -> None:
        """Appends one line of wall-clock values: they may differ between two runs of the same config."""
        self._append("timing", step, values)

    def progress(self, step: int, **shown: Any) -> None:
        """Shows bar, step / total, the given values and the time left. Cheap: call it at each step."""
        if self.enabled:
            self._view.show(step, shown)

    def message(self, text: str) -> None:
        """Prints a line of text above the progress line."""
        if self.enabled:
            self._view.message(text)

    def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if not self.enabled:
            return
        assert self._files, "RunLog is a context manager: with RunLog(...) as log"
        if self.start_step and not step > self.start_step:
            raise ValueError(f"{name} of step {step}: this run resumed after step {self.start_step}, which is on file")
        line = json.dumps(jsonable({"step": step, **values}), allow_nan=False) + "\n"
        self._files[name].write(line.encode())
        self._files[name].flush()
        self._view.filed(step, values)


def live_terminal() -> bool:
    """Whether stdout is a terminal in which what was printed can be drawn over."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class Pace:
    """The time left. What is reported first compiles and warms up, so after that the pace counts from its end."""

    def __init__(self, total: int, start: int) -> None:
        self.total = total
        self.began = (start, monotonic())
        self.first: tuple[int, float] | None = None  # (step, time) of the first report

    def reported(self, step: int, now: float) -> None:
        self.first = self.first or (step, now)

    def left(self, step: int, now: float) -> float:
        """Seconds; NaN while no step is done."""
        warm = self.first is not None and step > self.first[0]
        first_step, first_time = self.first if warm else self.began
        pace = (now - first_time) / (step - first_step) if step > first_step else math.nan
        return pace * (self.total - step)


class _ProgressLine:
    """The live line of a terminal, or plain lines now and then where stdout is a file or a pipe."""

    def __init__(self, total: int, start: int) -> None:
        self.total = total
        self.pace = Pace(total, start)
        self.drawn_step, self.drawn_at = start, -math.inf
        self.latest: tuple[int, Mapping[str, Any]] | None = None
        self.live = live_terminal()

    def filed(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing: the line shows what it is told to."""

    def show(self, step: int, shown: Mapping[str, Any]) -> None:
        now = monotonic()
        self.latest = (step, shown)
        if self._due(step, now):
            self._draw(now)
        self.pace.reported(step, now)

    def message(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self.live else text, flush=True)
        if self.live and self.latest is not None:
            self._draw(monotonic())

    def close(self) -> None:
        if self.latest is None:
            return
        if self.live or self.drawn_step != self.latest[0]:  # the last state, which may have come too soon to be drawn
            self._draw(monotonic())
        if self.live:
            print(flush=True)
        self.latest = None

    def _due(self, step: int, now: float) -> bool:
        waited = now - self.drawn_at
        if step >= self.total:
            return True
        if self.live:
            return waited >= REDRAW_S
        return waited >= PLAIN_S or step - self.drawn_step >= PLAIN_SHARE * self.total

    def _draw(self, now: float) -> None:
        text = self._text(now)
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap and could not be taken back
            print(f"\r{text[:width]}\x1b[K", end="", flush=True)
        else:
            print(text, flush=True)
        self.drawn_step, self.drawn_at = self.latest[0], now

    def _text(self, now: float) -> str:
        step, shown = self.latest
        share = step / self.total if self.total else 1.0
        parts = [f"{share:4.0%}", f"step {step:>{len(str(self.total))}}/{self.total}"]
        if self.live:
            full = round(BAR_WIDTH * min(share, 1.0))
            parts.insert(0, f"[{'=' * full}{'.' * (BAR_WIDTH - full)}]")
        parts += [f"{name} {_show(value)}" for name, value in shown.items()]
        return "  ".join([*parts, f"eta {format_duration(self.pace.left(step, now))}"])


def _show(value: Any) -> str:
    value = jsonable(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
