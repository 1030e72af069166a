"""How a step gets its loss from the model: all at once, or head and loss together without float32 logits.

The loss alone knows the gradient of its logits, so `HeadLoss` computes it in the forward pass, some rows at a time that
stay in the cache, and nothing of V numbers a token is ever kept. That is what a CPU's memory wants; on a GPU the
compiler fuses head and loss itself. What is compiled is compiled once for each kind of step (`Plan.kind`), so that the
same step runs the same program whatever was before it. Refused: nothing, models decide what they take.

Shapes: B batch, T time, N = B T tokens, C width, V vocabulary, K tokens ahead that are predicted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.masks import Documents
from minigpt.model import GPT
from minigpt.train import reproducible
from speedrun.config import RaceConfig
from speedrun.model import race_loss

ROWS = 256  # tokens worked on at once: 4 MiB of float32 at a vocabulary of 4,096
PROGRAMS = 256  # of one function; torch's own limit is 8, after which it goes on without compiling


def loss_of(model: GPT, config: RaceConfig, dtype: torch.dtype, device: torch.device) -> Callable:
    """(tokens_BT, targets_BT, weights, **options of GPT.forward) -> what a step minimises and the mean nats of the next
    token, see `race_loss`; compiled where the config asks for it. `dtype` is that of the products."""
    # Each of one shape: else the second shape would make a program for any, and a run that is resumed after it another.
    options = {"dynamic": False} | ({"mode": "reduce-overhead"} if config.cuda_graphs else {})
    compiled = partial(torch.compile, **options) if config.compile else lambda function: function
    if config.fused_loss:
        return partial(by_kernel, compiled(model), config.z_loss)
    if gradient_ahead(config, device):
        return partial(by_rows, model, compiled(model.hidden), compiled(loss_and_gradient), dtype, config.z_loss)
    return partial(at_once, compiled(partial(of_logits, model, config.z_loss)), dtype)


@contextmanager
def compiling(config: RaceConfig, device: torch.device) -> Iterator[None]:
    """Around steps: as many programs as there are kinds of them, which on a CPU give the same bits each time."""
    if not config.compile:
        yield
        return
    from torch import _dynamo  # slow to import

    with _dynamo.config.patch(recompile_limit=PROGRAMS), reproducible(device.type == "cpu"):
        yield


def gradient_ahead(config: RaceConfig, device: torch.device) -> bool:
    """Whether the head's gradients are computed in the forward pass."""
    return device.type == "cpu" and not (config.fp8_head or config.fused_loss)


def by_kernel(forward: Callable, z_loss: float, tokens_BT: Tensor, targets_BT: Tensor, _, **options):
    """The model's own loss_fn, which has one target a token."""
    loss = forward(tokens_BT, targets_BT, z_loss=z_loss, **options)
    return loss, loss.detach()


def at_once(
    program: Callable,
    dtype: torch.dtype,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    weights: tuple[float, ...],
    **options,
):
    # As tensors, which are filled on the device and not waited for: a program is compiled for the numbers it is given.
    exact, device = torch.promote_types(dtype, torch.float32), tokens_BT.device
    weights = tuple(torch.full((), weight, dtype=exact, device=device) for weight in weights)
    return program(tokens_BT, targets_BT, weights, **options)


def of_logits(
    model: GPT, z_loss: float, tokens_BT: Tensor, targets_BT: Tensor, weights: tuple[Tensor, ...], **options
) -> tuple[Tensor, Tensor]:
    return race_loss(model(tokens_BT, **options), targets_BT, weights, z_loss, options.get("documents"))


def by_rows(
    model: GPT,
    hidden: Callable,
    kernel: Callable,
    dtype: torch.dtype,
    z_loss: float,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    weights: tuple[float, ...],
    **options,
) -> tuple[Tensor, Tensor]:
    x_NC = hidden(tokens_BT, **options).flatten(0, 1)
    weight_VC = model.embedding.weight if model.config.tied else model.head.weight
    exact, documents = torch.promote_types(dtype, torch.float32), options.get("documents")
    wanted_NK, counts_NK = targets_ahead(targets_BT, weights, exact, documents)
    with torch.autocast(x_NC.device.type, enabled=False):
        loss, next_token = HeadLoss.apply(
            x_NC.to(dtype), weight_VC.to(dtype), wanted_NK, counts_NK, model.config.softcap, z_loss, kernel
        )
    return loss, next_token / weights[0]


def targets_ahead(
    targets_BT: Tensor, weights: tuple[float, ...], dtype: torch.dtype, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """(wanted_NK, counts_NK): of each token the targets from the next on, and by how much each one's nats count in the
    loss, in `dtype`: its weight over the targets that there are. Where there is none, -100 in the data or the row's
    end, the target is 0 and counts 0; so does one in another document, which is one of the targets that there are."""
    T = targets_BT.shape[1]
    weights = weights[:T]
    wanted = [F.pad(targets_BT[:, k:], (0, k), value=-100).flatten() for k in range(len(weights))]
    wanted_NK = torch.stack(wanted, dim=1)
    there_NK = wanted_NK >= 0
    each_K = torch.tensor(weights, dtype=dtype, device=targets_BT.device) / there_NK.sum(dim=0).clamp(min=1)
    if documents is not None:
        of_BT = documents.documents_BT
        same = [F.pad(of_BT[:, k:], (0, k), value=-1) == of_BT for k in range(1, len(weights))]
        there_NK = there_NK & torch.stack([torch.ones_like(of_BT, dtype=torch.bool), *same], dim=-1).flatten(0, 1)
    return wanted_NK.clamp(min=0), there_NK * each_K


def loss_and_gradient(
    raw_NV: Tensor, wanted_NK: Tensor, counts_NK: Tensor, softcap: float, z_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the head's products raw_NV: what each token adds to the loss, in it what the next token's nats add (both (N,),
    float32 at least), and the gradient of the first by raw_NV, in its dtype."""
    raw = raw_NV.to(torch.promote_types(raw_NV.dtype, torch.float32))
    bent = torch.tanh(raw / softcap) if softcap else raw
    logits = softcap * bent if softcap else raw
    log_Z = logits.logsumexp(dim=1, keepdim=True)
    loss_N = z_share * log_Z.square()[:, 0]
    gradient = (logits - log_Z).exp() * (counts_NK.sum(dim=1, keepdim=True) + 2 * z_share * log_Z)
    tokens_V = torch.arange(raw.shape[1], device=raw.device)
    nats_NK = []
    for k in range(wanted_NK.shape[1]):
        hit = tokens_V == wanted_NK[:, k, None]
        nats_NK.append((log_Z[:, 0] - torch.where(hit, logits, 0).sum(dim=1)) * counts_NK[:, k])
        gradient = gradient - torch.where(hit, counts_NK[:, k, None], 0)
    if softcap:
        gradient = gradient * (1 - bent * bent)
    return loss_N + sum(nats_NK), nats_NK[0], gradient.to(raw_NV.dtype)


class HeadLoss(torch.autograd.Function):
    """`race_loss` of the soft-capped logits x_NC weight_VC', and the next token's mean nats, without a gradient."""

    @staticmethod
    def forward(ctx, x_NC, weight_VC, wanted_NK, counts_NK, softcap, z_loss, kernel=loss_and_gradient):
        N, (needs_x, needs_weight) = x_NC.shape[0], ctx.needs_input_grad[:2]
        by_x_NC = torch.empty_like(x_NC) if needs_x else None
        exact = torch.promote_types(weight_VC.dtype, torch.float32)  # sums of parts lose less in it
        by_weight_VC = torch.zeros_like(weight_VC, dtype=exact) if needs_weight else None
        loss, next_token = 0.0, 0.0
        for first in range(0, N, ROWS):
            rows = slice(first, first + ROWS)
            raw_NV = x_NC[rows] @ weight_VC.mT
            of_loss, of_next, gradient_NV = kernel(raw_NV, wanted_NK[rows], counts_NK[rows], softcap, z_loss / N)
            loss, next_token = loss + of_loss.sum(), next_token + of_next.sum()
            if needs_x:
                by_x_NC[rows] = gradient_NV @ weight_VC
            if needs_weight:
                by_weight_VC += gradient_NV.mT @ x_NC[rows]
        ctx.save_for_backward(by_x_NC, None if by_weight_VC is None else by_weight_VC.to(weight_VC.dtype))
        ctx.mark_non_differentiable(next_token)
        return loss, next_token

    @staticmethod
    def backward(ctx, outer, _):
        by_x, by_weight = (None if part is None else part * outer.to(part.dtype) for part in ctx.saved_tensors)
        return by_x, by_weight, None, None, None, None, None
