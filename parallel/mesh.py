"""The device grid: every rank is a point of one array with the axes pp, dp, fsdp, cp, ep, tp; groups are slices of it.

    pp    pipeline stages                     cp   context parallelism (its axis is here, its code comes later)
    dp    replicas that average gradients     ep   expert parallelism (likewise)
    fsdp  ranks that share parameters         tp   ranks that share each matrix

The last axis varies fastest: the ranks of a tp group are neighbours, on one machine where possible, because they talk
most. One process without torch.distributed is a mesh too. Refused: a world size that is not the product of the axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import prod

import numpy as np
import torch.distributed as dist

AXES = ("pp", "dp", "fsdp", "cp", "ep", "tp")


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks each axis has."""

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not (isinstance(size, int) and size >= 1):
                raise ValueError(f"{field.name} {size!r}: expected a whole number of at least 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        return prod(self.sizes)

    def __str__(self) -> str:
        """`fsdp 2 x tp 2`; `1 process` where every axis is 1."""
        return (
            " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1) or "1 process"
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks in order, this process among them. process_group is None for a group of one."""

    axes: tuple[str, ...]
    ranks: tuple[int, ...]  # in the world
    rank: int  # this process's place in `ranks`
    process_group: dist.ProcessGroup | None = None
    name: str = ""  # of a group that is no slice of the mesh along axes

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def label(self) -> str:
        """`tp`, `dp+fsdp`; `world` for all axes."""
        if self.name:
            return self.name
        return "world" if self.axes == AXES else "+".join(self.axes) or "self"


class Mesh:
    """The grid, and this process's place on it.

    `group("dp", "fsdp")` are the ranks that differ from this one on those axes alone. torch wants every rank to create
    every group, in the same order: so all ranks call `group` for the same axes in the same order, the first time.
    Raises ValueError when the layout has not as many ranks as the world, or for an axis that does not exist.
    """

    def __init__(self, layout: Layout, rank: int = 0, world_size: int = 1):
        if layout.world_size != world_size:
            raise ValueError(
                f"layout {layout}: {' x '.join(map(str, layout.sizes))} = {layout.world_size} ranks "
                f"({' x '.join(AXES)}), but there are {world_size}: start as many, or change an axis"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: expected 0 to {world_size - 1}")
        self.layout, self.rank, self.world_size = layout, rank, world_size
        self.grid = np.arange(world_size).reshape(layout.sizes)
        self.place = dict(zip(AXES, map(int, np.unravel_index(rank, layout.sizes)), strict=True))
        self._groups: dict[tuple[str, ...], Group] = {}

    def size(self, *axes: str) -> int:
        return prod(getattr(self.layout, axis) for axis in self._checked(axes))

    def group(self, *axes: str) -> Group:
        axes = self._checked(axes)
        if axes not in self._groups:
            self._groups[axes] = self.make(self.lines(*axes), axes)
        return self._groups[axes]

    def make(self, lines: Sequence[tuple[int, ...]], axes: tuple[str, ...], name: str = "") -> Group | None:
        """The one of these groups of ranks in which this rank is, if any is; all ranks make them together."""
        mine = None
        for line in lines:
            process_group = dist.new_group(list(line)) if len(line) > 1 else None
            if self.rank in line:
                mine = Group(axes, tuple(line), line.index(self.rank), process_group, name)
        return mine

    def lines(self, *axes: str) -> list[tuple[int, ...]]:
        """The ranks of every group along these axes."""
        axes = self._checked(axes)
        others = [range(1) if axis in axes else range(size) for axis, size in zip(AXES, self.layout.sizes, strict=True)]
        cut = [slice(None) if axis in axes else 0 for axis in AXES]
        lines = []
        for point in product(*others):
            index = tuple(c if isinstance(c, slice) else p for c, p in zip(cut, point, strict=True))
            lines.append(tuple(map(int, self.grid[index].reshape(-1))))
        return lines

    def _checked(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [axis for axis in axes if axis not in AXES]:
            raise ValueError(f"axis {unknown[0]!r}: expected one of {', '.join(AXES)}")
        return tuple(axis for axis in AXES if axis in axes)  # in the order of the grid, whatever the caller's
