"""AdamW whose two averages are kept in 8 bits a number (Dettmers et al. 2022, 8-bit Optimizers via Block-wise
Quantization), and with `paged` in host memory.

    optimizer = AdamW8bit(adapter_parameters(model), lr=1e-3, paged=True)

Blocks of 256 numbers have one float32 absmax each; numbers are codes of the dynamic map (`lora.nf4.dynamic_codes`),
signed for the mean of gradients, unsigned for that of their squares. Parameters of fewer than 4096 numbers keep
float32. A step unpacks, averages in float32, changes the parameter by these exact values and packs them again, a page
of states at a time whatever number of parameters that is: some thirty passes of plain torch, not one kernel.

A gradient that is NaN, infinite or too large to be squared makes the averages of its block NaN, and with the next step
its parameters. Refused: parameters that are not contiguous or of another type than float32, bfloat16 and float16,
sparse gradients, options out of range, the states of another optimizer, and to be captured by a CUDA graph.
"""

import math
from collections.abc import Callable, Mapping
from itertools import chain, groupby
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda.quantised_ops import DTYPES
from lora.nf4 import dynamic_codes, nearest
from lora.paged import BLOCK, PAGE, RESIDENT, SCALES, WHOLE, Piece, States, block_bytes

Maps = tuple[Tensor, Tensor]  # codes of the two averages
# No square becomes the code 0, which is 0: a step divides by the root, and of a number with gradients far below the
# largest of its block, or zero for a while (rare rows of an embedding), it would be thousands of times too long. The
# lowest code left is 3.25e-7: where the root mean square of gradients is below 1 / 1750 of the block's largest, steps
# are shorter than AdamW's instead. Where all gradients were zero the mean is, and so the step. The look-up of
# bitsandbytes on CPUs makes no 0 either, but 1.6e-5 at least.
LOWEST = (0, 1)
TINY = 2.0**-149  # the least positive float32: what a block of zeros is divided by
SMALLEST = 4096  # numbers of a parameter that is worth 8 bits, as in bitsandbytes


def quantise_blocks(x: Tensor, codes: Tensor, lowest: int = 0) -> tuple[Tensor, Tensor]:
    """x (blocks, 256) float32 -> indices from `lowest` on of the codes nearest to x / absmax, uint8, and absmax
    (blocks,). A block with an infinite number has the absmax NaN: squares without end would end all its steps, and
    nobody would see it."""
    absmax = x.abs().amax(1)
    packed = nearest(x / absmax.clamp(min=TINY)[:, None], codes).clamp_(min=lowest)
    return packed, absmax + (absmax - absmax)


def dequantise_blocks(q: Tensor, absmax: Tensor, codes: Tensor) -> Tensor:
    # With [] torch would turn the indices into 8 bytes each, which is several times slower on a CPU.
    return codes.index_select(0, q.view(-1).int()).view(q.shape) * absmax[:, None]


def eight_bit(p: Tensor) -> bool:
    """Whether a parameter's states are quantised."""
    return p.numel() >= SMALLEST


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019); options, their defaults and the names of the states are
    those of torch.optim.AdamW.

    state[p] is {"step", "exp_avg", "exp_avg_sq"} and, of p in 8 bits, {"absmax", "absmax_sq"}; the states of all
    parameters of a group are made together, at the first step. Paged or not, the numbers are the same bit for bit, and
    so is the state_dict. `page` is in bytes of states, and `resident` pages are on the device at once; parameters
    below 4096 numbers are not paged. After a step on a GPU pages may still be on their way to the host: read them from
    the state_dict, which waits for them.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, paged: bool = False, page: int = PAGE, resident: int = RESIDENT,
    ):  # fmt: skip
        _check_paging(page, resident)
        self.laid_out: dict[int, list[States]] = {}
        self.paging = {"paged": paged, "page": page, "resident": resident}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__() | {"paging": self.paging}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what load_state_dict calls: states that were there are no longer those of the parameters."""
        super().__setstate__(state)
        self.laid_out = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_step()
        for index, group in enumerate(self.param_groups):
            changed = [p for p in group["params"] if p.grad is not None]
            if not changed:
                continue
            laid_out = self._states_of(index)
            for p in changed:
                self.state[p]["step"] += 1
            for states in laid_out:
                for page, held in states.pages():
                    self._update_page(page, held, states.codes, group)
        return loss

    def _check_step(self) -> None:
        """What a step would pass over, or a replay of it do wrong."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("AdamW8bit.step in a CUDA graph: expected it outside, its steps are counted on the host")
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.grad.layout != torch.strided:
                raise ValueError(f"gradient of a parameter of shape {tuple(p.shape)} is sparse: expected a dense one")
            if not p.is_contiguous():
                raise ValueError(f"parameter of shape {tuple(p.shape)} is no longer contiguous: expected as at first")

    def _states_of(self, index: int) -> list[States]:
        """Those of a group in 8 bits and those in float32, as far as there are any."""
        if index not in self.laid_out:
            parameters = self.param_groups[index]["params"]
            both = [[p for p in parameters if eight_bit(p)], [p for p in parameters if not eight_bit(p)]]
            codes = dynamic_codes(), dynamic_codes(signed=False)
            self.laid_out[index] = [
                States(some, self.state, maps, **self.paging)
                for some, maps in zip(both, (codes, None), strict=True)
                if some
            ]
        return self.laid_out[index]

    def _update_page(
        self, page: list[Piece], held: Mapping[str, Tensor], codes: Maps | None, group: dict[str, Any]
    ) -> None:
        """Neighbours with as many steps behind them are one tensor to work on; usually that is the page."""
        steps = [(piece.p.grad is not None, int(self.state[piece.p]["step"])) for piece in page]
        for (has_gradient, step), run in groupby(zip(steps, page, strict=True), key=lambda pair: pair[0]):
            pieces = [piece for _, piece in run]
            first, last = pieces[0].block - page[0].block, pieces[-1].end - page[0].block
            if has_gradient:
                _update(pieces, {name: x[first:last] for name, x in held.items()}, codes, step, group)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return super().state_dict()

    def _settle(self) -> None:
        for states in chain(*self.laid_out.values()):
            states.settle()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for the states of another optimizer, naming the parameter, before anything is changed.

        torch's own would turn the bytes into the type of the parameter.
        """
        self._settle()  # what is given may be our own states
        given = list(chain(*(group["params"] for group in state_dict["param_groups"])))
        own = list(chain(*(group["params"] for group in self.param_groups)))
        if len(given) == len(own):  # else torch says it
            for number, p in zip(given, own, strict=True):
                if number in state_dict["state"]:
                    _check_state(number, p, state_dict["state"][number])
        super().load_state_dict(state_dict | {"state": {}})
        for number, p in zip(given, own, strict=True):
            if number in state_dict["state"]:
                self.state[p] = {name: x.clone() for name, x in state_dict["state"][number].items()}
                self.state[p]["step"] = self.state[p]["step"].cpu()  # read at each step


def _update(
    pieces: list[Piece], held: Mapping[str, Tensor], codes: Maps | None, step: int, group: dict[str, Any]
) -> None:
    """Each operation is rounded by itself, so that a number's bits do not depend on where pages begin."""
    beta1, beta2 = group["betas"]
    w, g = (_gathered(pieces, values) for values in (lambda p: p.detach(), lambda p: p.grad))
    m, v = (held[name] for name in WHOLE)
    if codes is not None:
        m, v = (dequantise_blocks(*pair) for pair in zip((m, v), (held[name] for name in SCALES), codes, strict=True))
    m.mul_(beta1).add_(g * (1 - beta1))
    v.mul_(beta2).add_(g.mul_(g).mul_(1 - beta2))
    change = torch.sqrt(v).div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    torch.div(m, change, out=change).mul_(group["lr"] / (1 - beta1**step))
    w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change)
    if codes is not None:
        for x, map_, lowest, *names in zip((m, v), codes, LOWEST, WHOLE, SCALES, strict=True):
            for name, packed in zip(names, quantise_blocks(x, map_, lowest), strict=True):
                held[name].copy_(packed)
    line, first = w.view(-1), pieces[0].block * pieces[0].size
    places = [piece.block * piece.size - first for piece in pieces]
    sources = [line[place : place + piece.count] for place, piece in zip(places, pieces, strict=True)]
    torch._foreach_copy_([piece.of(piece.p.detach()) for piece in pieces], sources)


def _gathered(pieces: list[Piece], values: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """(blocks, block) in float32, each piece padded with zeros to whole blocks."""
    parts = [_padded(piece.of(values(piece.p)), -piece.count % piece.size) for piece in pieces]
    return torch.cat(parts).float().view(-1, pieces[0].size)


def _padded(x: Tensor, more: int) -> Tensor:
    return F.pad(x, (0, more)) if more else x  # a pad of nothing would be a copy


def _check_paging(page: int, resident: int) -> None:
    if page < block_bytes(True):
        raise ValueError(f"page {page}: expected at least {block_bytes(True)} bytes, one block of 256 numbers")
    if resident < 1:
        raise ValueError(f"resident {resident}: expected at least 1")


def _check_group(group: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not (0 <= group[name] < math.inf):
            raise ValueError(f"{name} {group[name]}: expected a number of at least 0")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas {group['betas']}: expected two numbers from 0 to below 1")
    for p in group["params"]:
        if p.dtype not in DTYPES or not p.is_contiguous():
            raise ValueError(
                f"parameter of shape {tuple(p.shape)} is {p.dtype}{'' if p.is_contiguous() else ', not contiguous'}: "
                f"expected contiguous numbers of one of {', '.join(map(str, DTYPES))}"
            )
    if len(devices := {p.device for p in group["params"]}) > 1:
        raise ValueError(f"parameters of a group on {', '.join(sorted(map(str, devices)))}: expected one device")


def _check_state(number: int, p: nn.Parameter, state: Mapping[str, Tensor]) -> None:
    kind, blocks = (torch.uint8, (ceil(p.numel() / BLOCK),)) if eight_bit(p) else (torch.float32, None)
    wanted = {"step": ((), torch.float32)} | {name: (tuple(p.shape), kind) for name in WHOLE}
    if eight_bit(p):
        wanted |= {name: (blocks, torch.float32) for name in ("absmax", "absmax_sq")}
    found = {name: (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for name, x in state.items()}
    if found != wanted:
        raise ValueError(f"state of parameter {number} is {found}: expected {wanted}")
