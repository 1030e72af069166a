"""The run log: the same bytes after a kill and a resume, valid JSON, and a progress line on and off a terminal."""

import contextlib
import json
import os
import platform
import pty
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import common.log
from common.log import RunLog, atomic_write, format_duration, git_state, jsonable, read_jsonl, versions


@dataclass(frozen=True, slots=True)
class Config:
    steps: int = 20
    out: Path = Path("runs/x")
    clip: float | None = None
    limit: float = float("inf")


def train(folder: Path, start: int, stop: int, total: int = 20) -> None:
    with RunLog(folder, Config(), total_steps=total, start_step=start) as log:
        for step in range(start + 1, stop + 1):
            log.metrics(step, loss=1 / step, lr=np.float32(0.1), note="é")
            log.timing(step, step_ms=7.5)


@pytest.fixture
def clock(monkeypatch):
    """A settable clock in place of the monotonic one."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(common.log, "monotonic", lambda: Clock.now)
    return Clock


# ---- files


def test_a_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(tmp_path):
    train(tmp_path / "whole", 0, 20)
    train(tmp_path / "killed", 0, 13)  # got to step 13; its last checkpoint is of step 10
    train(tmp_path / "killed", 10, 20)
    for name in ("metrics.jsonl", "timing.jsonl"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert whole.count(b"\n") == 20
        assert (tmp_path / "killed" / name).read_bytes() == whole


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_also_when_the_kill_tore_the_last_line(tmp_path, kept):
    train(tmp_path / "whole", 0, 20)
    train(tmp_path / "torn", 0, 13)
    path = tmp_path / "torn" / "metrics.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[: int(len(last) * kept)])
    train(tmp_path / "torn", 10, 20)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    train(tmp_path, 0, 10)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    train(tmp_path, 10, 10)
    assert path.read_bytes() == whole


def test_a_fresh_start_begins_the_files_anew(tmp_path):
    train(tmp_path, 0, 20)
    train(tmp_path, 0, 3)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_resuming_into_an_empty_folder(tmp_path):
    train(tmp_path / "new", 10, 12)
    assert [row["step"] for row in read_jsonl(tmp_path / "new" / "metrics.jsonl")] == [11, 12]


def test_a_step_that_is_on_file_is_refused(tmp_path):
    train(tmp_path, 0, 10)
    with RunLog(tmp_path, {}, total_steps=20, start_step=10) as log:
        with pytest.raises(ValueError, match="step 10"):
            log.metrics(10, loss=1.0)
        log.metrics(11, loss=1.0)


def test_every_line_is_on_file_at_once(tmp_path):
    with RunLog(tmp_path, {}, total_steps=3) as log:
        log.metrics(1, loss=0.5)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 0.5}\n'
        log.timing(1, step_ms=2)
        assert (tmp_path / "timing.jsonl").read_bytes() == b'{"step": 1, "step_ms": 2}\n'


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_jsonl(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        train(tmp_path, 1, 2)
    assert path.read_text().count("\n") == 3, "left as it was"
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object"):
        read_jsonl(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"line 1: expected a whole number as 'step'"):
        train(tmp_path, 1, 2)


def test_read_jsonl_ignores_a_torn_last_line(tmp_path):
    path = tmp_path / "x.jsonl"
    for tail in (b"", b'{"step": 2, "lo', b'{"step": 2, "note": "\xc3'):
        path.write_bytes(b'{"step": 1}\n' + tail)
        assert read_jsonl(path) == [{"step": 1}]
    path.write_bytes(b"")
    assert read_jsonl(path) == []


def test_nan_and_infinities_are_valid_json(tmp_path):
    with RunLog(tmp_path, {}, total_steps=1) as log:
        log.metrics(1, a=float("nan"), b=float("inf"), c=np.float32("-inf"), d=torch.tensor(float("nan")), e=None)
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(word):
        raise AssertionError(f"bare {word}")

    row = json.loads(text, parse_constant=refuse)
    assert row == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": "nan", "e": None}
    assert float(row["c"]) == -np.inf


def test_jsonable():
    value = {"a": np.arange(3), "b": torch.tensor([1.5]), "c": (Path("x/y"), np.int64(4), np.bool_(True)), 5: Config(3)}
    limits = {"steps": 3, "out": "runs/x", "clip": None, "limit": "inf"}
    assert jsonable(value) == {"a": [0, 1, 2], "b": [1.5], "c": ["x/y", 4, True], "5": limits}
    assert [type(item) for item in jsonable(value)["c"]] == [str, int, bool]
    with pytest.raises(TypeError, match="object"):
        jsonable({"x": object()})


def test_config_json(tmp_path):
    train(tmp_path, 0, 1)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["config"] == {"steps": 20, "out": "runs/x", "clip": None, "limit": "inf"}
    assert about["versions"] == versions()
    assert about["versions"]["python"] == platform.python_version()
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["numpy"] == np.__version__
    (sitting,) = about["sittings"]
    assert sitting["git"] == git_state() and about["platform"] == platform.platform()
    assert sitting["command"].startswith("python") and sitting["start_step"] == 0
    train(tmp_path, 1, 2)
    again = json.loads((tmp_path / "config.json").read_text())["sittings"]
    assert again[0] == sitting and [part["start_step"] for part in again] == [0, 1]


def test_git_state(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(common.log, "ROOT", tmp_path)
    assert git_state() == {"commit": None, "dirty": None}
    git("init")
    (tmp_path / "results").mkdir()
    for name in ("code.py", "README.md", "results/x.json"):
        (tmp_path / name).write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "dirty": False}
    for name in ("README.md", "results/x.json", "new.py"):
        (tmp_path / name).write_text("two")
    assert git_state()["dirty"] is False, "generated files and new ones do not count"
    (tmp_path / "code.py").write_text("two")
    assert git_state() == {"commit": commit, "dirty": True}


def test_the_disabled_log_writes_and_prints_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", {}, total_steps=2, enabled=False) as log:
        for step in (1, 2):
            log.metrics(step, loss=1)
            log.timing(step, ms=1)
            log.progress(step, loss=1)
            log.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("start", "total"), [(-1, 5), (6, 5), (float("nan"), 5)])
def test_a_start_outside_the_run_is_refused(tmp_path, start, total):
    with pytest.raises(ValueError, match="start_step"):
        RunLog(tmp_path, {}, total_steps=total, start_step=start)


def test_atomic_write(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    atomic_write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    other = tmp_path / "plain"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode, "readable by whom the umask allows"
    with pytest.raises(TypeError):
        atomic_write(path, 5)
    assert path.read_bytes() == b"\x00", "a failed write leaves the old file"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"], "and no temporary one"


# ---- progress


def test_without_a_terminal_plain_lines_now_and_then(tmp_path, capsys, clock):
    with RunLog(tmp_path, {}, total_steps=1000) as log:
        for step in range(1, 1001):
            clock.now += 0.001
            log.progress(step, loss=2 / 3)
            if step == 500:
                log.message("half")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "\r" not in out and "\x1b" not in out
    assert "half" in lines
    assert len(lines) == 22, "the first, each 5%, the last, and the message"
    assert lines[-1].split() == ["100%", "step", "1000/1000", "loss", "0.6667", "eta", "0:00"]


def test_without_a_terminal_a_slow_run_prints_every_ten_seconds(tmp_path, capsys, clock):
    with RunLog(tmp_path, {}, total_steps=1000) as log:
        for step in range(1, 25):
            clock.now += 1
            log.progress(step)
    steps = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["1/1000", "11/1000", "21/1000", "24/1000"], "and the last state at the end"


@contextlib.contextmanager
def terminal():
    """stdout as a terminal of 60 columns; yields a function that gives what was printed since. Not a fixture: pytest
    puts its own stdout in place again between a fixture and its test."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)  # a test that prints nothing must fail rather than wait

    def printed() -> str:
        text = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                text += os.read(ours, 4096)
        return text.decode().replace("\r\n", "\n")

    with pytest.MonkeyPatch.context() as patch, open(theirs, "w") as stream:
        patch.setenv("COLUMNS", "60")
        patch.setenv("TERM", "xterm")
        patch.setattr("sys.stdout", stream)
        yield printed
    os.close(ours)


def test_on_a_terminal_one_live_line(tmp_path, clock):
    with terminal() as printed:
        with RunLog(tmp_path, {}, total_steps=100) as log:
            for step in range(1, 51):
                clock.now += 0.02
                log.progress(step, loss=0.5, text="x" * 50)
        out = printed()
    draws = out.split("\r")[1:]
    assert len(draws) in (10, 11, 12), "1 s at 10 redraws a second, and the last state"
    assert out.count("\n") == 1 and out.endswith("\x1b[K\n")
    assert all(len(draw.removesuffix("\n").removesuffix("\x1b[K")) <= 59 for draw in draws), "never wraps"
    assert draws[-1].startswith("[==========..........]   50%  step  50/100  loss 0.5")


def test_on_a_terminal_a_message_stands_above_the_line(tmp_path, clock):
    with terminal() as printed:
        with RunLog(tmp_path, {}, total_steps=100) as log:
            log.message("before")
            log.progress(1)
            log.message("between")
        out = printed()
    line = "\r[....................]    1%  step   1/100  eta 0:00\x1b[K"
    assert out == f"\r\x1b[Kbefore\n{line}\r\x1b[Kbetween\n{line}{line}\n"


def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    with terminal() as printed:
        monkeypatch.setenv("TERM", "dumb")
        with RunLog(tmp_path, {}, total_steps=1) as log:
            log.progress(1)
        assert printed() == "100%  step 1/1  eta 0:00\n"


def test_the_time_left_counts_from_the_end_of_the_first_step(tmp_path, capsys, clock):
    with RunLog(tmp_path, {}, total_steps=110, start_step=10) as log:
        clock.now += 500  # compilation
        log.progress(11)
        clock.now += 50 * 3
        log.progress(61)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"eta {format_duration(500 * 99)}")
    assert second.endswith("eta 2:27"), "49 steps of 3 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (3599.7, "1:00:00"),
        (3661, "1:01:01"),
        (86400 * 2 + 3 * 3600 + 4 * 60 + 5, "2d 03:04:05"),
        (float("nan"), "--:--"),
        (float("inf"), "--:--"),
        (-1, "--:--"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
