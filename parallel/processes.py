"""Which process a rank is, and whether it still runs: asked of the kernel, for processes of the same machine.

A process is its number together with when it began, because numbers are used again. On a system without /proc only
"gone" is known. Refused: to say anything of another machine's processes.
"""

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Literal

State = Literal["runs", "stopped", "gone", "elsewhere"]


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    pid: int
    began: int  # clock ticks since the machine was started; 0 where there is no /proc
    host: str
    machine: str  # equal for processes that see each other

    @classmethod
    def this(cls) -> "Process":
        return cls(os.getpid(), _stat(os.getpid())[1], socket.gethostname(), machine())

    @classmethod
    def from_json(cls, text: str) -> "Process":
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def state(self) -> State:
        """`stopped` is SIGSTOP's, or a debugger's; a dead process whose parent has not asked for its code is gone."""
        if self.machine != machine():
            return "elsewhere"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "gone"
        except PermissionError:
            return "gone"  # somebody else's: the number is used again
        letter, began = _stat(self.pid)
        if began != self.began or letter in "ZX":
            return "gone"
        return "stopped" if letter in "Tt" else "runs"


def machine() -> str:
    """The same for two processes that share a kernel's clocks and process numbers."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if os.path.islink(path) else Path(path).read_text().strip())
        except OSError:
            continue
    return " ".join(parts)


def _stat(pid: int) -> tuple[str, int]:
    """The state's letter and the start of a process: fields 3 and 22 of /proc/PID/stat (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return ("R" if not Path("/proc/self/stat").exists() else "X"), 0
    except ProcessLookupError:
        return "X", 0
    fields = text.rpartition(")")[2].split()  # the program's name before it may hold anything
    return fields[0], int(fields[19])
