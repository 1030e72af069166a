"""Continues a text with a trained GPT, byte by byte: `python -m minigpt.sample --folder runs/minigpt --prompt "def "`.

A sample ends after `length` bytes, or where the model ends the document. Bytes are shown as UTF-8 while they come; what
is no UTF-8 shows as the replacement character. Each byte runs the model over its last `context` bytes afresh: there is
no key/value cache yet. Refused: a negative temperature, a top_k beyond the vocabulary, a prompt with the byte 0.
"""

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from minigpt.checkpoint import load_model
from minigpt.data import SEPARATOR, VOCAB_SIZE
from minigpt.model import GPT


@dataclass(frozen=True, slots=True)
class SampleConfig:
    folder: Path = field(default=Path("runs/minigpt"), metadata={"help": "folder of the run to sample from"})
    prompt: str = field(default="", metadata={"help": "how the document begins"})
    length: int = field(default=500, metadata={"help": "bytes to write at most"})
    temperature: float = field(default=0.8, metadata={"help": "logits are divided by it; 0 takes the likeliest byte"})
    top_k: int = field(default=0, metadata={"help": "only the k likeliest bytes; 0 for all"})
    seed: int = field(default=0, metadata={"help": "same seed, same sample"})

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length {self.length}: expected at least 1")
        if not (0 <= self.temperature < float("inf")):
            raise ValueError(f"temperature {self.temperature}: expected 0 or a positive number")
        if not (0 <= self.top_k <= VOCAB_SIZE):
            raise ValueError(f"top_k {self.top_k}: expected 0 to {VOCAB_SIZE}")
        if not (0 <= self.seed < 2**63):
            raise ValueError(f"seed {self.seed}: expected 0 to 2**63 - 1")
        if "\0" in self.prompt:
            raise ValueError(f"prompt {self.prompt!r}: the byte 0 separates documents and cannot be in one")


def next_token(logits_V: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Drawn from softmax(logits / temperature) over the top_k likeliest tokens; temperature 0 is the argmax."""
    if not torch.isfinite(logits_V).all():
        raise ValueError("the logits are not finite: the checkpoint's weights are broken")
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k:
        kept = logits_V.topk(top_k)
        logits_V = torch.full_like(logits_V, -torch.inf).scatter(0, kept.indices, kept.values)
    # Relative to the largest, so that a tiny temperature gives -inf for the others instead of inf for all.
    scaled_V = ((logits_V - logits_V.max()) / temperature).nan_to_num(nan=0.0, neginf=-torch.inf)
    return int(torch.multinomial(scaled_V.softmax(dim=0), 1, generator=generator))


@torch.no_grad()
def generate(
    model: GPT, prompt: bytes, *, length: int, temperature: float, top_k: int = 0, seed: int = 0
) -> Iterator[int]:
    """Yields up to `length` bytes after the separator and the prompt; stops where the model starts a new document."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    tokens = [SEPARATOR, *prompt]
    for _ in range(length):
        window_1T = torch.tensor([tokens[-model.config.context :]], device=device)
        logits_V = model(window_1T)[0, -1].float().cpu()
        token = next_token(logits_V, temperature=temperature, top_k=top_k, generator=generator)
        if token == SEPARATOR:
            return
        tokens.append(token)
        yield token


def as_text(tokens: Iterator[int]) -> Iterator[str]:
    """The text of the bytes as soon as each character is whole; malformed bytes become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(bytes([token]))
    yield decoder.decode(b"", final=True)


def main() -> None:
    config = cli.parse(SampleConfig, prog=cli.program(), description="continue a text with a trained GPT")
    model = load_model(config.folder / "checkpoint.pt")
    tokens = generate(
        model,
        config.prompt.encode(),
        length=config.length,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
    )
    sys.stdout.write(config.prompt)
    for text in as_text(tokens):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    cli.run(main)
