"""Conversations: which tokens the turns become, that what the cache keeps changes nothing, and the loop's commands."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from minigpt.chat import HELP, TEMPLATES, Conversation, converse, joined
from minigpt.checkpoint import TOKENIZER, save_checkpoint
from minigpt.config import GPTConfig
from minigpt.generate import generate
from minigpt.model import GPT
from minigpt.sample import Source
from minigpt.sampling import Sampling
from minigpt.tokenizer import Tokenizer
from tests.minigpt.programs import ROOT

GREEDY = Sampling(temperature=0)
BYTES = Tokenizer.bytes_only()
SPECIAL = {
    "plain": ["<|endoftext|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
TOKENIZERS = {
    kind: Tokenizer(BYTES.ranks, BYTES.pattern, {name: 256 + i for i, name in enumerate(names)})
    for kind, names in SPECIAL.items()
}


def random_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "context": 64, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 16}
    model = GPT(GPTConfig(**{**sizes, **changes})).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + (p.ndim == 1))
        model.head.weight *= 3
    return model


def conversation(kind: str = "plain", *, length: int = 10, sampling: Sampling = GREEDY, use_cache=True, **changes):
    tokenizer = TOKENIZERS[kind]
    opening = [tokenizer.special.get("<|begin_of_text|>", tokenizer.separator)]
    source = Source(random_gpt(**changes), tokenizer, tuple(opening))
    return Conversation(source, sampling=sampling, length=length, template=kind, use_cache=use_cache)


def said(talk: Conversation, *lines: str) -> str:
    out: list[str] = []
    converse(talk, [line + "\n" for line in lines], out.append)
    return "".join(out)


# What two turns are, written out; {a} stands for the first answer's tokens.
SPELLED_OUT = {
    "plain": "<|endoftext|>hé\n{a}\nyou <|im_end|>\n",
    "chatml": "<|endoftext|><|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
    "<|im_start|>user\nyou <|im_end|><|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhé<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{a}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nyou <|im_end|><|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_turns_are_the_template_spelled_out(kind):
    """A special token's name in what the user writes stays text."""
    talk = conversation(kind, length=6, context=200)
    first = "".join(talk.answer("hé"))
    answer = talk.rows.windows[0][len(talk.rows.windows[0]) - 6 :]
    "".join(talk.answer("you <|im_end|>"))
    before, after = SPELLED_OUT[kind].split("{a}")
    encode, mark = TOKENIZERS[kind].encode, "\1"
    harmless = after.replace("you <|im_end|>", mark)
    left, right = (encode(part, allowed_special="all").tolist() for part in harmless.split(mark))
    user = encode("you <|im_end|>").tolist()
    wanted = [*encode(before, allowed_special="all").tolist(), *answer, *left, *user, *right]
    assert talk.rows.windows[0][: len(wanted)] == wanted
    assert TOKENIZERS[kind].decode(answer) == first


@torch.no_grad()
def whole_conversation_by_hand(talk: Conversation, lines: list[str]) -> str:
    """Every token by reading the whole text again, from half a context before where it last overflowed."""
    model, tokenizer, out, tokens, start = talk.source.model, talk.source.tokenizer, "", [], 0
    context = model.config.context
    for number, line in enumerate(lines):
        turn = tokenizer.encode(("\n" if number else "") + line + "\n").tolist()
        batches = [turn if number else [tokenizer.separator, *turn]]
        answer = []
        for _ in range(talk.length):
            for batch in batches:
                tokens += batch
                start = start if len(tokens) - start <= context else len(tokens) - context // 2
            token = int(model(torch.tensor([tokens[start:]]))[0, -1, : tokenizer.vocab_size].argmax())
            batches = []
            if token == tokenizer.separator:
                break
            answer.append(token)
            batches = [[token]]
        for batch in batches:
            tokens += batch
            start = start if len(tokens) - start <= context else len(tokens) - context // 2
        out += tokenizer.decode(answer)
    return out


LINES = ["def f(x):", "é", "and a longer line than the others", "x", "y", "z" * 70, "and on"]


def test_cached_turns_are_the_whole_conversation_read_again():
    """Over more than two contexts, with a line longer than the context."""
    talk = conversation(length=20)
    answers = "".join(piece for line in LINES for piece in talk.answer(line))
    assert answers == whole_conversation_by_hand(conversation(length=20), LINES)
    assert talk.dropped > 64


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, repetition_penalty=1.2)], ids=str)
def test_the_cache_changes_nothing(kind, sampling):
    texts = [said(conversation(kind, length=15, sampling=sampling, use_cache=c), *LINES) for c in (True, False)]
    assert texts[0] == texts[1] and len(texts[0]) > 60


def test_an_answer_is_what_generate_writes_after_the_turn():
    """With a penalty on what the user wrote too; at an end token both stop."""
    lengths = set()
    for seed in range(6):
        sampling = Sampling(temperature=3.0, repetition_penalty=1.5, seed=seed)
        talk = conversation(sampling=sampling, length=100)
        options = {"max_new_tokens": 100, "sampling": sampling, "stop_tokens": [256], "vocab_size": 257}
        tokens = [token for (token,) in generate(talk.source.model, [[256, *b"hello\n"]], **options)]
        ended = tokens[-1] == 256
        assert "".join(talk.answer("hello")) == BYTES.decode(tokens[:-1] if ended else tokens)
        lengths.add(ended)
    assert lengths == {True, False}


def test_only_new_tokens_are_read():
    talk, read = conversation(length=3, context=200), []
    talk.source.model.embedding.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    said(talk, "abc", "de")
    assert read == [5, 1, 1, 5, 1, 1], "separator abc newline; the unread last token, newline, de, newline"


def test_a_full_context_is_noted():
    out = said(conversation(length=10), "a" * 50, "b")
    assert out.count("[the context of 64 was full: the oldest") == 1
    assert "oldest 33 tokens are forgotten]\n" in out


def test_reset_starts_again_as_new():
    sampling = Sampling(temperature=1.0, seed=4)
    first = said(conversation(sampling=sampling), "abc")
    assert said(conversation(sampling=sampling), "x", "/reset", "abc").endswith(first)
    assert said(conversation(sampling=sampling), "x", "abc") != said(conversation(sampling=sampling), "x") + first


def test_temperature_and_seed_are_changed():
    drawn = conversation(sampling=Sampling(temperature=1.0, seed=4))
    assert said(drawn, "/temperature 0", "abc") == said(conversation(), "abc")
    assert said(drawn, "/reset", "/temperature 1", "/seed 9", "abc") == said(
        conversation(sampling=Sampling(temperature=1.0, seed=9)), "abc"
    )


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/help", HELP),
        ("/nonsense 3", f"[no command /nonsense: expected one of these]\n{HELP}"),
        ("/temperature", "[/temperature '': expected a number]\n"),
        ("/temperature -1", "[temperature -1.0: expected 0 (greedy) or a positive number]\n"),
        ("/seed 1.5", "[/seed '1.5': expected a whole number]\n"),
        ("/seed -1", "[seed -1: expected 0 to 2**63 - 1]\n"),
        ("", ""),
    ],
)
def test_commands_and_their_errors_leave_the_conversation_as_it_is(line, answer):
    first = said(conversation(), "abc")
    assert said(conversation(), line, "abc") == answer + first
    assert said(conversation(), line, "/quit", "abc") == answer


def test_lines_are_continued_by_a_backslash():
    assert list(joined(["a\\\n", "b\n", "c\\\n", "\\\n", "d\n", "e\\"])) == ["a\nb", "c\n\nd", "e"]
    assert said(conversation(), "a\\", "b") == said(conversation(), "a\\", "b", "/quit")


def test_an_interrupted_answer_stays_and_the_conversation_goes_on(monkeypatch):
    talk, out = conversation(), []

    def write(text: str) -> None:
        out.append(text)
        if sum(map(len, out)) >= 3 and not any("stopped" in piece for piece in out):
            raise KeyboardInterrupt

    converse(talk, ["abc\n", "x\n"], write)
    text = "".join(out)
    assert " [stopped]\n" in text and len(text) > len(" [stopped]\n") + 10
    window = talk.rows.windows[0]
    with torch.no_grad():
        talk.rows.push(0, [5])
        kept = talk.rows.logits()[0]
        fresh = talk.source.model(torch.tensor([[*window, 5]]))[0, -1]
    assert (kept - fresh).abs().max().item() <= 1e-12


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_a_template_without_its_tokens_is_refused(kind):
    source = Source(random_gpt(), BYTES, (256,))
    with pytest.raises(ValueError, match=rf"template {kind}: the tokenizer lacks .*; it has <\|endoftext\|>"):
        Conversation(source, sampling=GREEDY, length=3, template=kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("run"), random_gpt().float()
    save_checkpoint(folder, 3, {"model_config": asdict(model.config)}, {"model": model.state_dict()}, 1)
    BYTES.save(folder / TOKENIZER)
    return folder


def heed_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that it starts: these tests, say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def program(folder):
    """Starts the program with pipes; killed at the end if it is still there."""
    started = []

    def start(*flags: str) -> subprocess.Popen:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-m", "minigpt.chat", "--folder", str(folder), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=heed_interrupts, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_as_a_process_fed_by_a_pipe(program):
    process = program("--temperature", "0", "--length", "12")
    out, err = process.communicate("äb\n/help\nx".encode(), timeout=60)
    talk = Conversation(Source(random_gpt().float(), BYTES, (256,)), sampling=GREEDY, length=12)
    assert process.returncode == 0 and not err and out.decode() == said(talk, "äb", "/help", "x")


def test_ctrl_c_stops_the_answer_of_a_process(program):
    """The program goes on with the next line and leaves at the end of the pipe. Greedily, this model never ends."""
    process = program("--length", "1000000", "--temperature", "0")
    process.stdin.write(b"abc\n")
    process.stdin.flush()
    assert process.stdout.read(5), "the answer has begun"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"/help\n", timeout=60)
    assert process.returncode == 0 and not err
    stopped, note, commands = out.decode(errors="replace").partition(" [stopped]\n")
    assert note and commands.endswith(HELP)
