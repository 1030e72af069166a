"""Real processes over gloo: results by rank, and every way a rank can fail, hang or die without leaving anything."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.cli import UserError
from common.dist import TORCHRUN, RankError, World, finish, init_from_env, spawn

ROOT = Path(__file__).parents[2]


def write_pid(folder: Path, rank: int) -> None:
    (folder / f"pid-{rank}").write_text(str(os.getpid()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid-*") if path.read_text()]


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """A folder where ranks write their pids; afterwards all are gone, and so is what spawn put into the temp folder."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield tmp_path
    assert pids(tmp_path), "at least one rank got as far as its function"
    assert not [pid for pid in pids(tmp_path) if alive(pid)]
    assert not list(temporary.glob("groundup-*"))


def sum_over_ranks(rank, world_size, folder, scale):
    write_pid(folder, rank)
    x = torch.full((3,), float(rank + 1)) * scale
    dist.all_reduce(x)
    return {"rank": rank, "sum": x, "backend": dist.get_backend(), "threads": torch.get_num_threads()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_reduce_and_values_by_rank(nothing_left, world_size):
    values = spawn(sum_over_ranks, world_size, nothing_left, 10.0)
    assert [value["rank"] for value in values] == list(range(world_size))
    total = 10.0 * world_size * (world_size + 1) / 2
    assert all(torch.equal(value["sum"], torch.full((3,), total)) for value in values)
    assert {value["backend"] for value in values} == {"gloo"}
    assert all(value["threads"] == max(1, len(os.sched_getaffinity(0)) // world_size) for value in values)


def change_argument(rank, world_size, x):
    x += rank + 1
    dist.barrier()
    return x


def test_arguments_travel_by_value():
    x = torch.zeros(2)
    first, second = spawn(change_argument, 2, x)
    assert (first.tolist(), second.tolist(), x.tolist()) == ([1, 1], [2, 2], [0, 0])


def early_and_late(rank, world_size, folder):
    """Rank 0 is done at once; rank 1, a while later, looks whether rank 0 is still there."""
    write_pid(folder, rank)
    dist.barrier()
    if rank == 0:
        return None
    time.sleep(0.5)
    return alive(int((folder / "pid-0").read_text()))


def test_a_rank_that_is_done_waits_for_the_others(nothing_left):
    assert spawn(early_and_late, 2, nothing_left) == [None, True]


def environment(rank, world_size, folder):
    write_pid(folder, rank)
    return os.environ.get("COMMON_DIST_TEST"), "HOME" in os.environ, os.getcwd()


def test_ranks_see_the_callers_environment_of_now(nothing_left, monkeypatch):
    spawn(environment, 1, nothing_left)  # the fork server has started at the latest here
    monkeypatch.setenv("COMMON_DIST_TEST", "new")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.chdir(nothing_left)
    assert spawn(environment, 1, nothing_left) == [("new", False, str(nothing_left))]


def raise_on_one(rank, world_size, folder, error):
    write_pid(folder, rank)
    dist.barrier()
    if rank == 1:
        raise error
    dist.barrier()


@pytest.mark.parametrize("error", [KeyError("the reason"), SystemExit("the reason")])
def test_a_rank_that_raises(nothing_left, error):
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*in raise_on_one.*the reason") as caught:
        spawn(raise_on_one, 3, nothing_left, error)
    assert caught.value.rank == 1
    assert len(pids(nothing_left)) == 3


def raise_on_all(rank, world_size, folder):
    write_pid(folder, rank)
    raise ValueError(f"rank {rank} is wrong")


def test_ranks_that_all_raise_are_all_named(nothing_left):
    with pytest.raises(RankError) as caught:
        spawn(raise_on_all, 2, nothing_left)
    assert "rank 0 is wrong" in str(caught.value) and "rank 1 is wrong" in str(caught.value)
    assert str(caught.value).count("Traceback") == 1, "one whole traceback, of the first"


def return_a_lambda(rank, world_size, folder):
    write_pid(folder, rank)
    return lambda: None


def test_a_result_that_does_not_pickle_is_the_ranks_error(nothing_left):
    with pytest.raises(RankError, match=r"(?s)return_a_lambda.*lambda"):
        spawn(return_a_lambda, 1, nothing_left)


def hang_on_one(rank, world_size, folder):
    write_pid(folder, rank)
    if rank == 1:
        time.sleep(600)
    return rank


def test_a_rank_that_hangs_is_a_timeout_with_its_stack(nothing_left):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)after 2 s: rank 1 of 2.*in hang_on_one"):
        spawn(hang_on_one, 2, nothing_left, timeout_s=2)
    assert time.monotonic() - start < 10


def die_on_one(rank, world_size, folder, how):
    write_pid(folder, rank)
    dist.barrier()
    if rank == 1:
        how, argument = how
        how(argument) if how is os._exit else how(os.getpid(), argument)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "says"), [((os.kill, signal.SIGKILL), "signal SIGKILL"), ((os._exit, 7), "exit code 7")]
)
def test_a_rank_that_dies_is_named(nothing_left, how, says):
    with pytest.raises(RankError, match=f"^rank 1: died by {says}") as caught:
        spawn(die_on_one, 3, nothing_left, how)
    assert caught.value.rank == 1


def test_a_segmentation_fault_leaves_its_python_stack(nothing_left):
    with pytest.raises(RankError, match=r"(?s)^rank 1: died by signal SIGSEGV.*in die_on_one"):
        spawn(die_on_one, 2, nothing_left, (os.kill, signal.SIGSEGV))


def sum_on_gpu(rank, world_size):
    x = torch.ones(2, device="cuda")
    dist.all_reduce(x)
    return init_from_env(), x.cpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl():
    ((world, x),) = spawn(sum_on_gpu, 1, backend="nccl")
    assert world == World(0, 1, 0, torch.device("cuda", 0), "nccl") and x.tolist() == [1, 1]


LAUNCHER = """
import os, pathlib, time
from common.dist import spawn

def hang(rank, world_size):
    pathlib.Path(f"pid-{rank}").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    spawn(hang, 2)
"""


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    script = tmp_path / "launch.py"
    script.write_text(LAUNCHER)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    launcher = subprocess.Popen([sys.executable, script], env=environment, cwd=tmp_path)
    try:
        assert wait_until(lambda: len(pids(tmp_path)) == 2, 60)
    finally:
        launcher.kill()
        launcher.wait()
    assert wait_until(lambda: not any(map(alive, pids(tmp_path))), 10)


def wait_until(condition, limit_s) -> bool:
    end = time.monotonic() + limit_s
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return done


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((raise_on_all, 0), {}, "world_size .* got 0"),
        ((raise_on_all, 2.0), {}, r"world_size .* got 2\.0"),
        ((raise_on_all, 1), {"timeout_s": 0}, "timeout_s"),
        ((raise_on_all, 1), {"timeout_s": float("nan")}, "timeout_s"),
        ((lambda rank, world_size: None, 1), {}, "module-level"),
        ((raise_on_all, 1, lambda: None), {}, "pickle"),
        ((raise_on_all, 1000), {"backend": "nccl"}, "GPUs"),
    ],
)
def test_bad_arguments(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        spawn(*arguments, **options)


# ---- init_from_env


@pytest.fixture
def bare(monkeypatch):
    """No variable of torchrun's is set."""
    for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_torchrun_a_world_of_one(bare):
    assert init_from_env("cpu") == World(0, 1, 0, torch.device("cpu"), None)
    assert not dist.is_initialized()
    assert init_from_env().device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    finish()
    assert not dist.is_initialized()


FULL = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize("missing", list(FULL))
def test_half_set_variables_name_the_missing_one(bare, missing):
    for name, value in FULL.items():
        if name != missing:
            bare.setenv(name, value)
    with pytest.raises(UserError, match=f" but {missing} missing"):
        init_from_env("cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"RANK": "one"}, "RANK must be a whole number, got 'one'"),
        ({"RANK": "1"}, r"RANK must be within 0\.\.WORLD_SIZE - 1 = 0, got 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number"),
    ],
)
def test_wrong_variables(bare, change, says):
    for name, value in (FULL | change).items():
        bare.setenv(name, value)
    with pytest.raises(UserError, match=says):
        init_from_env("cpu")


def test_a_device_this_machine_lacks(bare):
    for name, value in (FULL | {"RANK": "99", "WORLD_SIZE": "100", "LOCAL_RANK": "99"}).items():
        bare.setenv(name, value)
    with pytest.raises(UserError, match="local rank 99"):
        init_from_env("cuda")
    with pytest.raises(UserError, match="'tpu'"):
        init_from_env("tpu")


def report_world(rank, world_size):
    world = init_from_env()
    finish()
    finish()
    return world, dist.is_initialized()


def test_under_spawn_it_reports_the_group(bare):
    first, second = spawn(report_world, 2)
    assert first == (World(0, 2, 0, torch.device("cpu"), "gloo"), False)
    assert second == (World(1, 2, 1, torch.device("cpu"), "gloo"), False)


PROGRAM = """
import os
import torch
from common.dist import finish, init_from_env
world = init_from_env("cpu")
x = torch.tensor([world.rank + 1.0])
torch.distributed.all_reduce(x)
threads = torch.get_num_threads()
print(f"{world.rank} {world.world_size} {world.local_rank} {world.backend} {x.item()} {threads}\\n", end="")
finish()
"""


def test_under_torchrun(bare, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(done.stdout.splitlines()) == [f"{rank} 2 {rank} gloo 3.0 {threads}" for rank in range(2)]
