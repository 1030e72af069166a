"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty, and the draw.

The filters are pure functions of logits_BV that set what they exclude to -inf. They are applied in the order of
transformers' generate: repetition penalty, temperature, top-k, top-p, min-p. Each row draws with a generator of its
own, so its tokens do not depend on the rows beside it. Refused: settings out of range, logits that are not finite.

Shapes: B rows, V vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    temperature: float = 0.8  # 0: greedy, the likeliest token, the first of equal ones
    top_k: int = 0  # 0: all; more than the vocabulary: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # row b of a batch draws with seed + b

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf):
            raise ValueError(f"temperature {self.temperature}: expected 0 (greedy) or a positive number")
        if not (self.top_k >= 0):
            raise ValueError(f"top_k {self.top_k}: expected a positive number of tokens, or 0 for all")
        if not (0 < self.top_p <= 1):
            raise ValueError(f"top_p {self.top_p}: expected more than 0 and at most 1")
        if not (0 <= self.min_p <= 1):
            raise ValueError(f"min_p {self.min_p}: expected 0 to 1")
        if not (0 < self.repetition_penalty < math.inf):
            raise ValueError(f"repetition_penalty {self.repetition_penalty}: expected a positive number, 1 for none")
        if not (0 <= self.seed < 2**63):
            raise ValueError(f"seed {self.seed}: expected 0 to 2**63 - 1")


def repetition_penalty(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits of tokens already in the row divided by the penalty, or multiplied where they are negative.

    seen_BV is boolean. CTRL (Keskar et al. 2019, section 4.1), with the sign rule that all implementations add:
    dividing a negative logit would favour the token.
    """
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """logits / temperature, for a temperature above 0, relative to the largest of the row.

    The shift leaves the softmax alone; without it a tiny temperature gives inf for all instead of -inf for the others.
    """
    return (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keeps what is not less than the k-th largest logit of the row, so equal ones at the border all stay."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)


def top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keeps the fewest likeliest tokens whose probabilities reach p together; at least one.

    Nucleus sampling, Holtzman et al. 2019, section 3.1. Of equal tokens at the border the one with the lower id stays.
    """
    sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV  # exactly 0 for the first: that one always stays
    excluded_BV = before_BV >= p
    return logits_BV.masked_fill(torch.zeros_like(excluded_BV).scatter(1, ids_BV, excluded_BV), -math.inf)


def min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024, section 3)."""
    probabilities_BV = logits_BV.softmax(dim=-1)
    excluded_BV = probabilities_BV < p * probabilities_BV.amax(dim=-1, keepdim=True)
    return logits_BV.masked_fill(excluded_BV, -math.inf)


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits after temperature (above 0), top-k, top-p and min-p: their softmax is what is drawn from."""
    logits_BV = temperature(logits_BV, sampling.temperature)
    if sampling.top_k:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = top_p(logits_BV, sampling.top_p)
    return min_p(logits_BV, sampling.min_p) if sampling.min_p else logits_BV


def draw(logits_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """tokens_B from the softmax of each row, by one uniform number of the row's own generator (on the CPU).

    The token is the first at which the cumulative probability exceeds the number. Tokens at -inf are never drawn.
    """
    uniforms = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    uniform_B1 = torch.stack(uniforms).to(logits_BV.device)
    probabilities_BV = logits_BV.double().softmax(dim=-1)
    # A GPU sums in parallel, and rounding may make the sums grow over tokens of probability 0: those are left out.
    cumulative_BV = probabilities_BV.cumsum(dim=-1).where(probabilities_BV > 0, 0.0)
    # Divided by the largest, one token ends at exactly 1, above every uniform number.
    reached_BV = cumulative_BV / cumulative_BV.amax(dim=-1, keepdim=True) > uniform_B1
    return reached_BV.to(torch.int8).argmax(dim=-1)


class Sampler:
    """What choosing tokens for a batch of rows remembers: each row's generator and the tokens it has seen.

    `vocab_size` is the tokenizer's: logits beyond it, which models have as padding, are never drawn.
    """

    def __init__(self, sampling: Sampling, batch: int, vocab_size: int):
        self.sampling, self.vocab_size = sampling, vocab_size
        self.generators = [torch.Generator() for _ in range(batch)]
        self.reseed(sampling.seed)
        self.seen_BV = torch.zeros(batch, vocab_size, dtype=torch.bool)

    def reseed(self, seed: int) -> None:
        self.sampling = replace(self.sampling, seed=seed)
        for row, generator in enumerate(self.generators):
            generator.manual_seed(seed + row)

    def note(self, row: int, tokens: Collection[int]) -> None:
        """The row's prompt, or what else it read; chosen tokens are noted by themselves."""
        self.seen_BV[row, list(tokens)] = True

    def keep(self, rows: Sequence[int]) -> None:
        """The other rows leave the batch."""
        self.generators = [self.generators[row] for row in rows]
        self.seen_BV = self.seen_BV[list(rows)]

    def choose(self, logits_BV: Tensor) -> list[int]:
        """The next token of each row. Raises ValueError where logits of the vocabulary are not finite."""
        logits_BV = logits_BV[:, : self.vocab_size].double()
        if (penalty := self.sampling.repetition_penalty) != 1:
            logits_BV = repetition_penalty(logits_BV, self.seen_BV.to(logits_BV.device), penalty)
        if not torch.isfinite(logits_BV).all():
            extreme = f", or the repetition penalty {penalty} is too extreme" if penalty != 1 else ""
            raise ValueError(f"the logits are not finite: the model's weights are broken{extreme}")
        greedy = self.sampling.temperature == 0
        tokens_B = logits_BV.argmax(-1) if greedy else draw(filtered(logits_BV, self.sampling), self.generators)
        tokens = tokens_B.tolist()
        self.seen_BV[range(len(tokens)), tokens] = True
        return tokens
