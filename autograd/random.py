"""Randomness: the one generator that dropout and the initialisation of layers draw from, and dropout itself.

Refuses a p that is no probability.
"""

import numpy as np

from autograd.elementwise import floating
from autograd.tensor import Tensor, constant

_generator = np.random.default_rng(0)


def manual_seed(seed: int) -> None:
    """Seeds the generator that dropout and the initialisation of layers draw from."""
    _generator.bit_generator.state = type(_generator.bit_generator)(seed).state


def default_generator() -> np.random.Generator:
    return _generator


def dropout(x, p: float = 0.5, training: bool = True, generator: np.random.Generator | None = None) -> Tensor:
    """Zeroes elements with probability p and scales the others by 1 / (1 - p); draws from `generator`, or from the one
    that `manual_seed` seeds."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p {p}: expected a probability")
    x = floating(x)
    if not training or p == 0:
        return x
    keep = (generator or _generator).random(x.shape, dtype=np.float32) >= p
    return x * constant(keep * x.dtype.type(1 / (1 - p) if p < 1 else 0))
