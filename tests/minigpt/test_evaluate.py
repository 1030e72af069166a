"""Bits per byte against a brute-force sum over single predictions."""

import math

import numpy as np
import pytest
import torch

from minigpt.batches import held_out_windows
from minigpt.config import GPTConfig
from minigpt.evaluate import bits_per_byte, score, spread, to_bits_per_byte
from minigpt.model import GPT

LENGTHS = np.random.default_rng(3).integers(1, 6, 100)  # bytes of each token
SEPARATOR = 99
LENGTHS[SEPARATOR] = 0
CONFIG = GPTConfig(vocab_size=100, context=8, layers=1, width=16, heads=2, kv_heads=2, mlp_width=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    return model


def brute_force(model, tokens: np.ndarray, context: int, stride: int) -> float:
    """One prediction at a time, from the context the rule gives it."""
    nats = 0.0
    text = torch.from_numpy(tokens.astype(np.int64))
    length = min(context, tokens.size - 1)
    for target in range(1, tokens.size):
        end = length  # the position that the window of this target predicts last
        while end < target:
            end = min(end + stride, tokens.size - 1)
        seen = text[end - length : target]
        with torch.no_grad():
            nats -= model(seen[None])[0, -1].log_softmax(dim=0)[text[target]].item()
    return nats / math.log(2) / sum(int(LENGTHS[token]) for token in tokens[1:])


def documents(*sizes: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    parts = [np.r_[SEPARATOR, generator.integers(0, SEPARATOR, size)] for size in sizes]
    return np.concatenate(parts).astype(np.uint16)


@pytest.mark.parametrize("sizes", [(30, 1, 25), (5,), (8,), (9,), (1,)], ids=str)
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_equals_the_brute_force_sum(model, sizes, stride):
    tokens = documents(*sizes)
    ours = bits_per_byte(model, tokens, LENGTHS, context=8, stride=stride, rows=3)
    assert abs(ours - brute_force(model, tokens, 8, stride)) <= 1e-10


def test_a_model_that_knows_nothing_needs_eight_bits_and_the_separators():
    def uniform(tokens_BT):
        return torch.zeros(*tokens_BT.shape, 256)

    tokens = np.frombuffer(b"\0abc\0defgh", dtype=np.uint8)  # 8 bytes, and the separator between them
    lengths = np.r_[0, np.ones(255, dtype=np.int64)]
    assert bits_per_byte(uniform, tokens, lengths, context=4, stride=4) == pytest.approx(8 * 9 / 8, rel=1e-6)


def test_shares_of_the_windows_add_up(model):
    tokens = documents(100)
    windows = held_out_windows(tokens.size, 8, 4)
    place = {"rows": 4, "device": torch.device("cpu"), "dtype": torch.float32}
    parts = [score(model, tokens, LENGTHS, windows[rank::3], **place) for rank in range(3)]
    assert to_bits_per_byte(sum(parts)) == pytest.approx(
        bits_per_byte(model, tokens, LENGTHS, context=8, stride=4), abs=1e-12
    )


def test_spread_touches_the_whole_text():
    windows = held_out_windows(1001, 10, 10)
    assert spread(windows, 10) == windows[::10]
    assert spread(windows, 1000) == windows


def test_nothing_to_count_is_nan():
    assert math.isnan(to_bits_per_byte(torch.zeros(2, dtype=torch.float64)))
