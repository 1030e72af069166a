"""The .bin format, byte by byte; documents streamed into shards, against joining them in memory; what is refused."""

import struct

import numpy as np
import pytest

from minigpt import shards
from minigpt.shards import (
    ShardWriter,
    count_tokens,
    fingerprint,
    is_shard_folder,
    open_shard,
    read_folder,
    write_shard,
)

THREE = struct.pack("<3H", 7, 50256, 65535)


def raw(magic=20240520, version=1, count=3, tokens=THREE) -> bytes:
    return struct.pack("<256i", magic, version, count, *[0] * 253) + tokens


@pytest.mark.parametrize(
    ("dtype", "content"),
    [
        (np.uint16, raw()),
        (np.uint32, raw(magic=20240801, version=7, tokens=struct.pack("<3I", 7, 50256, 65535))),
    ],
)
def test_the_format_byte_by_byte(tmp_path, dtype, content):
    path = tmp_path / "deep" / "a.bin"
    write_shard(path, np.array([7, 50256, 65535], dtype))
    assert path.read_bytes() == content
    tokens = open_shard(path, 65536)
    assert isinstance(tokens, np.memmap) and tokens.dtype == dtype and tokens.tolist() == [7, 50256, 65535]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    assert [file.name for file in path.parent.glob("*.bin*")] == ["a.bin"], "nothing temporary is left"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes: expected a token shard, which begins with 1024 bytes of header"),
        (raw()[:1023], "1023 bytes: expected a token shard"),
        (raw(magic=20240521), "magic 20240521: expected 20240520 or 20240801"),
        (raw(version=2), "version 2: expected 1 with magic 20240520"),
        (raw(magic=20240801), "version 1: expected 7 with magic 20240801"),
        (raw(count=0, tokens=b""), "0 tokens: expected at least 1"),
        (raw(count=-1), "-1 tokens: expected at least 1"),
        (raw(count=4), "1,030 bytes, cut short: expected 1,032 for the 4 tokens"),
        (raw(count=2), "1,030 bytes, too long: expected 1,028 for the 2 tokens"),
        (raw(), "token 50256 at position 1: expected ids below the vocabulary size 50256"),
    ],
)
def test_broken_shards_are_refused(tmp_path, content, message):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.bin.*{message}"):
        open_shard(path, 50256)


def test_a_missing_shard_and_tokens_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.bin does not exist"):
        open_shard(tmp_path / "a.bin", 10)
    for tokens in (np.zeros(3), np.zeros(3, np.int64), np.zeros((2, 2), np.uint16), np.zeros(0, np.uint16)):
        with pytest.raises(ValueError, match=r"expected a row of 1 to 2\*\*31 - 1 uint16 or uint32"):
            write_shard(tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_token_is_found_once_and_again_when_the_file_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SCAN_TOKENS", 4)  # the scan goes piece by piece
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.uint16))
    open_shard(path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_parts", lambda tokens: pytest.fail("scanned again"))
        open_shard(path, 10)
        open_shard(path, 65536)  # no uint16 is beyond it: nothing to scan
    with pytest.raises(ValueError, match="token 9 at position 8: expected ids below the vocabulary size 9"):
        open_shard(path, 9)
    write_shard(path, np.array([1, 2, 3, 4, 5, 6, 7, 8, 10], np.uint16))
    with pytest.raises(ValueError, match="token 10 at position 8"):
        open_shard(path, 10)
    (tmp_path / shards.LARGEST).write_text('{"a.bin": "broken"')
    open_shard(path, 11)


def streamed(folder, documents, max_tokens, vocab_size=300, **options):
    calls = []
    with ShardWriter(
        folder, "train", vocab_size=vocab_size, separator=256, max_tokens=max_tokens,
        on_finish=lambda *call: calls.append(call), **options,
    ) as writer:  # fmt: skip
        for document in documents:
            writer.add(document)
    return calls


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 10, 11, 1000])
@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_streamed_documents_are_the_joined_text(tmp_path, max_tokens, vocab_size):
    generator = np.random.default_rng(0)
    documents = [generator.integers(256, size=size) for size in (3, 0, 6, 1, 25, 2)]
    whole = np.concatenate([part for document in documents for part in ([256], document)])
    calls = streamed(tmp_path, documents, max_tokens, vocab_size)
    opened = [open_shard(path, vocab_size) for path, _, _ in calls]
    assert [path.name for path, _, _ in calls] == [f"train_{number:06d}.bin" for number in range(1, len(calls) + 1)]
    assert all(shard.dtype == (np.uint16 if vocab_size == 300 else np.uint32) for shard in opened)
    assert [shard.size for shard in opened] == [count for _, count, _ in calls]
    assert all(shard.size == max_tokens for shard in opened[:-1]) and 1 <= opened[-1].size <= max_tokens
    assert np.array_equal(np.concatenate(opened), whole)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_writer_goes_on_where_a_shard_ended(tmp_path, stop):
    """Stopped after any shard, a second writer that skips what is on file gives the same shards."""
    documents = [np.arange(size) for size in (3, 0, 6, 1, 25, 2)]
    streamed(tmp_path / "whole", documents, 5)
    position, state = 0, {}

    class Stop(Exception):
        pass

    def on_finish(path, count, used):
        state.update(number=int(path.stem[-6:]), document=position, used=used)
        if state["number"] == stop:
            raise Stop

    options = {"vocab_size": 300, "separator": 256, "max_tokens": 5}
    with pytest.raises(Stop), ShardWriter(tmp_path / "two", "train", **options, on_finish=on_finish) as writer:
        for document in documents:
            writer.add(document)
            position += 1
    with ShardWriter(tmp_path / "two", "train", **options, first=stop + 1) as writer:
        for number, document in enumerate(documents[state["document"] :]):
            writer.add(document, skip=0 if number else state["used"])
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "two").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_a_broken_off_shard_never_gets_its_name(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", vocab_size=300, separator=256) as writer:
        writer.add(np.arange(10))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="token 300: expected ids below the vocabulary size 300"):
        streamed(tmp_path, [np.array([1, 300])], 10)
    with pytest.raises(ValueError, match="0 tokens a shard"):
        streamed(tmp_path, [], 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_both_sides_and_nothing_else(tmp_path):
    assert not is_shard_folder(tmp_path) and not is_shard_folder(tmp_path / "nowhere")
    (tmp_path / "meta.json").write_text('{"someone": "else\'s"}')
    assert not is_shard_folder(tmp_path)
    names = ["x_train_2.bin", "x_train_1.bin"]
    for name in names:
        write_shard(tmp_path / name, np.arange(1, 9, dtype=np.uint16))
    assert is_shard_folder(tmp_path)
    with pytest.raises(ValueError, match="2 training and 0 val shards: expected both"):
        read_folder(tmp_path)
    write_shard(tmp_path / "x_val_0.bin", np.arange(1, 9, dtype=np.uint16))
    found = read_folder(tmp_path)
    assert [path.name for path in found.train] == sorted(names) and [path.name for path in found.held_out] == [
        "x_val_0.bin"
    ]
    assert found.meta == {}
    for odd in ("test.bin", "train_val.bin"):
        write_shard(tmp_path / odd, np.arange(1, 9, dtype=np.uint16))
        with pytest.raises(ValueError, match=f"holds {odd}: expected either 'train' or 'val'"):
            read_folder(tmp_path)
        (tmp_path / odd).unlink()


def test_counts_and_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SCAN_TOKENS", 16)
    tokens = np.random.default_rng(0).integers(300, size=1001).astype(np.uint16)
    assert np.array_equal(count_tokens(tokens, 300), np.bincount(tokens, minlength=300))
    path = tmp_path / "a.bin"
    write_shard(path, tokens)
    first = fingerprint([path])
    assert first == fingerprint([path]) and first != fingerprint([])
    for place in (0, 500, 1000):
        changed = tokens.copy()
        changed[place] += 1
        write_shard(path, changed)
        assert fingerprint([path]) != first
