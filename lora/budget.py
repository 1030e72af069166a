"""What fine-tuning holds in memory, by formula, from a GPT without numbers: weights, adapters, gradients, optimizer,
activations.

    predict(skeleton(config), "nf4-double", "paged", rank=8, rows=4, T=512)

Methods: "full" fine-tuning, "lora" on whole weights, or QLoRA in one of its formats; adapters beside all linear layers
of the blocks, without dropout, passes in float32. Everything is predicted to the byte but for the peak of the two
passes, which has a bound, and for activations on GPUs, whose own kernels keep others. Left out: the working memory of
an optimizer's step, which for AdamW8bit is 29 bytes a number of a page: 57 MiB for pages of 4 MiB.
"""

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal, get_args

import torch

from lora.adamw8bit import SMALLEST
from lora.config import LoraConfig
from lora.integers import GROUP
from lora.paged import BLOCK, PAGE, RESIDENT, block_bytes
from lora.quantised import Format, predicted_bytes
from lora.targets import LINEAR, kind_of, places_of
from minigpt.config import GPTConfig
from minigpt.model import GPT
from parallel.memory import Plan, block_activations, head_activations

Method = Literal["full", "lora", "nf4", "nf4-double", "int8", "int4"]
Optimizer = Literal["adamw", "adamw8bit", "paged"]
MAPS = 2 * 256 * 4  # bytes of the codes of 8-bit states


@dataclass(frozen=True, slots=True)
class Bytes:
    """On the device but for `host`. `kept` are the activations between the passes. The peak of the two passes is at
    least that and at most `above` more: the gradients of parameters with that of the largest once more (a tied one has
    two), a weight while it is written out, and twice the widest activation - logits, MLP or four residual streams -
    which is what the backward pass was seen to hold at most, in all models of tests/lora/test_memory.py."""

    weights: int  # the base, rotary tables among them
    adapters: int
    gradients: int
    optimizer: int
    host: int  # states and counters of steps; for pinned ones torch takes the next power of two bytes for each kind
    kept: int
    above: int

    @property
    def held(self) -> int:
        """On the device all the time, if gradients stay."""
        return self.weights + self.adapters + self.gradients + self.optimizer


def skeleton(config: GPTConfig) -> GPT:
    """A GPT without numbers: on the meta device."""
    with torch.device("meta"):
        return GPT(config, seed=None)


def predict(
    model: GPT, method: Method, optimizer: Optimizer, *, rank: int, rows: int, T: int, page: int = PAGE,
    number: int = 4, fused: bool = False,
) -> Bytes:  # fmt: skip
    """Of a GPT, which may be a skeleton; it stays as it is. `number` is the bytes of a frozen weight that is not
    quantised, `fused` as in parallel.memory.Plan."""
    config, linear = model.config, linear_shapes(model)
    parameters = [tuple(p.shape) for p in model.parameters()]
    numbers, tables = sum(map(prod, parameters)), sum(x.numel() * x.element_size() for x in model.buffers())
    if method == "full":
        trained, weights, adapters = parameters, 4 * numbers + tables, 0
    else:
        trained = adapter_shapes(model, rank)
        weights, adapters = number * numbers + tables, 4 * sum(map(prod, trained))
        if method != "lora":
            weights += predicted_bytes(linear, method) - number * sum(map(prod, linear))
    plan = Plan(rows=rows, T=T, fused=fused)
    kept = kept_activations(config, plan, 0 if method == "full" else rank)
    written = max((written_out(shape, method) for shape in linear), default=0) if method in get_args(Format) else 0
    above = 2 * 4 * rows * T * max(config.vocab_size, config.mlp_width, 4 * config.width) + written
    above += 4 * (sum(map(prod, trained)) + max(map(prod, trained)))
    return Bytes(weights, adapters, 4 * sum(map(prod, trained)), *states(trained, optimizer, page), kept, above)


def linear_shapes(model: GPT) -> list[tuple[int, int]]:
    """Of the layers that are quantised."""
    layers = [m for name, m in model.blocks.named_modules() if kind_of(name) in LINEAR]
    return [(layer.out_features, layer.in_features) for layer in layers]


def written_out(shape: tuple[int, int], format: Format) -> int:
    """Bytes at the most while torch writes a weight out in float32, the weight among them."""
    outputs, inputs = shape
    if format == "int8":
        return 8 * outputs * inputs
    if format == "int4":
        return 9 * outputs * inputs + 4 * outputs * GROUP * ceil(inputs / GROUP)
    return 12 * ceil(outputs * inputs / 2) + 8 * 256  # indices and numbers of pairs, and the table of pairs


def adapter_shapes(model: GPT, rank: int) -> list[tuple[int, int]]:
    """A (r, I) of each place, and a B (O, r) of each of its layers."""
    shapes = []
    for place in places_of(model, LoraConfig(rank=rank)):
        layers = [model.get_submodule(name) for name in place.layers]
        shapes += [(rank, layers[0].in_features), *((layer.out_features, rank) for layer in layers)]
    return shapes


def states(shapes: list[tuple[int, ...]], optimizer: Optimizer, page: int = PAGE) -> tuple[int, int]:
    """Bytes of an optimizer's states for parameters of these shapes, on the device and in host memory.

    torch's fused AdamW has its counters of steps on the device, AdamW8bit on the host. Paged, the device has the pages
    that are there at once, and parameters below 4096 numbers.
    """
    sizes = list(map(prod, shapes))
    if optimizer == "adamw":
        return 8 * sum(sizes) + 4 * len(sizes), 0
    large = [size for size in sizes if size >= SMALLEST]
    blocks, small = sum(ceil(size / BLOCK) for size in large), 8 * (sum(sizes) - sum(large))
    constant, counters = small + MAPS * bool(large), 4 * len(sizes)
    whole = blocks * block_bytes(True)
    if optimizer == "adamw8bit":
        return whole + constant, counters
    most = page // block_bytes(True)  # blocks
    there = min(RESIDENT, ceil(blocks / most)) * min(most, blocks) * block_bytes(True)
    return there + constant, whole + counters


def kept_activations(config: GPTConfig, plan: Plan, rank: int) -> int:
    """Bytes that wait for the backward pass in float32, of adapters of a rank; rank 0 is full fine-tuning.

    With frozen weights norms keep their input only, the head keeps nothing, and the first norm, which has nothing
    before it to train, neither; adapters add what lies between A and B.
    """
    token = plan.rows * plan.T * plan.number
    rotary = config.positions == "rotary"
    once = 2 * plan.T * config.key_width * plan.number if rotary else 0  # the tables of all blocks
    once += 2 * plan.number  # the loss, and the weight it was divided by
    once += sum(config.window_of(i) > 0 for i in range(config.layers)) * plan.T**2 * plan.number  # masks
    if not rank:
        places = 0 if rotary else 8 * plan.T
        whole = config.layers * block_activations(config, plan) + head_activations(config, plan)
        return whole + places + once
    narrow = (7 if config.mlp == "swiglu" else 6) * rank
    copies = config.heads * config.key_width if config.qk_norm and not plan.fused else 0
    block = block_activations(config, replace(plan, fused=True)) + token * (narrow + copies)
    logits = token * (1 + (config.softcap > 0)) * config.vocab_size
    return config.layers * block + logits + once  # the last norm keeps what the first one does not
