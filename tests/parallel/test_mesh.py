"""The grid against its definition: ranks that agree on the other axes are a group; one process; layouts refused."""

from itertools import product

import pytest
import torch
import torch.distributed as dist

from common.dist import spawn
from parallel.mesh import AXES, Layout, Mesh

LAYOUT = Layout(pp=2, dp=3, fsdp=2, tp=2)


def place_of(rank: int, layout: Layout) -> tuple[int, ...]:
    """By counting like an odometer, the last axis fastest: not by the array that the mesh uses."""
    return list(product(*(range(size) for size in layout.sizes)))[rank]


def test_places_count_like_an_odometer():
    for rank in range(LAYOUT.world_size):
        mesh = Mesh(LAYOUT, rank, LAYOUT.world_size)
        assert tuple(mesh.place[axis] for axis in AXES) == place_of(rank, LAYOUT)


@pytest.mark.parametrize("axes", [(), ("tp",), ("dp",), ("dp", "fsdp"), ("pp", "tp"), ("cp",), AXES])
def test_lines_are_the_ranks_that_differ_on_these_axes_alone(axes):
    lines = Mesh(LAYOUT, 0, LAYOUT.world_size).lines(*axes)
    assert sorted(rank for line in lines for rank in line) == list(range(LAYOUT.world_size))
    for line in lines:
        assert list(line) == sorted(line)
        others = [
            tuple(x for x, axis in zip(place_of(rank, LAYOUT), AXES, strict=True) if axis not in axes) for rank in line
        ]
        assert len(set(others)) == 1
        assert len(line) == Mesh(LAYOUT, 0, LAYOUT.world_size).size(*axes)


def test_neighbours_share_a_matrix():
    mesh = Mesh(Layout(fsdp=2, tp=2), 0, 4)
    assert mesh.lines("tp") == [(0, 1), (2, 3)]
    assert mesh.lines("fsdp") == [(0, 2), (1, 3)]
    assert mesh.lines("tp", "fsdp") == mesh.lines("fsdp", "tp") == [(0, 1, 2, 3)]


def test_one_process_has_groups_of_one():
    mesh = Mesh(Layout())
    for axes in ((), ("tp",), ("dp", "fsdp"), AXES):
        group = mesh.group(*axes)
        assert (group.ranks, group.rank, group.size, group.process_group) == ((0,), 0, 1, None)
    assert mesh.group().label == "self"
    assert mesh.group("fsdp", "dp").label == "dp+fsdp"
    assert mesh.group("fsdp", "dp") is mesh.group("dp", "fsdp")


def groups_sum_their_own_ranks(rank, world_size):
    mesh = Mesh(Layout(pp=2, tp=3), rank, world_size)
    found = {}
    for axes in (("tp",), ("pp",), ("pp", "tp"), ("dp",)):
        group = mesh.group(*axes)
        assert group.ranks[group.rank] == rank
        x = torch.tensor([2**rank])  # a sum names its terms
        if group.process_group is not None:
            dist.all_reduce(x, group=group.process_group)
        assert x.item() == sum(2**other for other in group.ranks)
        found[axes] = group.ranks
    return found


def test_groups_of_six_ranks():
    found = spawn(groups_sum_their_own_ranks, 6)
    assert [found[rank]["tp",] for rank in range(6)] == [(0, 1, 2)] * 3 + [(3, 4, 5)] * 3
    assert [found[rank]["pp",] for rank in range(6)] == [(0, 3), (1, 4), (2, 5)] * 2
    assert all(found[rank]["pp", "tp"] == tuple(range(6)) and found[rank]["dp",] == (rank,) for rank in range(6))


def test_layout_in_words():
    assert str(Layout(fsdp=2, tp=2)) == "fsdp 2 x tp 2"
    assert str(Layout()) == "1 process"


@pytest.mark.parametrize("size", [0, -1, 1.0, "2", None])
def test_layout_refuses(size):
    with pytest.raises(ValueError, match="tp .*: expected a whole number of at least 1"):
        Layout(tp=size)


def test_mesh_refuses():
    with pytest.raises(ValueError, match=r"layout dp 2 x tp 2: 1 x 2 x 1 x 1 x 1 x 2 = 4 ranks.*but there are 6"):
        Mesh(Layout(dp=2, tp=2), 0, 6)
    with pytest.raises(ValueError, match="rank 4: expected 0 to 3"):
        Mesh(Layout(tp=4), 4, 4)
    with pytest.raises(ValueError, match="rank -1"):
        Mesh(Layout(tp=4), -1, 4)
    mesh = Mesh(Layout())
    for ask in (mesh.group, mesh.size, mesh.lines):
        with pytest.raises(ValueError, match="axis 'sp': expected one of pp, dp, fsdp, cp, ep, tp"):
            ask("tp", "sp")
