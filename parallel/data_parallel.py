"""Data parallelism in three steps: all ranks have the whole model, compute on rows of their own and average gradients.

    PerParameter   after the backward pass, one all-reduce for each parameter
    FlatBuckets    the same in buckets: gradients lie flat behind each other, few large messages
    Overlapped     a bucket is on its way as soon as its gradients are there, while the backward pass goes on

What follows a step is parallel/zero.py. Refused: stages that share a parameter name, buckets of no size.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, compress

import torch
from torch import Tensor, nn

from parallel.comm import Comm, Work
from parallel.model import StageGPT
from parallel.pieces import Piece, piece_of
from parallel.strategy import Strategy

Reduction = tuple[Work, Callable[[], Tensor]]  # one under way, and what reads its result once that is over


def trained_parameters(stages: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """By name, in the order of the stages. Raises ValueError when two stages have the same name."""
    found: dict[str, nn.Parameter] = {}
    for stage in stages:
        for name, p in stage.named_parameters():
            if name in found:
                raise ValueError(f"parameter {name!r} is in two stages of one rank: expected names of their own")
            found[name] = p
    return {name: p for name, p in found.items() if p.requires_grad}


@torch.no_grad()
def broadcast_state(stages: Sequence[nn.Module], comm: Comm) -> None:
    """Parameters, frozen ones too, and buffers become those of the first rank."""
    running = []
    for stage in stages:
        for name, x in chain(stage.named_parameters(), stage.named_buffers()):
            message = x.detach().contiguous()
            running.append((comm.broadcast(message, async_=True, tag=f"initial {name}"), x, message))
    for work, x, message in running:
        work.wait()
        if message.data_ptr() != x.data_ptr():
            x.copy_(message)


def split_into_buckets(
    parameters: Mapping[str, nn.Parameter], full_bytes: float, kind: Callable[[str], object] = lambda name: None
) -> list[dict[str, nn.Parameter]]:
    """In reverse order, about that of the gradients, and a bucket comes where its last gradient does.

    A bucket has one dtype, device and `kind(name)`, and takes no more once it has full_bytes.
    """
    filling: dict[object, dict[str, nn.Parameter]] = {}
    full = []
    for name, p in reversed(parameters.items()):
        key = p.dtype, p.device, kind(name)
        bucket = filling.setdefault(key, {})
        bucket[name] = p
        if sum(p.numel() * p.element_size() for p in bucket.values()) >= full_bytes:
            full.append(filling.pop(key))
    return full + list(filling.values())


class DataParallel(Strategy):
    """What all have in common. bucket_mb is the size of a bucket in MiB, for those that have buckets; reduce_dtype is
    what gradients travel in, if not their own. The first rank's weights and buffers go to all, unless `broadcast` is
    False because they are known to be the same."""

    def __init__(
        self,
        stages: Sequence[StageGPT],
        comm: Comm,
        *,
        bucket_mb: float = 25.0,
        reduce_dtype: torch.dtype | None = None,
        broadcast: bool = True,
    ):
        if not bucket_mb > 0:
            raise ValueError(f"bucket_mb {bucket_mb!r}: expected a positive number of MiB")
        self.stages, self.comm = stages, comm
        self.bucket_bytes, self.reduce_dtype = bucket_mb * 2**20, reduce_dtype
        self._trained = trained_parameters(stages)
        self._sync = True
        if broadcast:
            for group in reversed(self.averaged_over):  # outer first: then each inner first rank is right
                broadcast_state(stages, group)

    @property
    def averaged_over(self) -> tuple[Comm, ...]:
        """Groups over whose ranks gradients are averaged, one after the other."""
        return (self.comm,)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._trained

    def pieces(self) -> dict[str, Piece]:
        return {name: piece_of(p) for name, p in self._trained.items()}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def stepped(self) -> None:
        pass

    def _anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Which flags any rank has set."""
        device = next((p.device for p in self._trained.values()), None)
        votes = torch.tensor(flags, dtype=torch.int32, device=device)
        for comm in self.averaged_over:
            comm.all_reduce(votes, "max", tag="who has gradients")
        return votes.bool().tolist()


class PerParameter(DataParallel):
    """Nothing happens before `finish`. Many small messages: each pays for its latency."""

    @torch.no_grad()
    def finish(self) -> None:
        used = self._anywhere([p.grad is not None for p in self._trained.values()])
        for (name, p), anywhere in zip(self._trained.items(), used, strict=True):
            if anywhere:  # so that all ranks take part
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                message = gradient.to(self.reduce_dtype or p.dtype).contiguous()
                self.comm.all_reduce(message, "mean", tag=f"gradient of {name}")
                p.grad = message.to(p.dtype)


class Bucket:
    """Parameters whose gradients travel together, and how far they are in this step."""

    def __init__(self, parameters: dict[str, nn.Parameter], comm: Comm, reduce_dtype: torch.dtype | None):
        self.parameters, self.comm = parameters, comm
        first = next(iter(parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.reduce_dtype = reduce_dtype or first.dtype
        self.sizes = [p.numel() for p in parameters.values()]
        self.label = f"{next(iter(parameters))} and {len(parameters) - 1} others"
        self.seen: set[str] = set()  # whose gradient a hook has seen since the last start
        self.used: set[str] = set()  # whose gradient was sent off in this step, by this rank
        self.total: Tensor | None = None  # what came out of this step's reductions so far
        self._running: Reduction | None = None

    @property
    def complete(self) -> bool:
        return len(self.seen) == len(self.parameters)

    @property
    def pending(self) -> bool:
        """Has gradients that are not on their way."""
        return any(p.grad is not None for p in self.parameters.values())

    def uses(self, name: str) -> bool:
        return name in self.used or self.parameters[name].grad is not None

    def start(self) -> None:
        """Takes the gradients away from the parameters and sends them off. Further ones may come and start again."""
        self.collect()
        self.seen.clear()
        gradients = [p.grad for p in self.parameters.values()]
        self.used |= {name for name, p in self.parameters.items() if p.grad is not None}
        self._running = self.reduce(gradients)
        for p in self.parameters.values():
            p.grad = None

    def collect(self) -> None:
        """Waits for what was started, if anything was, and adds it to the total."""
        if self._running is None:
            return
        (work, result), self._running = self._running, None
        work.wait()
        reduced = result().to(self.dtype)
        self.total = reduced if self.total is None else self.total.add_(reduced)

    def deliver(self, used: Collection[str]) -> None:
        """Gives the averaged gradients to those parameters that any rank used, and ends the step."""
        if self.total is not None:
            for name, p, gradient in self.averaged(self.total):
                p.grad = gradient if name in used else None
        self.total = None
        self.seen.clear()
        self.used.clear()

    def reduce(self, gradients: Sequence[Tensor | None]) -> Reduction:
        """Divides by the number of ranks on the way into the bucket: a mean instead of a sum would be one more pass."""
        flat = torch.empty(sum(self.sizes), dtype=self.reduce_dtype, device=self.device)
        for part, gradient in zip(flat.split(self.sizes), gradients, strict=True):
            if gradient is None:
                part.zero_()
            elif gradient.dtype == part.dtype:
                torch.mul(gradient.reshape(-1), 1 / self.comm.size, out=part)
            else:
                part.copy_(gradient.reshape(-1)).mul_(1 / self.comm.size)
        return self.comm.all_reduce(flat, async_=True, tag=f"gradients of {self.label}"), lambda: flat

    def averaged(self, total: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Name, the tensor that the optimizer steps, its gradient."""
        for (name, p), part in zip(self.parameters.items(), total.split(self.sizes), strict=True):
            yield name, p, part.view(p.shape)


class FlatBuckets(DataParallel):
    """Nothing happens before `finish`, which has all buckets under way at once."""

    in_flight: int | None = None  # how many buckets may be under way; None: all

    def __init__(self, stages: Sequence[StageGPT], comm: Comm, **options):
        super().__init__(stages, comm, **options)
        self.buckets = self._make_buckets()
        self._under_way: deque[Bucket] = deque()

    def _make_buckets(self) -> list[Bucket]:
        buckets = split_into_buckets(self._trained, self.bucket_bytes)
        return [Bucket(parameters, self.comm, self.reduce_dtype) for parameters in buckets]

    @torch.no_grad()
    def finish(self) -> None:
        buckets, used = self._vote()
        for bucket in buckets:
            self._start(bucket)
        self._deliver(used)

    def zero_grad(self) -> None:
        assert all(bucket.total is None for bucket in self.buckets), "finish() comes before zero_grad()"
        super().zero_grad()

    def _vote(self) -> tuple[list[Bucket], set[str]]:
        """Buckets for which any rank has gradients to send, and all that any rank has used in this step."""
        pending = [bucket.pending for bucket in self.buckets]
        used = {name: bucket.uses(name) for bucket in self.buckets for name in bucket.parameters}
        flags = self._anywhere([*pending, *used.values()])
        names = set(compress(used, flags[len(pending) :]))
        return list(compress(self.buckets, flags)), names

    def _start(self, bucket: Bucket) -> None:
        bucket.start()
        self._under_way.append(bucket)
        while self.in_flight is not None and len(self._under_way) > self.in_flight:
            self._under_way.popleft().collect()

    def _deliver(self, used: Collection[str]) -> None:
        for bucket in self.buckets:
            bucket.collect()
        self._under_way.clear()
        for bucket in self.buckets:
            bucket.deliver(used)


class Overlapped(FlatBuckets):
    """A hook on each parameter sends a bucket off when its last gradient is there.

    All ranks must make the same calls in the same order, whatever parameters each of them uses. So a step goes in
    rounds: every bucket once, in order, each only after the one before it; then a vote on which buckets a further round
    has. `finish` ends the round, and goes on until no rank has a gradient left: those that no hook saw, and those that
    came after their bucket had gone. One that starts a second round during a backward pass votes for all buckets.
    """

    def __init__(self, stages: Sequence[StageGPT], comm: Comm, **options):
        super().__init__(stages, comm, **options)
        self._round = deque(self.buckets)  # those still to be sent
        self._votes: list[Work] = []
        for bucket in self.buckets:
            for name, p in bucket.parameters.items():
                p.register_post_accumulate_grad_hook(partial(self._arrived, bucket, name))

    def _arrived(self, bucket: Bucket, name: str, p: nn.Parameter) -> None:
        if not self._sync:
            return
        bucket.seen.add(name)
        if not self._round and self.buckets[0].complete:
            self._vote_for_all()
        while self._round and self._round[0].complete:
            self._start(self._round.popleft())

    def _vote_for_all(self) -> None:
        """The call that others make in `_vote`. Its outcome is known, so nobody waits here."""
        flags = len(self.buckets) + len(self._trained)
        for comm in self.averaged_over:
            ones = torch.ones(flags, dtype=torch.int32, device=self.buckets[0].device)
            self._votes.append(comm.all_reduce(ones, "max", async_=True, tag="who has gradients"))
        self._round.extend(self.buckets)

    @torch.no_grad()
    def finish(self) -> None:
        while self._round:
            self._start(self._round.popleft())
        while (vote := self._vote())[0]:
            for bucket in vote[0]:
                self._start(bucket)
        for work in self._votes:
            work.wait()
        self._votes.clear()
        self._deliver(vote[1])
        self._round.extend(self.buckets)


DATA_PARALLEL = {"naive": PerParameter, "flat": FlatBuckets, "overlapped": Overlapped}
