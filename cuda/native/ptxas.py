"""Runs nvcc and reads what ptxas says: the build fails where the machine code is not the kernel that was written.

    python ptxas.py nvcc <arguments>        (CMake puts it before every nvcc, see CMakeLists.txt)

Refused: a remark C75xx (ptxas has put a wait or a fence between wgmmas, or serialised them) and registers that spill to
memory. What ptxas said, registers and shared memory of each kernel, is kept beside the object file as `.ptxas.txt`.
"""

import re
import subprocess
import sys
from pathlib import Path

REMARK = re.compile(r"\(C75\d\d\)")
SPILL = re.compile(r"\b[1-9]\d* bytes spill (?:stores|loads)")


def faults(text: str) -> list[str]:
    """The lines of ptxas' report that fail the build; a spill with the line before it, which names the kernel."""
    lines, found = text.splitlines(), []
    for i, line in enumerate(lines):
        if REMARK.search(line):
            found.append(line)
        elif SPILL.search(line):
            found += lines[max(i - 1, 0) : i + 1]
    return found


def main(command: list[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    said = [line for line in report.splitlines() if not line.startswith(("ptxas info", "    "))]
    if said:
        print("\n".join(said), file=sys.stderr)
    if done.returncode or "-o" not in command or "-c" not in command:
        if done.returncode and len(said) < len(report.splitlines()):
            print(report, file=sys.stderr)
        return done.returncode
    target = Path(command[command.index("-o") + 1])
    target.with_name(target.name + ".ptxas.txt").write_text(report)
    wrong = faults(report)
    if wrong:
        target.unlink(missing_ok=True)
        print("ptxas: the machine code is not the kernel that was written:", *wrong, sep="\n  ", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
