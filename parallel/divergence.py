"""Where two layouts of one model begin to differ: the first module, gradient or parameter that is not the same.

Each rank records one batch under either layout; `assemble` makes one run of what its ranks have: rows of the data ranks
behind each other, positions or channels that tensor parallelism has cut put together, parameters by their Pieces. What
does not fit together is not compared, and named. Refused: runs of different batches, dropout.

Shapes: B rows, T positions, C channels, as modules give them: (B, T, C).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from parallel.mesh import AXES, Layout
from parallel.pieces import Piece

Parts = list[tuple[Piece, Tensor]]
Range = tuple[
    Tensor, Tensor
]  # the least and the greatest of what several ranks have of the same element; NaN if one is


@dataclass(slots=True)
class Recording:
    """What one rank has seen. Names are the model's, so those of one process."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)  # by module, one a call, in the order of first calls
    gradients: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # of the loss, by call of those outputs
    parameters: dict[str, tuple[Piece, Tensor]] = field(default_factory=dict)
    parameter_gradients: dict[str, tuple[Piece, Tensor]] = field(default_factory=dict)

    def keep(self, parameters: Mapping[str, nn.Parameter], pieces: Mapping[str, Piece]) -> None:
        """Of a Strategy, after finish(): `recording.keep(strategy.parameters(), strategy.pieces())`."""
        for name, p in parameters.items():
            self.parameters[name] = pieces[name], p.detach().clone()
            if p.grad is not None:
                self.parameter_gradients[name] = pieces[name], p.grad.detach().clone()


@contextmanager
def record(stages: Iterable[nn.Module]) -> Iterator[Recording]:
    """Inside, the output of every module of the stages is kept, and its gradient. Modules whose output is not a tensor
    are left out, and what activation checkpointing computes again."""
    recording = Recording()
    handles = []
    for stage in stages:
        for name, module in stage.named_modules():
            handles.append(module.register_forward_hook(_keeper(recording, name or "model")))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _keeper(recording: Recording, name: str):
    def keep(module: nn.Module, inputs: tuple, out: object) -> None:
        if not isinstance(out, Tensor) or torch._C._current_graph_task_id() != -1:  # not within a backward pass
            return
        calls, gradients = recording.outputs.setdefault(name, []), recording.gradients.setdefault(name, {})
        number = len(calls)  # a pipeline's backward passes come in another order than its forward passes
        calls.append(out.detach().clone())
        if out.requires_grad:
            out.register_hook(lambda gradient: gradients.__setitem__(number, gradient.detach().clone()))

    return keep


@dataclass(slots=True)
class Run:
    """Of one layout: by (kind, name), the candidates for the whole tensor; kinds in the order of their computation."""

    layout: Layout
    values: dict[tuple[str, str], list[Range]]


def assemble(recordings: Sequence[Recording], layout: Layout) -> Run:
    """`recordings` by rank. A data rank has consecutive rows of the batch, and its loss is their mean."""
    if len(recordings) != layout.world_size:
        raise ValueError(f"{len(recordings)} recordings for {layout.world_size} ranks ({layout})")
    run = Run(layout, {})
    rows = layout.dp * layout.fsdp
    for kind, scale in (("output", 1.0), ("gradient", 1.0 / rows)):
        names = _names([recording.outputs for recording in recordings])
        for name in names if kind == "output" else reversed(names):
            grid = {}  # by place along tp, the rows of the data ranks
            for place, recording in zip(_places(layout), recordings, strict=True):
                if calls := _calls(recording, kind, name):
                    grid.setdefault(place["tp"], []).append(scale * torch.cat(calls))
            if grid:
                parts = [torch.cat(parts) for _, parts in sorted(grid.items())]
                run.values[kind, name] = _candidates(parts, terms=kind == "gradient")
    for kind, of in (("gradient of", "parameter_gradients"), ("parameter", "parameters")):
        for name in _names([getattr(recording, of) for recording in recordings]):
            parts = [getattr(recording, of)[name] for recording in recordings if name in getattr(recording, of)]
            run.values[kind, name] = _whole(parts)
    return run


def _names(dicts: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for one in dicts for name in one))


def _calls(recording: Recording, kind: str, name: str) -> list[Tensor]:
    if kind == "output":
        calls = recording.outputs.get(name, [])
    else:
        calls = [gradient for _, gradient in sorted(recording.gradients.get(name, {}).items())]
    return calls if calls and calls[0].ndim else []


def _places(layout: Layout) -> list[dict[str, int]]:
    return [dict(zip(AXES, place, strict=True)) for place in product(*map(range, layout.sizes))]


def _candidates(parts: list[Tensor], terms: bool) -> list[Range]:
    """The parts of the tensor-parallel ranks may be the same whole, or cut along positions, or along channels; or, of
    the gradient of what several ranks read, terms of a sum."""
    found = []
    if len({part.shape for part in parts}) == 1:
        stacked = torch.stack(parts)
        found.append((stacked.amin(0), stacked.amax(0)))
        if terms and len(parts) > 1:
            found.append((stacked.sum(0),) * 2)
    if len(parts) > 1:
        found += [(torch.cat(parts, dim),) * 2 for dim in {1, parts[0].ndim - 1} if 0 < dim < parts[0].ndim]
    return found


def _whole(parts: Parts) -> list[Range]:
    """The parameter; nothing where an element is missing."""
    shape, like = parts[0][0].shape, parts[0][1]
    low, high = (like.new_full(shape, math.nan) for _ in range(2))
    covered = torch.zeros(shape, dtype=torch.bool, device=like.device)
    for piece, value in parts:
        new, seen = value.reshape(-1), piece.of(covered).reshape(-1)
        for whole, extreme in ((low, torch.minimum), (high, torch.maximum)):
            piece.put(whole, torch.where(seen, extreme(piece.of(whole).reshape(-1), new), new))
        piece.put(covered, torch.ones_like(new, dtype=torch.bool))
    return [(low, high)] if bool(covered.all()) else []


@dataclass(frozen=True, slots=True)
class Difference:
    kind: str  # output, gradient (with respect to that output), gradient of (a parameter), parameter
    name: str
    error: float  # relative to the largest number of run a
    place: tuple[int, ...]  # where it is largest
    agreed: tuple[str, ...]  # what came before it and was the same
    skipped: tuple[str, ...]  # what came before it and could not be compared

    def __str__(self) -> str:
        """One line, and what was not compared."""
        before = f"; the last that agrees: {self.agreed[-1]}" if self.agreed else ""
        skipped = f"; not compared: {', '.join(self.skipped)}" if self.skipped else ""
        return f"{self.kind} {self.name} differs first, by {self.error:.2e} at {self.place}{before}{skipped}"


def first_difference(a: Run, b: Run, tolerance: float) -> Difference | None:
    """In the order of run a's computation; None when all that can be compared agrees within `tolerance`, relative to
    the largest number of each tensor."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance!r}: expected 0 or more")
    agreed: list[str] = []
    skipped: list[str] = []
    for kind, name in a.values:
        pairs = product(a.values[kind, name], b.values.get((kind, name), []))
        found = [_distance(x, y) for x, y in pairs if x[0].shape == y[0].shape]
        if not found:
            skipped.append(f"{kind} {name}")
            continue
        error, place = min(found)
        if not error <= tolerance:
            return Difference(kind, name, error, place, tuple(agreed), tuple(skipped))
        agreed.append(f"{kind} {name}")
    if not agreed:
        raise ValueError("the runs have nothing that can be compared")
    return None


def _distance(x: Range, y: Range) -> tuple[float, tuple[int, ...]]:
    """The largest difference of any two ranks of the runs, relative to x's largest number, and where; inf for NaN."""
    if not x[0].numel():
        return 0.0, ()
    apart = torch.stack([(one - other).abs() for one in x for other in y]).amax(0).nan_to_num(math.inf, math.inf)
    place = torch.unravel_index(apart.argmax(), apart.shape)
    scale = torch.stack(x).abs().amax().clamp_min(1e-12)
    return (apart.max() / scale).nan_to_num(math.inf, math.inf).item(), tuple(int(i) for i in place)
