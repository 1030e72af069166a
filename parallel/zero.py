"""ZeRO stages 1 and 2 (Rajbhandari et al. 2020): every rank computes with the whole model and steps a part of it.

    Zero1   gradients stay whole until `finish` leaves each rank the mean of its part: optimizer states are split
    Zero2   that happens bucket by bucket while the backward pass goes on: gradients are split too

AdamW's parameters are cut flat, each into even ranges; the matrices in `whole`, Muon's, have one owner each. The rest
is in parallel/data_parallel.py. Refused: `whole` with a name that is no trained matrix. W ranks share the model.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from parallel.comm import Comm, Work
from parallel.data_parallel import Bucket, FlatBuckets, Overlapped, Reduction, split_into_buckets, trained_parameters
from parallel.model import StageGPT
from parallel.pieces import Piece, even_range, piece_of


class PartBucket(Bucket):
    """A bucket of which this rank steps `parts`: views of the parameters, which take no memory of their own."""

    def __init__(self, parameters: dict[str, nn.Parameter], comm: Comm, reduce_dtype: torch.dtype | None):
        super().__init__(parameters, comm, reduce_dtype)
        self.parts: dict[str, nn.Parameter] = {}

    def _add_part(self, name: str, view: Tensor, piece: Piece) -> None:
        part = self.parts[name] = nn.Parameter(view)
        part.piece = piece  # for optimizers that must know what they step

    def gather(self) -> tuple[Work, Callable[[], None]]:
        """Starts to give everybody everybody's parts; and what writes them into the parameters when that is over."""
        raise NotImplementedError


class RangeBucket(PartBucket):
    """Every rank has an even range of each parameter.

    Messages are seen as W rows, one for each rank: its ranges behind one another, the short last ones padded.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], comm: Comm, reduce_dtype: torch.dtype | None):
        super().__init__(parameters, comm, reduce_dtype)
        self.widths = [-(-p.numel() // comm.size) for p in parameters.values()]
        for name, p in parameters.items():
            start, stop = even_range(p.numel(), comm.rank, comm.size)
            if start < stop:
                self._add_part(name, p.detach().view(-1)[start:stop], piece_of(p).cut(start, stop))

    def reduce(self, gradients: Sequence[Tensor | None]) -> Reduction:
        W, row = self.comm.size, sum(self.widths)
        message = torch.zeros(W, row, dtype=self.reduce_dtype, device=self.device)
        for columns, gradient in zip(message.split(self.widths, 1), gradients, strict=True):
            if gradient is not None:
                for of_rank, values in _rows(columns, gradient.reshape(-1)):
                    of_rank.copy_(values)
        mine = message.new_empty(row)
        work = self.comm.reduce_scatter(message, mine, "mean", async_=True, tag=f"gradients of {self.label}")
        return work, lambda: mine

    def averaged(self, total: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        for name, columns in zip(self.parameters, total.split(self.widths), strict=True):
            if name in self.parts:
                yield name, self.parts[name], columns[: self.parts[name].numel()]

    def gather(self) -> tuple[Work, Callable[[], None]]:
        W, row = self.comm.size, sum(self.widths)
        mine = torch.zeros(row, dtype=self.dtype, device=self.device)
        for _, part, columns in self.averaged(mine):
            columns.copy_(part)
        message = mine.new_empty(W, row)

        def write() -> None:
            for columns, p in zip(message.split(self.widths, 1), self.parameters.values(), strict=True):
                for of_rank, values in _rows(columns, p.view(-1)):
                    values.copy_(of_rank)

        return self.comm.all_gather(mine, message, async_=True, tag=f"weights of {self.label}"), write


def _rows(block: Tensor, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What belongs together when `flat` fills the rows of `block`: the full rows at once, then the last one."""
    width = block.shape[1]
    full, rest = divmod(len(flat), width) if width else (0, 0)
    yield block[:full], flat[: full * width].view(full, width)
    if rest:
        yield block[full, :rest], flat[full * width :]


class OwnerBucket(PartBucket):
    """Every parameter is one rank's. Each rank sends the owners their gradients, and they add up what they get; that
    is an all-to-all of parts that may differ in size, and as many bytes as a reduce-scatter moves."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        comm: Comm,
        reduce_dtype: torch.dtype | None,
        owners: Mapping[str, int],
    ):
        by_owner = dict(sorted(parameters.items(), key=lambda item: owners[item[0]]))
        super().__init__(by_owner, comm, reduce_dtype)
        self.loads = [0] * comm.size
        for name, p in by_owner.items():
            self.loads[owners[name]] += p.numel()
            if owners[name] == comm.rank:
                self._add_part(name, p.detach(), piece_of(p))

    @property
    def load(self) -> int:
        return self.loads[self.comm.rank]

    def reduce(self, gradients: Sequence[Tensor | None]) -> Reduction:
        message = torch.empty(sum(self.loads), dtype=self.reduce_dtype, device=self.device)
        for part, gradient in zip(message.split(self.sizes), gradients, strict=True):
            part.zero_() if gradient is None else part.copy_(gradient.reshape(-1))
        W = self.comm.size
        mine = message.new_empty(W, self.load)
        tag = f"gradients of {self.label}"
        work = self.comm.all_to_all(message, mine, self.loads, [self.load] * W, async_=True, tag=tag)
        return work, lambda: mine.mean(0)

    def averaged(self, total: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        sizes = [part.numel() for part in self.parts.values()]
        for (name, part), gradient in zip(self.parts.items(), total.split(sizes) if sizes else (), strict=True):
            yield name, part, gradient.view(part.shape)

    def gather(self) -> tuple[Work, Callable[[], None]]:
        W = self.comm.size
        mine = torch.empty(W, self.load, dtype=self.dtype, device=self.device)  # the same for everybody
        for _, part, columns in self.averaged(mine[0]):
            columns.copy_(part)
        mine[1:] = mine[0]
        message = mine.new_empty(sum(self.loads))
        tag = f"weights of {self.label}"
        work = self.comm.all_to_all(mine, message, [self.load] * W, self.loads, async_=True, tag=tag)

        def write() -> None:
            for p, values in zip(self.parameters.values(), message.split(self.sizes), strict=True):
                p.copy_(values.view(p.shape))

        return work, write


def assign_owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The largest first, each to the rank that has least so far: the same on all ranks."""
    loads, owners = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable: equal ones stay in order
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


class Zero1(FlatBuckets):
    """comm: the ranks that share the model; replicas: those that have the same part of it, who average theirs then.

    Options are DataParallel's. Raises ValueError for names in `whole` that are no trained matrices.
    """

    in_flight = 2  # more would keep more whole gradients in memory

    def __init__(
        self,
        stages: Sequence[StageGPT],
        comm: Comm,
        replicas: Comm | None = None,
        *,
        whole: Collection[str] = (),
        **options,
    ):
        _check_matrices(whole, trained_parameters(stages))
        self.replicas, self.whole = replicas, frozenset(whole)
        self.split_over = (comm,)
        super().__init__(stages, comm, **options)

    @property
    def averaged_over(self) -> tuple[Comm, ...]:
        return (self.comm,) if self.replicas is None else (self.comm, self.replicas)

    def _make_buckets(self) -> list[PartBucket]:
        owners = assign_owners(
            {name: p.numel() for name, p in self._trained.items() if name in self.whole}, self.comm.size
        )
        split = split_into_buckets(self._trained, self.bucket_bytes, kind=self.whole.__contains__)
        return [
            OwnerBucket(parameters, self.comm, self.reduce_dtype, owners)
            if self.whole.issuperset(parameters)
            else RangeBucket(parameters, self.comm, self.reduce_dtype)
            for parameters in split
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        found = {name: part for bucket in self.buckets for name, part in bucket.parts.items()}
        return {name: found[name] for name in self._trained if name in found}

    def pieces(self) -> dict[str, Piece]:
        return {name: part.piece for name, part in self.parameters().items()}

    def zero_grad(self) -> None:
        super().zero_grad()
        for p in self._trained.values():
            p.grad = None

    def _deliver(self, used: Collection[str]) -> None:
        if self.replicas is not None:
            self._average_replicas()
        super()._deliver(used)

    def _average_replicas(self) -> None:
        running = []
        for bucket in self.buckets:
            bucket.collect()
            if bucket.total is not None and bucket.total.numel():
                tag = f"own gradients of {bucket.label}"
                running.append(self.replicas.all_reduce(bucket.total, "mean", async_=True, tag=tag))
        for work in running:
            work.wait()

    @torch.no_grad()
    def stepped(self) -> None:
        if self.comm.size == 1:
            return  # the parts are the parameters
        running: deque[tuple[Work, Callable[[], None]]] = deque()
        for bucket in self.buckets:
            running.append(bucket.gather())
            if len(running) > self.in_flight:
                _end(*running.popleft())
        for gathering in running:
            _end(*gathering)


def _check_matrices(whole: Collection[str], trained: Mapping[str, nn.Parameter]) -> None:
    for name in whole:
        if name not in trained:
            raise ValueError(f"whole {name!r}: expected names of trained parameters of this rank's stages")
        if trained[name].ndim != 2:
            raise ValueError(f"whole {name!r} of shape {tuple(trained[name].shape)}: expected a matrix")


def _end(work: Work, write: Callable[[], None]) -> None:
    work.wait()
    write()


class Zero2(Zero1, Overlapped):
    """With the hooks and rounds of Overlapped. Where memory counts, let every backward pass of a step synchronise:
    under no_sync whole gradients add up, as in Zero1."""
