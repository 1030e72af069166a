"""The texts on disk and their split, against the written rules."""

import hashlib
import sys
import sysconfig
from pathlib import Path

import pytest

from minigpt.corpus import is_held_out, load_corpus, parquet_rows


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_stdlib_follows_the_written_rule(stdlib):
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out, empty = [], [], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(name.split("/")[:-1]):
            continue
        text = path.read_bytes()
        empty += not text
        side = held_out if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0 else train
        side += [(name, text)] if text else []
    assert stdlib.train == tuple(train) and stdlib.held_out == tuple(held_out)
    assert stdlib.held_out_text == b"".join(text for _, text in held_out)
    assert stdlib.documents == len(train) + len(held_out)
    assert [reason for _, reason in stdlib.skipped].count("empty") == empty
    assert 0.02 < len(stdlib.held_out_text) / stdlib.train_bytes < 0.12


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the numbers in DESIGN.md are those of Python 3.11.7")
def test_stdlib_has_the_documented_size(stdlib):
    assert stdlib.documents + len(stdlib.skipped) == 601
    assert stdlib.train_bytes == 10_472_468 and len(stdlib.held_out_text) == 593_114
    assert stdlib.digest.startswith("c07759d739ec")


def test_sides_are_in_the_order_of_names(tmp_path):
    write(tmp_path, {f"{i}.txt": f"text {i} é".encode() for i in range(60)})
    corpus = load_corpus(str(tmp_path))
    names = sorted(f"{i}.txt" for i in range(60))
    for documents, side in ((corpus.train, False), (corpus.held_out, True)):
        assert documents == tuple((n, (tmp_path / n).read_bytes()) for n in names if is_held_out(n) == side)
    assert corpus.documents == 60 and corpus.split == "files by path hash"


def test_what_is_no_text_is_reported(tmp_path):
    text = {f"sub/{i}.txt": b"some text\n" for i in range(60)}
    odd = {"empty.txt": b"", "image.png": b"\x89PNG\0\0", "nul.txt": b"a\0b", "latin1.txt": "é".encode("latin-1")}
    write(tmp_path, {**text, **odd, ".git/config": b"hidden"})
    corpus = load_corpus(str(tmp_path))
    assert dict(corpus.skipped) == {
        "empty.txt": "empty", "image.png": "binary", "nul.txt": "binary", "latin1.txt": "not UTF-8"
    }  # fmt: skip
    assert corpus.documents == 60
    for name in odd:
        assert name in corpus.describe()


def test_digest_knows_names_bytes_and_sides(tmp_path):
    files = {f"{i}.txt": f"text {i}".encode() for i in range(60)}
    first = load_corpus(str(write(tmp_path / "a", files))).digest
    assert first == load_corpus(str(write(tmp_path / "b", files))).digest
    assert first != load_corpus(str(write(tmp_path / "c", {**files, "7.txt": b"text 8"}))).digest
    renamed = {("z.txt" if name == "7.txt" else name): text for name, text in files.items()}
    assert first != load_corpus(str(write(tmp_path / "d", renamed))).digest


def test_a_file_is_cut_after_95_percent(tmp_path):
    text = bytes(range(65, 91)) * 40
    path = tmp_path / "one.txt"
    path.write_bytes(text)
    corpus = load_corpus(str(path))
    cut = len(text) - len(text) // 20
    assert corpus.train == (("one.txt", text[:cut]),) and corpus.held_out == (("one.txt", text[cut:]),)
    assert corpus.split == "last 5% of the file" and corpus.documents == 1


def test_too_few_files_for_the_hash_are_cut_each(tmp_path):
    names = [name for name in (f"{i}.txt" for i in range(40)) if not is_held_out(name)][:3]
    corpus = load_corpus(str(write(tmp_path, {name: name[0].encode() * 100 for name in names})))
    assert corpus.held_out_text == b"".join(name[0].encode() * 5 for name in sorted(names))
    assert "too few for the hash" in corpus.split


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "no files at all"), ({"a.bin": b"\0\1"}, r"a.bin \(binary\)"), ({"e.txt": b""}, r"e.txt \(empty\)")],
)
def test_a_folder_without_text_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=f"holds no text: expected at least one UTF-8 file, found {message}"):
        load_corpus(str(write(tmp_path, files)))


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere' does not exist: expected 'stdlib', 'python', fineweb10B:N"):
        load_corpus(str(tmp_path / "nowhere"))


def test_parquet_rows_come_in_order_as_bytes(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i} é" if i % 7 else None for i in range(2500)]
    for name, part, kind in (
        ("0.parquet", texts[:2000], arrow.string()),
        ("1.parquet", texts[2000:], arrow.large_string()),
    ):
        table = arrow.table({"id": list(range(len(part))), "text": arrow.array(part, kind)})
        parquet.write_table(table, tmp_path / name, row_group_size=300)
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    assert list(parquet_rows(paths, "text")) == [(text or "").encode() for text in texts]
    with pytest.raises(ValueError, match="no column 'body': expected one of id, text"):
        list(parquet_rows(paths, "body"))
    with pytest.raises(ValueError, match="column 'id' holds int64: expected text"):
        list(parquet_rows(paths, "id"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken.parquet: not a parquet file"):
        list(parquet_rows([tmp_path / "broken.parquet"], "text"))


def test_without_pyarrow_it_says_what_to_install(monkeypatch):
    from common.cli import UserError

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        next(parquet_rows([], "text"))
