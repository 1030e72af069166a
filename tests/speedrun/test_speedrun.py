"""The main job as a user starts it: one process, two ranks under torchrun, killed and resumed; and its summary."""

import bz2
import json
import lzma
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from minigpt.checkpoint import load_checkpoint
from speedrun import summary
from speedrun.presets import PRESETS
from speedrun.record import RecordConfig, record
from tests.minigpt.programs import run, send_after, start

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.py"
    path.write_bytes(Path(subprocess.__file__).read_bytes())
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus) -> tuple[Path, str]:
    """A smoke run by one process: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    code, out, err = run("speedrun.train", *flags(folder, corpus))
    assert code == 0, err
    return folder, out


def flags(folder: Path, corpus: Path) -> list:
    return ["--preset", "smoke", "--folder", folder, "--corpus", corpus, "--dtype", "float32", "--device", "cpu",
            "--clip", 1]  # fmt: skip


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TWO = ("--accumulate", 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory, corpus) -> tuple[Path, str]:
    """The same run by two ranks, each in two parts: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    code, out, err = run("speedrun.train", *flags(folder, corpus), *TWO, launcher=TORCHRUN)
    assert code == 0, err
    return folder, out


def test_two_ranks_are_one_process(two, tmp_path, corpus):
    folder, out = two
    code, _, err = run("speedrun.train", *flags(tmp_path / "one", corpus))
    assert code == 0, err
    ours, theirs = rows(folder), rows(tmp_path / "one")
    assert len(ours) == len(theirs) == PRESETS["smoke"].steps
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-4), (other["step"], name)
    weights, expected = (load_checkpoint(each)[0].tensors("model") for each in (folder, tmp_path / "one"))
    for name, value in expected.items():
        error = (weights[name] - value).abs().max().item()
        assert error <= 5e-3, f"{name}: {error}"
    assert out.count("bits per byte ") == 1 and "on 2 ranks" in out, "rank 0 alone speaks"


def test_two_ranks_killed_and_resumed_end_like_the_undisturbed_ones(two, tmp_path, corpus):
    folder = tmp_path / "killed"
    process = start("speedrun.train", *flags(folder, corpus), *TWO, launcher=TORCHRUN)
    code, *_ = send_after(process, folder, 12, signal.SIGKILL, group=True)
    assert code == -signal.SIGKILL
    assert 10 <= load_checkpoint(folder)[0].state["step"] < PRESETS["smoke"].steps
    code, _, err = run("speedrun.train", "--folder", folder, "--resume", launcher=TORCHRUN)
    assert code == 0, err
    assert (folder / "metrics.jsonl").read_bytes() == (two[0] / "metrics.jsonl").read_bytes()
    for group in ("model", "optimizer0", "optimizer1"):
        ours, theirs = (load_checkpoint(each)[0].tensors(group) for each in (folder, two[0]))
        assert theirs and all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_batch_that_two_ranks_cannot_share(tmp_path, corpus):
    folder = tmp_path / "odd"
    code, _, err = run("speedrun.train", *flags(folder, corpus), "--batch", 3, launcher=TORCHRUN)
    assert (
        code != 0
        and "error: 3 rows at step 0 over 2 ranks x accumulate 1: expected a multiple of 2" in err
        and not folder.exists()
    )


def test_sigkill_then_resume_ends_like_the_undisturbed_run(alone, tmp_path, corpus):
    folder = tmp_path / "killed"
    code, *_ = send_after(start("speedrun.train", *flags(folder, corpus)), folder, 12, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 10 <= load_checkpoint(folder)[0].state["step"] < PRESETS["smoke"].steps
    code, out, err = run("speedrun.train", "--folder", folder, "--resume")
    assert code == 0, err
    assert (folder / "metrics.jsonl").read_bytes() == (alone[0] / "metrics.jsonl").read_bytes()
    sides = [load_checkpoint(each)[0].tensors("model") for each in (folder, alone[0])]
    assert all(torch.equal(sides[0][name], value) for name, value in sides[1].items())
    first_line = alone[1].partition("bits per byte ")[2].splitlines()[0]
    assert f"bits per byte {first_line}" in out


def test_the_summary_says_what_was_reached(alone, corpus):
    folder, out = alone
    text = corpus.read_bytes()
    held_out = text[len(text) - len(text) // 20 :]
    xz = 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)
    reached = rows(folder)[-1]["held_out_bits_per_byte"]
    assert f"{reached:.4f} on {len(held_out):,} held-out bytes (xz -9e {xz:.3f}" in out
    for part in ("tokens/s", "GFLOP/s", "of the GEMM peak measured here", "def "):
        assert part in out
    for name in ("loss.png", "metrics.jsonl", "checkpoints"):
        assert f"{folder / name}" in out and (folder / name).exists()


def test_a_second_run_into_the_same_folder_is_refused(alone, corpus):
    before = {path: path.read_bytes() for path in alone[0].rglob("*") if path.is_file()}
    code, out, err = run("speedrun.train", *flags(alone[0], corpus))
    assert (code, out) == (2, "") and err.count("\n") == 1 and "already holds a run" in err
    assert before == {path: path.read_bytes() for path in alone[0].rglob("*") if path.is_file()}


def test_compressors_are_computed():
    text = Path(json.__file__).read_bytes() * 2
    values = summary.compressors(text)
    assert list(values) == ["xz -9e", "bz2 -9", "zlib -9"]
    assert values["xz -9e"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert values["bz2 -9"] == 8 * len(bz2.compress(text, 9)) / len(text)
    assert values["zlib -9"] == 8 * len(zlib.compress(text, 9)) / len(text)


def test_a_finished_run_is_filed_under_results(alone, tmp_path):
    result, picture = record(RecordConfig(folder=alone[0], out=tmp_path))
    filed = json.loads(result.read_text())
    row = filed["rows"][0]
    assert result.name.startswith("cpu_") and filed["config"]["steps"] == row["steps"] == PRESETS["smoke"].steps
    assert filed["config"]["sittings"][0]["command"].startswith("python -m speedrun.train --preset smoke")
    assert row["bits_per_byte"] == rows(alone[0])[-1]["held_out_bits_per_byte"]
    assert [step for step, _ in row["held_out_looks"]] == [10, 20, 30] and {"xz", "bz2", "zlib"} <= row.keys()
    assert picture.read_bytes() == (alone[0] / "loss.png").read_bytes()
    with pytest.raises(ValueError, match=r"holds no finished speedrun: expected summary.json, config.json"):
        record(RecordConfig(folder=tmp_path / "nowhere", out=tmp_path))
