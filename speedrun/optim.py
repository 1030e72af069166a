"""The race's optimizers: Muon with what was found after it, for matrices; AdamW for the rest; both shared over ranks.

Muon (Jordan et al. 2024) by owner: matrices of one shape are one stack. Each rank gets the mean gradient of its share
of the stack (reduce-scatter), orthogonalises that, and hands the new weights round (all-gather): no work is done twice,
and momentum lives with the owner alone. NorMuon (Li et al. 2025) evens out the rows, cautious decay (Liang et al. 2024)
shrinks only weights that the update shrinks too. AdamW's tables are shared by rows in the same way. Collectives are
started in one order and waited for in that order, so that they overlap with the work on what has come.
Refused: parameters that are no matrices, options out of range, matrices without a gradient; on several ranks any
parameter without one.

Shapes: N matrices of a stack, R rows, C columns, W ranks.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minigpt.optim import orthogonalize
from parallel.comm import Comm, Work


class Muon(torch.optim.Optimizer):
    """u = g + momentum (buffer - g) with buffer += (1 - momentum) (g - buffer); O = orthogonalize(u);
    p -= lr max(1, R / C)^0.5 (O + weight_decay p).

    beta2 > 0: NorMuon. Along the shorter axis the mean of O squared is averaged over steps with beta2, O is divided by
    its root, and then scaled back to the norm that it had. `cautious`: only where O and p have the same sign does p
    decay. `dtype` is what products are computed in. Weights in bfloat16 keep their lower 16 bits beside them, and are
    updated as the float32 that both halves make.

    With a `comm` of several ranks every rank gives its own gradients, of which the mean counts; `start` may be called
    once they are there, before `step`. All ranks have the same weights afterwards. Gradients of None are refused.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        beta2: float = 0.0,
        weight_decay: float = 0.0,
        cautious: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        comm: Comm | None = None,
        multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    ):
        for name, value in (("momentum", momentum), ("beta2", beta2)):
            if not (0 <= value < 1):
                raise ValueError(f"{name} {value}: expected 0 to less than 1")
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not (0 <= value < math.inf):
                raise ValueError(f"{name} {value}: expected 0 or a positive number")
        options = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "cautious": cautious}
        super().__init__(params, options)
        self.dtype, self.multiply, self.comm = dtype, multiply, comm
        self.stacks = [(i, same) for i, group in enumerate(self.param_groups) for same in stacks_of(group["params"])]
        self._coming: list[tuple[Tensor, Work]] = []

    @torch.no_grad()
    def halve(self) -> None:
        """Before the first step: the weights become bfloat16, and what that leaves of them stays with their owners."""
        for group, same in self.stacks:
            high_NRC, low_NRC = halves(torch.stack(list(same)))
            first, last = share(len(same), self.comm)
            if own := same[first:last]:
                self.state[own[0]] |= new_state(own, self.param_groups[group]["beta2"]) | {"low": low_NRC[first:last]}
            for p, high in zip(same, high_NRC.unbind(), strict=True):
                p.data = high.clone()  # of its own, at an address that kernels like

    @torch.no_grad()
    def start(self) -> None:
        """Begins to average the gradients: every rank's share of each stack is on its way."""
        assert not self._coming, "start twice without a step"
        self._coming = [mean_share([p.grad for p in same], self.comm) for _, same in self.stacks]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if not self._coming:
            self.start()
        coming, self._coming = self._coming, []
        leaving = []
        for (group, same), (g_NRC, work) in zip(self.stacks, coming, strict=True):
            work.wait()
            first, last = share(len(same), self.comm)
            own = same[first:last]
            if own:
                self._update(own, g_NRC[: len(own)], self.param_groups[group])
            leaving.append(handed_round(own, same, self.comm))
        for same, new_NRC, work in leaving:
            work.wait()
            if new_NRC is not None:
                torch._foreach_copy_(same, list(new_NRC[: len(same)].unbind()))

    def _update(self, own: Sequence[nn.Parameter], g_NRC: Tensor, group: dict) -> None:
        state, (R, C) = self.state[own[0]], own[0].shape
        if not state:
            state |= new_state(own, group["beta2"])
        g_NRC = g_NRC.to(state["buffer"].dtype)
        state["buffer"].lerp_(g_NRC, 1 - group["momentum"])
        o_NRC = orthogonalize(g_NRC.lerp(state["buffer"], group["momentum"]), self.dtype, self.multiply)
        if group["beta2"]:
            o_NRC = evened(o_NRC, state["second"], group["beta2"])
        lr = group["lr"] * math.sqrt(max(1, R / C))
        p_NRC = joined(own, state["low"]) if "low" in state else torch.stack(list(own))
        if decay := lr * group["weight_decay"]:
            shrinking = (o_NRC * p_NRC > 0).to(p_NRC.dtype) if group["cautious"] else 1
            p_NRC.mul_(1 - decay * shrinking)
        p_NRC.sub_(o_NRC, alpha=lr)
        if "low" in state:
            p_NRC, state["low"] = halves(p_NRC)
        torch._foreach_copy_(list(own), list(p_NRC.unbind()))

    def load_state_dict(self, state_dict: dict) -> None:
        """Of as many ranks: each has the state of what it owns. torch's own would round it to the weights' type."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, values in state_dict["state"].items():
            p = parameters[number]
            self.state[p] = {name: value.to(p.device, copy=True) for name, value in values.items()}


def stacks_of(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Matrices by shape. Raises ValueError for parameters of another kind."""
    by_shape: dict[tuple, list[nn.Parameter]] = {}
    for p in parameters:
        if p.ndim != 2:
            raise ValueError(f"Muon got a parameter of shape {tuple(p.shape)}: expected matrices only")
        by_shape.setdefault((*p.shape, p.dtype), []).append(p)
    return list(by_shape.values())


def new_state(own: Sequence[nn.Parameter], beta2: float) -> dict[str, Tensor]:
    """All zero, float32 at least: the momentum, for NorMuon the mean squares, of bfloat16 weights the lower halves."""
    like, (R, C) = own[0].detach(), own[0].shape
    exact = torch.promote_types(like.dtype, torch.float32)
    state = {"buffer": like.new_zeros(len(own), R, C, dtype=exact)}
    if beta2:
        state["second"] = like.new_zeros(len(own), *((R, 1) if R >= C else (1, C)), dtype=exact)
    if like.dtype == torch.bfloat16:
        state["low"] = like.new_zeros(len(own), R, C, dtype=torch.int16)
    return state


def evened(o_NRC: Tensor, second: Tensor, beta2: float) -> Tensor:
    """NorMuon: updates `second`, (N, R, 1) of tall matrices, (N, 1, C) of wide ones. The norm of each matrix stays."""
    axis = 2 if second.shape[2] == 1 else 1
    second.lerp_(o_NRC.square().mean(axis, keepdim=True), 1 - beta2)
    new_NRC = o_NRC * second.clamp(min=1e-10).rsqrt()
    return new_NRC * (o_NRC.norm(dim=(1, 2), keepdim=True) / new_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10))


# ---- bfloat16 weights with their other half --------------------------------------------------------------------------


def joined(high: Sequence[Tensor], low_NRC: Tensor) -> Tensor:
    """float32 that `halves` took apart, bit for bit; high: bfloat16, low_NRC: int16."""
    bits_NRC = torch.stack(list(high)).view(torch.int16).to(torch.int32) << 16
    return (bits_NRC + low_NRC.to(torch.int32)).view(torch.float32)


def halves(x_NRC: Tensor) -> tuple[Tensor, Tensor]:
    """x rounded to bfloat16, and what the bits of x are above or below those, int16. Cutting would make all weights
    smaller. A tie goes away from zero, not to even as torch's: 16 bits could not tell which side of it x was on."""
    bits_NRC = x_NRC.contiguous().view(torch.int32)
    high_NRC = (bits_NRC + 0x8000) >> 16
    return high_NRC.to(torch.int16).view(torch.bfloat16), (bits_NRC - (high_NRC << 16)).to(torch.int16)


# ---- sharing over ranks ----------------------------------------------------------------------------------------------


def share(count: int, comm: Comm | None) -> tuple[int, int]:
    """[first, last) of `count` things that this rank owns: as many as the others, the last ranks fewer."""
    if comm is None or comm.size == 1:
        return 0, count
    each = math.ceil(count / comm.size)
    return min(comm.rank * each, count), min((comm.rank + 1) * each, count)


def mean_share(gradients: Sequence[Tensor | None], comm: Comm | None) -> tuple[Tensor, Work]:
    """This rank's share of the stacked gradients, averaged over the ranks, and what to wait for; padded with zeros."""
    if any(g is None for g in gradients):
        raise ValueError(
            "a matrix without a gradient: expected one for each, take what is not trained out of the group"
        )
    if comm is None or comm.size == 1:
        return torch.stack(list(gradients)), Work()
    each = math.ceil(len(gradients) / comm.size)
    all_NRC = gradients[0].new_zeros(each * comm.size, *gradients[0].shape)
    torch.stack(list(gradients), out=all_NRC[: len(gradients)])
    own_NRC = all_NRC.new_empty(each, *gradients[0].shape)
    return own_NRC, comm.reduce_scatter(all_NRC, own_NRC, "mean", async_=True, tag="gradients of matrices")


def clip(parameters: Sequence[nn.Parameter], largest: float, comm: Comm | None) -> None:
    """Scales all gradients alike where their mean over the ranks is longer than `largest`. No rank knows that length
    from its own gradients: they are all exchanged once more."""
    if comm is None or comm.size == 1:
        torch.nn.utils.clip_grad_norm_(parameters, largest)
        return
    mean = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    comm.all_reduce(mean, "mean", tag="gradients, to clip them")
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, mean.norm())


def handed_round(
    own: Sequence[Tensor], same: Sequence[Tensor], comm: Comm | None
) -> tuple[Sequence[Tensor], Tensor | None, Work]:
    """(all matrices, their new stack or None where nothing has to be copied, what to wait for)."""
    if comm is None or comm.size == 1:
        return same, None, Work()
    each = math.ceil(len(same) / comm.size)
    own_NRC = same[0].detach().new_zeros(each, *same[0].shape)
    if own:
        torch.stack([p.detach() for p in own], out=own_NRC[: len(own)])
    all_NRC = own_NRC.new_empty(each * comm.size, *same[0].shape)
    return same, all_NRC, comm.all_gather(own_NRC, all_NRC, async_=True, tag="matrices")


class Rows:
    """Any elementwise optimizer, each rank stepping its own rows of each table; what has too few rows, all ranks step.

    `make(groups)` builds the optimizer for groups like `groups` (dicts with "params"). On one rank that is all.
    """

    def __init__(self, groups: Sequence[dict], make: Callable[[list[dict]], torch.optim.Optimizer], comm: Comm | None):
        self.comm = None if comm is None or comm.size == 1 else comm
        self.tables: list[tuple[nn.Parameter, nn.Parameter]] = []  # (whole, this rank's rows: the same memory)
        self.small: list[nn.Parameter] = []
        own_groups = [{**group, "params": [self._own(p) for p in group["params"]]} for group in groups]
        self.optimizer = make(own_groups)
        self._coming: list[Work] = []

    def _own(self, p: nn.Parameter) -> nn.Parameter:
        if self.comm is None:
            return p
        if p.ndim < 2 or p.shape[0] % self.comm.size:
            self.small.append(p)
            return p
        each = p.shape[0] // self.comm.size
        own = nn.Parameter(p.detach()[self.comm.rank * each : (self.comm.rank + 1) * each])
        self.tables.append((p, own))
        return own

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def add_copy(self, of: nn.Parameter, new: nn.Parameter, peak_lr: float) -> None:
        """`new` has the values of `of`, and goes on with its states in a group like its own, at another peak."""
        pairs = [(p, own) for p, own in self.tables if p is of]
        old = pairs[0][1] if pairs else of
        group = next(group for group in self.param_groups if any(p is old for p in group["params"]))
        own = self._own(new)
        self.optimizer.add_param_group({**group, "params": [own], "lr": peak_lr, "peak_lr": peak_lr})
        self.optimizer.state[own] = {name: value.clone() for name, value in self.optimizer.state[old].items()}

    def state_dict(self) -> dict:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Of as many ranks: each has the states of its rows."""
        self.optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def start(self) -> None:
        """Begins to average the gradients."""
        assert not self._coming, "start twice without a step"
        if self.comm is None:
            return
        for p in (*(p for p, _ in self.tables), *self.small):
            if p.grad is None:  # the others may have one and wait for this rank's
                raise ValueError(f"a parameter of shape {tuple(p.shape)} without a gradient on rank {self.comm.rank}: "
                                 f"expected one for each on every rank")  # fmt: skip
        for p, own in self.tables:
            own.grad = torch.empty_like(own)
            gradient = p.grad.contiguous()
            work = self.comm.reduce_scatter(gradient, own.grad, "mean", async_=True, tag="gradients of a table")
            self._coming.append(work)
        if self.small:
            self._flat = torch.cat([p.grad.reshape(-1) for p in self.small])
            self._coming.append(self.comm.all_reduce(self._flat, "mean", async_=True, tag="gradients of the rest"))

    @torch.no_grad()
    def step(self) -> None:
        if self.comm is not None and not self._coming:
            self.start()
        for work in self._coming:
            work.wait()
        if self.small and self.comm is not None:
            parts = self._flat.split([p.numel() for p in self.small])
            for p, part in zip(self.small, parts, strict=True):
                p.grad = part.view_as(p)
        self._coming = []
        self.optimizer.step()
        if self.comm is None:
            return
        leaving = [
            (p, self.comm.all_gather(own.detach().clone(), p.detach(), async_=True, tag="a table"))
            for p, own in self.tables
        ]
        for _, work in leaving:
            work.wait()
