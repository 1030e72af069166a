"""Generating with a GPT: a batch of ragged prompts goes on token by token, and tokens become text while they come.

Beyond the context: a row whose tokens no longer fit goes on from its last context // 2 tokens (at least one), which are
read afresh from position 0; or it ends, with `stop_at_context`. The rule looks at one row and at token counts only, so
tokens are the same with and without the cache, alone and in a batch. Refused: no or empty prompts, a prompt longer than
the context, tokens outside the vocabulary, empty stop strings.

Shapes: B rows, T time, C width, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from minigpt.kv_cache import KVCache
from minigpt.model import GPT
from minigpt.sampling import Sampler, Sampling
from minigpt.tokenizer import Tokenizer


class Rows:
    """The tokens that each row of a batch has in sight, and the logits of what comes next.

    First `push` tokens to the rows, then `logits`, and so on. The keys and values of what the model has read stay in
    the cache; what a row has beyond them is read at the next `logits`. A batch reads prompts of any lengths first,
    later one token a row and round; a single row reads any number at any time. `capacity` (the context if not given)
    is how many tokens a row will hold at most. `numbers` are the rows of the first batch that are still there, in the
    order of this one; `on_rows` is told before each pass of the model which of those it reads, for models that treat
    rows differently.
    """

    def __init__(
        self,
        model: GPT,
        batch: int,
        *,
        capacity: int | None = None,
        use_cache: bool = True,
        on_rows: Callable[[Sequence[int]], None] | None = None,
    ):
        self.model, self.context, self.on_rows = model, model.config.context, on_rows
        self.numbers = list(range(batch))
        self.device = next(model.parameters()).device
        self.windows: list[list[int]] = [[] for _ in range(batch)]
        self.cache = KVCache(batch, min(self.context, capacity or self.context), self.device) if use_cache else None

    def is_full(self, row: int) -> bool:
        return len(self.windows[row]) >= self.context

    def push(self, row: int, tokens: Sequence[int]) -> int:
        """Appends to the row; returns how many tokens that pushed out: 0, or all but the last context // 2."""
        window = self.windows[row] + list(tokens)
        forgotten = 0
        if len(window) > self.context:
            forgotten = len(window) - max(1, self.context // 2)
            self._forget(row)
        self.windows[row] = window[forgotten:]
        return forgotten

    def _forget(self, row: int) -> None:
        """What the cache has of the row stood at other positions: the row will be read afresh."""
        if self.cache is not None:
            self.cache.truncate([0 if b == row else held for b, held in enumerate(self.cache.lengths)])

    def keep(self, rows: Sequence[int]) -> None:
        """The other rows leave the batch."""
        self.windows = [self.windows[row] for row in rows]
        self.numbers = [self.numbers[row] for row in rows]
        if self.cache is not None:
            self.cache.keep(rows)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """logits_BV after the last token of each row; every row must have a token that the model has not read yet."""
        if self.cache is None:
            return self._read(self.windows, None)
        if self.cache.longest:  # rows that start afresh beside rows that go on: all but their last token first
            for row, window in enumerate(self.windows):
                if not self.cache.lengths[row] and len(window) > 1:
                    self._refill(row, window[:-1])
        return self._read([w[held:] for w, held in zip(self.windows, self.cache.lengths, strict=True)], self.cache)

    def _refill(self, row: int, tokens: list[int]) -> None:
        self._announce([self.numbers[row]])
        alone = KVCache(1, len(tokens), self.device)
        self.model.hidden(torch.tensor([tokens], device=self.device), cache=alone)
        self.cache.put(row, alone)

    def _read(self, unread: list[list[int]], cache: KVCache | None) -> Tensor:
        """Rows are padded on the right; only the last position of each goes through the head."""
        counts = [len(tokens) for tokens in unread]
        assert min(counts) > 0, "a row without a new token"
        held = cache.lengths if cache is not None else []
        padded = [tokens + [0] * (max(counts) - len(tokens)) for tokens in unread]
        self._announce(self.numbers)
        x_BTC = self.model.hidden(torch.tensor(padded, device=self.device), cache=cache)
        if cache is not None and len(set(counts)) > 1:
            cache.truncate([old + new for old, new in zip(held, counts, strict=True)])
        last_BC = x_BTC[range(len(counts)), [count - 1 for count in counts]]
        return self.model.logits(last_BC[:, None])[:, 0]

    def _announce(self, numbers: list[int]) -> None:
        if self.on_rows is not None:
            self.on_rows(numbers)


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Collection[int] = (),
    vocab_size: int | None = None,
    use_cache: bool = True,
    stop_at_context: bool = False,
    on_rows: Callable[[Sequence[int]], None] | None = None,
) -> Iterator[list[int | None]]:
    """Yields the new token of each row, step by step; None for a row that has ended, until all have.

    A row ends after max_new_tokens, with a token of stop_tokens (which is yielded), or, with stop_at_context, with the
    token after a full context. vocab_size is the tokenizer's where the model's is padded. Row b draws with
    sampling.seed + b, and so, up to rounding, as the same prompt alone with that seed. on_rows is called before each
    pass of the model with the numbers of the prompts that are its rows, in their order. Raises ValueError at the call
    for wrong arguments, while stepping for logits that are not finite.
    """
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= model.config.vocab_size:
        raise ValueError(f"vocab_size {vocab_size}: expected 1 to the model's, {model.config.vocab_size}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}: expected at least 1")
    prompts = [list(map(int, prompt)) for prompt in prompts]  # numpy's integers would give tensors of their own type
    _check_prompts(prompts, model.config.context, vocab_size)
    longest = max(map(len, prompts))
    rows = Rows(model, len(prompts), capacity=longest + max_new_tokens, use_cache=use_cache, on_rows=on_rows)
    sampler = Sampler(sampling, len(prompts), vocab_size)
    for row, prompt in enumerate(prompts):
        rows.push(row, prompt)
        sampler.note(row, prompt)
    return _steps(rows, sampler, max_new_tokens, frozenset(stop_tokens), stop_at_context)


def _check_prompts(prompts: list[list[int]], context: int, vocab_size: int) -> None:
    if not prompts:
        raise ValueError("no prompts: expected at least one")
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= context:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens: expected 1 to the context, {context}")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"prompt {row} holds the token {wrong[0]}: expected 0 to {vocab_size - 1}")


def _steps(
    rows: Rows, sampler: Sampler, max_new_tokens: int, stop_tokens: frozenset[int], stop_at_context: bool
) -> Iterator[list[int | None]]:
    batch = len(rows.windows)
    for step in range(1, max_new_tokens + 1):
        step_tokens: list[int | None] = [None] * batch
        going_on: list[int] = []
        for row, token in enumerate(sampler.choose(rows.logits())):
            step_tokens[rows.numbers[row]] = token
            if step < max_new_tokens and token not in stop_tokens and not (stop_at_context and rows.is_full(row)):
                going_on.append(row)
                rows.push(row, [token])
        yield step_tokens
        if not going_on:
            return
        if len(going_on) < len(rows.windows):
            rows.keep(going_on)
            sampler.keep(going_on)


def stream_text(tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of the tokens as soon as it is certain, up to a stop string, which is not part of it.

    Bytes become text when a character is whole; malformed ones become U+FFFD. The stream ends where the first stop
    string is complete (the longest of those that end there), read character by character, so where the tokens divide
    does not matter. What may be the beginning of a stop string is held back until decided. Raises ValueError at the
    call for an empty stop string.
    """
    if "" in stop:
        raise ValueError(f"stop strings {list(stop)}: expected no empty one")
    return _stream(tokens, tokenizer, stop)


def _stream(tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
    held = ""
    for text in _characters(tokens, tokenizer):
        held += text
        if (end := _first_stop(held, stop)) is not None:
            if end:
                yield held[:end]
            return
        certain = len(held) - max((_overlap(held, each) for each in stop), default=0)
        if certain:
            yield held[:certain]
        held = held[certain:]
    if held:
        yield held


def _characters(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    decoder = tokenizer.stream_decoder()
    for token in tokens:
        yield decoder.feed([token])
    yield decoder.finish()


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins."""
    found = [(start + len(each), start) for each in stop if (start := text.find(each)) >= 0]
    return min(found)[1] if found else None


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text could begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
