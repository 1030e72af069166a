"""Sharded checkpoints: from any layout to any other, byte for byte; whole or not there; a run goes on with them."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from torch import nn

from common.cli import UserError
from common.dist import RankError, spawn
from minigpt.checkpoint import TOKENIZER, checkpoint_folders, load_run, save_checkpoint
from minigpt.optim import Muon, group_names, make_optimizers, optimizers_of
from minigpt.tokenizer import Tokenizer
from minigpt.train_config import TrainConfig
from parallel import checkpoint, checkpoint_writer
from parallel.checkpoint import Checkpoint, entries_of, export, load, open_single, restore, save, stored_config
from parallel.comm import make_comm
from parallel.fsdp import FSDP
from parallel.mesh import AXES, Group, Layout, Mesh
from parallel.model import StageGPT, materialise, whole_shapes
from parallel.pieces import Piece, piece_of
from parallel.zero import Zero2
from tests.parallel.gpts import CONFIGS, GPT2_LIKE, SMALL, batch, error, stirred_gpt
from tests.parallel.pieces_for_tests import entries, on_ranks, pieces_of

ALONE = make_comm(Group((), (0,), 0))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
SHAPES = ((), (1,), (13,), (0, 3), (7, 11), (8, 6), (5, 3, 7), (64, 2), (1, 1, 1), (2, 3, 5, 4))


def draw_values(seed: int) -> dict[str, torch.Tensor]:
    """Random bits, so NaN and infinities too; every dtype and shape, twice so that pp has something to share out."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for number, (shape, copy) in enumerate(itertools.product(SHAPES, "ab")):
        dtype = DTYPES[(number + seed) % len(DTYPES)]
        numel = torch.Size(shape).numel()
        size = torch.empty(0, dtype=dtype).element_size()
        data = torch.randint(2 if dtype == torch.bool else 256, (numel * size,), generator=generator, dtype=torch.uint8)
        values[f"{copy}.{number}"] = data.view(dtype).view(shape)
    return values


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(
        *(x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    )


def draw_layout(generator: random.Random) -> Layout:
    return Layout(**{axis: generator.choice((1, 1, 2, 3)) for axis in ("pp", "dp", "fsdp", "tp")})


def save_at(run, layout: Layout, values, step: int = 1, **options) -> list:
    options = {"keep": 3, "timeout_s": 20, **options}
    return on_ranks(
        layout.world_size,
        lambda comm: save(run, step, entries(values, layout, comm.rank), {"at": step}, comm, **options),
    )


def numbers(step: int) -> dict[str, torch.Tensor]:
    """Small tensors whose every element tells the step."""
    return {"a": torch.full((6, 5), float(step)), "b": torch.full((7,), float(step))}


def assert_whole(run) -> int:
    """A checkpoint of one step and nothing of another is found; which."""
    found, _ = load(run)
    step = found.state["at"]
    assert found.state["step"] == step
    for name, value in numbers(step).items():
        assert torch.equal(found.read(name), value), (name, step)
    return step


def newest(run):
    return checkpoint_writer.checkpoint_folders(run)[0]


@pytest.mark.parametrize("seed", range(8))
def test_any_layout_loads_at_any_other(seed, tmp_path):
    generator = random.Random(seed)
    there, here = draw_layout(generator), draw_layout(generator)
    values = draw_values(seed)
    assert save_at(tmp_path, there, values, asynchronous=bool(seed % 2))[0].wait() == 1
    shapes = {name: tuple(value.shape) for name, value in values.items()}

    def check(comm) -> int:
        found, warnings = load(tmp_path, comm)
        assert not warnings and found.state == {"at": 1, "step": 1, "ranks": there.world_size}
        pieces = pieces_of(shapes, here, comm.rank)
        for name, piece in pieces.items():
            assert same_bytes(found.read(name, piece), piece.of(values[name])), (name, piece, there, here)
        return len(pieces)

    counts = on_ranks(here.world_size, check)
    assert all(isinstance(count, int) for count in counts), counts
    alone = load(tmp_path)[0]
    assert sum(counts) > 0 and all(same_bytes(alone.read(name), value) for name, value in values.items())


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, fsdp=2)], ids=str)
def test_no_more_is_read_than_overlaps(layout, tmp_path, monkeypatch):
    values = {"a": torch.arange(96.0).view(12, 8), "b": torch.arange(40.0).view(5, 8)}
    save_at(tmp_path, layout, values)
    found = load(tmp_path)[0]
    handle, read = Checkpoint._open, []
    monkeypatch.setattr(Checkpoint, "_open", lambda *args: Reading(handle(*args), read))
    assert torch.equal(found.read("a", Piece((12, 8), ((2, 4), (0, 8)))), values["a"][2:4])
    assert sum(got.numel() for got in read) == 16


class Reading:
    """An open file, or a tensor in it, that notes what is read."""

    def __init__(self, held, read: list):
        self.held, self.read = held, read

    def get_slice(self, key: str):
        return Reading(self.held.get_slice(key), self.read)

    def __getitem__(self, index):
        self.read.append(self.held[index])
        return self.read[-1]


def test_copies_are_written_once_and_shared_out(tmp_path):
    values = {f"w{number}": torch.randn(10, 10) for number in range(8)}
    save_at(tmp_path, Layout(dp=4), values)
    shards = [safetensors.torch.load_file(file) for file in sorted(newest(tmp_path).glob("rank_*.safetensors"))]
    assert sorted(name for shard in shards for name in shard) == sorted(values)
    assert [len(shard) for shard in shards] == [2, 2, 2, 2]


def cut_short(got: dict, rank: int) -> dict:
    if rank == 1:
        tensor, piece = got["a"]
        got["a"] = (tensor[:-1], Piece(piece.shape, piece.box, (piece.flat[0], piece.flat[1] - 1)))
    return got


def other_dtype(got: dict, rank: int) -> dict:
    return got | ({"b": (got["b"][0].double(), got["b"][1])} if rank == 1 else {})


def other_shape(got: dict, rank: int) -> dict:
    return got | ({"b": (torch.zeros(8), Piece.whole((8,)))} if rank == 1 else {})


def wrong_size(got: dict, rank: int) -> dict:
    return got | ({"b": (torch.zeros(2), Piece.whole((7,)))} if rank == 1 else {})


def outside(got: dict, rank: int) -> dict:
    return got | ({"b": (torch.zeros(7), Piece((7,), ((1, 8),)))} if rank == 1 else {})


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (cut_short, r"a: no rank has its part \(\(5, 6\), \(4, 5\)\)"),
        (other_dtype, r"b: rank 1 has a piece of float64 \[7\], another rank of float32"),
        (other_shape, r"b: rank 1 has a piece of float32 \[8\], another rank of float32 \[7\]"),
        (wrong_size, "rank 1: b: a tensor of 2 elements for a piece of 7"),
        (outside, r"rank 1: b: box \(\(1, 8\),\)"),
    ],
)
def test_pieces_that_do_not_fit_are_refused_by_all_ranks(spoil, what, tmp_path):
    layout = Layout(fsdp=2)

    def attempt(comm):
        got = entries(numbers(1), layout, comm.rank)
        got["b"] = (numbers(1)["b"], Piece.whole((7,)))
        return save(tmp_path, 1, spoil(got, comm.rank), {}, comm, keep=1)

    for raised in on_ranks(2, attempt):
        assert isinstance(raised, ValueError)
        with pytest.raises(ValueError, match=what):
            raise raised
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep 0: expected at least 1"):
        save(tmp_path, 1, {}, {}, ALONE, keep=0)
    with pytest.raises(ValueError, match="rank 0: .*not JSON serializable"):
        save(tmp_path, 1, {}, {"x": torch.zeros(1)}, ALONE, keep=1)
    with pytest.raises(ValueError, match="no such checkpoint: expected a run folder"):
        load(tmp_path)
    assert all(isinstance(got, ValueError) for got in on_ranks(3, lambda comm: load(tmp_path, comm)))


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a shard is cut": ("rank_0001.safetensors", lambda file: os.truncate(file, 60)),
    "a bit is flipped": ("rank_0002.safetensors", flip),
    "a shard is missing": ("rank_0003.safetensors", lambda file: file.unlink()),
    "no manifest": ("manifest.json", lambda file: file.unlink()),
    "the manifest is cut": ("manifest.json", lambda file: os.truncate(file, file.stat().st_size - 9)),
    "the manifest is another": ("manifest.json", lambda file: file.write_text(file.read_text().replace("32", "64"))),
    "the manifest is no object": ("manifest.json", lambda file: file.write_text("[1]")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_broken_checkpoint_is_skipped_with_a_warning(name, damage, tmp_path):
    layout = Layout(fsdp=4)
    for step in (1, 2):
        save_at(tmp_path, layout, numbers(step), step)
    broken = newest(tmp_path)
    damage(broken / name)
    results = [load(tmp_path), *on_ranks(3, lambda comm: load(tmp_path, comm))]
    for found, warnings in results:
        assert found.state["step"] == 1 and len(warnings) == 1
        assert "skipped a broken checkpoint" in warnings[0] and str(broken) in warnings[0] and name in warnings[0]
    assert assert_whole(tmp_path) == 1
    save_at(tmp_path, layout, numbers(2), 2)  # the run goes on and writes that step again
    assert assert_whole(tmp_path) == 2 and not load(tmp_path)[1]
    shutil.rmtree(tmp_path / "sharded/step_00000001")
    damage(newest(tmp_path) / name)
    with pytest.raises(ValueError, match=f"no such checkpoint.*step_00000002.*{name}"):
        load(tmp_path)


def test_the_stored_config_is_that_of_the_newest_whole_manifest(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        stored_config(tmp_path)
    for step in (1, 2):
        save(tmp_path, step, {}, {"train_config": {"steps": step}}, ALONE, keep=2)
    assert stored_config(tmp_path) == {"steps": 2}
    flip(newest(tmp_path) / "manifest.json")
    assert stored_config(tmp_path) == {"steps": 1}


def test_a_checkpoint_of_another_format_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "FORMAT", "sharded 9")
    save_at(tmp_path, Layout(), numbers(1))
    with pytest.raises(ValueError, match="expected a checkpoint of format 'sharded 1', found 'sharded 9'"):
        load(tmp_path)


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 10, 100):
        save_at(tmp_path, Layout(fsdp=2), numbers(step), step, keep=2)
    assert sorted(path.name for path in (tmp_path / "sharded").iterdir()) == ["step_00000010", "step_00000100"]
    flip(newest(tmp_path) / "rank_0000.safetensors")
    (tmp_path / "sharded/.step_00000013.0123.partial").mkdir()  # of a kill
    save_at(tmp_path, Layout(), numbers(12), 12, keep=1)
    assert [path.name for path in (tmp_path / "sharded").iterdir()] == ["step_00000012"]


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_a_kill_between_any_two_file_operations_leaves_a_whole_checkpoint(again, tmp_path, monkeypatch):
    """Every call that touches files is a moment to die at, one after another."""
    left = [0]

    def mortal(fn):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return fn(*args, **kwargs)

        return call

    for holder, name in [
        (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (safetensors.torch, "save_file"),
        (checkpoint_writer, "_to_disk"), (checkpoint_writer, "_sha256"), (checkpoint_writer, "atomic_write"),
    ]:  # fmt: skip
        monkeypatch.setattr(holder, name, mortal(getattr(holder, name)))
    outcomes = []
    for moment in range(1, 99):
        run = tmp_path / str(moment)
        left[0] = 0
        save_at(run, Layout(), numbers(4), 4, keep=1)
        left[0] = moment
        step, values = (4, numbers(4)) if again else (5, numbers(5))
        try:
            save(run, step, entries(values, Layout(), 0), {"at": step}, ALONE, keep=1)
        except Killed:
            left[0] = 0
            outcomes.append(assert_whole(run))
            save_at(run, Layout(), numbers(6), 6, keep=1)  # what a kill leaves behind is no obstacle
            assert assert_whole(run) == 6 and len(list((run / "sharded").iterdir())) == 1
        else:
            break
    assert 12 < len(outcomes) < 90 and outcomes == sorted(outcomes)
    assert again or {4, 5} == {*outcomes}


def save_until_killed(rank: int, world_size: int, run, victim: int, delay: float) -> None:
    layout = Layout(fsdp=world_size)
    comm = make_comm(Mesh(layout, rank, world_size).group(*AXES))
    save(run, 1, entries(numbers(1), layout, rank), {"at": 1}, comm, keep=2)
    if rank == victim:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for step in range(2, 1000):
        got = entries(numbers(step), layout, rank)
        save(run, step, got, {"at": step}, comm, keep=2, asynchronous=bool(step % 2), timeout_s=20).wait()


@pytest.mark.parametrize(("victim", "delay"), [(0, 0.013), (1, 0.031), (0, 0.047)])
def test_a_rank_that_is_killed_leaves_whole_checkpoints(victim, delay, tmp_path):
    with pytest.raises(RankError, match=f"rank {victim}: died by signal SIGKILL"):
        spawn(save_until_killed, 2, tmp_path, victim, delay)
    assert assert_whole(tmp_path) >= 1


def test_the_weights_may_change_while_a_thread_writes(tmp_path, monkeypatch):
    go = threading.Event()
    write = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args: go.wait(20) and write(*args))
    layout = Layout(fsdp=2)
    mine = [entries(numbers(5), layout, rank) for rank in range(2)]
    pending = on_ranks(
        2, lambda comm: save(tmp_path, 5, mine[comm.rank], {"at": 5}, comm, keep=1, asynchronous=True, timeout_s=20)
    )
    for got in mine:
        for tensor, _ in got.values():
            tensor.mul_(-1)
    assert not any(one.done for one in pending) and not checkpoint_writer.checkpoint_folders(tmp_path)
    go.set()
    assert [one.wait() for one in pending] == [5, 5]
    assert assert_whole(tmp_path) == 5 and all(one.done for one in pending)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_is_named_by_the_others(rank, asynchronous, tmp_path, monkeypatch):
    write = safetensors.torch.save_file

    def full(tensors, file):
        if file.name == checkpoint_writer.shard_name(rank):
            raise OSError("no space left")
        write(tensors, file)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    layout = Layout(fsdp=3)

    def attempt(comm):
        got = entries(numbers(1), layout, comm.rank)
        save(tmp_path, 1, got, {}, comm, keep=1, asynchronous=asynchronous, timeout_s=20).wait()

    started = time.monotonic()
    raised = on_ranks(3, attempt)
    assert isinstance(raised[rank], OSError) and time.monotonic() - started < 10
    for other in {0, 1, 2} - {rank}:
        assert isinstance(raised[other], UserError)
        assert str(raised[other]) == f"checkpoint of step 1: rank {rank}: no space left"
    assert not checkpoint_writer.checkpoint_folders(tmp_path)


def test_a_rank_that_never_comes_is_named_after_the_time_limit(tmp_path, monkeypatch):
    write = checkpoint_writer.atomic_write
    silent = "rank_0002.safetensors.done"
    monkeypatch.setattr(
        checkpoint_writer, "atomic_write", lambda file, data: None if file.name == silent else write(file, data)
    )
    raised = save_at(tmp_path, Layout(fsdp=3), numbers(1), timeout_s=1.0)
    assert all(isinstance(one, UserError) for one in raised)
    assert all("no file from rank 2 within 1 s" in str(one) for one in raised)
    assert not checkpoint_writer.checkpoint_folders(tmp_path)


# What follows: real ranks, a GPT and its optimizers.

CONFIG = TrainConfig(optimizer="muon", learning_rate=0.01, muon_lr=0.02, weight_decay=0.1, steps=6, eps=1e-4)
ADAMW = replace(CONFIG, optimizer="adamw")


def freeze(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(name != "blocks.1.mlp_norm.weight")


def small_gpt(config):
    model = stirred_gpt(config)
    freeze(model)
    return model


class PiecesOfGPT:
    """A GPT whose optimizers see only this rank's pieces: each step all pieces are gathered, and the gradient of the
    whole is cut up again. Muon's matrices are whole, each on one rank."""

    def __init__(self, config, layout: Layout, rank: int):
        self.model, self.layout = small_gpt(config), layout
        self.whole = dict(self.model.named_parameters())
        groups = group_names(self.model)
        shapes = {name: tuple(p.shape) for name, p in self.whole.items()}
        self.pieces = pieces_of(shapes, layout, rank, owned=tuple(groups["matrices"]))
        self.parameters = {
            name: nn.Parameter(piece.of(self.whole[name].detach()).clone(), self.whole[name].requires_grad)
            for name, piece in self.pieces.items()
        }
        mine = {kind: [name for name in names if name in self.pieces] for kind, names in groups.items()}
        self.optimizers = optimizers_of(self.parameters, mine, CONFIG, torch.float64)

    def step(self, tokens_BT, targets_BT) -> float:
        self.gather()
        loss = self.model(tokens_BT, targets_BT)
        self.model.zero_grad()
        loss.backward()
        for name, p in self.parameters.items():
            if p.requires_grad:
                p.grad = self.pieces[name].of(self.whole[name].grad).clone()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()

    @torch.no_grad()
    def gather(self) -> dict[str, torch.Tensor]:
        mine = {name: (p.detach(), self.pieces[name]) for name, p in self.parameters.items()}
        everyone = [mine] * self.layout.world_size
        if self.layout.world_size > 1:
            torch.distributed.all_gather_object(everyone, mine)
        for one in everyone:
            for name, (value, piece) in one.items():
                piece.put(self.whole[name], value)
        return {name: p.detach().clone() for name, p in self.whole.items()}


def train_part(rank: int, world_size: int, run, layouts: dict[str, Layout], start: int, stop: int) -> dict:
    torch.manual_seed(1000 + rank)
    done = {name: train_one(rank, CONFIGS[name], run / name, layout, start, stop) for name, layout in layouts.items()}
    return done | {"strategies": train_with_strategy(rank, world_size, run / "strategies", start, stop)}


def train_one(rank: int, config, run, layout: Layout, start: int, stop: int):
    comm = make_comm(Mesh(layout, rank, layout.world_size).group(*AXES))
    gpt = PiecesOfGPT(config, layout, rank)
    if start:
        for p in gpt.parameters.values():
            p.detach().fill_(torch.nan)
        found, warnings = load(run, comm)
        assert found.state["step"] == start and not warnings
        restore(found, gpt.parameters, gpt.pieces, gpt.optimizers, asdict(config))
    losses = [gpt.step(*batch(config, 4, seed=step)) for step in range(start, stop)]
    got = entries_of(gpt.parameters, gpt.pieces, gpt.optimizers)
    pending = save(run, stop, got, {"model_config": asdict(config)}, comm, 1, asynchronous=True, timeout_s=30)
    weights = gpt.gather()
    gpt.step(*batch(config, 4, seed=99))  # meanwhile
    pending.wait()
    return losses, weights


class Trained:
    """AdamW on a strategy of this stage: FSDP with replicas on 4 ranks, ZeRO-2 on 2 and on one. Not for a GPT with key
    biases: their gradient is zero but for rounding, and AdamW makes a step of any size out of that."""

    def __init__(self, config, rank: int, world_size: int):
        layout = {4: Layout(dp=2, fsdp=2), 2: Layout(fsdp=2), 1: Layout()}[world_size]
        mesh = Mesh(layout, rank, world_size)
        self.all, inner, outer = (make_comm(mesh.group(*axes)) for axes in (AXES, ("fsdp",), ("dp",)))
        whole = stirred_gpt(config)
        self.stage = StageGPT(config)
        freeze(self.stage)
        if world_size == 4:
            values = dict(whole.named_parameters())
            self.strategy = FSDP([self.stage], inner, outer, config=config, values=values, dtype=torch.float64)
            tensors = self.strategy.tensors()
        else:
            materialise(self.stage, dtype=torch.float64)
            self.stage.load_state_dict(whole.state_dict())
            self.strategy = Zero2([self.stage], inner)
            tensors = {name: (p.data, piece_of(p)) for name, p in self.stage.named_parameters()}
        self.parameters, self.pieces = self.strategy.parameters(), self.strategy.pieces()
        self.frozen = {name: both for name, both in tensors.items() if name == "blocks.1.mlp_norm.weight"}
        names = {kind: [n for n in names if n in self.parameters] for kind, names in group_names(whole).items()}
        self.optimizers = optimizers_of(self.parameters, names, ADAMW)

    def entries(self) -> dict:
        frozen, pieces = ({name: both[i] for name, both in self.frozen.items()} for i in (0, 1))
        return entries_of(self.parameters, self.pieces, self.optimizers) | entries_of(frozen, pieces)

    def restore(self, found: Checkpoint) -> None:
        frozen, pieces = ({name: both[i] for name, both in self.frozen.items()} for i in (0, 1))
        for tensor in (*self.parameters.values(), *frozen.values()):
            tensor.detach().fill_(torch.nan)
        restore(found, self.parameters, self.pieces, self.optimizers)
        restore(found, frozen, pieces)
        self.strategy.stepped()

    def step(self, tokens_BT, targets_BT) -> float:
        rows = slice(self.all.rank, None, self.all.size)
        loss = self.stage(None, tokens_BT[rows], targets_BT[rows])
        loss.backward()
        self.strategy.finish()
        for optimizer in self.optimizers:
            optimizer.step()
        self.strategy.stepped()
        self.strategy.zero_grad()
        mean = loss.detach().clone()
        self.all.all_reduce(mean, "mean")
        return mean.item()


def train_with_strategy(rank: int, world_size: int, run, start: int, stop: int):
    trained = Trained(SMALL, rank, world_size)
    if start:
        trained.restore(load(run, trained.all)[0])
    losses = [trained.step(*batch(SMALL, 4, seed=step)) for step in range(start, stop)]
    save(run, stop, trained.entries(), {}, trained.all, 1, asynchronous=True, timeout_s=30).wait()
    found = load(run, trained.all)[0]
    return losses, {name: found.read(f"model/{name}") for name in whole_shapes(SMALL)}


def train_alone(
    config, train_config=CONFIG
) -> tuple[list[float], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Losses, the weights after each step, and the optimizer states at the end, of one process without us."""
    model = small_gpt(config)
    optimizers = make_optimizers(model, train_config, torch.float64)
    losses, weights, states = [], [], {}
    for step in range(6):
        loss = model(*batch(config, 4, seed=step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            states |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return losses, weights, states


def test_going_on_at_other_layouts_equals_the_uninterrupted_run(tmp_path):
    parts = [
        spawn(train_part, 4, tmp_path, {"ours": Layout(tp=2, fsdp=2), "gpt2": Layout(pp=2, fsdp=2)}, 0, 2),
        spawn(train_part, 2, tmp_path, {"ours": Layout(pp=2), "gpt2": Layout(fsdp=2)}, 2, 4),
        [train_part(0, 1, tmp_path, {"ours": Layout(), "gpt2": Layout()}, 4, 6)],
    ]
    for name, config in (CONFIGS | {"strategies": SMALL}).items():
        wanted, weights, states = train_alone(config, ADAMW if name == "strategies" else CONFIG)
        for stop, part in zip((2, 4, 6), parts, strict=True):
            for rank in part:
                losses, got = rank[name]
                for loss, want in zip(losses, wanted[stop - 2 : stop], strict=True):
                    assert abs(loss - want) <= 1e-12 * abs(want)
                assert got.keys() == weights[stop - 1].keys()
                for parameter, value in weights[stop - 1].items():
                    assert error(got[parameter], value) <= 1e-12, parameter
        found = load(tmp_path / name)[0]
        assert {tensor for tensor in found.tensors if tensor.startswith("optimizer")} == states.keys()
        for tensor, value in states.items():
            assert error(found.read(tensor).double(), value.double()) <= 1e-12, tensor


def gpt_checkpoint(run, config, layout=None):
    """A checkpoint of a GPT at a layout; the GPT."""
    model, layout = stirred_gpt(config), layout or Layout(tp=2, fsdp=2)
    values = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    state = {"model_config": asdict(config), "note": "n"}
    made = on_ranks(
        layout.world_size, lambda comm: save(run, 3, entries(values, layout, comm.rank), state, comm, 1, timeout_s=20)
    )
    assert [one.wait() for one in made] == [3] * layout.world_size
    return model


def test_another_architecture_is_refused_by_the_names_of_its_fields(tmp_path):
    gpt_checkpoint(tmp_path, SMALL)
    found = load(tmp_path)[0]
    for other, what in [(replace(SMALL, mlp_width=44), "mlp_width is 40 there, 44 asked"),
                        (replace(SMALL, layers=4), "layers is 3 there, 4 asked")]:  # fmt: skip
        pieces = {name: Piece.whole(shape) for name, shape in whole_shapes(other).items()}
        parameters = {name: nn.Parameter(torch.ones(piece.shape)) for name, piece in pieces.items()}
        with pytest.raises(ValueError, match=f"another architecture: {what}"):
            restore(found, parameters, pieces, [], asdict(other))
        with pytest.raises(ValueError, match=r"lacks the weights blocks.1|is \(40, 24\) there, \(44, 24\) asked"):
            restore(found, parameters, pieces)
        assert all(torch.equal(p, torch.ones_like(p)) for p in parameters.values())
    with pytest.raises(ValueError, match="holds no model/nothing"):
        found.read("model/nothing")


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    p = nn.Parameter(torch.randn(3, 4))
    adamw, muon = torch.optim.AdamW([p]), Muon([p], lr=0.1)
    p.grad = torch.randn(3, 4)
    adamw.step()
    pieces = {"w": Piece.whole((3, 4))}
    save(tmp_path, 1, entries_of({"w": p}, pieces, [adamw]), {}, ALONE, keep=1)
    found = load(tmp_path)[0]
    with pytest.raises(ValueError, match="w was stepped by another optimizer: .*exp_avg.*Muon needs buffer"):
        restore(found, {"w": p}, pieces, [muon])
    sgd = torch.optim.SGD([p], momentum=0.9)
    sgd.state[p]["odd"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"state odd of w: \(5,\), expected a tensor of shape \(3, 4\)"):
        entries_of({"w": p}, pieces, [sgd])


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_keeps_its_step_and_a_scalar_parameter_its_states(fused, tmp_path):
    """Of a 0-d parameter that is cut flat over two ranks one has it and the other nothing."""
    pieces = [{"s": Piece.whole(()).cut(rank, 1), "w": Piece.whole((3,)).cut(2 * rank, 2 + rank)} for rank in (0, 1)]
    made = []

    def train(comm):
        mine = pieces[comm.rank]
        ps = {name: nn.Parameter(torch.ones(piece.numel)) for name, piece in mine.items()}
        optimizer = torch.optim.AdamW(ps.values(), lr=0.1, fused=fused)
        for _ in range(3):
            for p in ps.values():
                p.grad = 0.5 * torch.ones_like(p)
            optimizer.step()
        made.append((comm.rank, ps, optimizer))
        return save(tmp_path, 3, entries_of(ps, mine, [optimizer]), {}, comm, keep=1, timeout_s=20)

    assert [pending.wait() for pending in on_ranks(2, train)] == [3, 3]
    found = load(tmp_path)[0]
    for rank, ps, optimizer in made:
        fresh = {name: nn.Parameter(torch.zeros_like(p)) for name, p in ps.items()}
        again = torch.optim.AdamW(fresh.values(), lr=0.1, fused=fused)
        restore(found, fresh, pieces[rank], [again])
        for name, p in ps.items():
            state, want = again.state[fresh[name]], optimizer.state[p]
            assert torch.equal(fresh[name], p) and state.keys() == want.keys() and state["step"] == 3
            assert all((state[k].dtype, state[k].shape) == (want[k].dtype, want[k].shape) for k in want)
            assert all(torch.equal(state[key], want[key]) for key in want)


@pytest.mark.parametrize("config", [SMALL, GPT2_LIKE], ids=["ours", "gpt2"])
def test_an_export_is_a_run_of_stage_2_and_back(config, tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    model = gpt_checkpoint(run, config)
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        export(run, out)
    Tokenizer.bytes_only().save(run / TOKENIZER)
    save_checkpoint(out, 2, {}, {"model": {}}, keep=9)  # of somebody else
    monkeypatch.setattr(sys, "argv", ["parallel.checkpoint", "--run", str(run), "--export", str(out)])
    checkpoint.main()
    assert "step_00000003" in capsys.readouterr().out
    for folder in (out, run):
        if folder == run:
            export(run, run)  # beside its own checkpoints
        loaded, _ = load_run(folder)
        assert loaded.config == config
        for name, p in model.named_parameters():
            assert torch.equal(dict(loaded.named_parameters())[name], p.float()), name
    save_checkpoint(out, 9, {}, {"model": {}}, keep=9)
    with pytest.raises(ValueError, match="has step_00000009 already, this is step 3"):
        export(run, out)
    assert [path.name[-1] for path in checkpoint_folders(out)] == ["9", "3", "2"]
    back(run, config, model)


def back(run, config, model) -> None:
    """Starts a parallel run from a run of stage 2."""
    found, warnings = open_single(run)
    assert not warnings and found.state["model_config"] == asdict(config)
    layout = Layout(tp=2, fsdp=2)
    for rank in range(4):
        pieces = pieces_of(whole_shapes(config), layout, rank)
        parameters = {name: nn.Parameter(torch.zeros(piece.of(torch.zeros(piece.shape)).shape).double())
                      for name, piece in pieces.items()}  # fmt: skip
        restore(found, parameters, pieces, model_config=asdict(config))
        for name, p in model.named_parameters():
            assert torch.equal(parameters[name], pieces[name].of(p.detach()))


def test_the_manifest_can_be_read_by_eye(tmp_path):
    save_at(tmp_path, Layout(tp=2), {"a": torch.zeros(4, 6)}, 7)
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert manifest["format"] == "sharded 1" and manifest["step"] == 7 and manifest["ranks"] == 2
    assert manifest["tensors"]["a"]["shape"] == [4, 6] and manifest["tensors"]["a"]["dtype"] == "float32"
    upper, lower = [[0, 2], [0, 6]], [[2, 4], [0, 6]]
    assert [piece[1:] for piece in manifest["tensors"]["a"]["pieces"]] == [[upper, None], [lower, None]]
    assert set(manifest["files"]["rank_0001.safetensors"]) == {"bytes", "sha256"}
