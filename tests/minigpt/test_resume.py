"""Killed and interrupted runs, as real processes: resumed, they are bitwise the run that nothing disturbed."""

import signal
from pathlib import Path

import pytest
import torch

from minigpt.checkpoint import checkpoint_folders, load_checkpoint
from tests.minigpt.programs import run, send_after, start

STEPS = 150


def flags(folder: Path, corpus: Path) -> list:
    return [
        "--preset",
        "tiny",
        "--folder",
        folder,
        "--corpus",
        corpus,
        "--steps",
        STEPS,
        "--checkpoint-every",
        7,
        "--ema",
        0.9,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, _, err = run("minigpt.train", *flags(folder, corpus))
    assert code == 0, err
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    ours, theirs = (load_checkpoint(each)[0] for each in (folder, other))
    assert step_of(folder) == step_of(other) == STEPS and ours.state["bits_per_byte"] == theirs.state["bits_per_byte"]
    for group in ("model", "ema", "optimizer"):
        assert theirs.tensors(group)
        for name, value in theirs.tensors(group).items():
            assert torch.equal(ours.tensors(group)[name], value), name


def step_of(folder: Path) -> int:
    return load_checkpoint(folder)[0].state["step"]


def test_sigkill_twice_then_resume_is_bitwise_the_undisturbed_run(undisturbed, tmp_path, corpus):
    folder = tmp_path / "killed"
    code, *_ = send_after(start("minigpt.train", *flags(folder, corpus)), folder, 25, signal.SIGKILL)
    assert code == -signal.SIGKILL
    first = step_of(folder)
    code, *_ = send_after(start("minigpt.train", "--folder", folder, "--resume"), folder, 80, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 21 <= first < step_of(folder) < STEPS, "both kills came mid-way"
    code, _, err = run("minigpt.train", "--folder", folder, "--resume")
    assert code == 0, err
    assert_same_run(folder, undisturbed)


def test_ctrl_c_saves_and_says_how_to_resume(undisturbed, tmp_path, corpus):
    folder = tmp_path / "interrupted"
    code, out, err = send_after(start("minigpt.train", *flags(folder, corpus)), folder, 30, signal.SIGINT)
    assert code == 130 and "Traceback" not in err
    step = step_of(folder)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == step < STEPS
    assert f"holds step {step}; continue with: python -m minigpt.train --folder {folder} --resume" in out
    code, _, err = run("minigpt.train", "--folder", folder, "--resume")
    assert code == 0, err
    assert_same_run(folder, undisturbed)


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    code, out, err = run("minigpt.train", "--folder", undisturbed, "--resume")
    assert code == 0 and f"after {STEPS} steps" in out, err
    assert before == {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}


def test_a_broken_checkpoint_is_skipped_and_the_end_is_the_same(undisturbed, tmp_path, corpus):
    folder = tmp_path / "broken"
    send_after(start("minigpt.train", *flags(folder, corpus)), folder, 30, signal.SIGKILL)
    newest, older, *_ = checkpoint_folders(folder)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, out, err = run("minigpt.train", "--folder", folder, "--resume")
    assert code == 0, err
    assert f"skipped a broken checkpoint: {weights}: broken: its checksum does not fit" in out
    assert_same_run(folder, undisturbed)
