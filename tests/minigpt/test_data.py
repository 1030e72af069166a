"""The corpus, its split and its batches, against the written rules and brute force."""

import hashlib
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from minigpt import data
from minigpt.data import SEPARATOR, batch, held_out_windows, load_corpus


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
        side.append(text)
    assert stdlib.held_out_text == b"".join(held_out)
    assert stdlib.train[stdlib.train != SEPARATOR].tobytes() == b"".join(train)
    assert stdlib.documents + len(stdlib.skipped) == len(train) + len(held_out)
    assert [reason for _, reason in stdlib.skipped].count("empty") == empty
    assert 0.02 < len(stdlib.held_out_text) / stdlib.train.size < 0.12


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the numbers in DESIGN.md are those of Python 3.11.7")
def test_stdlib_has_the_documented_size(stdlib):
    assert stdlib.documents + len(stdlib.skipped) == 601
    assert (stdlib.train != SEPARATOR).sum() == 10_472_468 and len(stdlib.held_out_text) == 593_114
    assert stdlib.digest.startswith("c07759d739ec")


def test_every_document_follows_one_separator(tmp_path):
    write(tmp_path, {f"{i}.txt": f"text {i} é".encode() for i in range(60)})
    corpus = load_corpus(str(tmp_path))
    names = sorted(f"{i}.txt" for i in range(60))
    for tokens, side in ((corpus.train, False), (corpus.held_out, True)):
        expected = b"".join(b"\0" + (tmp_path / n).read_bytes() for n in names if data.is_held_out(n) == side)
        assert tokens.dtype == np.uint8 and tokens.tobytes() == expected
    assert corpus.held_out_text == corpus.held_out.tobytes().replace(b"\0", b"")


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
    assert corpus.train.tobytes() == b"\0" + text[:cut] and corpus.held_out.tobytes() == b"\0" + text[cut:]
    assert corpus.split == "last 5% of the file"


def test_too_few_files_for_the_hash_are_cut_each(tmp_path):
    names = [name for name in (f"{i}.txt" for i in range(40)) if not data.is_held_out(name)][:3]
    corpus = load_corpus(str(write(tmp_path, {name: name[0].encode() * 100 for name in names})))
    assert corpus.held_out_text == b"".join(name[0].encode() * 5 for name in sorted(names))
    assert "too few for the hash" in corpus.split


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("context", [1, 7, 16])
def test_ranks_share_the_one_process_batch(world_size, context):
    tokens = np.random.default_rng(0).integers(256, size=101).astype(np.uint8)
    for step in range(9):
        place = {"seed": 3, "step": step, "global_batch": 6, "context": context}
        whole = batch(tokens, rank=0, world_size=1, **place)
        parts = [batch(tokens, rank=rank, world_size=world_size, **place) for rank in range(world_size)]
        for side in (0, 1):
            assert whole[side].shape == (6, context) and whole[side].dtype == np.int64
            assert np.array_equal(np.concatenate([part[side] for part in parts]), whole[side])


def test_targets_are_the_next_tokens_and_an_epoch_visits_each_window_once():
    tokens = np.arange(103).astype(np.uint8)  # a token is its own position
    context, global_batch = 10, 5
    first_epoch = [
        batch(tokens, seed=1, step=step, rank=0, world_size=1, global_batch=global_batch, context=context)
        for step in range(2)  # (103 - 1) // 10 = 10 windows
    ]
    inputs = np.concatenate([rows for rows, _ in first_epoch])
    targets = np.concatenate([rows for _, rows in first_epoch])
    assert np.array_equal(targets, inputs + 1)
    assert len(np.unique(targets)) == targets.size == 100, "every target of the epoch comes once"


def test_batches_depend_on_seed_step_and_epoch_and_on_nothing_else():
    tokens = np.random.default_rng(0).integers(256, size=2001).astype(np.uint8)
    place = {"rank": 0, "world_size": 1, "global_batch": 4, "context": 20}
    first = batch(tokens, seed=0, step=5, **place)[0]
    batch(tokens, seed=9, step=77, **place)
    np.random.seed(1)
    data.epoch_starts.cache_clear()
    assert np.array_equal(first, batch(tokens, seed=0, step=5, **place)[0])
    for other in ({"seed": 1, "step": 5}, {"seed": 0, "step": 6}, {"seed": 0, "step": 5 + 25}):  # 25 steps an epoch
        assert not np.array_equal(first, batch(tokens, **other, **place)[0])


@pytest.mark.parametrize("size", [2, 3, 9, 16, 17, 18, 64, 101])
@pytest.mark.parametrize(("context", "stride"), [(1, 1), (16, 16), (16, 5), (16, 1), (7, 4)])
def test_held_out_windows_predict_each_token_once_with_enough_context(size, context, stride):
    predicted = []
    for start, length, first in held_out_windows(size, context, stride):
        assert start >= 0 and start + length <= size - 1 and length <= context
        predicted += range(start + 1 + first, start + length + 1)
        if start:
            assert first >= context - stride, "a later window must see context - stride tokens before what counts"
    assert predicted == list(range(1, size))


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "no files at all"), ({"a.bin": b"\0\1"}, r"a.bin \(binary\)"), ({"e.txt": b""}, r"e.txt \(empty\)")],
)
def test_a_folder_without_text_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=f"holds no text: expected at least one UTF-8 file, found {message}"):
        load_corpus(str(write(tmp_path, files)))


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere' does not exist: expected 'stdlib' or the path"):
        load_corpus(str(tmp_path / "nowhere"))
    tokens = np.zeros(10, np.uint8)
    place = {"seed": 0, "step": 0, "rank": 0}
    with pytest.raises(ValueError, match="batch 5 is not divisible by world size 2"):
        batch(tokens, world_size=2, global_batch=5, context=4, **place)
    with pytest.raises(ValueError, match="10 tokens: expected at least 11"):
        batch(tokens, world_size=1, global_batch=1, context=10, **place)
    batch(tokens, world_size=1, global_batch=1, context=9, **place)
    for stride in (0, 5):
        with pytest.raises(ValueError, match=f"stride {stride}: expected 1 to the context, 4"):
            held_out_windows(10, 4, stride)
    with pytest.raises(ValueError, match="1 tokens: expected at least 2"):
        held_out_windows(1, 4, 4)
