"""Running a module of the repository as a user does, from its root."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_module(module: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
    """`python -m module arguments...` with both outputs captured as text."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
