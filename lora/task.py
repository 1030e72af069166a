"""What a model is fine-tuned for: packed training rows, and held-out prompts with the answers that are wanted.

Either the signatures of the standard library, or JSONL files of the user. A held-out prompt that stands in the training
data is taken out; so is an example longer than a row. Both are counted and listed, nothing is cut. Refused: a
vocabulary that the model has not, data of which one side is empty.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.log import atomic_write
from lora.examples import Example, ExampleSet, load_jsonl, standard_library
from lora.finetune_config import FinetuneConfig
from lora.packing import Encoded, Packed, encode, end_token, pack, prompt_tokens
from minigpt.sample import Source

TOO_LONG, CONTAMINATED = "longer than a row", "its prompt is in the training data"


@dataclass(frozen=True, slots=True)
class LeftOut:
    side: str
    why: str
    tokens: int  # 0 where nobody counted
    prompt: str


@dataclass(frozen=True, slots=True)
class Task:
    """Document n of `held_out` is held_out_examples[n], whose prompt has the tokens prompts[n]."""

    examples: ExampleSet
    train: Packed
    held_out: Packed
    held_out_examples: tuple[Example, ...]
    prompts: tuple[tuple[int, ...], ...]
    ends: frozenset[int]  # tokens that end an answer
    longest_answer: int  # tokens of the longest wanted answer, its end among them
    signatures: bool  # whether an answer is to be a signature in Python
    left_out: tuple[LeftOut, ...]

    @property
    def digest(self) -> str:
        return self.examples.digest

    def describe(self) -> str:
        text = f"{self.examples.describe()}\n  training: {self.train.describe()}"
        text += f"\n  held out: {self.held_out.describe()}"
        counts = Counter((left.side, left.why) for left in self.left_out)
        return text + "".join(f"\n  left out of {side}, {why}: {count}" for (side, why), count in counts.items())

    def list_left_out(self, path: Path) -> None:
        """Writes them to a JSON lines file, one each."""
        lines = [json.dumps({name: getattr(left, name) for name in LeftOut.__slots__}) for left in self.left_out]
        atomic_write(path, "".join(line + "\n" for line in lines))


def load_task(config: FinetuneConfig, source: Source) -> Task:
    """Raises ValueError for files that lora/examples.py refuses, templates that the tokenizer has no tokens for, and
    when nothing is left on a side."""
    model, tokenizer = source.model, source.tokenizer
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"a tokenizer of {tokenizer.vocab_size} tokens: the model has {model.config.vocab_size}")
    context = config.context or model.config.context
    if context > model.config.context:
        raise ValueError(f"context {context}: expected at most the model's, {model.config.context}")
    examples, left_out = without_contamination(load_examples(config))
    options: dict[str, Any] = {"template": config.template, "opening": source.opening}
    encoded = {side: [encode(e, tokenizer, **options) for e in members] for side, members in _sides(examples).items()}
    packed = {side: _packed(side, members, context) for side, members in encoded.items()}
    for side, members in _sides(examples).items():
        left_out += [LeftOut(side, TOO_LONG, length, members[n].prompt) for n, length in packed[side].too_long]
    long = dict(packed["held_out"].too_long)
    kept = [n for n in range(len(examples.held_out)) if n not in long]
    held_out, judged = [examples.held_out[n] for n in kept], [encoded["held_out"][n] for n in kept]
    if len(held_out) < 2:
        raise ValueError(f"{len(held_out)} held-out example: expected at least 2, to tell a difference from luck")
    return Task(
        examples, packed["train"], pack(judged, context), tuple(held_out),
        tuple(tuple(prompt_tokens(example, tokenizer, **options)) for example in held_out),
        frozenset({end_token(tokenizer, config.template), *source.ends}),
        max(int(example.scored.sum()) for example in judged), config.data is None, tuple(left_out),
    )  # fmt: skip


def _sides(examples: ExampleSet) -> dict[str, tuple[Example, ...]]:
    return {"train": examples.train, "held_out": examples.held_out}


def _packed(side: str, encoded: list[Encoded], context: int) -> Packed:
    try:
        return pack(encoded, context)
    except ValueError as error:
        raise ValueError(f"{side}: {error}") from None


def load_examples(config: FinetuneConfig) -> ExampleSet:
    if config.data is None:
        return standard_library()
    examples = load_jsonl(config.data)
    if config.held_out is not None:
        return ExampleSet(config.data.name, examples, load_jsonl(config.held_out), ())
    return split(config.data.name, examples, config.held_out_share)


def split(name: str, examples: Sequence[Example], share: float) -> ExampleSet:
    """By the SHA-256 of what stands before the answer, so equal prompts are on one side and the order of lines does not
    matter. Raises ValueError when a side is empty."""
    held_out = tuple(example for example in examples if _hash_share(example) < share)
    train = tuple(example for example in examples if not _hash_share(example) < share)
    if not train or not held_out:
        raise ValueError(
            f"{name}: held_out_share {share} of {len(examples)} examples holds out {len(held_out)}: expected some on "
            f"both sides, more examples or --held-out FILE"
        )
    return ExampleSet(name, train, held_out, ())


def without_contamination(examples: ExampleSet) -> tuple[ExampleSet, list[LeftOut]]:
    """Without the held-out examples whose prompt, with the turns before it, some training example has, up to
    whitespace. Raises ValueError when none is left."""
    known = {_key(example) for example in examples.train}
    left_out = [
        LeftOut("held_out", CONTAMINATED, 0, example.prompt) for example in examples.held_out if _key(example) in known
    ]
    kept = tuple(example for example in examples.held_out if _key(example) not in known)
    if not kept:
        raise ValueError(f"{examples.name}: the prompts of all {len(left_out)} held-out examples are in the training "
                         f"data: expected others")  # fmt: skip
    return ExampleSet(examples.name, examples.train, kept, examples.left_out), left_out


def _key(example: Example) -> str:
    texts = [text for turn in example.turns for text in turn] + [example.prompt]
    return json.dumps([" ".join(text.split()) for text in texts])


def _hash_share(example: Example) -> float:
    """From 0 to below 1."""
    return int(hashlib.sha256(_key(example).encode()).hexdigest()[:13], 16) / 16**13
