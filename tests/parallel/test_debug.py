"""Ranks that hang, die, stop, raise or call different things: the right one is named, all end in seconds."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from common.cli import UserError
from common.dist import spawn
from parallel.board import FolderBoard, StoreBoard
from parallel.comm import make_comm
from parallel.debug import Watchdog
from parallel.desync import DesyncDetector, DesyncError
from parallel.mesh import Layout, Mesh
from parallel.waits import Error, Status, Waiting, report
from tests.parallel.failures import CASES, LIMIT_S, outcome


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = tmp_path_factory.mktemp("failures")
    with ThreadPoolExecutor(3) as pool:  # they mostly wait
        return dict(zip(CASES, pool.map(lambda case: outcome(case, root / case), CASES), strict=True))


def lines(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_a_rank_that_comes_late_is_found_with_its_stack(outcomes):
    late = outcomes["late"]
    assert late.codes == [1, 1, 1, 1]
    assert late.seconds < LIMIT_S + 15
    assert lines(
        late.text, "rank 2 waits in all_reduce no 0 of tp (ranks 2, 3; 64 KiB float32; grads of blocks.1) for "
    )
    assert lines(late.text, "rank 0 waits in barrier no 0 of dp+tp (ranks 0, 1, 2, 3) for ")
    assert lines(late.text, "rank 3 is in no collective") and lines(late.text, "in busy_elsewhere")
    assert lines(late.text, "no 0 of tp (ranks 2, 3) lacks rank 3")
    assert sum("rank 2 waits" in text for text in late.texts) == 1  # one report, not four
    status = Status.from_json((late.folder / "reports" / "status-2.json").read_text())
    assert [(call.name, call.number, call.group, call.payload) for call in status.waiting] == [
        ("all_reduce", 0, "tp", 65536)
    ]
    assert "case_late" in status.stacks[0]
    assert (late.folder / "reports" / "report.txt").read_text().strip() in late.text


def test_a_rank_that_is_only_slow_is_left_alone(outcomes):
    assert outcomes["slow"].codes == [0, 0, 0, 0]
    assert outcomes["slow"].text == ""


def test_a_rank_that_is_killed_is_named(outcomes):
    killed = outcomes["killed"]
    assert killed.codes == [1, -9, 1, 1]
    assert "rank 1 died: its process is gone" in killed.text
    assert not any(f"rank {rank} died" in killed.text for rank in (0, 2, 3))
    assert lines(killed.text, "step 3") or lines(killed.text, "then raised")


def test_a_rank_that_is_gone_is_missed_by_ranks_that_compute(outcomes):
    assert outcomes["vanished"].codes == [1, 7, 1, 1]
    assert "rank 1 died: its process is gone" in outcomes["vanished"].text
    assert lines(outcomes["vanished"].text, "rank 3 is in no collective")


def test_a_rank_that_is_stopped_is_named_and_ended(outcomes):
    stopped = outcomes["stopped"]
    assert stopped.codes == [1, 1, -9, 1]
    assert lines(stopped.text, "rank 2 is stopped (SIGSTOP")
    assert lines(stopped.text, "rank 1 waits in all_reduce no 0 of dp+tp", "loss")
    assert lines(stopped.text, "lacks rank 2")


def test_different_collectives_are_reported(outcomes):
    different = outcomes["different"]
    assert different.codes == [1, 1, 1, 1]
    assert lines(different.text, "no 0 of dp+tp", "different collectives, all_gather and all_reduce")


def test_a_bug_of_one_rank_shows_its_traceback_once(outcomes):
    raising = outcomes["raising"]
    assert raising.codes == [1, 1, 1, 1]
    assert len(lines(raising.text, "RuntimeError: a bug of rank 2")) == 1
    assert lines(raising.text, "rank 2 raised") and lines(raising.text, "in case_raising")


def test_what_the_user_did_wrong_is_said_once(outcomes):
    for case, text in (
        ("user_alike", "error: heads 3: expected a multiple of tp 2"),
        ("user_one", "error: rank 1: no space left on the disk of rank one"),
        ("command_line", "error: argument --tp: expected a whole number, got '4'x"),
    ):
        assert outcomes[case].codes == [2, 2, 2, 2], case
        assert len(outcomes[case].text.splitlines()) == 1 and outcomes[case].text.strip().endswith(text), case
    assert outcomes["user_alike"].texts[1:] == ["", "", ""]  # rank 0 speaks


def test_a_rank_that_is_there_twice_is_refused(outcomes):
    twice = outcomes["twice"]
    assert twice.codes == [2, 2, 2, 2]
    assert len(twice.text.splitlines()) == 1 and "error: rank 2 is there twice: process" in twice.text


def test_a_rank_that_ended_early_is_named(outcomes):
    ended = outcomes["ended"]
    assert ended.codes == [1, 1, 1, 0]
    assert "rank 3 has ended" in ended.text


def test_sigterm_within_a_collective_is_answered(outcomes):
    terminated = outcomes["terminated"]
    assert terminated.codes == [143, 143, 143, 143]
    assert "rank 1 was told to end by SIGTERM" in terminated.text


def test_every_failure_ends_within_seconds(outcomes):
    assert {case: o.seconds for case, o in outcomes.items() if not o.seconds < 20} == {}


def test_the_report_is_a_function_of_the_statuses():
    call = Waiting("send", "pp", (0, 2), 4, "float32", 3 << 19, 2, "", 7.0)
    statuses = {0: Status(0, (call,), ()), 1: Status(1, (), (), Error("bug", "Traceback\nE: 1\n", 1))}
    text = report(Error("bug", "late", 1), statuses, {2: "elsewhere", 3: "gone"})
    assert text.splitlines() == [
        "rank 2 does not answer; it is on another machine",
        "rank 3 died: its process is gone",
        "rank 1 then raised E: 1",
        "rank 0 waits in send no 4 of pp to rank 2 (ranks 0, 2; 1.5 MiB float32) for 7.0 s",
    ]
    with pytest.raises(ValueError, match="limit_s 0"):
        Watchdog(None, 0, 1, limit_s=0)
    with Watchdog(None, 0, 1):  # a world of one: nothing to watch
        pass


def test_boards_keep_the_last_note_and_the_first_of_those_that_are_once(tmp_path):
    for board in (FolderBoard(tmp_path / "board"), StoreBoard(dist.HashStore())):
        assert board.read("a") is None
        board.post("a", "1")
        board.post("a", "2")
        assert board.read("a") == "2"
        assert board.post_once("b", "mine") and not board.post_once("b", "theirs")
        assert board.read("b") == "mine"
        with pytest.raises(ValueError, match="key"):
            board.post("../a", "x")


def desync_cases(rank, world_size, folder):
    """What each rank is told when the ranks do not call the same, and that equal calls pass."""
    mesh = Mesh(Layout(dp=2, tp=2), rank, world_size)
    groups = {name: mesh.group(*axes) for name, axes in (("tp", ["tp"]), ("all", ["dp", "tp"]))}
    told = {}

    def case(name, run, limit_s=30.0):
        detector = DesyncDetector(FolderBoard(folder / name), rank, limit_s)
        comms = {label: make_comm(group, listeners=[detector]) for label, group in groups.items()}
        began = time.monotonic()
        try:
            run(comms)
            told[name] = None
        except DesyncError as error:
            told[name] = str(error)
        assert time.monotonic() - began < 40
        dist.barrier()  # also proves that no collective was left half done

    def equal(comms):
        for _ in range(5):
            comms["all"].all_reduce(torch.ones(4), tag=f"tags may differ: {rank}")
            work = comms["tp"].all_gather(torch.ones(2), torch.empty(4), async_=True)
            sent, received = ([1, 2], [1, 3]) if rank % 2 == 0 else ([3, 1], [2, 1])
            comms["tp"].all_to_all(torch.ones(sum(sent)), torch.empty(sum(received)), sent, received)
            work.wait()
        comms["all"].broadcast(torch.ones(1), 2)
        comms["all"].barrier()

    def other_name(comms):
        comms["all"].barrier()
        x = torch.ones(8)
        if rank == 3:
            comms["all"].all_gather(x, torch.empty(32), tag="weights")
        else:
            comms["all"].all_reduce(x, tag="loss")

    def other_group(comms):
        comms["tp" if rank == 2 else "all"].all_reduce(torch.ones(8))

    case("equal", equal)
    case("other_name", other_name)
    case("other_size", lambda comms: comms["tp"].all_reduce(torch.ones(8 + rank)))
    case("other_dtype", lambda comms: comms["all"].all_reduce(torch.ones(8, dtype=DTYPES[rank])))
    case("other_op", lambda comms: comms["all"].all_reduce(torch.ones(8), "mean" if rank == 2 else "sum"))
    case("other_source", lambda comms: comms["all"].broadcast(torch.ones(8), rank // 2))
    case("other_group", other_group, 5.0)
    case("absent", lambda comms: comms["all"].barrier() if rank else None, 0.5)
    return told


DTYPES = [torch.float32, torch.int32, torch.float32, torch.float32]


def test_a_desync_is_told_on_all_ranks_before_anything_hangs(tmp_path):
    told = spawn(desync_cases, 4, tmp_path)
    assert [t["equal"] for t in told] == [None] * 4
    everyone = {
        "other_name": "call no 1 of dp+tp (ranks 0, 1, 2, 3) is not the same on all: ranks 0, 1, 2 all_reduce sum 32 B "
        "float32 (loss); rank 3 all_gather 128 B float32 (weights)",
        "other_dtype": "call no 0 of dp+tp (ranks 0, 1, 2, 3) is not the same on all: ranks 0, 2, 3 all_reduce sum 32 "
        "B float32; rank 1 all_reduce sum 32 B int32",
        "other_op": "call no 0 of dp+tp (ranks 0, 1, 2, 3) is not the same on all: ranks 0, 1, 3 all_reduce sum 32 "
        "B float32; rank 2 all_reduce mean 32 B float32",
        "other_source": "call no 0 of dp+tp (ranks 0, 1, 2, 3) is not the same on all: ranks 0, 1 broadcast 32 B "
        "float32 from 0; ranks 2, 3 broadcast 32 B float32 from 1",
    }
    for case, text in everyone.items():
        assert [t[case] for t in told] == [text] * 4
    assert told[2]["other_size"] == told[3]["other_size"]
    assert "rank 2 all_reduce sum 40 B float32; rank 3 all_reduce sum 44 B float32" in told[2]["other_size"]
    assert "rank 2 is in all_reduce sum 32 B float32 no 0 of tp (ranks 2, 3)" in told[3]["other_group"]
    assert "rank 3 is in all_reduce sum 32 B float32 no 0 of dp+tp (ranks 0, 1, 2, 3)" in told[2]["other_group"]
    assert all("rank 0 has called nothing for 0.5 s" in t["absent"] for t in told[1:])


def test_twice_the_same_rank(tmp_path):
    board = FolderBoard(tmp_path)
    with Watchdog(board, 0, 2):
        assert json.loads(board.read("rank-0"))["pid"] > 0
        with pytest.raises(UserError, match="rank 0 is there twice"):
            Watchdog(board, 0, 2).start()
        FolderBoard(tmp_path).folder.joinpath("alarm").unlink()  # or the first would end this process
