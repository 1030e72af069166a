"""Examples of the standard library against its own parser and inspect, JSONL line by line, and what is refused."""

import ast
import inspect
import json
import sysconfig
import textwrap
from pathlib import Path

import pytest

from lora.examples import Example, load_jsonl, module_examples, standard_library
from minigpt.corpus import is_held_out

SOURCE = '''
def kept(a, b=1, *, c: int = 2) -> str:
    """Keeps   what it
    is given, in order.

    A second paragraph.
    """

class Owner:
    @property
    def method(self):
        r"""A method counts \\d like a function."""
        def inner(x):
            "Functions in functions count, too."

def short():
    """Too short."""

def no_docstring(a):
    return a

def two_lines(
    a):
    """A signature of two lines is left out."""

def commented(a):  # why
    """A signature with a comment is left out."""

def spelled(a):
    """Call it as spelled(a) and see the answer."""

async def coroutine():
    """Nobody could know that it is one of these."""

def at_the_limit_LONG(a):
    """A signature of just the most characters."""

def above_the_limit_LONG_(a):
    """A signature of one character more than that."""
'''
AT_THE_LIMIT = "at_the_limit_" + "x" * (120 - len("def at_the_limit_(a):"))
SOURCE = SOURCE.replace("at_the_limit_LONG", AT_THE_LIMIT).replace(
    "above_the_limit_LONG", "above_the_limit_" + "x" * (120 - len("def above_the_limit_(a):"))
)


@pytest.fixture(scope="module")
def stdlib():
    return standard_library()


# -- one module --
def test_a_modules_examples_follow_the_written_rules():
    results = list(module_examples(SOURCE.encode()))
    assert [(e.prompt, e.answer) for e, _ in results if e] == [
        ("# kept: Keeps what it is given, in order.", "def kept(a, b=1, *, c: int = 2) -> str:"),
        (r"# method: A method counts \d like a function.", "def method(self):"),
        ("# inner: Functions in functions count, too.", "def inner(x):"),
        (f"# {AT_THE_LIMIT}: A signature of just the most characters.", f"def {AT_THE_LIMIT}(a):"),
    ]
    assert [reason for e, reason in results if e is None] == [
        "a first paragraph of fewer than 20 characters",
        "a signature that is not one line up to its colon",
        "a signature that is not one line up to its colon",
        "a docstring that spells the call",
        "a signature of more than 120 characters",
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_are_those_of_the_parser(newline):
    """Form feeds and other characters that str.splitlines cuts at stand in the library's files."""
    source = 'x = "\u2028\x1c"\n\x0c\ndef found(a):\n    """Its line is counted rightly."""\n'.replace("\n", newline)
    assert [e.answer for e, _ in module_examples(source.encode())] == ["def found(a):"]


def test_a_file_that_does_not_parse_is_a_reason():
    for source in (b"def broken(:", b"x = 1\n  y"):
        assert list(module_examples(source)) == [(None, "a file that does not parse")]
    assert list(module_examples(b"")) == []


# -- the library --
def test_every_answer_is_a_signature_of_the_name_in_its_prompt(stdlib):
    for example in stdlib.train + stdlib.held_out:
        (node,) = ast.parse(example.answer + " pass").body
        name, docstring = example.prompt.removeprefix("# ").split(": ", 1)
        assert isinstance(node, ast.FunctionDef) and node.name == name
        assert len(docstring) >= 20 and "\n" not in example.prompt and f"{name}(" not in docstring
        assert len(example.answer) <= 120 and "\n" not in example.answer and not example.turns


def test_examples_agree_with_inspect(stdlib):
    """The same pairs as the running functions of two modules give, without looking at the text."""
    known = {example.prompt: example.answer for example in stdlib.train + stdlib.held_out}
    checked = 0
    for function in (textwrap.wrap, textwrap.dedent, textwrap.TextWrapper.fill, inspect.getdoc, inspect.unwrap):
        paragraph = " ".join(inspect.getdoc(function).split("\n\n")[0].split())
        answer = known.get(f"# {function.__name__}: {paragraph}")
        if answer is not None:
            (node,) = ast.parse(answer + " pass").body
            expected = inspect.signature(function).parameters
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert [a.arg for a in arguments] == [n for n, p in expected.items() if p.kind not in (2, 4)]
            checked += 1
    assert checked >= 3


def test_sides_are_those_of_the_corpus_and_no_prompt_comes_twice(stdlib):
    prompts = [example.prompt for example in stdlib.train + stdlib.held_out]
    assert len(set(prompts)) == len(prompts)
    root, earlier = Path(sysconfig.get_paths()["stdlib"]), set()
    held_out = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(name.split("/")[:-1]):
            continue
        if is_held_out(name):
            held_out += [e for e, _ in module_examples(path.read_bytes()) if e]
        elif path.name in ("textwrap.py", "argparse.py", "heapq.py"):
            examples = [e for e, _ in module_examples(path.read_bytes()) if e]
            assert {e.prompt for e in examples} <= set(prompts)
            earlier |= {(e.prompt, e.answer) for e in examples}
    assert set(stdlib.held_out) <= set(held_out) and stdlib.held_out
    assert not {(e.prompt, e.answer) for e in stdlib.held_out} & earlier
    assert len(stdlib.train) > 1000 and 0.02 < len(stdlib.held_out) / len(stdlib.train) < 0.15


def library(folder: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return folder


def function(name: str, words: str) -> str:
    return f'def {name}(a):\n    """{words}, which is long enough."""\n'


HELD_OUT = next(f"module{i}.py" for i in range(999) if is_held_out(f"module{i}.py"))
TRAIN = next(f"module{i}.py" for i in range(999) if not is_held_out(f"module{i}.py"))


def test_a_library_of_our_own_is_split_by_module(tmp_path):
    root = library(
        tmp_path,
        {
            HELD_OUT: function("held", "One") + function("both", "Two"),
            TRAIN: function("trained", "Three") + function("both", "Two") + function("trained", "Four"),
            "test/skipped.py": function("skipped", "Five"),
            "broken.py": "def (",
            "empty.py": "",
        },
    )
    examples = standard_library(root)
    first = min(HELD_OUT, TRAIN)  # whose `both` is kept
    both = Example("# both: Two, which is long enough.", "def both(a):")
    assert (both in examples.held_out) == (first == HELD_OUT) and (both in examples.train) == (first == TRAIN)
    assert len(examples.train + examples.held_out) == 4
    assert examples.left_out == (("a file that does not parse", 1), ("the prompt of an earlier example", 1))
    text = examples.describe()
    assert f"{len(examples.train)} for training, {len(examples.held_out)} held out" in text
    assert "left out, the prompt of an earlier example: 1" in text and examples.digest[:12] in text
    assert standard_library(root).digest == examples.digest
    library(tmp_path, {TRAIN: function("trained", "Other")})
    assert standard_library(root).digest != examples.digest


def test_a_library_without_a_side_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no training examples"):
        standard_library(tmp_path)
    with pytest.raises(ValueError, match="no held-out examples"):
        standard_library(library(tmp_path, {TRAIN: function("trained", "Three")}))


# -- JSONL --
def written(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    rows = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def talk(*contents: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def test_jsonl_of_both_kinds(tmp_path):
    path = written(
        tmp_path,
        {"prompt": "p é\u2028\x85", "answer": " a\n", "id": 7},
        b"  ",
        talk("one", "two"),
        b'{"prompt": "", "answer": "x"}\r',
        talk("one", "two", "three", "four", "", "six"),
    )
    assert load_jsonl(path) == (
        Example("p é\u2028\x85", " a\n"),
        Example("one", "two"),
        Example("", "x"),
        Example("", "six", (("one", "two"), ("three", "four"))),
    )
    assert load_jsonl(str(path)) == load_jsonl(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p", "answer": ', "not JSON"),
        (b"prompt", "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b"1" * 10_000, "not JSON"),
        (b'\xef\xbb\xbf{"prompt": "p", "answer": "a"}', "not JSON .*BOM"),
        ([1, 2], r"\[1, 2\]: expected an object, got list"),
        (None, "None: expected an object, got NoneType"),
        ({}, r'keys \[\]: expected "prompt" and "answer", or "messages"'),
        ({"text": "t"}, r"keys \['text'\]"),
        ({"prompt": "p", "answer": "a", "messages": []}, r'expected "prompt" and "answer", or "messages"'),
        ({"prompt": "p"}, r"no \"answer\" beside \['prompt'\]"),
        ({"answer": "a"}, 'no "prompt" beside'),
        ({"prompt": "p", "answer": ""}, "answer '': expected text that is not blank"),
        ({"prompt": "p", "answer": " \n"}, "answer ' .n': expected text that is not blank"),
        ({"prompt": "p", "answer": None}, "answer None: expected a string, got NoneType"),
        ({"prompt": 3, "answer": "a"}, "prompt 3: expected a string, got int"),
        (b'{"prompt": "p", "answer": "\\ud800"}', "answer holds .* at place 0, a lone surrogate"),
        ({"messages": []}, r"messages \[\]: expected a list with at least two"),
        ({"messages": "hello"}, "messages 'hello': expected a list"),
        ({"messages": ["hello"]}, "message 0 'hello': expected an object with"),
        ({"messages": [{"role": "user"}]}, "message 0 .*: expected an object with"),
        ({"messages": [{"role": "system", "content": "s"}]}, "role 'system': expected 'user'; the templates have no"),
        ({"messages": [{"role": "assistant", "content": "s"}]}, "message 0 has role 'assistant': expected 'user'"),
        ({"messages": [{"role": "user", "content": "s"}] * 2}, "message 1 has role 'user': expected 'assistant'"),
        ({"messages": [{"role": "user", "content": 1}]}, "content of message 0 1: expected a string, got int"),
        ({"messages": [{"role": ["user"], "content": "s"}]}, r"role \['user'\]: expected 'user'"),
        (talk("one"), "1 messages: expected the assistant's last"),
        (talk("one", "two", "three"), "3 messages: expected the assistant's last"),
        (talk("one", " "), "content of message 1 ' ': expected an answer that is not blank"),
        (talk("one", "", "three", "four"), "content of message 1 ''"),
    ],
)
def test_jsonl_names_the_file_and_the_line(tmp_path, line, message):
    path = written(tmp_path, {"prompt": "p", "answer": "a"}, b"", line, {"prompt": "p", "answer": "a"})
    with pytest.raises(ValueError, match=message) as caught:
        load_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_jsonl_without_lines_is_refused(tmp_path):
    for content in (b"", b"\n \n"):
        (tmp_path / "none.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"none.jsonl: no lines: expected one example a line"):
            load_jsonl(tmp_path / "none.jsonl")
    for missing in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            load_jsonl(missing)


def test_examples_refuse_what_is_no_text():
    with pytest.raises(ValueError, match="content of a user 1: expected a string"):
        Example("p", "a", ((1, "b"),))
    with pytest.raises(ValueError, match="prompt b'p': expected a string, got bytes"):
        Example(b"p", "a")
