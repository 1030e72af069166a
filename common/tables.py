"""Rewrites the result tables in the READMEs from the newest files under results/, between a pair of markers:

    <!-- table: autograd/bench columns="case,ours_ms:.2f=ours (ms),ratio:.2f" where="dtype=float32" -->
    <!-- /table -->

A column is `key`, `key:format` or `key:format=heading`; `bits.low` is the key `low` of what stands under `bits`.
`where` is `key=value, key=value`. Each device has a table of its own, from its newest file. Refused: columns no row
has, conditions no row meets, markers without partner. Markers in code blocks are left alone.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import parse, run
from common.log import atomic_write

OPEN = re.compile(r"\s*<!--\s*table:\s*(?P<stage>[\w-]+)/(?P<name>[\w-]+)(?P<options>.*?)-->\s*")
OPTIONS = re.compile(r'(?:\s+(?:columns|where)="[^"]*")*\s*')
CLOSE = re.compile(r"\s*<!--\s*/table\s*-->\s*")
MARKER = re.compile(r" {0,3}<!--\s*/?table\b.*")  # indented further it is code
FENCE = re.compile(r" {0,3}(```+|~~~+)")
COLUMN = re.compile(r"(?P<key>[^:=]+)(?::(?P<format>[^=]*))?(?:=(?P<heading>.*))?")
ABSENT = "–"


@dataclass(frozen=True, slots=True)
class Column:
    key: str
    format: str
    heading: str


def rewrite(root: Path, *, check: bool = False) -> list[Path]:
    """Rewrites the tables of every README (each *.md that git does not ignore) under `root`; the files that differed.

    With `check` nothing is written. Raises ValueError naming the file for a table that cannot be made.
    """
    changed = []
    for path in markdown_files(root):
        text = path.read_bytes().decode()
        new = rewrite_text(text, path, root)
        if new != text:
            changed.append(path)
            if not check:
                atomic_write(path, new)
    return changed


def markdown_files(root: Path) -> list[Path]:
    """The *.md under `root` that git tracks or would track; all of them outside a checkout."""
    asked = ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.md"]
    try:
        listed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.SubprocessError):
        listed = [path.relative_to(root) for path in root.rglob("*.md")]
    return sorted(root / path for path in filter(None, listed) if (root / path).is_file())


def rewrite_text(text: str, path: Path, root: Path) -> str:
    """`text`, the content of `path`, with each block between markers made anew."""
    out: list[str] = []
    opened: tuple[int, re.Match[str]] | None = None
    fence = ""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        where = f"{path}, line {number}"
        if opened is None and (mark := FENCE.match(line)):
            fence = mark[1] if not fence else "" if line.strip().startswith(fence) else fence
        if fence or not MARKER.match(line):
            if opened is None:
                out.append(line)
        elif CLOSE.fullmatch(line):
            if opened is None:
                raise ValueError(f"{where}: end of a table that did not begin")
            out += [_block(opened[1], path, root, f"{path}, line {opened[0]}"), line]
            opened = None
        else:
            if opened is not None:
                raise ValueError(f"{where}: a table begins inside the one of line {opened[0]}")
            query = OPEN.fullmatch(line)
            if query is None or not OPTIONS.fullmatch(query["options"]):
                raise ValueError(
                    f'{where}: expected <!-- table: stage/name columns="..." where="..." -->, got {line!r}'
                )
            opened = (number, query)
            out.append(line)
    if opened is not None:
        raise ValueError(f"{path}, line {opened[0]}: a table begins and does not end")
    return "".join(out)


def _block(query: re.Match[str], path: Path, root: Path, where: str) -> str:
    options = dict(re.findall(r'(columns|where)="([^"]*)"', query["options"]))
    if not options.get("columns"):
        raise ValueError(f'{where}: no columns="..."')
    columns = [_column(text, where) for text in options["columns"].split(",")]
    files = newest_files(root / "results", query["stage"], query["name"])
    if not files:
        return "\n*Not yet measured.*\n\n"
    return "\n" + "\n".join(_table(file, columns, options.get("where", ""), path, where) for file in files) + "\n"


def _column(text: str, where: str) -> Column:
    match = COLUMN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{where}: expected a column as key:format=heading, got {text!r}")
    return Column(match["key"], match["format"] or "", match["heading"] or match["key"])


def newest_files(results: Path, stage: str, name: str) -> list[Path]:
    """The newest file of each device, `<name>_<device>_<date>.json`; a device has no `_` in it, so names may."""
    newest: dict[str, Path] = {}
    for path in sorted((results / stage).glob(f"{name}_*.json"), key=lambda path: path.stem.rsplit("_")[-1]):
        if re.fullmatch(re.escape(name) + r"_[^_]+_\d{4}-\d{2}-\d{2}", path.stem):
            newest[path.stem.rsplit("_", 2)[1]] = path  # dates of this form sort as text: the last one is the newest
    return [newest[device] for device in sorted(newest)]


def _table(file: Path, columns: list[Column], conditions: str, path: Path, where: str) -> str:
    result = json.loads(file.read_bytes())
    rows = [row for row in map(_flat, result["rows"]) if _meets(row, conditions, where)]
    if not rows:
        raise ValueError(f"{where}: no row of {file} meets where={conditions!r}")
    for column in columns:
        if not any(column.key in row for row in rows):
            known = ", ".join(sorted(set().union(*rows)))
            raise ValueError(f"{where}: no column {column.key!r} in {file}; it has {known}")
    numeric = [all(isinstance(row.get(column.key), int | float | None) for row in rows) for column in columns]
    lines = [[_escape(column.heading) for column in columns], ["--:" if right else "---" for right in numeric]]
    lines += [[_cell(row, column, where) for column in columns] for row in rows]
    link = Path(os.path.relpath(file, path.parent)).as_posix()
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{table}\n*{result['device']}, {result['date']}, [{file.name}]({link})*\n"


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": 1, "b": {"c": 2}} with "b.c" beside "a" and "b"."""
    flat = {prefix + key: value for key, value in row.items()}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
    return flat


def _meets(row: Mapping[str, Any], conditions: str, where: str) -> bool:
    for condition in filter(None, (part.strip() for part in conditions.split(","))):
        key, equals, value = condition.partition("=")
        if not equals:
            raise ValueError(f"{where}: expected key=value in where, got {condition!r}")
        if str(row.get(key.strip())) != value.strip():
            return False
    return True


def _cell(row: Mapping[str, Any], column: Column, where: str) -> str:
    value = row.get(column.key)
    if value is None:
        return ABSENT
    try:  # text in a column of numbers ("nan", "out of memory") stands as it is
        return _escape(str(value) if isinstance(value, str) else format(value, column.format))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: column {column.key!r}: {error}") from None


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True, slots=True)
class TablesConfig:
    """The command line of `python -m common.tables`."""

    root: Path = field(default=Path("."), metadata={"help": "the folder with the READMEs and results/"})
    check: bool = field(default=False, metadata={"help": "write nothing; exit 1 and name the files that differ"})


def main() -> int:
    config = parse(TablesConfig, prog="common.tables", description="Rewrite the result tables of every README.")
    changed = rewrite(config.root, check=config.check)
    for path in changed:
        print(f"{path}: {'differs from results/' if config.check else 'rewritten'}")
    return 1 if config.check and changed else 0


if __name__ == "__main__":
    run(main)
