"""How many lines of code an operation is in Triton and in CUDA C++: neither blank, nor comment, nor docstring.

A file counts with those of ours that it imports or includes, once each: what runs, and the rules for its sizes. What
all operations share does not: triton_compat.py, and the folders native/ and simt/. The operation's Python for torch is
the same for both and counts for neither.
"""

import re
from collections.abc import Iterable
from pathlib import Path

ROOM = Path(__file__).resolve().parents[1]
REMARKS = {
    ".py": re.compile(r'^\s*"""(?:.|\n)*?"""|#.*$', re.MULTILINE),
    ".cu": re.compile(r"//.*$|/\*(?:.|\n)*?\*/", re.MULTILINE),
}
SHARED = re.compile(r"triton_compat\.py|native/|simt/")
IMPORT = re.compile(r"^(?:from cuda\.(triton_\w+) import|from cuda import ([\w, ]+)$)", re.MULTILINE)
INCLUDE = re.compile(r'^#include "([\w/.]+)"', re.MULTILINE)


def lines_of(files: Iterable[str]) -> int:
    """`files` below cuda/, and all that they need."""
    waiting, seen = list(files), set()
    while waiting:
        name = waiting.pop()
        if name in seen or SHARED.match(name) or not (ROOM / name).is_file():
            continue
        seen.add(name)
        waiting += _needed((ROOM / name).read_text(), name)
    return sum(count((ROOM / name).read_text(), name) for name in seen)


def count(text: str, name: str) -> int:
    remarks = REMARKS[".py" if name.endswith(".py") else ".cu"]
    return sum(bool(line.strip()) for line in remarks.sub("", text).splitlines())


def _needed(text: str, name: str) -> list[str]:
    if not name.endswith(".py"):
        return INCLUDE.findall(text)
    modules = [one for direct, several in IMPORT.findall(text) for one in (direct or several).split(", ")]
    return [f"{module}.py" for module in modules if module.startswith("triton_")]
