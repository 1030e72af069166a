"""Wrong input ends in one line on stderr and exit code 2, and leaves everything on disk as it was."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common import cli
from minigpt import sample, train
from minigpt.checkpoint import checkpoint_folders
from minigpt.train_config import PRESETS, TrainConfig
from tests.minigpt.programs import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus) -> Path:
    """A short run to be misused; tests copy it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.train(replace(PRESETS["tiny"], folder=folder, corpus=str(corpus), steps=3, dtype="float32", device="cpu"))
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(main, arguments: list, monkeypatch, capsys) -> str:
    """Runs a program in this process; the line it ends with."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "error: " in err, err
    return err


def test_an_unknown_flag_as_a_user_sees_it(tmp_path):
    code, out, err = run("minigpt.train", "--learning-speed", "1", "--folder", tmp_path / "run")
    assert (code, out) == (2, "") and not (tmp_path / "run").exists()
    assert err == "minigpt.train: error: unrecognized arguments: --learning-speed 1; did you mean --learning-rate?\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning", "1"], "unrecognized arguments: --learning"),
        (
            ["--corpus", "nowhere"],
            "corpus 'nowhere' does not exist: expected 'stdlib', 'python', fineweb10B:N, hf:owner/name, or the path",
        ),
        (["--corpus", "EMPTY"], "holds no text: expected at least one UTF-8 file, found no files at all"),
        (["--corpus", "BINARY"], "holds no text: expected at least one UTF-8 file, found x.bin (binary)"),
        (["--corpus", "SHORT", "--tokenizer", "bytes"], "expected at least 65"),
        (["--corpus", "SHORT"], "vocab_size 512 needs 255 merges, the text has pairs for 14: expected more text"),
        (["--steps", "0"], "steps 0: expected at least 1"),
        (["--learning-rate", "nan"], "learning_rate nan: expected a positive number"),
        (["--learning-rate", "-1"], "learning_rate -1.0: expected a positive number"),
        (["--beta2", "1"], "beta2 1.0: expected 0 to less than 1"),
        (["--clip", "-1"], "clip -1.0: expected 0 or a positive number"),
        (["--floor", "2"], "floor 2.0: expected 0 to 1"),
        (["--heads", "3"], "width 32 over 3 heads: expected an even whole head width"),
        (["--batch", "6", "--accumulate", "4"], "batch 6 is not divisible by accumulate 4"),
        (["--eval-stride", "65"], "eval_stride 65: expected 1 to the context, 64"),
        (["--resume"], "run: no such checkpoint: expected a run folder"),
        (["--mlp", "tanh"], "expected one of swiglu, relu2, gelu, gelu_tanh, got 'tanh'"),
        (["--tokenizer", "bpe:100"], "bpe:100"),
        (["--tokenizer", "nowhere.json"], "nowhere.json"),
        (["--muon-lr", "0"], "muon_lr 0.0: expected a positive number"),
        (["--ema", "1"], "ema 1.0: expected 0 to less than 1"),
        (["--cooldown", "1.5"], "cooldown 1.5: expected 0 to 1"),
        (["--keep", "0"], "keep 0: expected at least 1"),
        (["--window", "-2"], "window -2: expected a positive number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BINARY").mkdir()
    (tmp_path / "BINARY/x.bin").write_bytes(b"\0\1\2")
    (tmp_path / "SHORT").write_bytes(b"twenty bytes of text")
    before = contents(tmp_path)
    flags = [tmp_path / flag if flag.isupper() else flag for flag in flags]
    arguments = ["--preset", "tiny", "--folder", tmp_path / "run", *flags]
    assert message in refused(train.main, arguments, monkeypatch, capsys)
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl", "config.json"])
def test_a_run_is_not_overwritten(left, copy, corpus, monkeypatch, capsys):
    for path in copy.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(copy)
    line = refused(train.main, ["--preset", "tiny", "--folder", copy, "--corpus", corpus], monkeypatch, capsys)
    assert f"{copy} already holds a run ({left}): continue with --resume, or choose another --folder" in line
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "64", "--layers", "3"], "holds another architecture: layers is 2 there, 3 asked; width is 32"),
        (["--mlp", "swiglu"], "holds another architecture: mlp is relu2 there, swiglu asked"),
        (["--learning-rate", "0.5"], "another config: learning_rate is 0.001 there, 0.5 asked"),
        (["--preset", "laptop"], "holds another architecture: "),
        (["--corpus", "OTHER"], "another config: corpus is "),
        (["--tokenizer", "bytes"], "holds another architecture: vocab_size is 512 there, 320 asked"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_run_is_not_resumed(flags, message, copy, tmp_path, monkeypatch, capsys):
    shutil.copy(shutil.__file__, tmp_path / "OTHER")
    before = contents(copy)
    flags = [tmp_path / flag if flag.isupper() else flag for flag in flags]
    assert message in refused(train.main, ["--folder", copy, "--resume", *flags], monkeypatch, capsys)
    assert contents(copy) == before


def test_a_changed_text_is_not_resumed(tmp_path, monkeypatch, capsys):
    text = Path(shutil.copy(shutil.__file__, tmp_path / "text.txt"))
    folder = tmp_path / "run"
    train.train(replace(PRESETS["tiny"], folder=folder, corpus=str(text), steps=2, device="cpu"))
    text.write_text(text.read_text() + "!")
    line = refused(train.main, ["--folder", folder, "--resume"], monkeypatch, capsys)
    assert "was trained on other tokens: digest" in line


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "foreign"])
@pytest.mark.parametrize("program", ["train", "sample"])
def test_a_run_with_broken_checkpoints_only(damage, program, copy, monkeypatch, capsys):
    for folder in checkpoint_folders(copy):
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 1
        damaged = {"truncated": data[:-1000], "flipped": data, "emptied": b"", "foreign": b"no weights" * 100}
        path.write_bytes(damaged[damage])
    before = contents(copy)
    main, flags = (train.main, ["--resume"]) if program == "train" else (sample.main, [])
    line = refused(main, ["--folder", copy, *flags], monkeypatch, capsys)
    assert f"{copy}: no such checkpoint" in line and f"{path}: broken" in line and contents(copy) == before


def test_a_batch_that_ranks_cannot_share(tmp_path):
    import torch

    from common.dist import World

    config = TrainConfig(folder=tmp_path / "run", batch=8, accumulate=2)
    world = World(0, 3, 0, torch.device("cpu"), "gloo")
    with pytest.raises(ValueError, match="batch 8 is not divisible by world size 3 x accumulate 2"):
        train.train(config, world=world, grad_sync=lambda tensors: None)
    with pytest.raises(ValueError, match="2 ranks without grad_sync"):
        train.train(config, world=World(0, 2, 0, torch.device("cpu"), "gloo"))
    assert not (tmp_path / "run").exists()
