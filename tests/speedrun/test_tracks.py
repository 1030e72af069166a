"""The tracks: what they fix, what counts of their held-out text, and shards that are missing or damaged."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.dist import World
from minigpt import download
from minigpt.corpus import load_corpus
from minigpt.data import TokenData, load_data
from minigpt.shards import FORMATS, write_shard
from minigpt.tokenizer import Tokenizer
from speedrun import tracks, train
from speedrun.config import RaceConfig
from speedrun.presets import ON_TRACK, PRESETS
from speedrun.tracks import TRACKS, check_track, judged, load, nats_per_bit, predicted, table

NOWHERE = "http://127.0.0.1:9"
ALONE = World(0, 1, 0, torch.device("cpu"), None)


def test_a_track_fixes_text_tokens_and_device():
    for name, track in TRACKS.items():
        corpus = track.corpus.replace("N", "3")
        check_track(name, corpus, track.tokenizer or "bpe:777", "auto")
        for wrong in ("other", "fineweb10B", "fineweb10B:N", "fineweb10B:-1", "stdlib:3", ""):
            with pytest.raises(ValueError, match=f"corpus {wrong!r} on track {name}: expected {track.corpus}"):
                check_track(name, wrong, track.tokenizer, "auto")
    check_track("", "anything", "anything", "cuda")
    with pytest.raises(ValueError, match="device 'cuda' on track laptop: expected cpu"):
        RaceConfig(track="laptop", device="cuda")
    with pytest.raises(ValueError, match="the nearest is fineweb"):
        RaceConfig(track="finewebs")


def test_each_track_has_a_recipe_and_both_baselines():
    assert ON_TRACK.keys() == TRACKS.keys()
    every = [preset.folder for of_track in ON_TRACK.values() for preset in of_track.values()]
    for of_track in ON_TRACK.values():
        for baseline in ("nanogpt", "record21"):
            assert every.count(of_track[baseline].folder) == 1, "two runs in one folder are refused"


def test_the_table_has_all_targets_and_rules():
    text = table()
    for track in TRACKS.values():
        assert f"| {track.name} | `{track.corpus}` | {track.target:.2f} {track.unit} |" in text
        assert all(f"* {rule}" in text for rule in track.rules)


def test_arguments_that_nobody_reads_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tracks", "--track", "laptop"])
    with pytest.raises(SystemExit):
        tracks.main()
    assert "unrecognized arguments: --track laptop" in capsys.readouterr().err


# ---- what counts of the held-out text --------------------------------------------------------------------------------


def data_of(tokens: np.ndarray, lengths: list[int]) -> TokenData:
    return TokenData(
        "text", Tokenizer.bytes_only(), None, tokens, int(np.array(lengths)[tokens].sum()), None, None,
        np.array(lengths), 1, "digest", "about",
    )  # fmt: skip


def test_the_first_predictions_count():
    """fineweb's 10,485,760: as many tokens are predicted, from the one before each."""
    count, lengths = TRACKS["fineweb"].held_out, [0, 1, 3]
    assert count == 10_485_760
    tokens = np.resize(np.array([0, 1, 2, 2, 1], dtype=np.uint16), count + 5)
    data = judged(data_of(tokens, lengths), "fineweb")
    assert data.held_out.size == count + 1 and np.shares_memory(data.held_out, tokens)
    assert data.held_out_bytes == sum(np.array(lengths)[tokens[: count + 1]].tolist())
    with pytest.raises(ValueError, match="10,485,760 held-out tokens on track fineweb: expected at least 10,485,761"):
        judged(data_of(tokens[:count], lengths), "fineweb")
    whole = data_of(tokens[:7], lengths)
    assert judged(whole, "laptop") is whole and judged(whole, "") is whole


def test_nats_per_token_by_hand():
    """5 predicted tokens of 1 + 3 + 0 + 3 + 1 bytes that cost 9 nats."""
    data = data_of(np.array([2, 1, 2, 0, 2, 1], dtype=np.uint16), [0, 1, 3])
    bits_per_byte = 9 / np.log(2) / 8
    assert predicted(data) == {"held_out_tokens": 5, "held_out_bytes": 8}
    assert bits_per_byte * nats_per_bit(predicted(data)) == pytest.approx(9 / 5, rel=1e-12)


# ---- fineweb, missing or damaged -------------------------------------------------------------------------------------


def fineweb(folder: Path) -> Path:
    """A folder data/fineweb10B of two small shards, in tokens of 256 bytes, one merge and the separator, as GPT-2's
    files have them: bytes are written as printable characters."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (32, 0xA0, 0xAD)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    names = [letters[byte] for byte in printable + others] + ["th", "<|endoftext|>"]
    where = folder / "data" / "fineweb10B"
    where.mkdir(parents=True)
    (where / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (where / "merges.txt").write_text("#version: 0.2\nt h\n")
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        write_shard(where / name, np.arange(3000, dtype=np.uint16) % 258)
    return where


def small(folder: Path) -> RaceConfig:
    """The track's recipe, small and on a CPU."""
    return replace(
        PRESETS["fineweb"], folder=folder / "run", corpus="fineweb10B:1", layers=2, width=32, heads=2, kv_heads=2,
        mlp_width=64, bigrams=16, context=64, contexts="", eval_stride=64, batch=4, batches="", accumulate=1, steps=4,
        warmup=1, device="cpu", compile=False, attention="torch", kernels="torch",
    )  # fmt: skip


def damage(path: Path, at: int, value: int, size: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + size] = value.to_bytes(size, "little")
    path.write_bytes(content)


MAGIC, VERSION = FORMATS[np.dtype("<u2")]


@pytest.mark.parametrize("shard", ["fineweb_val_000000.bin", "fineweb_train_000001.bin"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: damage(path, 0, 7), f"magic 7: expected {MAGIC}"),
        (lambda path: damage(path, 4, 2), f"version 2: expected {VERSION}"),
        (lambda path: damage(path, 8, 0), "0 tokens: expected at least 1"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "7,022 bytes, cut short: expected 7,024 for the 3,000"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "100 bytes: expected a token shard"),
        (lambda path: damage(path, 1024 + 2 * 1234, 258, 2), "token 258 at position 1,234: expected ids below"),
    ],
)
def test_a_damaged_shard_is_named_before_any_step(shard, spoil, message, tmp_path, monkeypatch):
    spoil(fineweb(tmp_path) / shard)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        train.race(small(tmp_path), ALONE)
    assert shard in str(caught.value) and not (tmp_path / "run").exists()


def test_a_short_held_out_shard_is_refused_on_the_track_alone(tmp_path, monkeypatch):
    fineweb(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="3,000 held-out tokens on track fineweb: expected at least 10,485,761"):
        train.race(small(tmp_path), ALONE)
    assert not (tmp_path / "run").exists()
    run = train.race(replace(small(tmp_path), track=""), ALONE)
    assert run.step == 4 and 0 < run.bits_per_byte * nats_per_bit(predicted(run.data)) < 10
    rates = {id(p): group["peak_lr"] for group in run.rest.param_groups for p in group["params"]}
    head, table = run.model.head.weight, run.model.embedding.weight
    assert rates[id(head)] == rates[id(table)] == run.config.head_lr, "what was the head keeps the head's rate"
    assert rates[id(run.model.bigrams.bigram_embedding.weight)] == run.config.embedding_lr


def test_missing_shards_offer_the_download_and_other_tracks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError) as caught:
        load("fineweb10B:5", "auto", "fineweb", NOWHERE)
    for part in ("vocab.json", "python -m minigpt.download --shards 5", "--track one-gpu", "--track laptop"):
        assert part in str(caught.value), caught.value


def test_what_was_downloaded_needs_no_network(tmp_path, monkeypatch, capsys):
    fineweb(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["download", "--shards", "1", "--endpoint", NOWHERE])
    download.main()
    assert "1 training shards and fineweb_val_000000.bin: --corpus fineweb10B:1" in capsys.readouterr().out
    assert load("fineweb10B:1", "auto", "", NOWHERE).train.size == 3000


# ---- the larger text of Python ---------------------------------------------------------------------------------------


@pytest.fixture
def interpreter(tmp_path, monkeypatch) -> Path:
    """A standard library and two folders of packages."""
    files = {
        "lib/os.py": "one", "lib/site-packages/in_the_library.py": "no", "lib/test/no.py": "no",
        "first/a.py": "two", "first/b.py": "one", "first/p/tests/no.py": "no", "first/__editable___x.py": "no",
        "first/empty.py": "", "second/a.py": "three", "second/c.txt": "no", "second/d.py": "two",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    roots = [str(tmp_path / name) for name in ("first", "nowhere", "second")]
    monkeypatch.setattr("site.getsitepackages", lambda: roots)
    return tmp_path


def test_python_is_the_library_and_all_packages(interpreter):
    corpus = load_corpus("python")
    assert {name for name, _ in corpus.train + corpus.held_out} == {
        "os.py", "site-packages/a.py", "site-packages-2/a.py"
    }  # fmt: skip
    assert dict(corpus.skipped) == {
        "site-packages/b.py": "duplicate", "site-packages/empty.py": "empty", "site-packages-2/d.py": "duplicate"
    }  # fmt: skip
    assert "left out, duplicate: 2 (site-packages/b.py, site-packages-2/d.py)" in corpus.describe()
    before = corpus.digest
    (interpreter / "second" / "a.py").write_text("four!")
    assert load_corpus("python").digest != before
    assert load_data("python", "bytes").name == "python"


def test_files_of_the_library_stay_on_their_side(monkeypatch, tmp_path):
    """So a model of corpus python has not read what corpus stdlib holds out."""
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    (tmp_path / "copy.py").write_bytes(load_corpus("stdlib").held_out[0][1])
    stdlib, python = load_corpus("stdlib"), load_corpus("python")
    held_out = {text for _, text in stdlib.held_out}
    assert {text for _, text in python.held_out} == held_out, "the copy among the packages is gone"
    assert not held_out & {text for _, text in python.train}
