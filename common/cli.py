"""A command line generated from a frozen dataclass, and the way a program ends.

One field is one flag: `learning_rate: float` becomes `--learning-rate FLOAT`, a bool becomes `--flag / --no-flag`.
Refused: abbreviated or unknown flags, positional arguments, sub-commands, nested configs, lists. Range checks belong to
the config's `__post_init__`; a ValueError raised there ends as one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
NONE = "none"  # the word that gives None to a field of type `X | None`


class UserError(RuntimeError):
    """A failure meant for the user rather than for the programmer: `run` shows it as one line, without a traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage block: the usage of a config with thirty fields buries the message."""
        self.exit(2, f"{self.prog}: error: {_one_line(message)}\n")


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    presets: Mapping[str, Config] | None = None,
    default_preset: str | None = None,
    prog: str,
    description: str,
) -> Config:
    """The config that `argv` (default: `sys.argv[1:]`) describes.

    Fields are of type int, float, str, bool, Path, `Literal[...]` of str or int, or one of these (but bool) `| None`,
    where the word `none` gives None; help comes from `field(metadata={"help": ...})`. With `presets`, `--preset NAME`
    chooses the base that the other flags override; without it the base is `default_preset`, else the class's defaults.
    Ends the process with code 2 and one line on stderr when the user is wrong; raises TypeError for a field type that
    no flag can express.
    """
    options = {"presets": presets, "default_preset": default_preset, "prog": prog, "description": description}
    return parse_explicit(config_class, argv, **options)[0]


def parse_explicit(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    presets: Mapping[str, Config] | None = None,
    default_preset: str | None = None,
    prog: str,
    description: str,
) -> tuple[Config, frozenset[str]]:
    """`parse`, and the names of the fields whose own flag was given; an explicit `--preset` adds the name "preset"."""
    presets = presets or {}
    if default_preset is not None and default_preset not in presets:
        raise ValueError(f"default_preset {default_preset!r} is not among the presets {sorted(presets)}")
    parser = _build(config_class, presets, default_preset, prog, description)
    tokens = _attach_negative_numbers(sys.argv[1:] if argv is None else argv)
    namespace, unknown = parser.parse_known_args(tokens)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(unknown, parser)}")
    given = vars(namespace)
    explicit = frozenset(given)
    base = presets.get(given.pop("preset", default_preset)) if presets else None
    missing = (
        [] if base is not None else [f.name for f in _fields(config_class) if _required(f) and f.name not in given]
    )
    if missing:
        parser.error(f"required: {', '.join(map(_flag, missing))}")
    try:
        config = config_class(**given) if base is None else dataclasses.replace(base, **given)
    except ValueError as error:
        parser.error(str(error))
    return config, explicit


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls `main` and exits with its code (None is 0).

    UserError, ValueError and FileNotFoundError are the user's: one line on stderr, exit code 2. Ctrl-C is 130, and 141,
    without a word, is an output whose reader has enough (`| head`). Anything else keeps its traceback, because a bug
    must look like one.
    """
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says at its end what it cannot flush
        sys.exit(141)
    except KeyboardInterrupt:
        print(f"\n{program()}: interrupted", file=sys.stderr)
        sys.exit(130)
    except FileNotFoundError as error:
        _fail(f"{error.strerror}: {error.filename}" if error.filename is not None else str(error))
    except (UserError, ValueError) as error:
        _fail(str(error) or type(error).__name__)
    sys.exit(code)


def program() -> str:
    """`minigpt.train` under `python -m minigpt.train`, else the script's file name."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name


def _fail(message: str) -> NoReturn:
    print(f"{program()}: error: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _build(config_class, presets, default_preset, prog, description) -> argparse.ArgumentParser:
    if not (isinstance(config_class, type) and dataclasses.is_dataclass(config_class)):
        raise TypeError(f"config_class must be a dataclass, got {config_class!r}")
    # argument_default=SUPPRESS: only what the user gave reaches the namespace, which is what parse_explicit reports.
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if presets:
        text = "the base that the other flags override" + (f" (default: {default_preset})" if default_preset else "")
        parser.add_argument("--preset", help=text, **_choices({name: name for name in presets}))
    base = presets.get(default_preset)
    hints = get_type_hints(config_class)
    for field in _fields(config_class):
        try:
            parser.add_argument(_flag(field.name), help=_help(field, base), **_options(field.name, hints[field.name]))
        except argparse.ArgumentError as error:  # a field called `help`, `preset`, or `no_x` beside a bool `x`
            raise TypeError(f"{config_class.__name__}.{field.name} cannot be a flag: {error}") from None
    return parser


def _nearest(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    """`; did you mean --batch-size?`, where there are flags that begin with an unknown one, or are like it."""
    known = [flag for action in parser._actions for flag in action.option_strings]
    flags = [text.partition("=")[0] for text in unknown if text.startswith("--")]
    longer = {flag: [name for name in known if len(flag) > 3 and name.startswith(flag)][:2] for flag in flags}
    near = [name for flag in flags for name in longer[flag] or difflib.get_close_matches(flag, known, n=2, cutoff=0.7)]
    return f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""


def _fields(config_class: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(config_class) if field.init]


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(field: dataclasses.Field, base: object | None) -> str:
    if base is not None:
        default = _show(getattr(base, field.name))
    elif field.default_factory is not dataclasses.MISSING:
        default = _show(field.default_factory())
    else:
        default = _show(field.default)
    note = "(required)" if base is None and _required(field) else f"(default: {default})"
    return f"{field.metadata.get('help', '')} {note}".strip().replace("%", "%%")  # argparse expands % in help


def _show(value: object) -> str:
    if value is None:
        return NONE
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(name: str, annotation: Any) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for a field of this type."""
    inner, optional = _strip_none(annotation)
    if inner is bool and not optional:
        return {"action": argparse.BooleanOptionalAction}
    convert, metavar = _converter(name, annotation, inner)
    if not optional:
        return {"type": convert, "metavar": metavar}
    return {"type": lambda text: None if text == NONE else convert(text), "metavar": f"{metavar}|{NONE}"}


def _strip_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [member for member in get_args(annotation) if member is not type(None)]
    return (members[0], True) if len(members) == 1 else (annotation, False)


def _converter(name: str, annotation: Any, inner: Any) -> tuple[Callable[[str], Any], str]:
    simple = {int: (_whole, "INT"), float: (_number, "FLOAT"), str: (str, "TEXT"), Path: (_path, "PATH")}
    if get_origin(inner) is Literal and all(type(value) in (int, str) for value in get_args(inner)):
        options = _choices({str(value): value for value in get_args(inner)})
        return options["type"], options["metavar"]
    if inner not in simple:
        raise TypeError(
            f"field {name!r}: no flag for type {annotation!r}; "
            "expected int, float, str, bool, Path, Literal of str or int, or one of these (but bool) | None"
        )
    return simple[inner]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _path(text: str) -> Path:
    if not text:  # Path("") is the current folder: an unset shell variable would quietly write there
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def _choices(by_text: Mapping[str, object]) -> dict[str, Any]:
    """Our own instead of argparse's `choices`, whose wording and quoting change between Python versions."""

    def convert(text: str) -> object:
        if text not in by_text:
            near = difflib.get_close_matches(text, by_text, n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(by_text)}, got {text!r}{hint}")
        return by_text[text]

    return {"type": convert, "metavar": "{" + ",".join(by_text) + "}"}


def _attach_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--bias -1e-3` as `--bias=-1e-3`: argparse knows `-1` for a number but takes `-1e-3` and `-inf` for flags."""
    tokens: list[str] = []
    for token in argv:
        if (
            token.startswith("-")
            and _is_number(token)
            and tokens
            and tokens[-1].startswith("--")
            and "=" not in tokens[-1]
        ):
            tokens[-1] += f"={token}"
        else:
            tokens.append(token)
    return tokens


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
