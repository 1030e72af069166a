"""Starting the training programs as a user does: real processes, one thread each, a time limit, killed at the end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120


def start(module: str, *arguments: object, launcher: tuple[str, ...] = (sys.executable, "-m")) -> subprocess.Popen:
    # One thread: the runs compared bit by bit need the same count, and tests that run beside them spare the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "TERM": "dumb"}
    return subprocess.Popen(
        [*launcher, module, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, out, err


def run(module: str, *arguments: object, **options) -> tuple[int, str, str]:
    return finish(start(module, *arguments, **options))


def descendants(pid: int) -> list[int]:
    """The process and all that it started, by /proc: torchrun gives each of its ranks a session of its own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def send_after(
    process: subprocess.Popen, folder: Path, lines: int, signal_number: int, *, group: bool = False
) -> tuple[int, str, str]:
    """Sends the signal, to the process or to all that it started, once metrics.jsonl has that many lines."""
    deadline = time.monotonic() + LIMIT_S
    path = folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            for pid in descendants(process.pid) if group else [process.pid]:
                os.kill(pid, signal_number)
            break
        time.sleep(0.002)
    return finish(process)
