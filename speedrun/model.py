"""The racing GPT: stage 2's, of the parts that a config asks for, and what changes in it while it trains.

`build` makes it; `stretch` and `untie` change it at their step; `race_loss` is what a step minimises. A finished run
is a plain GPT, which stage 2 samples and stage 5 fine-tunes. Refused: head widths that the kernels have not, dtypes and
GPUs that a switch cannot work with.

Shapes: B batch, T time, C width, V vocabulary, K channels of a head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import UserError
from minigpt.masks import Documents
from minigpt.model import GPT, rotary_tables
from speedrun.config import RaceConfig
from speedrun.documents import packed_attention
from speedrun.winners import Choice, missing, named

# Of matrices that begin at zero; what `--no-zero-init` gives them instead is GPT-2's way, Radford et al. 2019.
ENDS = ("output.weight", "down.weight", "head.weight")
SPREAD = 0.02
# Arguments of GPT, by the fields of Choice that decide about them.
PARTS = {
    "linear": "linear_cls", "norm": "norm_cls", "embedding": "embedding_cls", "rotary": "rotary_fn",
    "activation": "activation_fn", "loss": "loss_fn",
}  # fmt: skip


def build(config: RaceConfig, vocab_size: int, choice: Choice | None = None) -> GPT:
    """On the CPU, in float32, the same for one seed everywhere. `choice` says whose kernels; None: those that the
    config names, torch's for "auto"."""
    model = GPT(
        config.model_config(vocab_size),
        seed=config.seed,
        activation_checkpointing=config.activation_checkpointing,
        **parts(config, choice or named(config)),
    )
    if not config.zero_init:
        draw_ends(model, config.seed)
    for block in model.blocks if config.fp8_mlp else ():
        for name in ("up", "gate", "down"):
            if hasattr(block.mlp, name):
                setattr(block.mlp, name, Fp8Linear(getattr(block.mlp, name)))
    if config.fp8_head:
        model.head = Fp8Linear(model.head)
    return model


def refuse(config: RaceConfig, choice: Choice, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError or UserError for switches that cannot work on this device in this dtype."""
    parts(config, choice)  # knows of head widths
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs on {device.type}: expected a CUDA device")
    if choice.attention == "cuda" and dtype == torch.float32:
        raise ValueError("dtype float32 with attention cuda: expected bfloat16, it takes 16 bits")
    if config.bf16_weights and dtype == torch.float32:
        raise ValueError(
            "bf16_weights where dtype auto is float32: expected --dtype bfloat16, products are of one type"
        )
    if config.fp8_head or config.fp8_mlp:
        from cuda.device import place

        if problem := missing("triton", device):
            raise UserError(f"fp8: {problem}")
        if place(device, kernels="triton").kind == "sm_80":
            raise UserError(f"fp8 on {torch.cuda.get_device_name(device)}: expected a Hopper GPU, capability 9.0")


def parts(config: RaceConfig, choice: Choice) -> dict:
    """Arguments of GPT. Raises ValueError where stage 3's attention has no such head width."""
    if not choice.ours():
        return {}
    from cuda import ops, train_gpt  # which a run on torch's own kernels never needs

    arguments = {}
    for part, name in PARTS.items():
        arguments |= {name: train_gpt.gpt_arguments(getattr(choice, part), config.norm).get(name)}
    if choice.attention != "torch":
        width = config.head_width or config.width // config.heads
        if width not in train_gpt.WIDTHS[choice.attention]:
            known = ", ".join(map(str, train_gpt.WIDTHS[choice.attention]))
            raise ValueError(f"head width {width} with attention {choice.attention}: expected one of {known}")
        function = packed_attention if config.documents else ops.causal_attention
        arguments["attention_fn"] = partial(attention, function, kernels=choice.attention)
    return {name: value for name, value in arguments.items() if value is not None}


def attention(function: Callable[..., Tensor], *qkv: Tensor, **options: Any) -> Tensor:
    """A function of our own in autocast's type, which torch's goes by unasked."""
    device = qkv[0].device.type
    if torch.is_autocast_enabled(device):
        qkv = [x.to(torch.get_autocast_dtype(device)) for x in qkv]
    return function(*qkv, **options)


def exported(model: GPT) -> GPT:
    """The same weights, in float32, in a GPT of torch's own layers: what stage 2 reads from a checkpoint."""
    plain = GPT(model.config, seed=None).to(model.embedding.weight.device)
    plain.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return plain


@torch.no_grad()
def draw_ends(model: GPT, seed: int) -> None:
    """Projections back into the stream are the smaller, the more of them there are."""
    generator = np.random.default_rng([seed, 1])
    for name, p in model.named_parameters():
        if name.endswith(ENDS):
            std = SPREAD if name.startswith("head") else SPREAD / math.sqrt(2 * model.config.layers)
            p.copy_(torch.from_numpy(generator.normal(0.0, std, p.shape)))


class Fp8Linear(nn.Linear):
    """A linear layer without bias whose three products are in 8 bits, forward in e4m3, gradients in e5m2."""

    def __init__(self, whole: nn.Linear):
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        self.weight = whole.weight

    def forward(self, x: Tensor) -> Tensor:
        from cuda import ops

        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return ops.fp8_linear(x, self.weight.to(x.dtype))


def race_loss(
    logits_BTV: Tensor,
    targets_BT: Tensor,
    weights: Sequence[float | Tensor],
    z_loss: float = 0.0,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """What a step minimises, and the mean cross-entropy of the next token alone, in nats and without a gradient.

    The first is the sum over k of weights[k] times the mean cross-entropy of the token k further on than the next, as
    far as the row goes, plus z_loss * mean(log Z squared). Targets of -100 do not count. With documents a token further
    on than the next that belongs to another one costs nothing; means are still over all tokens, so that those of ranks
    that have more and fewer documents are put together rightly.
    """
    log_Z_BT, losses = logits_BTV.logsumexp(dim=-1), []
    for ahead, weight in enumerate(weights[: targets_BT.shape[1]]):
        T = targets_BT.shape[1] - ahead
        wanted_BT = targets_BT[:, ahead:]
        counts_BT = wanted_BT >= 0
        chosen_BT = logits_BTV[:, :T].gather(2, wanted_BT.clamp(min=0)[..., None])[..., 0]
        nats_BT = (log_Z_BT[:, :T] - chosen_BT) * counts_BT
        if documents is not None and ahead:
            nats_BT = nats_BT * (documents.documents_BT[:, ahead:] == documents.documents_BT[:, :T])
        losses.append(weight * nats_BT.sum() / counts_BT.sum().clamp(min=1))
    total = sum(losses)
    return total + z_loss * log_Z_BT.square().mean() if z_loss else total, losses[0].detach() / weights[0]


# ---- what changes on the way -----------------------------------------------------------------------------------------


@torch.no_grad()
def stretch(model: GPT, windows: str) -> None:
    """YaRN (Peng et al. 2023) for windows so far, of which the last has just begun: rotary speeds, and scores that are
    as much sharper as more keys are in sight. Nothing where the model has been told these windows before."""
    before = [int(window) for window in model.config.rope_windows.split(",") if window]
    now = [int(window) for window in windows.split(",") if window]
    if now == before:
        return
    assert now[: len(before)] == before and len(now) == len(before) + 1, (before, now)
    model.config = replace(model.config, rope_windows=windows)
    for name, table_TK in zip(("cos_TK", "sin_TK"), rotary_tables(model.config), strict=True):
        getattr(model, name).copy_(table_TK)
    if before and model.config.qk_norm:  # the gain of the queries is the scale of the scores
        for block in model.blocks:
            if block.attention is not None:
                block.attention.query_norm.weight.mul_(0.2 * math.log(now[-1] / before[-1]) + 1)


@torch.no_grad()
def untie(model: GPT) -> nn.Parameter:
    """The head gets weights of its own, at first those of the embedding; returns them."""
    assert model.config.tied
    weight = model.embedding.weight
    model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    model.head.weight.copy_(weight)
    model.config = replace(model.config, tied=False)
    return model.head.weight
