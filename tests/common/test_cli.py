"""The command line generated from a dataclass: each type, presets, every way to be wrong, and how a program ends."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

from common.cli import UserError, parse, parse_explicit, run


@dataclass(frozen=True, slots=True)
class Config:
    batch_size: int = field(default=8, metadata={"help": "sequences a step, 50% of them new"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak"})
    name: str = "run"
    out: Path = Path("runs/default")
    compile: bool = False
    shuffle: bool = True
    kind: Literal["gpt", "mlp"] = "gpt"
    layers: Literal[2, 4] | None = None
    seed: "int | None" = 0
    clip: Optional[float] = None  # noqa: UP045 - both spellings are supported

    def __post_init__(self):
        if not self.batch_size >= 1:
            raise ValueError(f"batch_size must be at least 1,\n  got {self.batch_size}")


@dataclass(frozen=True)
class Required:
    steps: int
    data_path: Path
    factory: str = field(default_factory=lambda: "made")


PRESETS = {"tiny": Config(batch_size=2, name="tiny"), "big": Config(batch_size=64, name="big", compile=True)}
ABOUT = {"prog": "stage.train", "description": "Train it, 100% of it."}


def read(*argv, **options):
    return parse(Config, argv, **ABOUT, **options)


def refused(capsys, *argv, config=Config, **options) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(config, argv, **ABOUT, **options)
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("stage.train: error: ")
    assert printed.err.count("\n") == 1, "one line"
    return printed.err


def test_no_arguments_gives_the_defaults():
    assert read() == Config()


def test_every_type_is_read():
    argv = "--batch-size 1_000 --learning-rate 1e-2 --name x --out a/b --compile --no-shuffle --kind mlp --layers 4"
    config = read(*argv.split(), "--seed", "none", "--clip=0.5")
    assert config == Config(1000, 1e-2, "x", Path("a/b"), True, False, "mlp", 4, None, 0.5)
    assert type(config.layers) is int


def test_argv_defaults_to_the_process_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--batch-size", "3"])
    assert parse(Config, **ABOUT).batch_size == 3


@pytest.mark.parametrize("text", ["-1e-3", "-.5", "-2", "-inf"])
def test_negative_numbers_need_no_equals_sign(text):
    assert read("--learning-rate", text).learning_rate == float(text)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--batch-size", "1e3"], "--batch-size: expected a whole number, got '1e3'"),
        (["--batch-size", "2.0"], "expected a whole number, got '2.0'"),
        (["--learning-rate", "fast"], "--learning-rate: expected a number, got 'fast'"),
        (["--out", ""], "--out: expected a path, got ''"),
        (["--kind", "rnn"], "--kind: expected one of gpt, mlp, got 'rnn'"),
        (["--layers", "3"], "--layers: expected one of 2, 4, got '3'"),
        (["--batch-size", "none"], "expected a whole number, got 'none'"),
        (["--batch", "3"], "--batch 3"),
        (["--batch_size", "3"], "--batch_size 3"),
        (["--unknown"], "--unknown"),
        (["stray"], "stray"),
        (["--name=x", "-1"], "-1"),
        (["--compile", "yes"], "yes"),
        (["--name"], "--name"),
        (["--preset", "tiny"], "--preset"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, argv, says):
    assert says in refused(capsys, *argv)


def test_required_fields(capsys):
    error = refused(capsys, config=Required)
    assert "--steps" in error and "--data-path" in error and "--factory" not in error
    assert parse(Required, ["--steps", "1", "--data-path", "x"], **ABOUT) == Required(1, Path("x"), "made")
    presets = {"one": Required(1, Path("x"))}
    assert "--steps" in refused(capsys, config=Required, presets=presets)
    assert parse(Required, ["--preset", "one", "--steps", "5"], presets=presets, **ABOUT).steps == 5


def test_presets_are_the_base_and_flags_override():
    options = {"presets": PRESETS, "default_preset": "tiny"}
    assert read(**options) == PRESETS["tiny"]
    assert read("--preset", "big", **options) == PRESETS["big"]
    config = read("--no-compile", "--preset", "big", **options)
    assert (config.name, config.compile) == ("big", False)
    assert read(presets=PRESETS) == Config(), "without a default preset the class's defaults are the base"


def test_an_override_is_checked_by_the_config(capsys):
    assert "got 0" in refused(capsys, "--batch-size", "0", presets=PRESETS, default_preset="tiny")


def test_an_unknown_preset(capsys):
    assert "expected one of tiny, big, got 'huge'" in refused(capsys, "--preset", "huge", presets=PRESETS)
    with pytest.raises(ValueError, match="huge"):
        read(presets=PRESETS, default_preset="huge")


def test_explicit_names():
    def names(*argv):
        return parse_explicit(Config, argv, presets=PRESETS, default_preset="tiny", **ABOUT)[1]

    assert names() == frozenset()
    assert names("--batch-size", "2", "--no-compile") == {"batch_size", "compile"}, "also where it equals the default"
    assert names("--preset", "tiny", "--seed", "1") == {"preset", "seed"}


def test_help_shows_help_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help", presets=PRESETS, default_preset="tiny")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for part in ("Train it, 100% of it.", "50% of them new (default: 2)", "peak (default: 0.0003)", "{gpt,mlp}"):
        assert part in text
    assert "--compile, --no-compile" in text and "(default: false)" in text and "{2,4}|none (default: none)" in text


@pytest.mark.parametrize("kind", [list[int], int | str, dict, bool | None, Literal[1.5], tuple, bytes])
def test_a_type_no_flag_can_express_fails_at_once(kind):
    bad = dataclass(type("Bad", (), {"__annotations__": {"good": int, "odd": kind}, "good": 1, "odd": None}))
    with pytest.raises(TypeError, match="odd"):
        parse(bad, [], **ABOUT)


@pytest.mark.parametrize("name", ["help", "preset", "no_compile"])
def test_a_field_whose_flag_is_taken_fails_at_once(name):
    fields = {"compile": bool, name: int}
    bad = dataclass(type("Bad", (), {"__annotations__": fields, "compile": False, name: 1}))
    with pytest.raises(TypeError, match=name):
        parse(bad, [], presets={"x": bad()}, **ABOUT)


def test_a_class_that_is_no_dataclass():
    with pytest.raises(TypeError, match="dataclass"):
        parse(int, [], **ABOUT)


def ending(main) -> int | None:
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code


def raiser(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("code", [None, 0, 1, 7])
def test_run_exits_with_the_code(code):
    assert ending(lambda: code) == code


def test_run_shows_the_users_errors_in_one_line(capsys):
    for error in (UserError("no group\n  here"), ValueError("no group here")):
        assert ending(raiser(error)) == 2
        err = capsys.readouterr().err
        assert err.endswith(": error: no group here\n") and err.count("\n") == 1
    assert ending(lambda: Path("/nonexistent/file").read_text()) == 2
    assert "No such file or directory: /nonexistent/file\n" in capsys.readouterr().err


def test_run_ctrl_c_is_130(capsys):
    assert ending(raiser(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 100_000])  # one is still in the buffer when the program ends
def test_run_stays_silent_when_its_reader_has_enough(lines):
    code = f"from common.cli import run\nrun(lambda: print('line\\n' * {lines}))"
    done = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    done.stdout.close()
    assert done.stderr.read() == b""
    assert done.wait(30) == 141


@pytest.mark.parametrize("error", [TypeError("bug"), RuntimeError("bug"), KeyError("bug"), AssertionError("bug")])
def test_run_lets_a_bug_look_like_one(error):
    with pytest.raises(type(error), match="bug"):
        run(raiser(error))


def test_the_program_is_named_as_it_was_started(tmp_path):
    (tmp_path / "room").mkdir()
    code = "from common.cli import run, UserError\ndef main(): raise UserError('boom')\nrun(main)\n"
    (tmp_path / "room" / "work.py").write_text(code)
    root = Path(__file__).parents[2]
    for start, name in ((["-m", "room.work"], "room.work"), (["room/work.py"], "work.py")):
        done = subprocess.run(
            [sys.executable, *start], cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (2, f"{name}: error: boom\n")


def test_the_light_modules_import_no_torch():
    code = "import sys, common.cli, common.log, common.timing, common.tables; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "False"
