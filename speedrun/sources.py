"""Which commit of this repository holds the program that a log names: its files' digests against git's own contents.

Refused: nothing; outside a git checkout, or where history was not fetched, the answer is that nobody can say.
"""

import hashlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from speedrun.record_log import ROOT, is_source

Blobs = dict[str, str]  # posix path: git's name of the content


def commit_of(sources: Mapping[str, str], named: str | None, root: Path = ROOT) -> tuple[str | None, list[str]]:
    """(The commit whose code is exactly `sources`, []) or (None, the files that tell it from the one it names).

    sources: {posix path: SHA-256}, of all code of a race. The commit `named` is tried first, then all that git knows
    here, the newest first. Where `named` is not here, the files are those that no commit has. Raises ValueError where
    there is no git checkout, or one without its history.
    """
    hashes, every = Hashes(root), commits(root)
    known = named in every
    for commit in [named] * known + every:
        blobs = tree(commit, root)
        if blobs.keys() == sources.keys() and all(hashes[blob] == sources[name] for name, blob in blobs.items()):
            return commit, []
    if git(root, "rev-parse", "--is-shallow-repository").strip() == b"true":
        raise ValueError("no commit here is it, but this clone is shallow: expected all history, git fetch --unshallow")
    if known:
        blobs = tree(named, root)
        names = sorted(blobs.keys() | sources.keys())
        return None, [name for name in names if name not in blobs or hashes[blobs[name]] != sources.get(name)]
    seen = {(name, hashes[blob]) for commit in every for name, blob in tree(commit, root).items()}
    return None, [name for name, digest in sorted(sources.items()) if (name, digest) not in seen]


class Hashes(dict):
    """{git's name of a content: SHA-256 of it}, asked for when needed and kept: commits share most of their files."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, blob: str) -> str:
        self[blob] = hashlib.sha256(git(self.root, "cat-file", "blob", blob)).hexdigest()
        return self[blob]


def commits(root: Path) -> list[str]:
    """All that branches, tags and HEAD reach, the newest first."""
    return git(root, "rev-list", "--date-order", "--all", "HEAD").decode().split()


def tree(commit: str, root: Path) -> Blobs:
    """The code of a race in a commit."""
    return {name: blob for name, blob in _entries(commit, root) if is_source(Path(name))}


def _entries(commit: str, root: Path) -> Iterator[tuple[str, str]]:
    for entry in git(root, "ls-tree", "-r", "-z", commit).decode().split("\0")[:-1]:
        about, _, name = entry.partition("\t")
        yield name, about.split()[2]


def git(root: Path, *arguments: str) -> bytes:
    """Raises ValueError where git has no answer."""
    try:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", b"") or str(error).encode()
        raise ValueError(f"git {arguments[0]} in {root.name}: {why.decode(errors='replace').strip()}") from None
