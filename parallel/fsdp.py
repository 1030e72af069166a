"""Fully sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020): each of W ranks keeps a W-th of every parameter.

A unit is a block, or one of the embeddings, or what follows the blocks. It is gathered when a pass comes to it, the
next ones ahead of time, and freed behind the pass. When a backward pass leaves it, its gradients go out in the
background and come back as this rank's part of their mean (storage: parallel/flat.py). Refused: stages that already
have storage, parameters that two stages share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minigpt.config import GPTConfig
from parallel.comm import Comm
from parallel.flat import Flat, Places
from parallel.model import StageGPT, fill
from parallel.pieces import Piece
from parallel.strategy import Strategy


class Unit:
    """What is gathered, reduced and freed together: a Flat of trained parameters, one of frozen ones, or both."""

    def __init__(self, flats: Sequence[Flat]):
        self.flats = flats
        self.trained = [flat for flat in flats if flat.trained]
        self.backwards = 0  # passes whose forward half is over and whose backward half is not
        self.in_backward = False
        self.owed = False  # gradients may be there that are not reduced; the same on all ranks

    def gather(self) -> None:
        for flat in self.flats:
            flat.gather()

    def wait(self) -> None:
        for flat in self.flats:
            flat.wait()

    def free(self) -> None:
        for flat in self.flats:
            flat.free()

    def deferred(self) -> bool:
        """Whether weight gradients of this backward pass come later (parallel/deferred.py)."""
        queues = [getattr(p, "deferred", None) for flat in self.trained for p in flat.parameters.values()]
        return any(queue is not None and queue.open for queue in queues)


class FSDP(Strategy):
    """Shards `stages`, which are on the meta device, over the ranks of `comm`; `replicas` hold the same shards.

    With replicas (hybrid sharding) parameters move within `comm` only, and each rank's part of the gradient is averaged
    over the replicas besides. The initial weights are those that one process would draw from `seed`; or `values`, whole
    tensors by name (a mapping or a function). They, the gradients that are reduced and what the optimizer steps have
    the dtype `dtype` (default: the parameters'); forward and backward passes compute in `param_dtype` (default: the
    same). reshard_after_forward False keeps blocks whole from the forward pass to `finish`: a third less to send, the
    memory of ZeRO-2. `prefetch` is how many blocks are gathered ahead. `offload` keeps master weights, their gradients
    and so the optimizer's states in CPU memory.

    A stage is to be called as a module, with the same blocks on all ranks, and requires_grad is as it was at the start.
    """

    def __init__(
        self, stages: Sequence[StageGPT], comm: Comm, replicas: Comm | None = None, *, config: GPTConfig,
        seed: int | None = None, values: Mapping[str, Tensor] | Callable[[str], Tensor] | None = None,
        dtype: torch.dtype | None = None, param_dtype: torch.dtype | None = None, reshard_after_forward: bool = True,
        prefetch: int = 1, offload: bool = False, device: torch.device | str = "cpu",
    ):  # fmt: skip
        _check(stages, seed, values, prefetch, dtype, param_dtype)
        self.stages, self.split_over = stages, (comm,)
        self.reshard, self.prefetch, self.offload = reshard_after_forward, prefetch, offload
        self.syncing, self.stepping, self.last = True, False, None
        replicas = replicas if replicas is not None and replicas.size > 1 else None
        device = torch.device(device)
        self._flat = partial(Flat, comm=comm, replicas=replicas, dtype=dtype, param_dtype=param_dtype, device=device,
                             offload=offload)  # fmt: skip
        self.units = [unit for stage in stages for unit in self._shard(stage)]
        self.flats = [flat for unit in self.units for flat in unit.flats]
        self._masters = {name: p for flat in self.flats if flat.trained for name, p in flat.masters.items()}
        self._pieces = {name: piece for flat in self.flats for name, piece in flat.pieces.items()}
        self._initialise(config, seed, values)

    @torch.no_grad()
    def _initialise(self, config: GPTConfig, seed, values) -> None:
        tensors = self.tensors()
        if values is None:
            fill(tensors, config, seed)
        else:
            find = values.__getitem__ if isinstance(values, Mapping) else values
            for name, (tensor, piece) in tensors.items():
                tensor.copy_(piece.of(find(name)))
        self.stepped()

    def _shard(self, stage: StageGPT) -> list[Unit]:
        named = _named(stage)
        roots = [self._unit(label, {name: named.pop(name)}) for label, name in _ROOTS.items() if name in named]
        blocks = []
        for layer, block in stage.blocks.items():
            names = [name for name in named if name.startswith(f"blocks.{layer}.")]
            blocks.append(self._unit(f"blocks.{layer}", {name: named.pop(name) for name in names}))
            block.register_forward_pre_hook(partial(self._before_block, blocks, len(blocks) - 1))
        after = [self._unit("norm and head", named)] if named else []
        for index, block in enumerate(stage.blocks.values()):
            block.register_forward_hook(partial(self._after_block, blocks, index, after))
        stage.register_forward_pre_hook(partial(self._before_stage, [*roots, *after], blocks))
        stage.register_forward_hook(self._after_stage)
        return [*roots, *blocks, *after]

    def _unit(self, label: str, parameters: dict[str, tuple[nn.Parameter, Places]]) -> Unit:
        kinds = [
            {name: p for name, p in parameters.items() if p[0].requires_grad is trained} for trained in (True, False)
        ]
        return Unit([self._flat(label, kind) for kind in kinds if kind])

    # Passes through the model.

    def _before_stage(self, roots: list[Unit], blocks: list[Unit], stage, args) -> None:
        for unit in (*roots, *blocks[: self.prefetch]):
            unit.gather()
        for unit in roots:
            unit.wait()
            unit.owed |= torch.is_grad_enabled()
        self.stepping |= torch.is_grad_enabled()

    def _after_stage(self, stage, args, out) -> None:
        if not self.stepping:  # an evaluation: no backward pass comes
            self._free()

    def _before_block(self, blocks: list[Unit], index: int, block, args):
        unit = blocks[index]
        unit.gather()
        if not unit.in_backward:
            for ahead in blocks[index + 1 : index + 1 + self.prefetch]:
                ahead.gather()
        unit.wait()
        x_BTC, *others = args
        if not torch.is_grad_enabled() or not (x_BTC.requires_grad or unit.trained):
            return None
        # The hook must fire after all of the block's gradients: that of a leaf would go before them, that of a node
        # made here comes last, as the engine takes the youngest node first.
        x_BTC = x_BTC if x_BTC.requires_grad else x_BTC.detach().requires_grad_()
        x_BTC = x_BTC.view_as(x_BTC)
        if not unit.in_backward:  # else the block is being computed again
            x_BTC.register_hook(lambda _: self._after_backward(unit))
        return x_BTC, *others

    def _after_block(self, blocks: list[Unit], index: int, after: list[Unit], block, args, out_BTC: Tensor) -> None:
        unit = blocks[index]
        if unit.in_backward:
            return
        if out_BTC.requires_grad:
            unit.backwards += 1
            out_BTC.register_hook(lambda _: self._before_backward(blocks, index, after))
        if self.reshard:
            unit.free()

    def _before_backward(self, blocks: list[Unit], index: int, after: list[Unit]) -> None:
        unit = blocks[index]
        unit.in_backward = True
        unit.gather()
        for ahead in reversed(blocks[max(0, index - self.prefetch) : index]):
            if ahead.backwards:
                ahead.gather()
        if index == len(blocks) - 1:
            for behind in after:
                self._done(behind)
        unit.wait()

    def _after_backward(self, unit: Unit) -> None:
        unit.in_backward = False
        unit.backwards -= 1
        self._done(unit)
        if self.reshard:
            unit.free()

    # Gradients.

    def _done(self, unit: Unit) -> None:
        """A backward pass has left the unit. Whether all its parameters were used may differ between ranks; what is
        sent, and when, does not."""
        unit.owed = True
        if self.syncing and not unit.deferred():
            self._reduce(unit)

    def _reduce(self, unit: Unit) -> None:
        if self.last is not None:  # one unit at a time, so that no more than two whole gradients are held
            for flat in self.last.trained:
                flat.land()
        for flat in unit.trained:
            flat.reduce()
        self.last, unit.owed = unit, False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before

    def finish(self) -> None:
        for unit in self.units:
            if unit.owed:
                self._reduce(unit)
        for unit in self.units:
            for flat in unit.trained:
                flat.deposit()
                assert all(p.grad is None for p in flat.parameters.values()), f"{flat.label}: a gradient of no pass"
            unit.backwards, unit.in_backward = 0, False
        self.last, self.stepping = None, False
        self._free()

    def _free(self) -> None:
        for unit in self.units:
            unit.free()

    # What this rank has.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Flat segments; a parameter of which this rank has nothing is absent."""
        return dict(self._masters)

    def pieces(self) -> dict[str, Piece]:
        return {name: self._pieces[name] for name in self._masters}

    def tensors(self) -> dict[str, tuple[Tensor, Piece]]:
        """All segments of this rank, frozen ones too: what a checkpoint keeps. After writing to them call `stepped`."""
        return {name: (p.data, self._pieces[name]) for flat in self.flats for name, p in flat.masters.items()}

    def stepped(self) -> None:
        for flat in self.flats:
            flat.publish()
        self._free()


_ROOTS = {"embedding": "embedding.weight", "position embedding": "position_embedding.weight"}


@contextmanager
def summon(strategy: FSDP) -> Iterator[dict[str, Tensor]]:
    """Inside, the modules' parameters are whole without a pass, and the value is all of them by name in the master's
    dtype. Every rank of the shard group takes part. What is written to them is lost."""
    values: dict[str, Tensor] = {}
    for flat in strategy.flats:
        flat.gather()
        flat.wait()
        whole = flat.whole
        if whole.dtype != flat.master.dtype:
            whole = torch.empty(whole.shape, dtype=flat.master.dtype, device=whole.device)
            mine = flat.master.to(whole.device)
            flat.comm.all_gather(mine, whole, tag=f"masters of {flat.label}")
        for name, p in flat.parameters.items():
            values[name] = whole[slice(*flat.ranges[name])].view(p.shape)
    try:
        yield values
    finally:
        strategy._free()


def _named(stage: StageGPT) -> dict[str, tuple[nn.Parameter, Places]]:
    """Each parameter by its first name, and all places where it hangs."""
    names = {id(p): name for name, p in stage.named_parameters()}
    named: dict[str, tuple[nn.Parameter, Places]] = {}
    for module in stage.modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                named.setdefault(names[id(p)], (p, []))[1].append((module, attribute))
    return named


def _check(stages, seed, values, prefetch, dtype, param_dtype) -> None:
    if (seed is None) == (values is None):
        raise ValueError(f"seed {seed!r} and values {'given' if values is not None else None}: expected one of the two")
    if not (isinstance(prefetch, int) and prefetch >= 0):
        raise ValueError(f"prefetch {prefetch!r}: expected a number of blocks, 0 or more")
    for kind in (dtype, param_dtype):
        if kind is not None and not kind.is_floating_point:
            raise ValueError(f"dtype {kind}: expected a floating-point type")
    seen: set[str] = set()
    for stage in stages:
        for name, p in stage.named_parameters():
            if not p.is_meta:
                raise ValueError(f"{name} is on {p.device}: expected stages on the meta device, without storage")
            if name in seen:
                raise ValueError(f"{name} is in two stages of this rank: expected each parameter once")
            seen.add(name)
