"""Continues a text with a trained GPT: `python -m minigpt.sample --folder runs/minigpt --prompt "def "`.

The model is a run of ours or, with --hf, a folder of Hugging Face weights with their tokenizer.json. In our runs a
document begins with the separator, so that comes before the prompt. Hugging Face models read the prompt as it is, after
<|begin_of_text|> where the tokenizer has one (Llama 3); an empty prompt is the separator. A sample ends after `length`
tokens, at a stop string, or where the model ends the document. Refused: settings out of range, a prompt longer than the
context.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch

from common import cli
from minigpt.checkpoint import load_run
from minigpt.generate import generate, stream_text
from minigpt.hf import load_pretrained
from minigpt.model import GPT
from minigpt.sampling import Sampling
from minigpt.tokenizer import Tokenizer

BEGIN = "<|begin_of_text|>"
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """The flags that sampling and chatting share."""

    folder: Path = field(default=Path("runs/minigpt"), metadata={"help": "folder of the run that has the model"})
    hf: Path | None = field(default=None, metadata={"help": "folder of a Hugging Face model, instead of a run"})
    length: int = field(default=200, metadata={"help": "tokens to write at most"})
    temperature: float = field(default=0.8, metadata={"help": "logits are divided by it; 0 takes the likeliest token"})
    top_k: int = field(default=0, metadata={"help": "only the k likeliest tokens; 0 for all"})
    top_p: float = field(default=1.0, metadata={"help": "only the likeliest tokens that are p together"})
    min_p: float = field(default=0.0, metadata={"help": "only tokens p times as likely as the likeliest"})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1: tokens already there become less likely"}
    )
    seed: int = field(default=0, metadata={"help": "same seed, same text; further samples take the next seeds"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "where the model runs"})

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length {self.length}: expected at least 1")
        self.sampling()  # checks the rest

    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling.__slots__})


@dataclass(frozen=True, slots=True)
class SampleConfig(SourceConfig):
    prompt: str = field(default="", metadata={"help": "how the document begins"})
    samples: int = field(default=1, metadata={"help": "how many, computed as one batch and shown one after another"})
    stop: str | None = field(default=None, metadata={"help": "text at which a sample ends"})
    cache: bool = field(default=True, metadata={"help": "keep keys and values instead of reading the text afresh"})

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)  # slots make a new class, of which a bare super() knows nothing
        if self.samples < 1:
            raise ValueError(f"samples {self.samples}: expected at least 1")
        if self.stop == "":
            raise ValueError("stop '': expected a text, or none")


@dataclass(frozen=True, slots=True)
class Source:
    """A model with its tokenizer, and the tokens that open and end its documents."""

    model: GPT
    tokenizer: Tokenizer
    opening: tuple[int, ...]

    @property
    def ends(self) -> frozenset[int]:
        special = self.tokenizer.special
        return frozenset({self.tokenizer.separator, *(special[name] for name in ENDS if name in special)})

    def document(self, prompt: str) -> list[int]:
        return [*self.opening, *self.tokenizer.encode(prompt).tolist()] or [self.tokenizer.separator]


def load_source(config: SourceConfig) -> Source:
    """Raises ValueError naming the folder where it holds no model, or the device where there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds none here, expected cpu")
    if config.hf is None:
        model, tokenizer = load_run(config.folder)
        return Source(model.to(config.device), tokenizer, (tokenizer.separator,))
    tokenizer = Tokenizer.load(config.hf)
    opening = (tokenizer.special[BEGIN],) if BEGIN in tokenizer.special else ()
    return Source(load_pretrained(config.hf, device=config.device), tokenizer, opening)


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, *, length: int, sampling: Sampling) -> str:
    """What a model trained here writes after the prompt, at most `length` tokens."""
    source = Source(model, tokenizer, (tokenizer.separator,))
    rows = generate(
        model,
        [source.document(prompt)],
        max_new_tokens=length,
        sampling=sampling,
        stop_tokens=source.ends,
        vocab_size=tokenizer.vocab_size,
    )
    return "".join(stream_text(document_tokens((token for (token,) in rows), source.ends), tokenizer))


def document_tokens(tokens: Iterable[int | None], ends: frozenset[int]) -> Iterator[int]:
    """A row's tokens up to where it ended."""
    return takewhile(lambda token: token is not None and token not in ends, tokens)


def write_samples(config: SampleConfig, source: Source, steps: Iterable[list[int | None]]) -> None:
    """One sample while it comes, several when all are done."""
    stop = () if config.stop is None else (config.stop,)
    rows = [(token for (token,) in steps)] if config.samples == 1 else zip(*steps, strict=True)
    for number, row in enumerate(rows):
        if config.samples > 1:
            print(f"--- sample {number + 1} of {config.samples}, seed {config.seed + number}")
        sys.stdout.write(config.prompt)
        for text in stream_text(document_tokens(row, source.ends), source.tokenizer, stop):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")


class Counter:
    """Passes steps on and counts the tokens in them."""

    def __init__(self, steps: Iterable[list[int | None]]):
        self.steps, self.tokens, self.started = steps, 0, time.monotonic()

    def __iter__(self) -> Iterator[list[int | None]]:
        for step in self.steps:
            self.tokens += sum(token is not None for token in step)
            yield step

    def report(self) -> str:
        seconds = time.monotonic() - self.started
        return f"{self.tokens:,} tokens in {seconds:.2f} s, {self.tokens / seconds:,.1f} tokens/s"


def main() -> None:
    config = cli.parse(SampleConfig, prog=cli.program(), description="continue a text with a trained GPT")
    source = load_source(config)
    steps = Counter(
        generate(
            source.model,
            [source.document(config.prompt)] * config.samples,
            max_new_tokens=config.length,
            sampling=config.sampling(),
            stop_tokens=source.ends,
            vocab_size=source.tokenizer.vocab_size,
            use_cache=config.cache,
        )
    )
    write_samples(config, source, steps)
    print(steps.report(), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
