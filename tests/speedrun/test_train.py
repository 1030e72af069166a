"""Whole races, small: every switch of the schedule in one run, stopped and resumed between its changes; the clock."""

import json
import math
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.cli import UserError
from common.dist import World
from minigpt.checkpoint import load_checkpoint, load_run
from minigpt.config import EXTRAS
from speedrun import train
from speedrun.presets import PRESETS
from speedrun.schedule import plan

WORLD = World(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A config of 12 steps in float32 on a small text; its folder has to be given."""
    text = tmp_path_factory.mktemp("corpus") / "text.py"
    text.write_bytes(Path(json.decoder.__file__).read_bytes() * 3)
    return replace(
        PRESETS["smoke"], corpus=str(text), dtype="float32", device="cpu", steps=12, warmup=2, eval_every=4,
        checkpoint_every=12, eval_windows=4,
    )  # fmt: skip


CHANGING = {
    "batches": "4,8,4", "contexts": "32,64", "windows": "16,32,48", "yarn": True, "window_pattern": "SL",
    "mtp": "1,0.5,0.25", "mtp_until": 0.6, "momentum_start": 0.8, "momentum_warmup": 6,
}  # fmt: skip
MODEL = {
    "zero_init": False, "value_gate": True, "attention_gate": True, "x0_skip": True, "unet_skips": True,
    "backout": True, "smear": True, "bigrams": 300, "layers": 3, "accumulate": 2,
}  # fmt: skip
OPTIMIZER = {"normuon": 0.9, "muon_decay": 0.2, "clip": 0.5, "prefetch": False}
SWITCHED = {
    "everything that changes": CHANGING,
    "every part of the model": MODEL,
    "an untied head": {"tied": True, "untie_at": 0.5},
    "all of it": CHANGING | MODEL | OPTIMIZER | {"tied": True, "untie_at": 0.5},
    "adamw for everything": {"optimizer": "adamw", "document_mask": True},
}


def metrics(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", SWITCHED)
def test_a_run_stopped_anywhere_ends_like_the_undisturbed_one(smoke, tmp_path, monkeypatch, name):
    config = replace(smoke, folder=tmp_path / "whole", **SWITCHED[name])
    whole = train.race(config, WORLD)
    assert math.isfinite(whole.bits_per_byte)
    parts = replace(config, folder=tmp_path / "parts")
    for stop in (5, 9):  # after the first changes, and after the last
        press_at(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            train.race(parts, WORLD)
        assert load_checkpoint(parts.folder)[0].state["step"] == stop
        parts = replace(parts, resume=True)
    monkeypatch.undo()
    resumed = train.race(parts, WORLD)
    assert metrics(parts.folder) == metrics(config.folder)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


def press_at(monkeypatch, stop: int) -> None:
    """Ctrl-C in the middle of the step that ends as number `stop`."""
    update = train.update

    def pressed(run, now):
        update(run, now)
        if run.step + 1 == stop:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "update", pressed)


def test_the_end_of_a_race_is_a_gpt_of_stage_2(smoke, tmp_path):
    run = train.race(replace(smoke, folder=tmp_path / "run", **SWITCHED["all of it"]), WORLD)
    model, tokenizer = load_run(tmp_path / "run")[:2]
    assert set(model.config.extras) <= set(EXTRAS) and model.config.extras
    tokens = torch.arange(40)[None] % run.data.tokenizer.vocab_size
    error = (model(tokens) - run.model(tokens)).abs().max().item()
    assert error <= 1e-5


def test_each_switch_of_a_run_changes_its_numbers(smoke, tmp_path):
    """None of them is read by nobody."""
    plain = train.race(replace(smoke, folder=tmp_path / "plain"), WORLD)
    seen = {metrics(plain.config.folder): "none"}
    single = CHANGING | {name: value for name, value in MODEL.items() if name != "layers"} | OPTIMIZER
    quiet = {"yarn", "window_pattern", "mtp_until", "momentum_warmup", "accumulate", "prefetch", "clip"}
    for name, value in single.items():
        if name in quiet:
            continue
        folder = tmp_path / name
        train.race(replace(smoke, folder=folder, **{name: value}), WORLD)
        assert metrics(folder) not in seen, f"{name} is like {seen[metrics(folder)]}"
        seen[metrics(folder)] = name


def test_other_rows_go_on_where_the_text_was_left(monkeypatch):
    """Not at its beginning, which the shorter rows have read."""
    taken: list[tuple[int, int]] = []  # in tokens of the text: from, to
    monkeypatch.setattr(train, "batch", lambda _, *, row, rows, context, **others: taken.append(
        (row * context, (row + rows) * context)))  # fmt: skip
    config = replace(PRESETS["smoke"], batches="3,4", contexts="32,64,16", steps=12)
    make = train.batches(SimpleNamespace(config=config, world=WORLD, documents=None, data=SimpleNamespace(train=None)))
    for step in range(12):
        make(step)
    assert all(0 <= begin - end < 64 for (_, end), (begin, _) in pairwise(taken))
    assert taken[0][0] == 0 and taken[4][0] == 768 and taken[-1][1] == 64 * (6 * 3 + 6 * 4)


def test_the_clock_counts_steps_alone(smoke, tmp_path, monkeypatch):
    """A clock that ticks once at each reading of it, and 100 times in a first pass, a look, a saving."""
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    def slowly(name):
        plainly = getattr(train, name)

        def slow(*arguments):
            clock[0] += 100.0
            return plainly(*arguments)

        return slow

    monkeypatch.setattr(train.time, "perf_counter", tick)
    for name in ("evaluate", "save"):
        monkeypatch.setattr(train, name, slowly(name))
    calls, gradients = [], train.gradients

    def passes(run, now, *batch):
        calls.append(run.step)
        clock[0] += 1000.0 if calls.count(run.step) == 1 and now.kind not in kinds else 10.0
        kinds.add(now.kind)
        return gradients(run, now, *batch)

    kinds: set = set()
    monkeypatch.setattr(train, "gradients", passes)
    config = replace(smoke, folder=tmp_path / "run", contexts="32,64")
    run = train.race(config, WORLD)
    assert len(calls) == config.steps + 2 and len(kinds) == 2
    assert 2000.0 <= run.warm_seconds <= 2010.0
    assert 10.0 * config.steps <= run.seconds <= 20.0 * config.steps
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert math.fsum(row["step_ms"] for row in timing) / 1e3 == pytest.approx(run.seconds)


def test_steps_are_fitted_to_minutes(smoke, tmp_path, monkeypatch):
    """A clock on which rows cost a second each: 8 in each step of the first half, 16 in the second."""
    clock, update = [0.0], train.update

    def slow(run, now):
        clock[0] += now.rows
        update(run, now)

    monkeypatch.setattr(train, "update", slow)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    config = replace(smoke, folder=tmp_path / "run", batches="8,16", minutes=2.0)
    run = train.race(config, WORLD)
    assert run.config.steps == 10 and run.seconds == 120.0
    stored = load_checkpoint(config.folder)[0].state["train_config"]
    assert stored["steps"] == 10 and stored["minutes"] == 2.0
    rows = [plan(step, run.config).rows for step in range(10)]
    assert rows == [8] * 5 + [16] * 5


def test_a_loss_that_is_no_number_stops_the_run(smoke, tmp_path, monkeypatch):
    nan = torch.tensor(math.nan)
    monkeypatch.setattr(train, "loss_of", lambda model, *_: lambda tokens, *_: (model(tokens).sum() * nan, nan))
    with pytest.raises(UserError, match="loss nan at step 1: stopped"):
        train.race(replace(smoke, folder=tmp_path / "run"), WORLD)


def test_what_a_race_refuses_writes_nothing(smoke, tmp_path):
    for changes, message in (
        ({"ema": 0.9}, "ema 0.9: expected 0"),
        ({"batches": "4,5", "accumulate": 2}, "5 rows at step 6 over 1 ranks x accumulate 2: expected a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train.race(replace(smoke, folder=tmp_path / "run", **changes), WORLD)
    assert not (tmp_path / "run").exists()
