"""Texts on disk -> documents of a training and a held-out side: the standard library, that and all installed packages,
a folder, a file, parquet.

A document is bytes of UTF-8 without a byte 0. Which side a document is on depends on its name alone, so it stays when
others come. Refused: a missing path, a folder without text, a parquet column that is not there or no text. Files that
are empty, binary or not UTF-8 are left out and reported, never silently.
"""

import hashlib
import os
import site
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError

EXCLUDED = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3"})
HELD_OUT_MODULUS = 20  # one document in twenty, 5%
PARQUET_ROWS = 1024  # rows read at a time

Document = tuple[str, bytes]  # (name, text)


@dataclass(frozen=True, slots=True)
class TextCorpus:
    """The documents of both sides in the order of their names, a posix relative path each."""

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: tuple[tuple[str, str], ...]  # (relative path, why)
    split: str  # how the held-out side was chosen, in words
    digest: str  # SHA-256 over the path, side and bytes of every document, in order

    @property
    def documents(self) -> int:
        """How many there are on disk: one that is cut gives a part to each side and counts once."""
        return len({name for name, _ in self.train + self.held_out})

    @property
    def train_bytes(self) -> int:
        return sum(len(text) for _, text in self.train)

    @property
    def held_out_text(self) -> bytes:
        return b"".join(text for _, text in self.held_out)

    def describe(self) -> str:
        text = (
            f"corpus {self.name}: {self.documents} documents, {self.train_bytes / 1e6:.2f} MB training, "
            f"{len(self.held_out_text) / 1e6:.2f} MB held out ({self.split}), digest {self.digest[:12]}"
        )
        for reason in sorted({reason for _, reason in self.skipped}):
            names = [name for name, why in self.skipped if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            text += f"\n  left out, {reason}: {len(names)} ({shown})"
        return text


def load_corpus(spec: str) -> TextCorpus:
    """`stdlib` (the standard library of this interpreter), `python` (that, and the Python files of the packages that
    are installed for it), or the path of a folder or file (`./stdlib` is a path)."""
    if spec in ("stdlib", "python"):
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [(name, root / name) for name in python_files(root)]
        if spec == "stdlib":
            return build_corpus(spec, files)
        return build_corpus(spec, files + package_files(map(Path, site.getsitepackages())), distinct=True)
    path = Path(spec)
    if not path.exists():
        raise ValueError(
            f"corpus {spec!r} does not exist: expected 'stdlib', 'python', fineweb10B:N, hf:owner/name, or the path of "
            f"a text file, of a folder of texts or of a folder of token shards"
        )
    if path.is_dir():
        return build_corpus(spec, [(name, path / name) for name in folder_files(path)])
    return build_corpus(spec, [(path.name, path)])


def python_files(root: Path) -> list[str]:
    """Posix relative paths, sorted: every *.py outside the excluded folders."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return sorted(name for name in names if not EXCLUDED & set(name.split("/")[:-1]))


def package_files(roots: Iterable[Path]) -> list[tuple[str, Path]]:
    """Of the folders that packages are installed in, one after the other: names begin with `site-packages/`, in the
    second folder with `site-packages-2/`, ... No name of the standard library does, so files of that are on the side
    where corpus `stdlib` has them. `__editable__*.py` only says where on this machine a project lies."""
    found = []
    for number, root in enumerate((root for root in roots if root.is_dir()), start=1):
        prefix = "site-packages" + (f"-{number}" if number > 1 else "")
        names = [name for name in python_files(root) if not name.startswith("__editable__")]
        found += [(f"{prefix}/{name}", root / name) for name in names]
    return found


def folder_files(root: Path) -> list[str]:
    """Posix relative paths of every file below root, sorted; hidden files and folders (.git) do not belong to it."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def build_corpus(spec: str, files: Iterable[tuple[str, Path]], *, distinct: bool = False) -> TextCorpus:
    """Of (name, path) each. `distinct`: a file with the bytes of an earlier one is left out, or the held-out side could
    be learnt by heart."""
    texts, skipped, seen = {}, [], set()
    for name, path in files:
        text, reason = read_text(path)
        if distinct and not reason:
            known = len(seen)
            seen.add(hashlib.sha256(text).digest())
            reason = "duplicate" if len(seen) == known else ""
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
    sides = tuple(train.items()), tuple(held_out.items())
    return TextCorpus(spec, *sides, skipped=tuple(skipped), split=split, digest=digest.hexdigest())


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
    """True for a fixed 5% of names: the SHA-256 of the posix relative path, as an integer, is 0 modulo 20."""
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


def parquet_rows(paths: Sequence[Path], column: str) -> Iterator[bytes]:
    """The texts of one column, row after row and file after file, `PARQUET_ROWS` in memory at a time; b"" where null.

    Raises UserError without pyarrow, ValueError for a file that is not parquet, a column that is not there or holds no
    text.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Hugging Face datasets are parquet files: pip install pyarrow") from None
    for path in paths:
        try:
            table = parquet.ParquetFile(path)
        except arrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a parquet file ({error})") from None
        with table:
            fields = {field.name: field.type for field in table.schema_arrow}
            if column not in fields:
                raise ValueError(f"{path}: no column {column!r}: expected one of {', '.join(fields)}")
            if fields[column] not in (arrow.string(), arrow.large_string()):
                raise ValueError(f"{path}: column {column!r} holds {fields[column]}: expected text")
            for rows in table.iter_batches(PARQUET_ROWS, columns=[column]):
                # As binary: the bytes are what is tokenised, and str objects would be made for nothing.
                yield from (text or b"" for text in rows.column(0).cast(arrow.large_binary()).to_pylist())
