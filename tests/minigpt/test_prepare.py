"""Shards made from texts: the same tokens as in memory, the same files after any interruption."""

import itertools
import json

import numpy as np
import pytest

from minigpt import prepare as module
from minigpt.corpus import is_held_out, load_corpus
from minigpt.data import load_data
from minigpt.prepare import Source, choose_tokenizer, open_source, parse_dataset, prepare, text_source
from tests.minigpt.programs import run
from tests.minigpt.test_download import Site, serve

SHARD = 400  # tokens


@pytest.fixture
def words(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    for number in range(60):
        text = f"text number {number}, é, some words and more words\n" * (number % 5 + 1)
        (folder / f"{number}.txt").write_bytes(text.encode())
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def make(source, out, spec="bpe:300", shard_tokens=SHARD):
    return prepare(source, choose_tokenizer(spec, source.train()), out, spec=spec, shard_tokens=shard_tokens)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_shards_hold_what_memory_holds(words, tmp_path, spec, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TEXT", 200)  # a few documents at a time
    out = tmp_path / "out"
    meta = make(open_source(str(words), tmp_path, ""), out, spec)
    memory, disk = load_data(str(words), spec), load_data(str(out))
    assert np.array_equal(np.concatenate(disk.train.shards), memory.train.shards[0])
    assert all(shard.size == SHARD for shard in disk.train.shards[:-1]) and len(disk.train.shards) > 3
    assert np.array_equal(disk.held_out, memory.held_out)
    assert disk.held_out_bytes == memory.held_out_bytes == meta["bytes"]["held_out"]
    assert (disk.digest, disk.documents) == (memory.digest, 60)
    assert meta["tokens"] == {"held_out": memory.held_out.size, "train": memory.train.size}
    names = [f"train_{number:06d}.bin" for number in range(1, len(disk.train.shards) + 1)]
    assert set(files(out)) == {"meta.json", "tokenizer.json", "val_000000.bin", *names}
    assert load_data(str(out), spec).digest == disk.digest, "the spec that they were made with is their own"
    assert str(words) in disk.describe() and "60 documents" in disk.describe()


class Break(Exception):
    pass


@pytest.mark.parametrize(
    ("moment", "after"), [*(("state", n) for n in (0, 1, 2, 3, 7)), *(("text", n) for n in (0, 8, 20, 51, 90))]
)
def test_an_interruption_leaves_no_trace(words, tmp_path, monkeypatch, moment, after):
    """Broken off between documents, or just after a shard got its name but before that was noted."""
    monkeypatch.setattr(module, "BATCH_TEXT", 200)
    texts = [part for text in text_source(load_corpus(str(words))).train() for part in (text, b"")]  # empty rows too
    source = Source("words", "by hand", "00", lambda: texts[:9], lambda: texts)
    make(source, tmp_path / "whole")
    left = after

    def breaking(write):
        def wrapped(*arguments):
            nonlocal left
            if (left := left - 1) < 0:
                raise Break
            return write(*arguments)

        return wrapped

    tokenizer = choose_tokenizer("bpe:300", source.train())
    with monkeypatch.context() as patch:
        if moment == "state":
            patch.setattr(module, "atomic_write", breaking(module.atomic_write))
        else:
            patch.setattr(module, "_batches", lambda texts: map(breaking(list), ([text] for text in texts)))
        with pytest.raises(Break):
            prepare(source, tokenizer, tmp_path / "out", spec="bpe:300", shard_tokens=SHARD)
    assert not (tmp_path / "out" / "meta.json").exists()
    if (tmp_path / "out" / "state.json").exists():
        with pytest.raises(ValueError, match=r"out is unfinished: run the same minigpt\.prepare again"):
            load_data(str(tmp_path / "out"))
    make(source, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_finished_shards_are_not_written_again(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "BATCH_TEXT", 200)
    source = text_source(load_corpus(str(words)))
    broken = Source(source.name, source.split, source.digest, source.held_out, lambda: until(source.train(), 40))
    tokenizer = choose_tokenizer("bpe:300", source.train())
    with pytest.raises(Break):
        prepare(broken, tokenizer, tmp_path / "out", spec="bpe:300", shard_tokens=SHARD)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    assert len(stamps) > 2
    make(source, tmp_path / "out")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert f"goes on after {len(stamps)} shards" in capsys.readouterr().out
    make(source, tmp_path / "out")  # finished: nothing to do


def until(texts, count):
    yield from itertools.islice(texts, count)
    raise Break


def test_a_folder_of_something_else_is_refused(words, tmp_path):
    source, out = text_source(load_corpus(str(words))), tmp_path / "out"
    make(source, out)
    for change, message in [
        ({"spec": "bytes"}, "tokenizer 'bpe:300', not 'bytes'"),
        ({"shard_tokens": 9}, f"{SHARD}, not 9"),
    ]:
        with pytest.raises(ValueError, match=f"out holds shards with .*{message}"):
            make(source, out, **change)
    (words / "7.txt").write_bytes(b"changed")
    with pytest.raises(ValueError, match="out holds shards with digest"):
        make(text_source(load_corpus(str(words))), out)
    (out / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"\.bin files that are not of minigpt\.prepare"):
        make(source, out)
    empty = Source("none", "by hand", "00", lambda: [], lambda: [b"text"])
    with pytest.raises(ValueError, match=r"none has no held_out documents \(by hand\)"):
        make(empty, tmp_path / "empty", "bytes")
    with pytest.raises(ValueError, match="is token shards already"):
        open_source("fineweb10B:1", tmp_path, "")


def test_a_changed_folder_is_refused(words, tmp_path):
    out = tmp_path / "out"
    make(text_source(load_corpus(str(words))), out)
    (out / "train_000002.bin").rename(out / "train_000099.bin")
    with pytest.raises(ValueError, match=r"train_000002.bin, train_000099.bin: expected the \d+ of its meta.json"):
        load_data(str(out))
    (out / "train_000099.bin").rename(out / "train_000002.bin")
    choose_tokenizer("bytes", ()).save(out / "tokenizer.json")
    with pytest.raises(ValueError, match="is not the tokenizer of its meta.json"):
        load_data(str(out))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf:o/n", ("o/n", None, "train", "text")),
        ("hf:o/n:c", ("o/n", "c", "train", "text")),
        ("hf:o/n::test:body", ("o/n", None, "test", "body")),
        ("hf:n", None),
        ("hf:o/n/m", None),
        ("hf:/n", None),
        ("hf:o/n:a:b:c:d", None),
    ],
)
def test_data_set_names(spec, expected):
    if expected:
        assert parse_dataset(spec) == expected
    else:
        with pytest.raises(ValueError, match="expected hf:owner/name"):
            parse_dataset(spec)


TEXTS = [f"row {number} of some words\n" * 3 if number % 9 else ("" if number % 2 else None) for number in range(150)]


@pytest.fixture
def hub(tmp_path):
    """A server that offers TEXTS as o/n, without a validation split, and as o/v, with one."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    site = Site()
    server = serve(site)
    for name, rows in {
        "0": TEXTS[:100],
        "1": TEXTS[100:],
        "partial-train/1": TEXTS[100:],
        "v": ["held out 1", "held out 2"],
    }.items():
        parquet.write_table(arrow.table({"text": arrow.array(rows, arrow.string())}), tmp_path / "file")
        site.files[f"/{name}"] = (tmp_path / "file").read_bytes()
    train, validation = [f"{site.address}/0", f"{site.address}/1"], [f"{site.address}/v"]
    partial = [train[0], f"{site.address}/partial-train/1"]
    index = {"n": {"train": train}, "v": {"train": partial, "validation": validation}}
    for name, splits in index.items():
        site.files[f"/api/datasets/o/{name}/parquet"] = json.dumps({"default": splits}).encode()
    yield site
    server.shutdown()
    server.server_close()


def test_rows_of_a_data_set_become_documents(hub, tmp_path):
    data = load_data("hf:o/n", "bytes", root=tmp_path, endpoint=hub.address)
    sides = [[], []]
    for number, text in enumerate(TEXTS):
        if text:
            sides[is_held_out(str(number))].append(text.encode())
    assert min(map(len, sides)) > 1
    for tokens, texts in ((data.train.shards[0], sides[0]), (data.held_out, sides[1])):
        assert tokens.tolist() == [token for text in texts for token in (256, *text)]
    assert data.documents == len(sides[0]) + len(sides[1])
    assert "rows by the hash of their number, digest" in data.describe()
    meta = json.loads(next(tmp_path.glob("shards/*/meta.json")).read_text())
    assert sum(meta["left_out"].values()) == len(TEXTS) - data.documents
    hub.files.clear()
    assert load_data("hf:o/n", "bytes", root=tmp_path, endpoint=hub.address).digest == data.digest, "no network needed"


def test_the_validation_split_is_held_out_where_there_is_one(hub, tmp_path):
    data = load_data("hf:o/v", "bpe:300", root=tmp_path, endpoint=hub.address)
    assert data.tokenizer.decode_bytes(data.held_out[1:]) == b"held out 1<|endoftext|>held out 2"
    assert "held out: split validation; only the part that the hub converted" in data.describe()
    documents = [text.encode() for text in TEXTS if text]
    assert (data.train.shards[0] == data.tokenizer.separator).sum() == len(documents)
    for spec, message in [
        ("hf:o/v:default:test", "has no split 'test': expected one of train, validation"),
        ("hf:o/v:other", "has no config 'other': expected one of default"),
        ("hf:o/v:default:train:body", "no column 'body': expected one of text"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_data(spec, "bytes", root=tmp_path, endpoint=hub.address)


def test_the_command_line(words, tmp_path):
    arguments = ["--corpus", words, "--tokenizer", "bpe:300", "--out", tmp_path / "out", "--shard-tokens", 700]
    code, out, err = run("minigpt.prepare", *arguments)
    assert (code, err) == (0, "") and "tokens to train on" in out and "files by path hash" in out
    assert load_data(str(tmp_path / "out")).digest == load_data(str(words), "bpe:300").digest
    code, out, err = run("minigpt.prepare", *arguments[:-1], 800)
    assert code == 2 and err.count("\n") == 1 and "shard_tokens 700, not 800" in err
    code, out, err = run("minigpt.prepare", *arguments[:-1], 0)
    assert code == 2 and err == "minigpt.prepare: error: shard_tokens 0: expected 1 to 2147483647\n"
