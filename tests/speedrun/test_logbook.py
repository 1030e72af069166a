"""Real races leave logs: what is in them, after a kill too; they pass, run again, and get to the leaderboard."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.dist import World
from minigpt.checkpoint import load_checkpoint, load_run
from minigpt.data import load_data
from speedrun import leaderboard, record, verify
from speedrun.doubts import bytes_of
from speedrun.presets import PRESETS
from speedrun.record_log import digest_of, read_log, source_digests
from speedrun.rerun import expected
from speedrun.summary import summarise
from speedrun.tracks import TRACKS
from speedrun.train import race, update
from tests.speedrun.race_logs import MACHINE

ROOT = Path(__file__).resolve().parents[2]
TEXT = "minigpt/model.py"  # tokenised at once, and a relative path, which --rerun can read again
CONFIG = replace(
    PRESETS["smoke"], corpus=TEXT, dtype="float32", device="cpu", compile=False, steps=24, eval_every=10,
    checkpoint_every=5,
)  # fmt: skip
WORLD = World(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A smoke run: its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return race(replace(CONFIG, folder=tmp_path_factory.mktemp("runs") / "alone"), WORLD).config.folder


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_log_of_a_run_is_its_numbers(alone):
    log, metrics, timing = read_log(alone / "race.jsonl"), rows(alone, "metrics"), rows(alone, "timing")
    assert len(log.steps) == 24
    for step, metric, time in zip(log.steps, metrics, timing, strict=True):
        assert {name: step[name] for name in metric} == metric
        assert step["seconds"] == time["step_ms"] / 1e3
        assert step["seconds"] * time["tokens_per_s"] == pytest.approx(4 * 64), "tokens of a step"
    checkpoint = load_checkpoint(alone)[0]
    assert log.result["bits_per_byte"] == metrics[-1]["held_out_bits_per_byte"]
    assert log.result["train_seconds"] == checkpoint.state["seconds"] and log.result["tokens"] == 24 * 4 * 64
    assert log.result["parameters"] == sum(value.numel() for value in checkpoint.tensors("model").values())
    assert log.result["seconds_to_target"] is None, "no track"
    assert log.about["source"] == digest_of(source_digests())
    assert log.about["data_digest"] == checkpoint.state["data_digest"]
    assert str(alone.parent) not in (alone / "race.jsonl").read_text(), "no path of this machine"


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_nats_per_token_are_those_of_the_held_out_tokens(alone):
    log, data = read_log(alone / "race.jsonl"), load_data(TEXT, CONFIG.tokenizer)
    model, _ = load_run(alone)
    tokens, T, total = torch.from_numpy(data.held_out.astype("int64")), CONFIG.context, 0.0
    with torch.no_grad():  # the smoke preset's windows do not overlap, but for the last, which ends with the text
        for first in range(0, len(tokens) - 1, T):
            left = min(T, len(tokens) - 1 - first)
            part = tokens[first + left - T : first + left + 1]
            total += F.cross_entropy(
                model(part[None, :-1])[0, T - left :], part[1 + T - left :], reduction="sum"
            ).item()
    assert log.result["nats_per_token"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


def killed(folder: Path, at: int) -> None:
    """A run that ends without a word in step `at`, like one that was killed: files are as its last lines left them."""
    calls = iter(range(1, 1000))

    def dying(*arguments):
        if next(calls) == at:
            raise RuntimeError("killed")
        update(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("speedrun.train.update", dying)
        race(replace(CONFIG, folder=folder), WORLD)


def test_a_resumed_run_leaves_the_log_of_the_undisturbed_one_but_for_seconds(alone, tmp_path):
    folder = tmp_path / "killed"
    killed(folder, 13)
    assert not (folder / "race.jsonl").exists() and len(rows(folder, "metrics")) == 12
    race(replace(CONFIG, folder=folder, resume=True), WORLD)
    ours, theirs = (read_log(each / "race.jsonl") for each in (folder, alone))
    seconds = {"seconds", "train_seconds", "compile_seconds"}
    for one, other in zip([*ours.steps, ours.result], [*theirs.steps, theirs.result], strict=True):
        assert one.keys() == other.keys() and without(one, seconds) == without(other, seconds)
    assert [sitting["step"] for sitting in ours.about["sittings"]] == [0, 10]
    times = {"sittings", "date", "ended"}
    assert without(ours.about, times) == without(theirs.about, times)
    assert [each.text for each in verify.verify_log(folder / "race.jsonl")[1] if not each.good] == []
    before = (folder / "race.jsonl").read_bytes()
    race(replace(CONFIG, folder=folder, resume=True), WORLD)
    assert (folder / "race.jsonl").read_bytes() == before, "a finished run keeps its log"


def without(row: dict, names: set[str]) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def test_a_sitting_that_left_no_step_is_not_in_the_log(tmp_path):
    killed(tmp_path / "run", 3)  # before the first checkpoint but that of step 0
    race(replace(CONFIG, folder=tmp_path / "run", resume=True), WORLD)
    assert [sitting["step"] for sitting in read_log(tmp_path / "run" / "race.jsonl").about["sittings"]] == [0]


def test_a_program_that_changed_between_sittings_is_in_the_log(tmp_path):
    folder = tmp_path / "run"
    killed(folder, 13)
    sittings = json.loads((folder / "sittings.json").read_text())
    name = next(iter(sittings[0]["sources"]))
    sittings[0]["sources"][name] = "0" * 64
    (folder / "sittings.json").write_text(json.dumps(sittings))
    race(replace(CONFIG, folder=folder, resume=True), WORLD)
    assert read_log(folder / "race.jsonl").about["changed_files"] == [name]
    found = [each.text for each in verify.verify_log(folder / "race.jsonl")[1] if each.good is False]
    assert found == [f"sittings: line 1, sources: the program changed during the run: {name}"]


def test_the_first_steps_run_again(alone):
    log = read_log(alone / "race.jsonl")
    found = verify.verify_rerun(log, 4)
    assert [each.good for each in found] == [True, True] and "bit for bit" in found[0].text
    assert found[1].text == "batches: all 24 are those of the seed"
    bent = copy.deepcopy(log)
    bent.steps[2]["loss"] *= 1 + 1e-6
    found = verify.verify_rerun(bent, 4)
    assert found[0].good is False and "rerun: line 4, loss:" in found[0].text
    other, size = copy.deepcopy(log), bytes_of(log.steps[19], 256)
    other.steps[19]["train_bits_per_byte"] *= size / (size + 1)  # one byte more, in a step that is not computed again
    found = verify.verify_rerun(other, 1)
    assert found[0].good and found[1].text == (
        f"batches: line 21, train_bits_per_byte: of {size + 1:,.1f} bytes, while the batch has {size:,.0f}"
    )
    bent.about["data_digest"] = "0" * 64
    assert "the text here is another" in verify.verify_rerun(bent, 4)[0].text
    assert "expected 1 to 24" in verify.verify_rerun(log, 25)[0].text


def test_tolerances_of_a_rerun():
    about = {**MACHINE, "machine": "a"}
    assert expected(about, MACHINE, "a") == (0.0, "same torch, threads and CPU")
    assert expected(about, {**MACHINE, "ranks": 2}, "a") == (1e-3, "ranks 2 instead of 1")
    assert expected({**about, "dtype": "bfloat16"}, {**MACHINE, "dtype": "bfloat16"}, "b")[0] == 2e-2


def started(monkeypatch, main: Callable[[], int | None], *arguments: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    return main()


def test_the_program_says_where_a_log_was_edited(alone, tmp_path, monkeypatch, capsys):
    text = (alone / "race.jsonl").read_text()
    monkeypatch.setattr(verify, "commit_of", lambda sources, named: (named, []))  # the code here may not be committed
    assert started(monkeypatch, verify.main, alone / "race.jsonl", "--rerun", 2) == 0
    out = capsys.readouterr().out
    assert "ok     links: 26 lines" in out and "ok     rerun: the losses of 2 steps" in out and "WRONG" not in out
    monkeypatch.setattr(verify, "commit_of", lambda sources, named: (None, ["speedrun/x.py"]))
    assert started(monkeypatch, verify.main, alone / "race.jsonl") == 1
    out = capsys.readouterr().out
    assert "WRONG  program: no commit here has these files" in out and "No arithmetic on a log finds" in out
    at = text.index('"loss"', len(text) // 2) + 9
    (tmp_path / "edited.jsonl").write_text(text[:at] + ("7" if text[at] != "7" else "8") + text[at + 1 :])
    assert started(monkeypatch, verify.main, tmp_path / "edited.jsonl") == 1
    assert f"WRONG  links: line {text[:at].count(chr(10)) + 1}: changed" in capsys.readouterr().out


def test_from_a_race_to_the_leaderboard(tmp_path, monkeypatch, capsys):
    """With a text and a target for the track that a smoke run reaches."""
    track = replace(TRACKS["laptop"], corpus=TEXT, target=4.5)
    monkeypatch.setitem(TRACKS, "laptop", track)
    monkeypatch.setattr(verify, "commit_of", lambda sources, named: (named, []))
    monkeypatch.setattr("speedrun.summary.machine_peak", lambda dtype, world: 1e12)  # takes seconds to measure
    folders = [tmp_path / f"seed{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        run = race(replace(CONFIG, folder=folder, seed=seed, track="laptop"), WORLD)
        summarise(run, 1.0)
        assert read_log(folder / "race.jsonl").result["seconds_to_target"] > 0
    records, board = tmp_path / "records", tmp_path / "LEADERBOARD.md"
    where = ("--out", tmp_path / "results", "--records", records)
    capsys.readouterr()
    started(monkeypatch, record.main, "--folder", *folders, "--name", "smoke", *where)
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [f"{records}/laptop/smoke/{seed}.jsonl" for seed in range(3)]
    assert all(Path(path).exists() for path in out) and len(out) == 5
    assert started(monkeypatch, verify.main, records / "laptop" / "smoke", "--rerun", 1) == 0, capsys.readouterr().out
    options = ("--records", records, "--out", board)
    assert started(monkeypatch, leaderboard.main, *options, "--check") == 1
    assert started(monkeypatch, leaderboard.main, *options) in (0, None)
    assert started(monkeypatch, leaderboard.main, *options, "--check") == 0
    assert "| 1 | smoke |" in board.read_text() and "Not listed" not in board.read_text()
