"""Whole races, small: every switch of the schedule in one run, stopped and resumed between its changes; the clock; what
is compiled when; what one rank of two meets."""

import gc
import json
import math
import signal
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.dist import World, init_from_env, spawn
from minigpt.batches import TokenStream
from minigpt.by_document import by_document
from minigpt.checkpoint import load_checkpoint, load_run
from minigpt.config import EXTRAS
from speedrun import breakdown, loss, rerun, step_times, train
from speedrun.documents import DocumentRows
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
    "zero_init": False, "value_gate": True, "value_tables": 1, "attention_gate": True, "without_attention": "1",
    "x0_skip": True, "unet_skips": True, "backout": True, "smear": True, "bigrams": 300, "layers": 3, "accumulate": 2,
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


@pytest.mark.parametrize("name", ["everything that changes", "documents"])
def test_the_bits_of_its_documents_add_up_to_a_races_number(smoke, tmp_path, name):
    """What evaluates a stored run sees the windows and documents that the race saw in the end."""
    run = train.race(
        replace(smoke, folder=tmp_path / "run", **(SWITCHED | {"documents": {"documents": True}})[name]), WORLD
    )
    assert abs(by_document(tmp_path / "run").bits_per_byte - run.bits_per_byte) <= 1e-9


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


def test_a_run_killed_before_its_first_step_goes_on(smoke, tmp_path, monkeypatch):
    """Its checkpoint is of the model that no plan has changed yet."""
    config = replace(smoke, folder=tmp_path / "run", **SWITCHED["all of it"])
    with monkeypatch.context() as patch:
        patch.setattr(train, "loop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.race(config, WORLD)
    train.race(replace(config, resume=True), WORLD)
    train.race(replace(config, folder=tmp_path / "whole"), WORLD)
    assert metrics(config.folder) == metrics(tmp_path / "whole")


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
    """None of them is read by nobody; some need another one to be on."""
    smoke = replace(smoke, steps=8, eval_every=8)
    plain = train.race(replace(smoke, folder=tmp_path / "plain", prefetch=False), WORLD)
    seen = {metrics(plain.config.folder): "none"}
    single = CHANGING | MODEL | OPTIMIZER | {"tied": True, "untie_at": 0.5, "batch_lr": 0.0}
    single |= {"cautious": False}
    needs = {"yarn": "windows", "window_pattern": "windows", "mtp_until": "mtp", "momentum_warmup": "momentum_start",
             "untie_at": "tied", "batch_lr": "batches", "cautious": "muon_decay"}  # fmt: skip
    for name in sorted(single.keys() - {"layers", "accumulate", "prefetch"}, key=lambda name: name in needs):
        folder = tmp_path / name
        changes = {each: single[each] for each in (name, needs.get(name)) if each}
        train.race(replace(smoke, folder=folder, **changes), WORLD)
        assert metrics(folder) not in seen, f"{name} is like {seen[metrics(folder)]}"
        seen[metrics(folder)] = name
    train.race(replace(smoke, folder=tmp_path / "prefetch", prefetch=True), WORLD)
    assert seen[metrics(tmp_path / "prefetch")] == "none", "a thread makes the same batches"


@pytest.mark.parametrize("documents", [False, True], ids=["windows", "documents"])
def test_an_epoch_has_every_token_once_whatever_the_contexts(documents):
    """All tokens but separators are different ones, so what comes twice is seen."""
    tokens = np.arange(64 * 47 + 1, dtype=np.uint16)
    tokens[::37] = SEPARATOR = 60_000
    stream = TokenStream([tokens])
    config = replace(PRESETS["smoke"], batches="3,4,4", contexts="32,64,16,16", steps=12, documents=documents)
    rows = DocumentRows(stream, SEPARATOR) if documents else None
    make = train.batches(
        SimpleNamespace(config=config, world=WORLD, documents=rows, data=SimpleNamespace(train=stream))
    )
    found = [make(step) for step in range(12)]
    assert [len(inputs) for inputs, *_ in found] == [6] * 3 + [3] + [4] * 2 + [16] * 6
    every = np.concatenate([inputs.ravel() for inputs, *_ in found])
    assert every.size == 64 * (3 * 4 + 4 * 8), "nearly the epoch"
    assert np.unique(every[every != SEPARATOR]).size == (every != SEPARATOR).sum()
    for (inputs, targets, *where), step in zip(found, range(12), strict=True):
        assert inputs.shape[1] == plan(step, config).context
        follows = (targets == inputs + 1) | (targets == SEPARATOR) | (inputs == SEPARATOR)
        assert follows.all()
        if documents:
            positions, numbers, _ = where
            assert (positions[:, 0] == 0).all(), "a window begins a piece"
            same = numbers[:, 1:] == numbers[:, :-1]
            assert ((positions[:, 1:] == positions[:, :-1] + 1) == same).all() and (positions[:, 1:][~same] == 0).all()
            assert (inputs[:, 1:][same] == targets[:, :-1][same]).all()


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


def test_a_rehearsal_compiles_what_the_race_runs_and_leaves_nothing(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    seen, models, gradients = set(), [], train.gradients

    def watched(run, now, *batch):
        seen.add(torch.are_deterministic_algorithms_enabled())
        models.append(weakref.ref(run.model))
        return gradients(run, now, *batch)

    monkeypatch.setattr(train, "gradients", watched)
    train.fitted(replace(smoke, folder=tmp_path / "run", compile=True, minutes=1.0), WORLD)
    assert seen == {True} and not (tmp_path / "run").exists()
    gc.collect()
    assert models and all(model() is None for model in models)


@pytest.mark.parametrize("ahead", [True, False])
def test_all_is_compiled_in_first_passes(smoke, tmp_path, monkeypatch, ahead):
    """More kinds of steps than the 8 programs after which torch by itself goes on without compiling, weights that are
    others in each step: nothing of it on the clock."""
    torch._dynamo.reset()
    where, compiled, kinds, warm_up = ["step"], [], [], train.warm_up

    def noted(graph, _):
        compiled.append(where[0])
        return graph.forward

    def warm(run, now, *batch):
        where[0] = "first pass"
        kinds.append(now.kind)
        seconds = warm_up(run, now, *batch)
        where[0] = "step"
        return seconds

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=noted))
    monkeypatch.setattr(train, "warm_up", warm)
    monkeypatch.setattr(loss, "gradient_ahead", lambda *_: ahead)
    windows = ",".join(str(4 * number) for number in range(1, 11))
    changes = {"windows": windows, "batches": "4,8,4", "mtp": "1,0.5", "mtp_until": 1.0, "layers": 1, "compile": True}
    train.race(replace(smoke, folder=tmp_path / "run", **changes), WORLD)
    torch._dynamo.reset()
    assert len(kinds) == len(set(kinds)) >= 10 and set(compiled) == {"first pass"}
    assert len(compiled) == len(kinds) + ahead, "the head's kernel works on so many rows, whatever the batch"


def test_whoever_makes_steps_compiles_as_the_race_does(smoke, tmp_path, monkeypatch):
    """Timing one switch after the other, a ninth model must not be timed uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    seen, gradients = [], train.gradients

    def watched(*arguments):
        seen.append((torch._dynamo.config.recompile_limit, torch.are_deterministic_algorithms_enabled()))
        return gradients(*arguments)

    for module in (step_times, rerun, breakdown):
        monkeypatch.setattr(module, "gradients", watched)
    config = replace(smoke, compile=True, folder=tmp_path / "run")
    step_times.step_ratios(replace(config, compile=False), config, 1, WORLD)
    rerun.losses_of(train.prepare(config, WORLD)[0], 1)
    breakdown.measure(config, WORLD, 1)
    assert len(seen) >= 6 and set(seen) == {(loss.PROGRAMS, True)}
    assert torch._dynamo.config.recompile_limit < loss.PROGRAMS, "as it was"


# -- two ranks --
def one_of_two(rank: int, world_size: int, config, folder: Path) -> list:
    """What a rank sees when the other one is late in its first pass, is pressed Ctrl-C, has a NaN."""
    world, seen = init_from_env("cpu"), []
    gradients, update = train.gradients, train.update

    def late(run, now, *batch):
        if not run.warm_seconds:
            here = folder / "rank 0 has begun"
            if rank == 0:
                here.touch()
            while not here.exists():
                time.sleep(0.01)
            time.sleep(1.0 * rank)
        return gradients(run, now, *batch)

    train.gradients = late
    run = train.race(replace(config, folder=folder / "late", steps=2), world)
    seen.append(run.warm_seconds)
    train.gradients = gradients

    def pressed(run, now):
        update(run, now)
        if rank == 1 and run.step == 2:
            signal.raise_signal(signal.SIGINT)

    train.update = pressed
    try:
        train.race(replace(config, folder=folder / "pressed"), world)
    except KeyboardInterrupt:
        seen.append("stopped")
    train.update = update

    def spoilt(run, now, *batch):
        return gradients(run, now, *batch) * (math.nan if rank == 1 and run.step == 2 else 1)

    train.gradients = spoilt
    try:
        train.race(replace(config, folder=folder / "spoilt"), world)
    except UserError as error:
        seen.append(str(error))
    return seen


def test_what_befalls_one_rank_is_known_to_both(smoke, tmp_path):
    for warm, pressed, error in spawn(one_of_two, 2, smoke, tmp_path):
        assert warm >= 0.9, "who comes first waits for the other off the clock"
        assert pressed == "stopped" and error.startswith("loss nan at step 3: stopped")
    assert load_checkpoint(tmp_path / "pressed")[0].state["step"] == 3


def test_a_loss_that_is_no_number_stops_the_run(smoke, tmp_path, monkeypatch):
    nan = torch.tensor(math.nan)
    monkeypatch.setattr(train, "loss_of", lambda model, *_: lambda tokens, *_: (model(tokens).sum() * nan, nan))
    with pytest.raises(UserError, match="loss nan at step 1: stopped"):
        train.race(replace(smoke, folder=tmp_path / "run"), WORLD)


def test_a_checkpoint_of_another_race_is_refused(smoke, tmp_path):
    """Before its step is looked up in a plan that has fewer."""
    config = replace(smoke, folder=tmp_path / "run", windows="16,32,48")
    train.race(config, WORLD)
    before = metrics(config.folder)
    for changes, message in (
        ({"steps": 6}, "steps is 12 there, 6 asked"),
        ({"windows": "16,32"}, "windows is 16,32,48 there, 16,32 asked"),
        ({"corpus": signal.__file__}, "corpus is .* there"),
    ):
        with pytest.raises(ValueError, match=message):
            train.race(replace(config, resume=True, **changes), WORLD)
    assert metrics(config.folder) == before


def test_ranks_share_the_rows_that_windows_are_parts_of(smoke):
    two = World(0, 2, 0, torch.device("cpu"), "gloo")
    train.check(replace(smoke, batch=4, contexts="16,64"), two)
    with pytest.raises(ValueError, match="3 rows of 64 at step 0 over 2 ranks: expected a multiple of 2"):
        train.check(replace(smoke, batch=3, contexts="32,64"), two)


def test_what_a_race_refuses_writes_nothing(smoke, tmp_path):
    for changes, message in (
        ({"ema": 0.9}, "ema 0.9: expected 0"),
        ({"batches": "4,5", "accumulate": 2}, "5 rows at step 6 over 1 ranks x accumulate 2: expected a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train.race(replace(smoke, folder=tmp_path / "run", **changes), WORLD)
    assert not (tmp_path / "run").exists()
