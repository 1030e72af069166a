"""Examples -> rows of tokens to train on: loss on the answers only, several examples a row that do not see each other.

`encode` marks what is to be learned, the answer and the token that ends it. `pack` puts examples whole into rows, first
fit; each is a document of its own, at positions from 0, and the GPT is told so. An example longer than the context is
left out, counted and named, never cut. Refused: a template that the tokenizer lacks tokens for, rows without anything
to learn.

Shapes: N examples, n tokens of one, R rows, B rows of a batch, T the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from lora.examples import Example
from minigpt.chat import SPECIAL, TEMPLATES, Template
from minigpt.masks import Documents
from minigpt.model import GPT, mean_cross_entropy
from minigpt.tokenizer import Tokenizer

IGNORED = -100  # target without a loss, torch's and our kernels' default
PADDING = -1  # document of what fills a row up
FILLER = 0  # its token; any would do, nothing else sees it


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one example, int64 (n,), and which of them are to be predicted, bool (n,)."""

    tokens: np.ndarray
    scored: np.ndarray

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.shape != self.scored.shape:
            raise ValueError(f"tokens {self.tokens.shape}, mask {self.scored.shape}: expected two rows of one length")
        if self.tokens.dtype != np.int64 or self.scored.dtype != np.bool_:
            raise ValueError(f"tokens {self.tokens.dtype}, mask {self.scored.dtype}: expected int64 and bool")
        if not self.scored.any() or self.scored[0]:
            raise ValueError("nothing to predict or the first token: expected a scored token after another one")

    @property
    def length(self) -> int:
        """Places that it takes in a row: each token predicts the next, so the last one is a target only."""
        return self.tokens.size - 1


# -- text to tokens --
def encode(
    example: Example, tokenizer: Tokenizer, *, template: str = "plain", opening: Sequence[int] | None = None
) -> Encoded:
    """`prompt_tokens`, the answer, and the token that ends it: of the template, or else the tokenizer's separator.

    Prompt and answer are encoded apart, so that no token spans both, as none does when the answer is generated. Raises
    ValueError for an unknown template or one that the tokenizer lacks tokens for.
    """
    prompt = prompt_tokens(example, tokenizer, template=template, opening=opening)
    answer = [*tokenizer.encode(example.answer).tolist(), end_token(tokenizer, template)]
    scored = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return Encoded(np.array(prompt + answer, dtype=np.int64), scored)


def prompt_tokens(
    example: Example, tokenizer: Tokenizer, *, template: str = "plain", opening: Sequence[int] | None = None
) -> list[int]:
    """What stands before the answer, and what a model is given to write it: the tokens that minigpt/chat.py would read.

    opening: the tokens that begin a document, see minigpt.sample.Source; None for the separator, as in our own runs.
    Only the template's special tokens become one token each; their names in the examples are ordinary text.
    """
    turn, tokens = checked_template(tokenizer, template), []
    for place, (prompt, answer) in enumerate([*example.turns, (example.prompt, None)]):
        text = (turn.closing if place else "") + turn.before + "\0" + turn.after  # \0 stands for what the user wrote
        for piece in SPECIAL.split(text):
            if SPECIAL.fullmatch(piece):
                tokens.append(tokenizer.special[piece])
            elif piece:
                tokens += tokenizer.encode(piece.replace("\0", prompt)).tolist()
        if answer is not None:
            tokens += tokenizer.encode(answer).tolist()
    return [*([tokenizer.separator] if opening is None else opening), *tokens]


def end_token(tokenizer: Tokenizer, template: str) -> int:
    """The token at which an answer ends."""
    marks = SPECIAL.findall(checked_template(tokenizer, template).closing)
    return tokenizer.special[marks[0]] if marks else tokenizer.separator


def checked_template(tokenizer: Tokenizer, name: str) -> Template:
    if name not in TEMPLATES:
        raise ValueError(f"template {name!r}: expected one of {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    wanted = SPECIAL.findall(template.before + template.after + template.closing)
    if missing := sorted(set(wanted) - set(tokenizer.special)):
        has = " ".join(tokenizer.special) or "none"
        raise ValueError(f"template {name}: the tokenizer lacks {' '.join(missing)}; it has {has}")
    return template


# -- rows --
@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of packed examples, each field int64 (R, T)."""

    tokens_RT: Tensor
    targets_RT: Tensor  # the next token, or IGNORED
    positions_RT: Tensor  # within the document
    documents_RT: Tensor  # number of the example in what was packed, or PADDING

    def __len__(self) -> int:
        return self.tokens_RT.shape[0]

    @property
    def scored(self) -> int:
        """Targets with a loss: the weight of these rows where means over batches or ranks are put together."""
        return int((self.targets_RT != IGNORED).sum())

    def batch(self, rows: Sequence[int] | slice, device: torch.device | str = "cpu") -> "Rows":
        """The rows named, on a device."""
        return Rows(*(getattr(self, field.name)[rows].to(device) for field in fields(self)))

    def documents(self) -> Documents:
        return Documents(self.positions_RT, self.documents_RT)

    def loss(self, model: GPT) -> Tensor:
        """Mean cross-entropy over the scored targets of all rows, in nats. Places without one do not go through the
        head, a large part of a small model; a GPT with a loss_fn sees all of them."""
        if model.loss_fn is not None:
            return model(self.tokens_RT, self.targets_RT, documents=self.documents())
        logits_nV, targets_n = self.scored_logits(model)
        return mean_cross_entropy(logits_nV, targets_n)

    def scored_logits(self, model: GPT) -> tuple[Tensor, Tensor]:
        """Logits (n, V) where there is a target, and the targets (n,), row by row."""
        scored_RT = self.targets_RT != IGNORED
        x_RTC = model.hidden(self.tokens_RT, documents=self.documents())
        return model.logits(x_RTC[scored_RT]), self.targets_RT[scored_RT]


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows, and what did not go into them: `too_long` holds (number of the example, its length)."""

    rows: Rows
    examples: int
    too_long: tuple[tuple[int, int], ...]

    @property
    def filled(self) -> float:
        """The share of the rows' places that examples take."""
        return float((self.rows.documents_RT != PADDING).double().mean())

    def describe(self) -> str:
        R, T = self.rows.tokens_RT.shape
        text = f"{self.examples - len(self.too_long)} examples in {R} rows of {T} tokens, {100 * self.filled:.1f}% full"
        if self.too_long:
            longest = max(length for _, length in self.too_long)
            text += f"; {len(self.too_long)} longer than the context left out, the longest of {longest} tokens"
        return text


def first_fit(lengths: Sequence[int], context: int) -> list[tuple[int, int]]:
    """(row, offset) of each length, none above the context: in the first row that has room, or in a new one."""
    places, rows = [], 0
    room = np.full(len(lengths), context)
    for length in lengths:
        assert 1 <= length <= context
        row = int(np.argmax(room[: rows + 1] >= length))  # row `rows` is empty, so there always is one
        places.append((row, context - int(room[row])))
        room[row] -= length
        rows = max(rows, row + 1)
    return places


def pack(examples: Sequence[Encoded], context: int) -> Packed:
    """All examples that fit in a row of `context` tokens, in the order given. Raises ValueError when none does."""
    if context < 1:
        raise ValueError(f"context {context}: expected at least 1")
    fitting = [number for number, example in enumerate(examples) if example.length <= context]
    too_long = tuple((i, example.length) for i, example in enumerate(examples) if example.length > context)
    if not fitting:
        shortest = f", the shortest of {min(length for _, length in too_long)} tokens" if too_long else ""
        raise ValueError(f"none of {len(examples)} examples{shortest} fits: expected one of at most {context} tokens")
    places = first_fit([examples[number].length for number in fitting], context)
    shape = (max(row for row, _ in places) + 1, context)
    tokens_RT, targets_RT = np.full(shape, FILLER, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions_RT, documents_RT = np.zeros(shape, dtype=np.int64), np.full(shape, PADDING, dtype=np.int64)
    for number, (row, start) in zip(fitting, places, strict=True):
        example, place = examples[number], slice(start, start + examples[number].length)
        tokens_RT[row, place] = example.tokens[:-1]
        targets_RT[row, place] = np.where(example.scored[1:], example.tokens[1:], IGNORED)
        positions_RT[row, place] = np.arange(example.length)
        documents_RT[row, place] = number
    rows = Rows(*map(torch.from_numpy, (tokens_RT, targets_RT, positions_RT, documents_RT)))
    return Packed(rows, len(examples), too_long)
