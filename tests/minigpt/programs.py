"""Starting the training programs as a user does: real processes, one thread each, a time limit, killed at the end."""

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


def send_after(process: subprocess.Popen, folder: Path, lines: int, signal_number: int) -> tuple[int, str, str]:
    """Sends the signal once metrics.jsonl has that many lines."""
    deadline = time.monotonic() + LIMIT_S
    path = folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            os.kill(process.pid, signal_number)
            break
        time.sleep(0.002)
    return finish(process)
