"""Parameters of several ranks in one flat tensor: gathered for computing, freed after it, gradients reduced in parts.

This is the storage below parallel/fsdp.py, which decides when. Parameters lie behind one another, padded to a multiple
of the W ranks, and each rank owns one part. What a module sees are views of one flat buffer whose storage is freed and
given back, so that autograd's saved tensors outlive the freeing. Refused: parameters of several dtypes in one tensor.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from parallel.comm import Comm, Work
from parallel.pieces import Piece, piece_of

Places = list[tuple[nn.Module, str]]  # where a parameter hangs: more than one module may share it


class Flat:
    """Parameters in one flat tensor, all of them trained or all frozen; this rank's part of it is the `master`.

    `masters` are the segments of that part, by name: what the optimizer steps. With offload they are in CPU memory, and
    the device has a copy in the dtype of computation.
    """

    def __init__(
        self, label: str, parameters: Mapping[str, tuple[nn.Parameter, Places]], comm: Comm, replicas: Comm | None, *,
        dtype: torch.dtype | None, param_dtype: torch.dtype | None, device: torch.device, offload: bool,
    ):  # fmt: skip
        self.label, self.comm, self.replicas, self.offload = label, comm, replicas, offload
        first = next(iter(parameters.values()))[0]
        kinds = {p.dtype for p, _ in parameters.values()}
        if dtype is None and len(kinds) > 1:
            raise ValueError(
                f"{label} has parameters of {' and '.join(map(str, kinds))}: expected one dtype, or `dtype`"
            )
        self.trained, dtype = first.requires_grad, dtype or first.dtype
        self.part = -(-sum(p.numel() for p, _ in parameters.values()) // comm.size)
        pinned = offload and device.type == "cuda"
        self.master = torch.zeros(self.part, dtype=dtype, device="cpu" if offload else device, pin_memory=pinned)
        self.local = torch.zeros(self.part, dtype=param_dtype or dtype, device=device) if offload else self.master
        self.alone = comm.size == 1 and self.local.dtype == (param_dtype or dtype)  # then there is nothing to gather
        length = self.part * comm.size
        self.whole = self.local if self.alone else torch.empty(length, dtype=param_dtype or dtype, device=device)
        self.ranges: dict[str, tuple[int, int]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self.pieces: dict[str, Piece] = {}
        for name, (p, places) in parameters.items():
            self._place(name, p, places)
        self.gathering: tuple[Work, Tensor] | None = None
        self.gradient: Tensor | None = None  # the whole one, of this rank
        self.arrived: set[str] = set()  # whose gradient is in it
        self.reducing: tuple[Work, Tensor, Tensor] | None = None  # with the gradient that is being read
        self.reduced: list[tuple[Work, Tensor]] = []
        self.free()

    def _place(self, name: str, p: nn.Parameter, places: Places) -> None:
        start = max((stop for _, stop in self.ranges.values()), default=0)
        self.ranges[name] = start, start + p.numel()
        # .data has a version counter of its own: to gather is no change of the parameter in autograd's eyes.
        view = nn.Parameter(self.whole.data[slice(*self.ranges[name])].view(p.shape), p.requires_grad)
        view.__dict__.update(p.__dict__)
        self.parameters[name] = view
        for module, attribute in places:
            module._parameters[attribute] = view
        if self.trained:
            view.register_post_accumulate_grad_hook(partial(self._arrive, name))
        low = max(start, self.comm.rank * self.part)
        high = min(start + p.numel(), (self.comm.rank + 1) * self.part)
        if low < high:
            offset = self.comm.rank * self.part
            self.masters[name] = nn.Parameter(self.master.data[low - offset : high - offset], p.requires_grad)
            self.pieces[name] = piece_of(p).cut(low - start, high - start)

    def gather(self) -> None:
        """Begins to, unless the whole is there or on its way."""
        storage = self.whole.untyped_storage()
        if self.alone or storage.nbytes():
            return
        storage.resize_(self.whole.numel() * self.whole.element_size())
        mine = self.local.to(self.whole.dtype)
        self.gathering = self.comm.all_gather(mine, self.whole, async_=True, tag=f"parameters of {self.label}"), mine

    def wait(self) -> None:
        if self.gathering is not None:
            self.gathering[0].wait()
            self.gathering = None

    def free(self) -> None:
        self.wait()
        if not self.alone:
            self.whole.untyped_storage().resize_(0)

    @torch.no_grad()
    def _arrive(self, name: str, p: nn.Parameter) -> None:
        """Moves a gradient into the flat one, in the master's dtype: many micro-batches add up there exactly enough."""
        if p.grad is None:  # put off: the hook is called, the gradient comes later
            return
        if self.gradient is None:
            self.gradient = torch.empty(self.part * self.comm.size, dtype=self.master.dtype, device=self.whole.device)
        target = self.gradient[slice(*self.ranges[name])].view(p.shape)
        if name in self.arrived:
            target.add_(p.grad)
        else:
            target.copy_(p.grad)
            self.arrived.add(name)
        p.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Begins the mean over the ranks; what has not arrived on this rank counts as zero."""
        self.land()
        for name, p in self.parameters.items():
            if p.grad is not None:  # computed late, where no hook saw it
                self._arrive(name, p)
        if self.gradient is None:
            self.gradient = torch.zeros(self.part * self.comm.size, dtype=self.master.dtype, device=self.whole.device)
        for name, (start, stop) in self.ranges.items():
            if name not in self.arrived:
                self.gradient[start:stop] = 0
        self.gradient[stop:] = 0
        mine = self.gradient.new_empty(self.part)
        tag = f"gradients of {self.label}"
        work = self.comm.reduce_scatter(self.gradient, mine, "mean", async_=True, tag=tag)
        self.reducing, self.gradient = (work, mine, self.gradient), None
        self.arrived.clear()

    def land(self) -> None:
        """Waits for the mean over the ranks that share parameters, and begins that over the replicas."""
        if self.reducing is not None:
            work, mine, _ = self.reducing
            work.wait()
            self.reducing = None
            if self.replicas is not None:
                tag = f"gradients of {self.label}"
                work = self.replicas.all_reduce(mine, "mean", async_=True, tag=tag)
            self.reduced.append((work, mine))

    @torch.no_grad()
    def deposit(self) -> None:
        """Waits for all means and adds them up in the gradients of `masters`."""
        self.land()
        total = None
        for work, mine in self.reduced:
            work.wait()
            total = mine if total is None else total.add_(mine)
        self.reduced.clear()
        if total is None:
            return
        total = total.to(self.master.device)
        position = 0
        for p in self.masters.values():  # which are one behind the other
            mine = total[position : position + p.numel()]
            p.grad = mine if p.grad is None else p.grad.add_(mine)
            position += p.numel()

    def publish(self) -> None:
        """With offload, gives the device the stepped values."""
        if self.offload:
            self.local.copy_(self.master, non_blocking=True)
