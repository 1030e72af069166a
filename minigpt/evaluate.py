"""Bits per byte on held-out text: how many bits a coder driven by the model would need, divided by the bytes.

The rule: every token of the held-out text but the first separator is predicted exactly once, from the windows of
`minigpt.batches.held_out_windows`. The cost of separators counts, since it tells where documents end, but they are no
bytes. So the number does not depend on the tokenizer, is comparable with a compressor's on the same documents, and
slightly to our disadvantage.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.batches import held_out_windows

Window = tuple[int, int, int]


def bits_per_byte(
    model: Callable[[Tensor], Tensor],
    tokens: np.ndarray,
    byte_lengths: np.ndarray,
    *,
    context: int,
    stride: int,
    rows: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Of all held-out tokens, in windows of `context` that advance by `stride`; dtype bfloat16 means autocast.

    byte_lengths (V,): the bytes that each token stands for, 0 for separators.
    """
    windows = held_out_windows(tokens.size, context, stride)
    totals = score(model, tokens, byte_lengths, windows, rows=rows, device=torch.device(device), dtype=dtype)
    return to_bits_per_byte(totals)


def to_bits_per_byte(totals: Tensor) -> float:
    nats, count = totals.tolist()
    return nats / math.log(2) / count if count else math.nan


def spread(windows: list[Window], count: int) -> list[Window]:
    """`count` of the windows, evenly spaced: a quick look that touches every part of the text."""
    count = min(count, len(windows))
    return [windows[i * len(windows) // count] for i in range(count)]


def score(
    model: Callable[[Tensor], Tensor],
    tokens: np.ndarray,
    byte_lengths: np.ndarray,
    windows: list[Window],
    *,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(nats, bytes) over the counted predictions of `windows`, float64 of shape (2,); `rows` windows at a time."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    byte_lengths_V = torch.from_numpy(byte_lengths).to(device)
    for _, targets_BT, nats_BT, counted_BT in predictions(
        model, tokens, windows, rows=rows, device=device, dtype=dtype
    ):
        bytes_BT = byte_lengths_V[targets_BT] * counted_BT
        totals += torch.stack([nats_BT[counted_BT].sum(), bytes_BT.sum().double()])
    return totals


@torch.no_grad()
def predictions(
    model: Callable[[Tensor], Tensor],
    tokens: np.ndarray,
    windows: list[Window],
    *,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[list[Window], Tensor, Tensor, Tensor]]:
    """For `rows` windows at a time: those, and of shape (B, T) what is predicted, its nats in float64, and which of
    them count."""
    for first in range(0, len(windows), rows):
        group = windows[first : first + rows]
        text_BT = np.stack([tokens[start : start + length + 1] for start, length, _ in group]).astype(np.int64)
        text_BT = torch.from_numpy(text_BT).to(device)
        inputs_BT, targets_BT = text_BT[:, :-1], text_BT[:, 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits_BTV = model(inputs_BT)
        nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none").double()
        first_B1 = torch.tensor([[scored] for _, _, scored in group], device=device)
        yield group, targets_BT, nats_BT, torch.arange(targets_BT.shape[1], device=device) >= first_B1
