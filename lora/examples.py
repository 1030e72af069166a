"""Fine-tuning examples: a prompt and its answer, from the Python standard library or from a JSONL file.

The default task needs no download: from the name and the docstring of a function, write its signature. Held-out
examples come from held-out modules, by the rule of minigpt/corpus.py. A JSONL line is {"prompt": .., "answer": ..} or
{"messages": [{"role": .., "content": ..}, ..]}, a talk whose last answer is to be learned; which special tokens mark
the turns is said when they are encoded (lora/packing.py). Refused, with file and line: what is not JSON, not an
object, of the wrong type, an empty answer, roles that do not take turns; and a file without lines.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt.corpus import is_held_out, python_files, read_text

LONGEST_SIGNATURE = 120  # characters
SHORTEST_DOCSTRING = 20  # characters of its first paragraph

Turn = tuple[str, str]  # what the user said, what the assistant answered


@dataclass(frozen=True, slots=True)
class Example:
    """`answer` is to be written after `prompt`; `turns` of the same talk came before."""

    prompt: str
    answer: str
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("answer", self.answer)):
            _check_text(name, text)
        for turn in self.turns:
            for name, text in zip(("content of a user", "content of an assistant"), turn, strict=True):
                _check_text(name, text)
        if not self.answer.strip():
            raise ValueError(f"answer {self.answer!r}: expected text that is not blank")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} {text!r:.60}: expected a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at place {error.start}"
        raise ValueError(f"{name} holds {found}, a lone surrogate: expected characters") from None


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples of both sides in the order of file and line, and what was left out, by reason."""

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    left_out: tuple[tuple[str, int], ...]

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over side and text of every example, in order."""
        sides = (("train", self.train), ("held_out", self.held_out))
        rows = [[side, e.turns, e.prompt, e.answer] for side, examples in sides for e in examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def describe(self) -> str:
        text = (
            f"examples {self.name}: {len(self.train)} for training, {len(self.held_out)} held out, "
            f"digest {self.digest[:12]}"
        )
        return text + "".join(f"\n  left out, {reason}: {count}" for reason, count in self.left_out)


# -- the standard library --
def standard_library(root: Path | None = None) -> ExampleSet:
    """Signatures from docstrings, from the *.py below `root` that minigpt/corpus.py counts as the standard library.

    Kept is a function with a one-line signature of at most LONGEST_SIGNATURE characters and a docstring whose first
    paragraph has at least SHORTEST_DOCSTRING; not one whose docstring spells a call of it, which gives the answer away.
    Of equal prompts the first stays, whichever side it is on. Raises ValueError when a side has no example.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    train, held_out, prompts = [], [], set()
    left_out: Counter[str] = Counter()
    for name in python_files(root):
        side = held_out if is_held_out(name) else train
        for example, reason in module_examples(read_text(root / name)[0]):
            if example is not None and example.prompt in prompts:
                example, reason = None, "the prompt of an earlier example"
            if example is None:
                left_out[reason] += 1
            else:
                prompts.add(example.prompt)
                side.append(example)
    for side, examples in (("training", train), ("held-out", held_out)):
        if not examples:
            raise ValueError(f"{root}: no {side} examples: expected functions with docstrings in modules of both sides")
    return ExampleSet("stdlib", tuple(train), tuple(held_out), tuple(sorted(left_out.items())))


def module_examples(source: bytes) -> Iterator[tuple[Example | None, str]]:
    """(example, "") or (None, why not) of each function that has a docstring, in the order of lines.

    A function nested in another and a method count too; a coroutine does not, since neither name nor docstring tells.
    A file that does not parse is one reason.
    """
    # Newlines as the parser counts them; str.splitlines would cut at form feeds, which the library has.
    text = source.decode().replace("\r\n", "\n").replace("\r", "\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in strings that Python will refuse one day
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        yield None, "a file that does not parse"
        return
    lines = text.split("\n")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in sorted(functions, key=lambda node: (node.lineno, node.col_offset)):
        if docstring := ast.get_docstring(node):
            yield function_example(node, docstring, lines[node.lineno - 1].strip())


def function_example(node: ast.FunctionDef, docstring: str, line: str) -> tuple[Example | None, str]:
    """The example, or the reason against it. `line` is where `def` stands."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    if len(paragraph) < SHORTEST_DOCSTRING:
        return None, f"a first paragraph of fewer than {SHORTEST_DOCSTRING} characters"
    if f"{node.name}(" in paragraph:
        return None, "a docstring that spells the call"
    if len(line) > LONGEST_SIGNATURE:
        return None, f"a signature of more than {LONGEST_SIGNATURE} characters"
    if not is_whole_signature(line):
        return None, "a signature that is not one line up to its colon"
    return Example(f"# {node.name}: {paragraph}", line), ""


def is_whole_signature(line: str) -> bool:
    """Whether the line is `def name(arguments):` and nothing else: with a body after it, and only then, it parses."""
    try:
        (node,) = ast.parse(f"{line} pass").body
    except (SyntaxError, ValueError):
        return False
    return line.endswith(":") and isinstance(node, ast.FunctionDef) and len(node.body) == 1


# -- JSONL --
def load_jsonl(path: Path | str) -> tuple[Example, ...]:
    """The examples of a UTF-8 file, one a line, in order; blank lines are passed over.

    Keys other than "prompt" and "answer", or "messages", are ignored. A ValueError names the file and the line.
    """
    path, examples = Path(path), []
    if not path.is_file():
        raise ValueError(f"{path}: no such file: expected a JSONL file")
    with path.open("rb") as lines:  # bytes: they are cut at \n alone, not at other characters that end lines
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                examples.append(parse_line(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: no lines: expected one example a line")
    return tuple(examples)


def parse_line(line: bytes) -> Example:
    """The example of one line. Raises ValueError saying what is wrong with it."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{row!r:.60}: expected an object, got {type(row).__name__}")
    if ("messages" in row) == ("prompt" in row or "answer" in row):
        raise ValueError(f'keys {sorted(row)}: expected "prompt" and "answer", or "messages"')
    if "messages" in row:
        return talk_example(row["messages"])
    if missing := [key for key in ("prompt", "answer") if key not in row]:
        raise ValueError(f'no "{missing[0]}" beside {sorted(row)}: expected "prompt" and "answer"')
    return Example(row["prompt"], row["answer"])


def talk_example(messages: object) -> Example:
    """The last answer of a talk; user and assistant take turns, the user first, the assistant last."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages {messages!r:.60}: expected a list with at least two")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f'message {place} {message!r:.60}: expected an object with "role" and "content"')
        role = ("user", "assistant")[place % 2]
        if message["role"] != role:
            hint = "; the templates have no system prompt" if message["role"] == "system" else ""
            raise ValueError(f"message {place} has role {message['role']!r:.60}: expected {role!r}{hint}")
        _check_text(f"content of message {place}", message["content"])
        if role == "assistant" and not message["content"].strip():
            raise ValueError(f"content of message {place} {message['content']!r}: expected an answer that is not blank")
    if len(messages) % 2:
        raise ValueError(f"{len(messages)} messages: expected the assistant's last, after each of the user's")
    contents = [message["content"] for message in messages]
    turns = list(zip(contents[::2], contents[1::2], strict=True))
    return Example(*turns[-1], turns=tuple(turns[:-1]))
