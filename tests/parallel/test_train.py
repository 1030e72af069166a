"""The program as a user starts it: the loss of one process on every layout, resuming on others, bad launches.

In float64 where equality is the claim. Ranks are spawned here; one test goes through torchrun.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.dist import World, spawn
from minigpt.checkpoint import load_run
from minigpt.train import train as train_one
from minigpt.train_config import TrainConfig
from parallel.board import FolderBoard
from parallel.checkpoint import export
from parallel.config import PRESETS, ParallelConfig
from parallel.desync import DesyncDetector
from parallel.train import configured, train
from parallel.trainer import ParallelTrainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path, corpus) -> ParallelConfig:
    return replace(
        PRESETS["tiny"], folder=tmp_path / "run", corpus=str(corpus), tokenizer="bytes", device="cpu", steps=8,
        width=24, heads=2, kv_heads=2, mlp_width=48, context=32, eval_stride=32, eval_every=4, eval_windows=3,
        checkpoint_every=4, vocab_multiple=4, batch=8,
    )  # fmt: skip


def run(rank: int, world_size: int, config: ParallelConfig) -> None:
    backend = "gloo" if world_size > 1 else None
    train(config, World(rank, world_size, rank, torch.device("cpu"), backend), dtype=torch.float64)


def losses(config: ParallelConfig) -> list[dict]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


def alike(config: ParallelConfig, reference: ParallelConfig, tolerance: float = 1e-10) -> bool:
    ours, theirs = losses(config), losses(reference)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, reference.steps + 1))
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in a]
    return all(abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in pairs)


@pytest.fixture
def reference(config, tmp_path) -> ParallelConfig:
    """The run of one process."""
    alone = replace(config, folder=tmp_path / "alone")
    run(0, 1, alone)
    return alone


@pytest.mark.parametrize("document_mask", [False, True])
def test_one_process_is_stage_2(config, document_mask):
    """The same log as minigpt.train's, to the rounding of float32."""
    documents = config.folder.with_name("documents")
    documents.mkdir()
    text = Path(config.corpus).read_text()
    for start in range(0, len(text), 100):
        (documents / f"{start}.py").write_text(text[start : start + 100])
    config = replace(
        config, corpus=str(documents), document_mask=document_mask, learning_rate=0.02, steps=30, warmup=1, eps=1e-4
    )
    shared = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
    single = TrainConfig(**shared | {"folder": config.folder.with_name("stage2")})
    train_one(single)
    train(config, World(0, 1, 0, torch.device("cpu"), None))
    assert alike(config, single, 2e-5)


def test_every_kind_of_layout_gives_the_losses_of_one_process(config, reference):
    layouts = {
        "tp2-fsdp2": {"tp": 2, "fsdp": 2, "sequence_parallel": True, "overlap": True, "async_save": False},
        "pp2-dp2": {
            "pp": 2,
            "dp": 2,
            "pipeline": "zb-h1",
            "microbatches": 4,
            "collectives": "ours",
            "recompute": "full",
        },
    }
    for name, options in layouts.items():
        one = replace(config, folder=config.folder.with_name(name), **options)
        spawn(run, 4, one, timeout_s=120)
        assert alike(one, reference), name


def test_a_run_goes_on_with_other_ranks(config, reference):
    """4 ranks, then 2, then 1: the same curve; and what is exported is stage 2's run with the same weights."""
    run(0, 1, replace(config, steps=4))
    with pytest.raises(ValueError, match="steps is 4 there, 8 asked"):
        run(0, 1, replace(config, resume=True))
    second = replace(config, folder=config.folder.with_name("second"))
    spawn(stopped_after, 4, replace(second, tp=2, fsdp=2), 4, timeout_s=120)
    spawn(stopped_after, 2, replace(second, pp=2, resume=True), 6, timeout_s=120)
    run(0, 1, replace(second, resume=True))
    assert alike(second, reference)
    out = config.folder.with_name("exported")
    export(second.folder, out)
    model, _ = load_run(out)
    assert model.num_parameters() > 0 and all(p.isfinite().all() for p in model.parameters())


def stopped_after(rank: int, world_size: int, config: ParallelConfig, steps: int) -> None:
    """Ctrl-C on rank 1 alone, in the middle of that step: all ranks save, and stop."""
    update = ParallelTrainer.update

    def interrupted(self, inputs_BT, targets_BT, stop=False):
        return update(self, inputs_BT, targets_BT, stop=self.step + 1 == steps and rank == 1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ParallelTrainer, "update", interrupted)
        run(rank, world_size, config)


def test_a_folder_of_checkpoints_alone_is_a_run_too(config):
    run(0, 1, replace(config, steps=4))
    for name in ("metrics.jsonl", "config.json"):
        (config.folder / name).unlink()
    with pytest.raises(ValueError, match="already holds checkpoints: continue with --resume"):
        run(0, 1, config)
    assert len(list((config.folder / "sharded").glob("step_*"))) == 2


def test_a_layout_of_several_ranks_without_torchrun(config):
    with pytest.raises(ValueError, match="layout tp 2: .* but there are 1: start as many"):
        run(0, 1, replace(config, tp=2))
    assert not config.folder.exists()


def test_what_decides_a_resumed_run_is_stored(config):
    """The layout of the command line has to fit the stored model, not the preset's."""
    run(0, 1, replace(config, steps=1, layers=6, batch=12, muon_lr=0.5))
    flags = ["--folder", str(config.folder), "--resume"]
    assert configured([*flags, "--pp", "6", "--microbatches", "12"]).muon_lr == 0.5
    assert configured([*flags, "--dp", "12"]).batch == 12
    assert configured([*flags, "--steps", "9"]).steps == 9


def checked(rank: int, world_size: int, config: ParallelConfig, folder: Path) -> None:
    """With a detector that compares every call, which has to find nothing."""
    world = World(rank, world_size, rank, torch.device("cpu"), "gloo")
    train(config, world, [DesyncDetector(FolderBoard(folder), rank)], dtype=torch.float64)


def test_checked_runs_find_nothing_in_what_is_right(config, tmp_path):
    for number, options in enumerate(({"pp": 2, "tied": True}, {"tp": 2, "kv_heads": 1})):
        one = replace(config, folder=tmp_path / f"run-{number}", steps=2, **options)
        spawn(checked, 2, one, tmp_path / f"board-{number}")


def compressed(rank: int, world_size: int, config: ParallelConfig) -> None:
    train(config, World(rank, world_size, rank, torch.device("cpu"), "gloo"))  # float32: float64 is never compressed


def test_compressed_gradients_train_nearly_alike(config, reference):
    one = replace(config, dp=2, collectives="ours", compress="bf16", bucket_mb=0.01)
    spawn(compressed, 2, one)
    assert alike(one, reference, 1e-2) and not alike(one, reference, 1e-6)


def test_average_of_the_weights(config, tmp_path):
    alone = replace(config, folder=tmp_path / "alone", ema=0.9, optimizer="muon")
    run(0, 1, alone)
    many = replace(config, folder=tmp_path / "many", ema=0.9, optimizer="muon", fsdp=2, zero=1)
    spawn(run, 2, many)
    assert alike(many, alone, 1e-6)  # Muon's products are in float64 in both


def torchrun(ranks: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "-m", "parallel.train", *flags]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_and_a_rank_that_dies(config):
    """Through torchrun; then one rank is killed: the report names it, within seconds, and nothing is left running."""
    flags = ["--preset", "tiny", "--folder", str(config.folder), "--corpus", config.corpus, "--tokenizer", "bytes",
             "--vocab-multiple", "4", "--steps", "100000", "--fsdp", "2", "--device", "cpu"]  # fmt: skip
    process = torchrun(2, *flags)
    try:
        until = time.monotonic() + 90
        while not (config.folder / "metrics.jsonl").exists() or not losses(config):
            assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode != 0
    assert "died" in out or "SIGKILL" in out, out


@pytest.mark.slow
def test_a_wrong_launch_is_told_once(config):
    process = torchrun(2, "--preset", "tiny", "--folder", str(config.folder), "--dp", "4")
    out, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert out.count("parallel.train: error: ") == 1, out
    assert "but there are 2" in out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--cp", "2"], "cp 2: expected 1"),
        (["--pp", "9"], "layers do not reach"),
        (["--fsdp", "2", "--optimizer", "muon"], "take zero 1 or 2"),
        (["--pp", "2", "--accumulate", "2"], "micro-batches are its parts"),
        (["--chunks", "2"], "with pp 1"),
        (["--microbatches", "2"], "with pp 1"),
        (["--pp", "2", "--chunks", "2"], "chunks 2"),
        (["--pp", "2", "--pipeline", "interleaved-1f1b"], "chunks 1"),
        (["--tp", "4"], "heads 2 over tp 4"),
        (["--offload"], "zero 3"),
        (["--compress", "bf16"], "expected --collectives ours"),
        (["--recompute", "budget"], "expected both"),
        (["--tp", "3", "--sequence-parallel"], "whole parts"),
        (["--compile"], "not in stage 4"),
        (["--dp", "3"], "expected a multiple of 3"),
        (["--zero", "4"], "expected one of 0, 1, 2, 3"),
        (["--tp", "0"], "tp 0"),
    ],
)
def test_bad_flags(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        configured(["--preset", "tiny", *flags])
    assert caught.value.code == 2 and words in capsys.readouterr().err
