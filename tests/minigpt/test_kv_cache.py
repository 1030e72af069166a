"""Reading in pieces through the cache against reading everything at once, in float64."""

import random

import pytest
import torch

from minigpt import kv_cache
from minigpt.kv_cache import KVCache
from minigpt.model import GPT
from tests.minigpt import models

SMALL = {"vocab_size": 19, "context": 24, "layers": 3, "width": 16, "heads": 4, "kv_heads": 4, "mlp_width": 12}
KINDS = {
    "full heads": {},
    "one key head": {"kv_heads": 1},
    "grouped heads": {"kv_heads": 2, "qk_norm": False},
    "learned positions": {"positions": "learned", "norm": "layernorm", "qkv_bias": True, "kv_heads": 2},
    "sliding window": {"window": 3, "window_pattern": "SSL", "kv_heads": 2},
    "window of one": {"window": 1, "window_pattern": "SL"},
    "smear": {"smear": True, "positions": "learned", "norm": "layernorm"},
    "bigrams": {"bigrams": 31, "kv_heads": 2},
    "smear over bigrams": {"smear": True, "bigrams": 31, "x0_skip": True, "window": 5, "window_pattern": "SL"},
    "value embeddings": {"value_embeddings": True, "kv_heads": 2, "window": 5, "window_pattern": "SL"},
}


def random_gpt(**changes) -> GPT:
    return models.random_gpt(**{**SMALL, **changes})


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request) -> GPT:
    return random_gpt(**request.param)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max().item()
    assert error <= 1e-12, error


def read_ragged(model, cache, rows, start, count) -> list[torch.Tensor]:
    """Reads count[b] tokens of each row from start[b] on, padded on the right; the logits of each row's own tokens."""
    longest = max(count)
    padded = [row[s : s + n] + [7] * (longest - n) for row, s, n in zip(rows, start, count, strict=True)]
    logits = model(torch.tensor(padded), cache=cache)
    cache.truncate([s + n for s, n in zip(start, count, strict=True)])
    return [logits[b, :n] for b, n in enumerate(count)]


def test_chunks_of_any_size_are_the_whole(model):
    generator = random.Random(0)
    tokens = torch.randint(19, (2, 24))
    whole = model(tokens)
    for _ in range(5):
        cache, pieces, start = KVCache(2, 24), [], 0
        while start < 24:
            size = generator.choice([1, 1, 2, 5, 9])
            pieces.append(model(tokens[:, start : start + size], cache=cache))
            start += size
        assert_close(torch.cat(pieces, dim=1), whole)


def test_ragged_rows_are_each_alone(model):
    """Prompts of four lengths, then single tokens and short pieces that are ragged again."""
    generator = random.Random(1)
    rows = [[generator.randrange(19) for _ in range(24)] for _ in range(4)]
    whole = [model(torch.tensor([row]))[0] for row in rows]
    cache, start, seen = KVCache(4, 24), [0] * 4, []
    for count in ([5, 1, 9, 3], [1, 1, 1, 1], [1, 1, 1, 1], [2, 4, 1, 3], [1, 1, 1, 1]):
        seen.append(read_ragged(model, cache, rows, start, count))
        start = [s + n for s, n in zip(start, count, strict=True)]
    for b in range(4):
        assert_close(torch.cat([pieces[b] for pieces in seen]), whole[b][: start[b]])


def test_rows_leave_and_rows_start_again(model):
    """After `keep`, the rows that stay go on as before; after `put`, a row goes on as the text put there."""
    rows = torch.randint(19, (4, 24))
    cache = KVCache(4, 24)
    read_ragged(model, cache, rows.tolist(), [0] * 4, [5, 2, 9, 3])
    cache.keep([3, 1, 2])
    fresh, alone = torch.randint(19, (1, 24)), KVCache(1, 11)
    model(fresh[:, :11], cache=alone)
    cache.put(1, alone)
    assert cache.lengths == [3, 11, 9] and cache.lengths_B.tolist() == [3, 11, 9]
    logits = model(torch.cat([rows[3:4, 3:5], fresh[:, 11:13], rows[2:3, 9:11]]), cache=cache)
    assert_close(logits[0], model(rows[3:4, :5])[0, 3:])
    assert_close(logits[1], model(fresh[:, :13])[0, 11:])
    assert_close(logits[2], model(rows[2:3, :11])[0, 9:])


def test_truncated_text_is_forgotten(model):
    tokens = torch.randint(19, (1, 12))
    cache = KVCache(1, 24)
    model(torch.cat([tokens[:, :4], torch.randint(19, (1, 9))], dim=1), cache=cache)
    cache.truncate([4])
    assert_close(model(tokens[:, 4:], cache=cache), model(tokens)[:, 4:])


def test_memory_is_taken_once_for_the_capacity():
    model, cache = random_gpt(), KVCache(2, 20)
    model(torch.randint(19, (2, 1)), cache=cache)
    held = cache.layers[0][0]
    model(torch.randint(19, (2, 15)), cache=cache)
    assert held.shape[2] == 20 and cache.layers[0][0] is held


def test_the_tokens_are_kept_only_where_they_are_asked_for_again():
    for model, layers in ((random_gpt(), {0, 1, 2}), (random_gpt(smear=True), {kv_cache.TOKENS, 0, 1, 2})):
        cache = KVCache(2, 20)
        model(torch.randint(19, (2, 3)), cache=cache)
        assert cache.layers.keys() == layers


def test_beyond_that_memory_grows_with_the_tokens_up_to_the_capacity(monkeypatch):
    monkeypatch.setattr(kv_cache, "PREALLOCATED", 2)
    model, cache = random_gpt(), KVCache(2, 20)
    sizes = []
    for count in (1, 1, 1, 7, 10):
        model(torch.randint(19, (2, count)), cache=cache)
        sizes.append(cache.layers[0][0].shape[2])
    assert sizes == [2, 2, 6, 20, 20]


def test_more_than_the_capacity_is_refused():
    model, cache = random_gpt(), KVCache(2, 10)
    read_ragged(model, cache, [[1] * 9, [2] * 9], [0, 0], [9, 4])
    with pytest.raises(ValueError, match="9 tokens in the cache and 2 more: expected at most its capacity, 10"):
        model(torch.ones(2, 2, dtype=torch.long), cache=cache)
    model(torch.ones(2, 1, dtype=torch.long), cache=cache)
    big = KVCache(1, 30)
    model(torch.ones(1, 24, dtype=torch.long), cache=big)
    with pytest.raises(ValueError, match="context, 24"):
        model(torch.ones(1, 1, dtype=torch.long), cache=big)
    with pytest.raises(ValueError, match="24 tokens: expected 0 to 1 from a cache of one row and at most 10"):
        cache.put(0, big)


def test_wrong_sizes_and_rows_are_refused():
    for batch, capacity in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            KVCache(batch, capacity)
    cache = KVCache(2, 4)
    for lengths in ([1, 0], [0], [0, -1]):
        with pytest.raises(ValueError, match="expected for each row 0 to what it holds"):
            cache.truncate(lengths)
    for rows in ([], [2], [-1]):
        with pytest.raises(ValueError, match="expected at least one, from 0 to 1"):
            cache.keep(rows)
