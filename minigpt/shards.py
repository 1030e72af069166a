"""Token shards, the .bin files of the speedrun community: a header of 256 int32, then the tokens, little-endian.

Two siblings: magic 20240520, version 1, uint16 tokens for vocabularies up to 65,536, and magic 20240801, version 7,
uint32 tokens for larger ones (llm.c's files of GPT-2 and Llama-3 tokens). A file stands under its name whole or not at
all. Refused on opening: another magic or version, a length that does not fit the count, an empty shard, a token beyond
the vocabulary.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from common.log import atomic_write

HEADER_BYTES = 1024
FORMATS = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}  # (magic, version)
MAX_TOKENS = 2**31 - 1  # the count is an int32
SCAN_TOKENS = 1 << 22  # looked at together, so that a scan needs a few megabytes
LARGEST = ".largest_token.json"  # beside the shards: what a scan found, so that the next opening need not read it all
META, STATE = "meta.json", "state.json"  # of a folder that minigpt.prepare wrote; STATE while it is unfinished
META_FORMAT = "groundup token shards 1"


def shard_dtype(vocab_size: int) -> np.dtype:
    """The smaller of the two that holds ids below vocab_size."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class _ShardFile:
    """One shard in the making, under a temporary name beside its own; `finish` gives it its name."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype, self.count = path, dtype, 0
        self.temporary = path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.temporary, "wb")  # noqa: SIM115 - closed by finish or discard
        self.file.write(bytes(HEADER_BYTES))

    def write(self, tokens: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self.count += tokens.size

    def finish(self) -> None:
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = *FORMATS[self.dtype], self.count
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes tokens, uint16 or uint32 of shape (count,), count > 0, as the shard of that dtype; whole or not at all."""
    if tokens.dtype not in FORMATS or tokens.ndim != 1 or not 1 <= tokens.size <= MAX_TOKENS:
        raise ValueError(f"{path}: {tokens.dtype} {tokens.shape}: expected a row of 1 to 2**31 - 1 uint16 or uint32")
    shard = _ShardFile(Path(path), tokens.dtype)
    try:
        shard.write(tokens)
        shard.finish()
    except BaseException:
        shard.discard()
        raise


class ShardWriter:
    """Streams documents into `<prefix>_<number>.bin` of exactly `max_tokens` tokens, the last one shorter.

    A document is preceded by the separator. One that does not fit is split: its rest opens the next shard, without a
    separator of its own. Training windows never span two shards, so a split costs one document some context, no token.
    Memory holds the document that is being added. `on_finish(path, count, used)` is called once a shard stands under
    its name: `used` tokens of the document being added, its separator included, are on file, and
    `add(document, skip=used)` of a new writer goes on from there. Leaving the `with` block by an exception drops the
    shard in the making.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        *,
        vocab_size: int,
        separator: int,
        max_tokens: int = MAX_TOKENS,
        first: int = 1,
        on_finish: Callable[[Path, int, int], None] = lambda *_: None,
    ) -> None:
        if not 1 <= max_tokens <= MAX_TOKENS:
            raise ValueError(f"{max_tokens} tokens a shard: expected 1 to 2**31 - 1")
        self.folder, self.prefix, self.number, self.on_finish = Path(folder), prefix, first, on_finish
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self.separator = np.array([separator], dtype=shard_dtype(vocab_size))
        self._shard: _ShardFile | None = None
        self._document_size = 0

    def add(self, document: np.ndarray, skip: int = 0) -> None:
        """Appends the separator and the document's tokens, any integer dtype, less the first `skip` of them all."""
        if document.size and not 0 <= int(document.min()) <= int(document.max()) < self.vocab_size:
            raise ValueError(f"token {document.max()}: expected ids below the vocabulary size {self.vocab_size}")
        tokens = np.concatenate([self.separator, document.astype(self.separator.dtype)])
        self._document_size, used = tokens.size, skip
        while used < tokens.size:
            if self._shard is None:
                path = self.folder / f"{self.prefix}_{self.number:06d}.bin"
                self._shard = _ShardFile(path, self.separator.dtype)
            part = tokens[used : used + self.max_tokens - self._shard.count]
            self._shard.write(part)
            used += part.size
            if self._shard.count == self.max_tokens:
                self._finish(used)

    def _finish(self, used: int) -> None:
        shard, self._shard = self._shard, None
        shard.finish()
        self.number += 1
        self.on_finish(shard.path, shard.count, used)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._shard is None:
            return
        if kind is None:
            self._finish(self._document_size)
        else:
            self._shard.discard()


def open_shard(path: Path, vocab_size: int) -> np.memmap:
    """The tokens of a shard, uint16 or uint32 of shape (count,), memory-mapped and read-only.

    All tokens are read once, to find the largest; the file's `.largest_token.json` neighbour remembers it for as long
    as size and time of the shard stay, so only the first opening costs (200 MB: 0.03 s from memory, else the disk's
    time). Raises ValueError for whatever the head of this module refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a token shard")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(
            f"{path}: {size} bytes: expected a token shard, which begins with {HEADER_BYTES} bytes of header"
        )
    with open(path, "rb") as file:
        magic, version, count = (int(number) for number in np.frombuffer(file.read(12), dtype="<i4"))
    dtype = next((dtype for dtype, (known, _) in FORMATS.items() if known == magic), None)
    if dtype is None:
        raise ValueError(f"{path}: magic {magic}: expected {' or '.join(str(known) for known, _ in FORMATS.values())}")
    if version != FORMATS[dtype][1]:
        raise ValueError(f"{path}: version {version}: expected {FORMATS[dtype][1]} with magic {magic}")
    if count < 1:
        raise ValueError(f"{path}: {count} tokens: expected at least 1")
    expected = HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        what = "cut short" if size < expected else "too long"
        raise ValueError(
            f"{path}: {size:,} bytes, {what}: expected {expected:,} for the {count:,} tokens of its header"
        )
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size <= np.iinfo(dtype).max and largest_token(path, tokens) >= vocab_size:
        raise ValueError(_beyond(path, tokens, vocab_size))
    return tokens


def largest_token(path: Path, tokens: np.ndarray) -> int:
    """Of the shard at path, from the memory of an earlier scan where it still holds."""
    state, memory = path.stat(), path.with_name(LARGEST)
    stamp, known = [state.st_size, state.st_mtime_ns], _read_json(memory)
    match known.get(path.name):
        case [size, time, int(largest)] if [size, time] == stamp:
            return largest
    largest = max(int(part.max()) for part in _parts(tokens))
    with contextlib.suppress(OSError):  # a folder that cannot be written to is scanned each time
        atomic_write(memory, json.dumps({**known, path.name: [*stamp, largest]}))
    return largest


def _parts(tokens: np.ndarray) -> Iterable[np.ndarray]:
    return (tokens[start : start + SCAN_TOKENS] for start in range(0, tokens.size, SCAN_TOKENS))


def _beyond(path: Path, tokens: np.ndarray, vocab_size: int) -> str:
    for number, part in enumerate(_parts(tokens)):
        if (wrong := part >= vocab_size).any():
            place = int(wrong.argmax())
            where = f"{path}: token {part[place]} at position {number * SCAN_TOKENS + place:,}"
            return f"{where}: expected ids below the vocabulary size {vocab_size}; is this the shards' own tokenizer?"
    raise AssertionError(f"{path} changed while it was read")


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, int64 of shape (vocab_size,); a piece of the tokens in memory at a time."""
    return sum((np.bincount(part, minlength=vocab_size) for part in _parts(tokens)), np.zeros(vocab_size, np.int64))


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """The shards of a folder by side, in the order of their names; meta is {} where minigpt.prepare wrote none."""

    folder: Path
    train: tuple[Path, ...]
    held_out: tuple[Path, ...]
    meta: dict[str, Any]


def is_shard_folder(path: Path) -> bool:
    """Whether it has a meta.json or state.json of minigpt.prepare, or .bin files called after a side."""
    if not path.is_dir():
        return False
    sides = any("train" in file.stem or "val" in file.stem for file in path.glob("*.bin"))
    return sides or (path / STATE).exists() or _meta(path).get("format") == META_FORMAT


def read_folder(folder: Path) -> ShardFolder:
    """Training shards have `train` in their name, held-out shards `val`.

    Raises ValueError where a side is missing, a .bin file is of neither, minigpt.prepare has not finished, or its
    meta.json lists other files.
    """
    meta = _meta(folder)
    if (folder / STATE).exists() and not meta:
        raise ValueError(f"{folder} is unfinished: run the same minigpt.prepare again, it goes on where it stopped")
    files = sorted(folder.glob("*.bin"))
    train = tuple(file for file in files if "train" in file.stem)
    held_out = tuple(file for file in files if "val" in file.stem)
    if set(train) & set(held_out) or len(train) + len(held_out) < len(files):
        odd = [file.name for file in files if (file in train) == (file in held_out)]
        raise ValueError(f"{folder} holds {', '.join(odd[:3])}: expected either 'train' or 'val' in each shard's name")
    if not (train and held_out):
        raise ValueError(f"{folder} holds {len(train)} training and {len(held_out)} val shards: expected both")
    if meta and (changed := {file.name for file in files} ^ set(meta["shards"])):
        raise ValueError(
            f"{folder}: {', '.join(sorted(changed)[:3])}: expected the {len(meta['shards'])} of its {META}"
        )
    return ShardFolder(folder, train, held_out, meta)


def _meta(folder: Path) -> dict[str, Any]:
    """{} where there is none, or where another program's file has the name."""
    meta = _read_json(folder / META)
    return meta if meta.get("format") == META_FORMAT else {}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256 over name, size and sixteen pieces of 4 KiB of each file: tells files apart without reading it all."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for piece in range(16):
                file.seek(piece * max(0, size - 4096) // 15)
                digest.update(file.read(4096))
    return digest.hexdigest()
