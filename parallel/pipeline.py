"""Runs a pipeline schedule: one rank's list of instructions (schedules.py), on the chunks of the model that it holds.

Sends and receives do not block; receives are posted one computation ahead. As a program it draws a schedule:
`python -m parallel.pipeline --draw zb-h1 --stages 4 --microbatches 8`. Refused: batches that the micro-batches do not
divide, chunks that are not this rank's.

Shapes: B rows of the batch, b rows of a micro-batch, T time, C width; t = T / sequence_parallel of what travels.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from common import cli
from minigpt.config import GPTConfig
from parallel import deferred, schedules
from parallel.comm import Comm, Kind, Listener, Work, make_comm
from parallel.draw import main
from parallel.mesh import Mesh
from parallel.model import StageGPT, split_layers
from parallel.schedules import Instruction, early_receives, room_for, target_of, with_communication


def chunk_layers(layers: int, rank: int, stages: int, chunks: int = 1) -> list[range]:
    """The blocks of each of this pipeline rank's chunks. Raises ValueError for more chunks than layers."""
    return split_layers(layers, stages * chunks)[rank::stages]


class Pipeline:
    """`stages`: this rank's chunks in order, those of `chunk_layers`; `comm`: the pp group.

    The ranks of one tp group each have a pipeline of their own. Under sequence parallelism only each
    `sequence_parallel`-th part of a sequence travels. `dtype` is that of activations between chunks, by default the
    parameters'. For zb-h1 the stages' linear layers are deferred.DeferrableLinear or such, or W has nothing to do.
    `back`, another group of the same ranks (`make_back`), carries what goes to lower ranks: NCCL runs one group's
    sends and receives between two ranks one after the other, and both might begin with a send.
    `record(instruction, start, end)` hears of each computation, in time.perf_counter() seconds.
    Raises ValueError for schedules that do not exist and stages that do not fit.
    """

    def __init__(
        self, stages: Sequence[StageGPT], comm: Comm, *, schedule: str, microbatches: int, sequence_parallel: int = 1,
        dtype: torch.dtype | None = None, back: Comm | None = None,
        record: Callable[[Instruction, float, float], None] | None = None,
    ):  # fmt: skip
        self.stages, self.comm, self.back = list(stages), comm, back or comm
        self.microbatches, self.sequence_parallel, self.dtype, self.record = (
            microbatches, sequence_parallel, dtype, record,
        )  # fmt: skip
        lists = schedules.schedule(schedule, comm.size, microbatches, len(self.stages))
        self._check_stages()
        self.training = early_receives(with_communication(lists))[comm.rank]
        forward = [[x for x in instructions if x.kind == "F"] for instructions in lists]
        self.forward_only = early_receives(with_communication(forward))[comm.rank]
        self.greeted = False
        self.queue = deferred.WeightGradients()
        if any(x.kind == "W" for x in self.training):
            for stage in self.stages:
                self.queue.attach(stage)
        self.peak = 0  # activations alive at once in the last run, in (chunk, micro-batch) pairs

    def run(self, tokens_BT: Tensor, targets_BT: Tensor, *, scale: float = 1.0, **options) -> Tensor | None:
        """Adds `scale` times the gradient of the mean loss over the batch to the parameters'; returns that mean, not
        scaled, where the last chunk is, else None. `options` are those of StageGPT.forward."""
        work = _Pass(self, tokens_BT, targets_BT, scale, options)
        work.run(self.training)
        self.peak = work.peak
        return work.loss

    @torch.no_grad()
    def evaluate(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, **options) -> Tensor | None:
        """The mean loss as `run` returns it, or without targets logits_BTV, where the last chunk is; no gradients."""
        work = _Pass(self, tokens_BT, targets_BT, 1.0, options)
        work.run(self.forward_only)
        return work.loss if targets_BT is not None or not work.logits else torch.cat(work.logits)

    def share_loss(self, loss: Tensor | None) -> Tensor:
        """What `run` returned on the last rank, in float64, on all."""
        device = next(self.stages[0].parameters()).device
        shared = torch.zeros((), dtype=torch.float64, device=device) if loss is None else loss.double()
        self.comm.broadcast(shared, self.comm.size - 1, tag="loss")
        return shared

    def greet(self, device: torch.device) -> None:
        """One number over each channel, once. NCCL connects two ranks when both first ask for it, and waits there: in
        an order that suits nobody unless everybody sends and receives in turn, as here."""
        if self.greeted or self.comm.size == 1:
            return
        rank, last = self.comm.rank, self.comm.size - 1
        number = torch.zeros(1, device=device)
        ways = [(r, r + 1) for r in range(last)] + [(r + 1, r) for r in reversed(range(last))]
        if len(self.stages) > 1 and last > 1:
            ways += [(last, 0), (0, last)]
        for source, to in ways:
            if rank == source:
                self.channel(source, to).send(number, to, tag="greeting")
            elif rank == to:
                self.channel(source, to).receive(number, source, tag="greeting")
        self.greeted = True

    def channel(self, source: int, to: int) -> Comm:
        return self.comm if source < to else self.back

    @property
    def chunks(self) -> int:
        """Of the whole model."""
        return self.comm.size * len(self.stages)

    def _check_stages(self) -> None:
        for local, stage in enumerate(self.stages):
            chunk = local * self.comm.size + self.comm.rank
            if (stage.first, stage.last) != (chunk == 0, chunk == self.chunks - 1):
                raise ValueError(
                    f"stage {local} of pipeline rank {self.comm.rank} is chunk {chunk} of {self.chunks}, but has first "
                    f"{stage.first} and last {stage.last}: expected the layers that chunk_layers gives"
                )
        if self.comm.size == 1 and len(self.stages) > 1 and self.stages[0].config.tied:
            raise ValueError(f"{len(self.stages)} chunks of a tied model on one rank: expected 1, or more ranks")


class _Pass:
    """One batch on its way through. Keys (kind, chunk, micro-batch): kind F for activations, B for their gradients."""

    def __init__(self, pipeline: Pipeline, tokens_BT: Tensor, targets_BT: Tensor | None, scale: float, options: dict):
        (B, T), m, parts = tokens_BT.shape, pipeline.microbatches, pipeline.sequence_parallel
        if not B or B % m:
            raise ValueError(f"{B} rows in {m} micro-batches: expected a multiple")
        if targets_BT is not None and targets_BT.shape != tokens_BT.shape:
            raise ValueError(f"targets of shape {tuple(targets_BT.shape)}: expected that of the tokens, {(B, T)}")
        if T % parts:
            raise ValueError(f"sequences of {T} tokens over {parts} ranks: expected a multiple")
        stage = pipeline.stages[0]
        self.pipeline, self.scale, self.options = pipeline, scale, options
        self.tokens = tokens_BT.chunk(m)
        self.targets = [None] * m if targets_BT is None else targets_BT.chunk(m)
        self.shape = (B // m, T // parts, stage.config.width)
        self.dtype = pipeline.dtype or next(stage.parameters()).dtype
        self.inbox: dict[tuple[str, int, int], tuple[Work, Tensor]] = {}
        self.outbox: dict[tuple[str, int, int], Tensor] = {}
        self.sending: dict[int, deque[tuple[Work, Tensor]]] = defaultdict(deque)
        self.saved: dict[tuple[int, int], tuple[Tensor | None, GradientEdge | None]] = {}
        self.jobs: dict[tuple[int, int], list[deferred.Job]] = {}
        self.loss: Tensor | None = None
        self.logits: list[Tensor] = []
        self.peak = 0

    def run(self, instructions: Sequence[Instruction]) -> None:
        steps = {"F": self.forward, "B": self.backward, "I": self.backward, "W": self.weight_gradients}
        steps |= {"SEND_F": self.send, "SEND_B": self.send, "RECV_F": self.receive, "RECV_B": self.receive}
        record = self.pipeline.record
        self.pipeline.greet(self.tokens[0].device)
        for x in instructions:
            started = time.perf_counter()
            steps[x.kind](x)
            if record is not None and x.kind in ("F", "B", "I", "W"):
                record(x, started, time.perf_counter())
        for queue in self.sending.values():
            for work, _ in queue:
                work.wait()
        assert not (self.inbox or self.outbox or self.saved or self.jobs), "a schedule that leaves something undone"

    def forward(self, x: Instruction) -> None:
        stage = self.stage_of(x)
        hidden_btC = None if stage.first else self.take("F", x)
        training = torch.is_grad_enabled()
        if training and hidden_btC is not None:
            hidden_btC.requires_grad_()
        targets_bT = self.targets[x.microbatch] if stage.last else None
        out = stage(hidden_btC, self.tokens[x.microbatch], targets_bT, **self.options)
        if stage.last and targets_bT is None:
            self.logits.append(out)
        elif stage.last:
            out = out / self.pipeline.microbatches  # so that the sum over micro-batches is the mean over the batch
            self.loss = out.detach() if self.loss is None else self.loss + out.detach()
            out = out * self.scale
        else:
            self.give(x, out.detach())
        if training:
            # The edge instead of the output: nobody here needs its numbers once they are sent.
            edge = get_gradient_edge(out) if out.requires_grad else None
            self.saved[x.chunk, x.microbatch] = hidden_btC, edge
            self.peak = max(self.peak, len(self.saved) + len(self.jobs))

    def backward(self, x: Instruction) -> None:
        """B, and I, which leaves the weight gradients as jobs."""
        gradient_btC = None if self.stage_of(x).last else self.take("B", x)
        hidden_btC, edge = self.saved.pop((x.chunk, x.microbatch))
        queue = self.pipeline.queue
        queue.open = x.kind == "I"
        try:
            # Autocast is for forward passes: the backward pass takes the dtypes that those chose.
            with torch.autocast(self.tokens[0].device.type, enabled=False):
                if edge is not None:  # None: this chunk and all before it are frozen
                    torch.autograd.backward(edge, gradient_btC)
        finally:
            queue.open = False
            jobs = queue.take()
        if x.kind == "I":
            self.jobs[x.chunk, x.microbatch] = jobs
        if hidden_btC is not None:
            self.give(x, hidden_btC.grad)

    def weight_gradients(self, x: Instruction) -> None:
        deferred.run(self.jobs.pop((x.chunk, x.microbatch)))

    def send(self, x: Instruction) -> None:
        tensor = self.outbox.pop((x.kind[-1], x.chunk, x.microbatch))
        to = self.rank_of(x.chunk + 1 if x.kind == "SEND_F" else x.chunk - 1)
        queue = self.sending[to]
        while len(queue) >= room_for(self.pipeline.comm.size):
            queue.popleft()[0].wait()
        work = self.pipeline.channel(self.pipeline.comm.rank, to).send(tensor, to, async_=True, tag=str(x))
        queue.append((work, tensor))

    def receive(self, x: Instruction) -> None:
        source = self.rank_of(x.chunk - 1 if x.kind == "RECV_F" else x.chunk + 1)
        buffer_btC = torch.empty(self.shape, dtype=self.dtype, device=self.tokens[0].device)
        comm = self.pipeline.channel(source, self.pipeline.comm.rank)
        work = comm.receive(buffer_btC, source, async_=True, tag=str(x))
        self.inbox[x.kind[-1], x.chunk, x.microbatch] = work, buffer_btC

    def take(self, kind: str, x: Instruction) -> Tensor:
        work, tensor = self.inbox.pop((kind, x.chunk, x.microbatch))
        work.wait()
        return tensor

    def give(self, x: Instruction, tensor_btC: Tensor) -> None:
        """To the chunk that needs it, on this rank or for the SEND that follows."""
        if tuple(tensor_btC.shape) != self.shape or tensor_btC.dtype != self.dtype:
            raise ValueError(
                f"{x} makes {tuple(tensor_btC.shape)} of {tensor_btC.dtype}: expected {self.shape} of {self.dtype} "
                "(micro-batch, time / sequence_parallel, width; the pipeline's dtype)"
            )
        kind, target = "F" if x.kind == "F" else "B", target_of(x, self.pipeline.chunks)
        if self.rank_of(target) == self.pipeline.comm.rank:
            self.inbox[kind, target, x.microbatch] = Work(), tensor_btC
        else:
            self.outbox[kind, x.chunk, x.microbatch] = tensor_btC.contiguous()

    def stage_of(self, x: Instruction) -> StageGPT:
        return self.pipeline.stages[x.chunk // self.pipeline.comm.size]

    def rank_of(self, chunk: int) -> int:
        return chunk % self.pipeline.comm.size


def make_back(mesh: Mesh, kind: Kind = "torch", listeners: Sequence[Listener] = (), **options) -> Comm:
    """A second group of the ranks of each pipeline, for `Pipeline(back=...)`. All ranks of the mesh call it."""
    first = mesh.group("pp")
    if first.size == 1:
        return make_comm(first, kind, listeners, **options)
    return make_comm(mesh.make(mesh.lines("pp"), ("pp",), "pp-back"), kind, listeners, **options)


def tied_groups(
    mesh: Mesh, config: GPTConfig, kind: Kind = "torch", listeners: Sequence[Listener] = (), **options
) -> dict[str, Comm]:
    """For strategy.sum_partial: a tied embedding's gradient is that of the first chunk's and the last chunk's together.

    {name: the group of those two ranks}, empty on other ranks, for untied models and for one pipeline rank. All ranks
    of the mesh call it, in the same order among the groups they make.
    """
    if not config.tied or mesh.size("pp") == 1:
        return {}
    group = mesh.make([(line[0], line[-1]) for line in mesh.lines("pp")], ("pp",), "pp-ends")
    return {} if group is None else {"embedding.weight": make_comm(group, kind, listeners, **options)}


if __name__ == "__main__":
    cli.run(main)
