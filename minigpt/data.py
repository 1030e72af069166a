"""Text on disk -> byte tokens -> deterministic batches and held-out windows.

A token is a byte (vocabulary 256). Every document is preceded by one byte 0, the separator, so files that contain a
byte 0 are not text here. Nothing keeps random state: a batch is a function of (seed, step, rank), so resuming a run
needs only its step. Refused: a missing path, a folder without text, a corpus shorter than a context window. Files that
are empty, binary or not UTF-8 are left out and reported, never silently.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

SEPARATOR = 0
VOCAB_SIZE = 256
STDLIB_EXCLUDED = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3"})
HELD_OUT_MODULUS = 20  # one file in twenty, 5%


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens are uint8 arrays that begin with a separator; held_out_text is the held-out bytes without separators."""

    name: str
    train: np.ndarray
    held_out: np.ndarray
    held_out_text: bytes
    documents: int
    skipped: tuple[tuple[str, str], ...]  # (relative path, why)
    split: str  # how the held-out side was chosen, in words
    digest: str  # SHA-256 over the path, side and bytes of every document, in order

    def describe(self) -> str:
        text = (
            f"corpus {self.name}: {self.documents} documents, {self.train.size / 1e6:.2f} MB training, "
            f"{len(self.held_out_text) / 1e6:.2f} MB held out ({self.split}), digest {self.digest[:12]}"
        )
        for reason in sorted({reason for _, reason in self.skipped}):
            names = [name for name, why in self.skipped if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            text += f"\n  left out, {reason}: {len(names)} ({shown})"
        return text


def load_corpus(spec: str) -> Corpus:
    """`stdlib` (the standard library of this interpreter) or the path of a folder or file (`./stdlib` is a path)."""
    if spec == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return build_corpus(spec, root, stdlib_files(root))
    path = Path(spec)
    if not path.exists():
        raise ValueError(f"corpus {spec!r} does not exist: expected 'stdlib' or the path of a folder or text file")
    if path.is_dir():
        return build_corpus(spec, path, folder_files(path))
    return build_corpus(spec, path.parent, [path.name])


def stdlib_files(root: Path) -> list[str]:
    """Posix relative paths of the stdlib corpus, sorted: every *.py outside the excluded folders."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return sorted(name for name in names if not STDLIB_EXCLUDED & set(name.split("/")[:-1]))


def folder_files(root: Path) -> list[str]:
    """Posix relative paths of every file below root, sorted; hidden files and folders (.git) do not belong to it."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def build_corpus(spec: str, root: Path, names: list[str]) -> Corpus:
    texts, skipped = {}, []
    for name in names:
        text, reason = read_text(root / name)
        if reason:
            skipped.append((name, reason))
        else:
            texts[name] = text
    if not texts:
        found = ", ".join(f"{name} ({reason})" for name, reason in skipped[:3]) or "no files at all"
        raise ValueError(f"corpus {spec!r} holds no text: expected at least one UTF-8 file, found {found}")
    train, held_out, split = split_documents(texts)
    digest = hashlib.sha256()
    for side, documents in (("train", train), ("held_out", held_out)):
        for name, text in documents.items():
            digest.update(f"{side} {name} {len(text)}\n".encode() + text)
    return Corpus(
        name=spec,
        train=join_documents(train.values()),
        held_out=join_documents(held_out.values()),
        held_out_text=b"".join(held_out.values()),
        documents=len(texts),
        skipped=tuple(skipped),
        split=split,
        digest=digest.hexdigest(),
    )


def read_text(path: Path) -> tuple[bytes, str]:
    """(bytes, "") of a text file, or (b"", why it is not one)."""
    try:
        data = path.read_bytes()
        data.decode()
    except UnicodeDecodeError:
        return b"", "binary" if b"\0" in data else "not UTF-8"
    except OSError as error:
        return b"", f"unreadable: {error.strerror}"
    if not data:
        return b"", "empty"
    return (b"", "binary") if b"\0" in data else (data, "")


def is_held_out(name: str) -> bool:
    """True for a fixed 5% of paths: the SHA-256 of the posix relative path, as an integer, is 0 modulo 20."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % HELD_OUT_MODULUS == 0


def split_documents(texts: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes], str]:
    """(training, held out, rule in words). By path hash; where that leaves a side empty, the tail of every file."""
    held_out = {name: text for name, text in texts.items() if is_held_out(name)}
    train = {name: text for name, text in texts.items() if name not in held_out}
    if len(texts) > 1 and train and held_out:
        return train, held_out, "files by path hash"
    cut = {name: len(text) - max(1, len(text) // HELD_OUT_MODULUS) for name, text in texts.items()}
    train = {name: text[: cut[name]] for name, text in texts.items()}
    held_out = {name: text[cut[name] :] for name, text in texts.items()}
    return train, held_out, "last 5% of the file" if len(texts) == 1 else "last 5% of each file, too few for the hash"


def join_documents(documents: Iterable[bytes]) -> np.ndarray:
    """uint8 tokens: a separator in front of each document."""
    return np.frombuffer(b"".join(b"\0" + text for text in documents), dtype=np.uint8)


def batch(
    tokens: np.ndarray, *, seed: int, step: int, rank: int, world_size: int, global_batch: int, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int64 of shape (global_batch / world_size, context): this rank's rows of step's batch.

    Row r of step s is row s * global_batch + r of an endless list: epoch after epoch, the text is cut into
    (size - 1) // context windows from a random offset, and each window comes once, in random order. Concatenated in
    rank order, the rows of all ranks are the rows of the one-process batch.
    """
    if global_batch % world_size:
        raise ValueError(f"batch {global_batch} is not divisible by world size {world_size}")
    check_length(tokens, context)
    per_epoch = (tokens.size - 1) // context
    rows = global_batch // world_size
    first = step * global_batch + rank * rows
    starts = [
        epoch_starts(tokens.size, context, seed, row // per_epoch)[row % per_epoch]
        for row in range(first, first + rows)
    ]
    window = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64)
    return window[:, :-1], window[:, 1:]


@lru_cache(maxsize=4)  # a pure function; the cache only saves shuffling the same epoch again
def epoch_starts(size: int, context: int, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of one epoch start, shuffled."""
    count = (size - 1) // context
    generator = np.random.default_rng((seed, epoch))
    offset = generator.integers(size - count * context)
    return offset + context * generator.permutation(count)


def check_length(tokens: np.ndarray, context: int) -> None:
    if tokens.size < context + 1:
        raise ValueError(
            f"the training text is {tokens.size} tokens: expected at least {context + 1}, a context window and its "
            f"last target; give more text or a smaller context"
        )


def held_out_windows(size: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, length, first_scored) of windows that together predict each of the tokens 1..size-1 exactly once.

    A window reads tokens start..start+length-1 and predicts the ones after each; only predictions from first_scored on
    count. The first window counts whole; each later one advances by `stride`, so all its counted predictions see at
    least context - stride tokens before them. The last window ends with the text.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride}: expected 1 to the context, {context}")
    if size < 2:
        raise ValueError(f"the held-out text is {size} tokens: expected at least 2")
    length = min(context, size - 1)
    windows, scored = [(0, length, 0)], length
    while scored < size - 1:
        end = min(scored + stride, size - 1)
        windows.append((end - length, length, scored - (end - length)))
        scored = end
    return windows
