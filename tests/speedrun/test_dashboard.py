"""The live view: drawn into a terminal of our own, at many sizes, while it is resized, and when a run breaks off."""

import contextlib
import itertools
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.log import RunLog
from speedrun import dashboard
from speedrun.dashboard import Dashboard, width_of
from speedrun.presets import PRESETS
from tests.minigpt.programs import ROOT

CONFIG = replace(PRESETS["smoke"], steps=100, compile=True)
TITLE = ("runs/x", "corpus stdlib", "0.1 M parameters in float32", "cpu, 1 rank")
SEQUENCE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")


class Terminal:
    """Enough of a terminal: it wraps, scrolls, and breaks long lines anew when it becomes narrower. As sys.stdout."""

    encoding = "utf-8"

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self.columns, self.height = columns, lines
        self.rows, self.wrapped = [""], [False]  # all rows since the start; whether one goes on in the next
        self.y, self.x, self.cursor, self.writes, self.text = 0, 0, True, 0, ""

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def write(self, text: str) -> None:
        self.writes, self.text = self.writes + 1, self.text + text
        while text:
            if found := SEQUENCE.match(text):
                self._control(*found.groups())
                text = text[found.end() :]
            else:
                self._letter(text[0])
                text = text[1:]

    def _control(self, private: str, number: str, letter: str) -> None:
        if private:
            assert number in ("25", "2026")
            self.cursor = (letter == "h") if number == "25" else self.cursor
        elif letter == "A":
            self.y = max(self.y - int(number or 1), len(self.rows) - self.height, 0)
        elif letter in "KJ":
            self.rows[self.y], self.wrapped[self.y] = self.rows[self.y][: self.x], False
            if letter == "K":
                return
            del self.rows[self.y + 1 :], self.wrapped[self.y + 1 :]
        else:
            assert letter == "m", letter

    def _letter(self, letter: str) -> None:
        assert letter.isprintable() or letter in "\r\n", repr(letter)
        if letter == "\r":
            self.x = 0
        elif letter == "\n":
            self._down()
        else:
            if self.x == self.columns:
                self.wrapped[self.y] = True
                self._down()
            row = self.rows[self.y].ljust(self.x)
            self.rows[self.y] = row[: self.x] + letter + row[self.x + 1 :]
            self.x += 1

    def _down(self) -> None:
        self.y, self.x = self.y + 1, 0
        if self.y == len(self.rows):
            self.rows.append("")
            self.wrapped.append(False)

    def resize(self, columns: int, lines: int) -> None:
        rows, wrapped, y = [], [], 0
        for number, row in enumerate(self.rows):
            if number == self.y:
                y = len(rows)
            pieces = [row[i : i + columns] for i in range(0, max(len(row), 1), columns)]
            rows += pieces
            wrapped += [*[True] * (len(pieces) - 1), self.wrapped[number]]
        self.rows, self.wrapped, self.y, self.columns, self.height = rows, wrapped, y, columns, lines

    def shown(self) -> list[str]:
        return [row.rstrip() for row in self.rows]


@contextlib.contextmanager
def terminal(columns: int = 80, lines: int = 24, **environment: str):
    """Not a fixture: pytest puts its own stdout in place again between a fixture and its test."""
    ours = Terminal(columns, lines)
    with pytest.MonkeyPatch.context() as patch:
        ours.patch = patch
        patch.delenv("NO_COLOR", raising=False)
        for name, value in {"TERM": "xterm", **environment}.items():
            patch.setenv(name, value)
        patch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((ours.columns, ours.height)))
        patch.setattr("sys.stdout", ours)
        yield ours


@pytest.fixture
def clock(monkeypatch):
    ours = SimpleNamespace(now=1000.0)
    for module in ("speedrun.dashboard", "common.log"):
        monkeypatch.setattr(f"{module}.monotonic", lambda: ours.now)
    return ours


def step(log: RunLog, clock: SimpleNamespace, number: int, seconds: float = 1.0, **more: float) -> None:
    """A step as the loop files it."""
    clock.now += seconds
    log.timing(number, step_ms=1e3 * seconds, tokens_per_s=256 / seconds, mfu=0.25, memory_bytes=1.5e9,
               data_ms=100.0, forward_ms=300.0, backward_ms=500.0, communication_ms=0.0, other_ms=100.0)  # fmt: skip
    log.metrics(number, loss=6 - number / 50, train_bits_per_byte=2.5, lr_share=0.5, **more)
    log.progress(number, loss=6 - number / 50)


def view(**options) -> Dashboard:
    return Dashboard(TITLE, CONFIG, target="target 1.35 bits per byte", **options)


EXPECTED = """\
runs/x  corpus stdlib  0.1 M parameters in float32  cpu, 1 rank
 50%  ████████████████████░░░░░░░░░░░░░░░░░░░░  50/100  eta 0:50  clock 0:50
loss        5.880  ⠉⠉⠉⠉⠉⠉⠉⠉⠑⠒⠒⠤⠤⢄⣀⣀
now 5.000                           ⠈⠉⠉⠒⠒⠤⠤⢄⣀⣀
            5.000                             ⠈⠉⠉⠒⠒⠤⠤⢄⣀⣀⡀
bits/byte  held out 3.1250 at step 40  target 1.35 bits per byte  train 2.500
speed      256 tokens/s  MFU 25.0%  1,000 ms a step  1.50 GB
schedule   rate 50% of its peak  4 rows of 64 tokens
a step     data 10%  forward 30%  backward 50%  other 10%  DDFFFFFFBBBBBBBBBB.."""


def run_to(folder, clock, screen, last: int, **options) -> None:
    with RunLog(folder, {}, total_steps=100, view=view(**options)) as log:
        log.message("the corpus")
        for number in range(1, last + 1):
            step(log, clock, number, **({"held_out_look": 3.125} if number % 40 == 0 else {}))
            if number == 20:
                log.message("two lines\nof a message")


def test_what_is_drawn(tmp_path, clock):
    with terminal() as screen:
        run_to(tmp_path, clock, screen, 50)
    lines = screen.shown()
    assert lines[:3] == ["the corpus", "two lines", "of a message"]
    drawn, expected = lines[3:-1], EXPECTED.splitlines()
    for number in (0, 1, 5, 6, 7, 8):
        assert drawn[number] == expected[number]
    assert lines[-1] == "" and (screen.x, screen.y) == (0, len(lines) - 1) and screen.cursor, (
        "rests below the last line"
    )
    assert [line[:19] for line in drawn[2:5]] == ["loss        5.880  ", "now 5.000          ", "            5.000  "]
    assert dots("\n".join(line[19:].ljust(60, chr(0x2800)) for line in drawn[2:5])) == fallen(120)


def dots(text: str) -> list[int]:
    """Of each column of dots the height of the highest one, from the pictures of the Unicode standard."""
    rows = text.split("\n")
    places = {1: (0, 0), 2: (1, 0), 3: (2, 0), 4: (0, 1), 5: (1, 1), 6: (2, 1), 7: (3, 0), 8: (3, 1)}  # number of a dot
    heights = [-1] * (2 * max(map(len, rows)))
    for y, row in enumerate(rows):
        for x, letter in enumerate(row):
            for number, (down, right) in places.items():
                if (ord(letter) - 0x2800) >> (number - 1) & 1:
                    at = 2 * x + right
                    heights[at] = max(heights[at], 4 * len(rows) - 1 - 4 * y - down)
    return heights


def fallen(columns: int) -> list[int]:
    """The curve of losses 5.98, 5.96, ... 5.00 in twelve levels: the scale begins after the first tenth."""
    losses = [6 - number / 50 for number in range(1, 51)]
    values = [losses[column * 50 // columns] for column in range(columns)]
    low, high = min(values[columns // 10 :]), max(values[columns // 10 :])
    levels = [round((min(value, high) - low) / (high - low) * 11) for value in values]
    joined = [max(level, before - 1) for level, before in zip(levels[1:], levels, strict=False)]
    return [levels[0], *joined]


@pytest.mark.parametrize(
    ("columns", "lines"), [*itertools.product((1, 2, 7, 20, 39, 40, 41, 60, 80, 200), (2, 3, 5, 9, 24))]
)
def test_no_size_breaks_it(tmp_path, clock, columns, lines):
    with terminal(columns, lines) as screen:
        board = view()
        with RunLog(tmp_path, {}, total_steps=100, view=board) as log:
            for number in range(1, 60):
                step(log, clock, number, held_out_look=3.125)
        frame = board.frame(columns - 1, lines - 1)
    assert not any(screen.wrapped), "nothing wraps"
    assert all(width_of(line) <= max(columns - 1, 1) for line in frame) and len(frame) <= lines - 1
    assert screen.shown() == ["".join(text for text, _ in line).rstrip() for line in frame] + [""], (
        "drawn once, in place"
    )
    assert len(frame) >= min(lines - 1, 4) or columns < 20


def test_a_number_that_does_not_fit_is_left_out_rather_than_cut(clock):
    board = view()
    board.take(1, {"loss": 5.0, "train_bits_per_byte": 2.125, "held_out_look": 3.0625})
    whole = {"3.0625", "2.125", "1.35", "5.000"}
    with terminal():
        for width in range(1, 100):
            text = " ".join(part for line in board.frame(width, 20) for part, _ in line)
            assert {number for number in re.findall(r"\d+\.\d+", text) if number != "0.1"} <= whole, (width, text)


def test_resized_while_it_runs(tmp_path, clock):
    with terminal(100, 30) as screen:
        board = view()
        with RunLog(tmp_path, {}, total_steps=100, view=board) as log:
            log.message("first")
            sizes = [(100, 50), (33, 50), (61, 40), (20, 60), (120, 40), (50, 50)]
            for number, size in enumerate(sizes, start=1):
                screen.resize(*size)
                step(log, clock, number)
                drawn = ["".join(text for text, _ in line).rstrip() for line in board.frame(size[0] - 1, size[1] - 1)]
                assert screen.shown() == ["first", *drawn, ""] and not any(screen.wrapped), size
            screen.resize(20, 8)  # what of the old lines has left the screen above cannot be taken back
            step(log, clock, 7)
            drawn = ["".join(text for text, _ in line).rstrip() for line in board.frame(19, 7)]
            assert screen.shown()[-len(drawn) - 1 :] == [*drawn, ""] and len(drawn) == 5


def test_drawn_at_most_ten_times_a_second(tmp_path, clock):
    with terminal() as screen, RunLog(tmp_path, {}, total_steps=100, view=view()) as log:
        for number in range(1, 101):
            step(log, clock, number, seconds=0.01)
        assert 9 <= screen.writes <= 12


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_the_terminal_as_it_was(tmp_path, clock, error):
    with terminal() as screen:
        with pytest.raises(error), RunLog(tmp_path, {}, total_steps=100, view=view()) as log:
            for number in (1, 2, 3):
                step(log, clock, number, seconds=0.001)  # too soon to be drawn
            raise error
        assert screen.cursor and screen.x == 0 and screen.shown()[-1] == ""
        assert screen.text.endswith("\x1b[J\x1b[?25h\x1b[?2026l")
        assert "3/100" in screen.shown()[1], "with the last state"
        opened = re.findall(r"\x1b\[\?25([hl])", screen.text)
        assert opened == ["l", "h"] * (len(opened) // 2), "hidden within a drawing only"


def test_a_program_in_a_real_terminal_stopped_by_ctrl_c():
    code = """
import itertools, pathlib, sys, tempfile, time
from dataclasses import replace
from common import cli
from common.log import RunLog
from speedrun.dashboard import Dashboard
from speedrun.presets import PRESETS
def main():
    view = Dashboard(("in a terminal",), replace(PRESETS["smoke"], steps=10**6))
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, {}, total_steps=10**6, view=view) as log:
        for step in itertools.count(1):
            log.metrics(step, loss=1 / step)
            log.progress(step)
            time.sleep(0.005)
cli.run(main)
"""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm", "COLUMNS": "70", "LINES": "20", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    text, pressed = b"", False
    with contextlib.suppress(OSError):  # the terminal is closed when the program has ended
        while piece := os.read(ours, 65536):
            text += piece
            if text.count(b"loss") >= 5 and not pressed:
                process.send_signal(signal.SIGINT)
                pressed = True
    assert process.wait(60) == 130, text
    os.close(ours)
    screen = Terminal(70, 20)
    screen.write(text.decode().replace("\r\n", "\n"))
    lines = screen.shown()
    assert screen.cursor and not any(screen.wrapped) and "Traceback" not in text.decode()
    assert sum("in a terminal" in line for line in lines) == 1 and lines[-2].endswith("interrupted")


def test_plain_lines_where_nothing_can_be_drawn_over(tmp_path, capsys):
    run = SimpleNamespace()  # nothing of it is looked at
    assert dashboard.view(run) is None
    with terminal(TERM="dumb"):
        assert dashboard.view(run) is None


def test_without_colours(tmp_path, clock):
    with terminal() as coloured:
        run_to(tmp_path / "a", clock, coloured, 50)
    with terminal(NO_COLOR="1") as plain:
        run_to(tmp_path / "b", clock, plain, 50)
    assert "\x1b[1m" in coloured.text and not re.search(r"\x1b\[\d*m", plain.text)
    assert plain.shown() == coloured.shown()


@pytest.mark.parametrize(("encoding", "kind"), [("ascii", "xterm"), ("latin-1", "xterm"), ("utf-8", "linux")])
def test_ascii_where_blocks_and_braille_do_not_arrive(tmp_path, clock, encoding, kind):
    with terminal(TERM=kind) as screen:
        screen.encoding = encoding
        run_to(tmp_path, clock, screen, 50)
    assert screen.text.isascii()
    lines = screen.shown()[3:]
    assert lines[1].startswith(" 50%  [===================...................]  50/100")
    assert (
        lines[2][19:].startswith("'''")
        and lines[4].endswith(".")
        and set("".join(lines[2:5])) <= set("lossnow0123456789 '-.")
    )


def test_a_name_cannot_move_the_cursor():
    with terminal() as screen:
        board = Dashboard(("a\x1b[2Jb\n", "漢字", "e\u0301"), CONFIG)
        board.message("hello")
        assert "漢" not in screen.text and screen.shown()[1] == "a?[2Jb?  ??  e?"


def test_a_resumed_run_goes_on_with_its_curve(tmp_path, clock):
    rows = [{"step": n, "loss": 6 - n / 50, "lr_share": 1.0} for n in range(1, 31)]
    rows[19]["held_out_look"] = 3.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(PRESETS["smoke"], folder=tmp_path, resume=True)
    world = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    model = SimpleNamespace(num_parameters=lambda: 4_917_696)
    run = SimpleNamespace(config=config, world=world, dtype=torch.bfloat16, model=model, step=25, seconds=75.0)
    with terminal(300) as screen:
        board = dashboard.view(run, "laptop")
        assert board.losses.values == [6 - n / 50 for n in range(1, 26)], "not the steps that a kill has undone"
        with RunLog(tmp_path, {}, total_steps=40, start_step=25, view=board) as log:
            step(log, clock, 26, seconds=2.0)
    text = "\n".join(screen.shown())
    for part in ("preset smoke  track laptop", "4.9 M parameters in bfloat16", "2 ranks", "26/40", "clock 1:17",
                 "held out 3.5000 at step 20", "target 1.35 bits per byte"):  # fmt: skip
        assert part in text


def test_a_target_in_nats_per_token(tmp_path, clock):
    """Five held-out tokens after the first, of nine bytes: one bit per byte is 9/5 ln 2 nats per token."""
    data = SimpleNamespace(held_out=np.array([0, 1, 0, 1, 1, 1]), held_out_bytes=10, byte_lengths=np.array([1, 2]))
    config, world = (
        replace(PRESETS["smoke"], folder=tmp_path),
        SimpleNamespace(world_size=1, device=torch.device("cpu")),
    )
    model = SimpleNamespace(num_parameters=lambda: 1)
    run = SimpleNamespace(config=config, world=world, dtype=torch.float32, model=model, step=0, seconds=0.0, data=data)
    with terminal(200) as screen:
        board = dashboard.view(run, "fineweb")
        with RunLog(tmp_path, {}, total_steps=40, view=board) as log:
            step(log, clock, 10, held_out_look=2.0)
    wanted = f"held out 2.0000 at step 10  {2 * 9 / 5 * math.log(2):.4f} nats per token  target 3.28 nats per token"
    assert wanted in "\n".join(screen.shown())


def test_the_time_left_leaves_the_first_steps_out(tmp_path, clock):
    with terminal() as screen, RunLog(tmp_path, {}, total_steps=100, view=view()) as log:
        log.message("x")
        assert "0/100  the first step compiles" in screen.shown()[2]
        step(log, clock, 1, seconds=500)
        assert "eta 13:45:00" in screen.shown()[2], "nothing else is known yet"
        step(log, clock, 51, seconds=150)
    assert "51/100  eta 2:27" in screen.shown()[2], "49 steps of 3 s"


def test_the_last_look_is_at_all_of_the_text(tmp_path, clock):
    with terminal() as screen, RunLog(tmp_path, {}, total_steps=100, view=view()) as log:
        step(log, clock, 100, held_out_bits_per_byte=1.23456)
    assert "held out 1.2346 on all of it" in "\n".join(screen.shown()) and "100%" in screen.shown()[1]
