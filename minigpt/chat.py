"""Talks with a GPT in the terminal: `python -m minigpt.chat --folder runs/minigpt`, or `--hf path` for other models.

A base model has no turns: what you write is appended as plain text with a newline, and it goes on from there. The
templates chatml (Qwen) and llama3 mark the turns with special tokens, if the tokenizer has them. Only new tokens are
read; when the context is full the oldest half is dropped, with a note. Lines can come from a pipe. Refused: a template
that the tokenizer has no tokens for; what you write never becomes a special token. There is no system prompt.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from common import cli
from minigpt.generate import Rows, stream_text
from minigpt.sample import Source, SourceConfig, load_source
from minigpt.sampling import Sampler, Sampling

HELP = """/reset            forget the conversation and start again, with the same seed
/temperature 0.5  how freely to draw; 0 takes the likeliest token
/seed 7           draw from this seed on
/help             this list
/quit             leave; so does Ctrl-D
A backslash at the end of a line continues it on the next, a space before / makes it text. Ctrl-C stops an answer.
"""


@dataclass(frozen=True, slots=True)
class Template:
    """Text before and after what the user writes, and what closes an answer when the next turn comes."""

    before: str
    after: str
    closing: str


TEMPLATES = {
    "plain": Template("", "\n", "\n"),
    "chatml": Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    "llama3": Template(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}
SPECIAL = re.compile(r"(<\|\w+\|>)")


@dataclass(frozen=True, slots=True)
class ChatConfig(SourceConfig):
    template: Literal["plain", "chatml", "llama3"] = field(default="plain", metadata={"help": "what marks the turns"})


class Conversation:
    """The running text of one conversation. Raises ValueError for a template that the tokenizer lacks tokens for."""

    def __init__(
        self, source: Source, *, sampling: Sampling, length: int, template: str = "plain", use_cache: bool = True
    ):
        self.source, self.length, self.use_cache = source, length, use_cache
        self.template, self.sampling = TEMPLATES[template], sampling
        special = source.tokenizer.special
        wanted = SPECIAL.findall(self.template.before + self.template.after + self.template.closing)
        if missing := sorted(set(wanted) - set(special)):
            raise ValueError(
                f"template {template}: the tokenizer lacks {' '.join(missing)}; it has {' '.join(special) or 'none'}"
            )
        self.reset()

    def reset(self) -> None:
        self.rows = Rows(self.source.model, 1, use_cache=self.use_cache)
        self.sampler = Sampler(self.sampling, 1, self.source.tokenizer.vocab_size)
        self.dropped, self.started = 0, False

    def set_temperature(self, temperature: float) -> None:
        self.sampling = replace(self.sampling, temperature=temperature)
        self.sampler.sampling = self.sampling

    def set_seed(self, seed: int) -> None:
        self.sampling = replace(self.sampling, seed=seed)
        self.sampler.reseed(seed)

    def turn_tokens(self, text: str) -> list[int]:
        """The tokens that a turn of the user appends. Only the template's special tokens become one token each."""
        template, tokenizer = self.template, self.source.tokenizer
        closing = template.closing if self.started else ""
        tokens = [] if self.started else list(self.source.opening)
        # A mark for the text that no template contains, put in after the special tokens are cut out.
        for piece in SPECIAL.split(closing + template.before + "\0" + template.after):
            if SPECIAL.fullmatch(piece):
                tokens.append(tokenizer.special[piece])
            elif piece:
                tokens += tokenizer.encode(piece.replace("\0", text)).tolist()
        return tokens

    def answer(self, text: str) -> Iterator[str]:
        """Appends the user's turn and yields the answer as it comes; what has come when you stop it stays."""
        tokens = self.turn_tokens(text)
        self.started = True
        self._push(tokens)
        yield from stream_text(self._answer_tokens(), self.source.tokenizer)

    def _answer_tokens(self) -> Iterator[int]:
        ends = self.source.ends
        for _ in range(self.length):
            token = self.sampler.choose(self.rows.logits())[0]
            if token in ends:
                return
            self._push([token])
            yield token

    def _push(self, tokens: list[int]) -> None:
        self.sampler.note(0, tokens)
        self.dropped += self.rows.push(0, tokens)


def converse(conversation: Conversation, lines: Iterable[str], write: Callable[[str], object]) -> None:
    """The loop: answers each line, or obeys it when it is a command, until /quit or the end of the lines."""
    for text in joined(lines):
        try:
            if text.startswith("/"):
                if not obey(conversation, text, write):
                    return
            elif text:
                reply(conversation, text, write)
        except ValueError as error:
            write(f"[{error}]\n")


def joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines without their newlines; one with a backslash at its end takes the next one in, after a newline."""
    begun: list[str] = []
    for line in lines:
        line = line.removesuffix("\n")
        begun.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(begun)
            begun = []
    if begun:
        yield "\n".join(begun)


def reply(conversation: Conversation, text: str, write: Callable[[str], object]) -> None:
    dropped = conversation.dropped
    try:
        for piece in conversation.answer(text):
            write(piece)
    except KeyboardInterrupt:
        write(" [stopped]")
    write("\n")
    if conversation.dropped > dropped:
        context = conversation.source.model.config.context
        forgotten = conversation.dropped - dropped
        write(f"[the context of {context} was full: the oldest {forgotten} tokens are forgotten]\n")


def obey(conversation: Conversation, text: str, write: Callable[[str], object]) -> bool:
    """Whether the conversation goes on. Raises ValueError for a value that is not one."""
    name, _, value = text.partition(" ")
    match name:
        case "/quit":
            return False
        case "/reset":
            conversation.reset()
        case "/temperature":
            conversation.set_temperature(_number(float, name, value))
        case "/seed":
            conversation.set_seed(_number(int, name, value))
        case "/help":
            write(HELP)
        case _:
            write(f"[no command {name}: expected one of these]\n{HELP}")
    return True


def _number(convert: type[float] | type[int], name: str, text: str) -> float:
    try:
        return convert(text)
    except ValueError:
        raise ValueError(f"{name} {text!r}: expected {'a number' if convert is float else 'a whole number'}") from None


def terminal_lines() -> Iterator[str]:
    """Lines of stdin; a prompt where somebody types. Ctrl-C abandons a line, Ctrl-D ends them."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them
    print("/help lists the commands")
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    config = cli.parse(ChatConfig, prog=cli.program(), description="talk with a GPT")
    source = load_source(config)
    conversation = Conversation(source, sampling=config.sampling(), length=config.length, template=config.template)
    converse(conversation, terminal_lines(), show)


if __name__ == "__main__":
    cli.run(main)
