"""Boxes and runs against brute force: an index in each element, a mask over the whole tensor."""

import random
from math import prod

import torch

from parallel.pieces import Piece
from parallel.reshard import inside, overlap, runs, uncovered, view_of


def draw_piece(shape: tuple[int, ...], generator: random.Random) -> Piece:
    box = tuple(tuple(sorted(generator.choices(range(size + 1), k=2))) for size in shape)
    piece = Piece(shape, box)
    if generator.random() < 0.3:
        return piece
    return piece.cut(*sorted(generator.choices(range(piece.numel + 1), k=2)))


def draw_shape(generator: random.Random) -> tuple[int, ...]:
    return tuple(generator.choice((1, 2, 3, 5, 7)) for _ in range(generator.randrange(5)))


def test_runs_are_the_elements_of_a_piece_in_order():
    generator = random.Random(0)
    for _ in range(1000):
        shape = draw_shape(generator)
        whole = torch.arange(prod(shape)).view(shape)
        piece = draw_piece(shape, generator)
        found = runs(piece)
        assert len(found) <= max(1, 2 * len(shape) - 1)
        boxes = [whole[inside(run.box, tuple((0, size) for size in shape))].reshape(-1) for run in found]
        got = torch.cat(boxes) if boxes else torch.empty(0, dtype=torch.int64)
        assert torch.equal(got, piece.of(whole).reshape(-1)), piece
        for run in found:
            assert torch.equal(view_of(got, run).reshape(-1), got[run.offset : run.stop])


def test_overlaps_are_what_both_boxes_have():
    generator = random.Random(1)
    for _ in range(500):
        shape = draw_shape(generator)
        a, b = (Piece(draw.shape, draw.box) for draw in (draw_piece(shape, generator), draw_piece(shape, generator)))
        masks = [torch.zeros(shape, dtype=torch.bool) for _ in range(3)]
        for mask, piece in zip(masks, (a, b), strict=False):
            piece.put(mask, torch.ones(piece.box_shape, dtype=torch.bool))
        shared = overlap(a.box, b.box)
        if shared is not None:
            Piece(shape, shared).put(masks[2], torch.ones(Piece(shape, shared).box_shape, dtype=torch.bool))
        assert torch.equal(masks[0] & masks[1], masks[2]), (a, b, shared)


def test_holes_are_found():
    generator = random.Random(2)
    holes = 0
    for _ in range(1000):
        shape = draw_shape(generator)
        pieces = [draw_piece(shape, generator) for _ in range(generator.randrange(9))]
        mask = torch.zeros(shape, dtype=torch.bool)
        for piece in pieces:
            piece.put(mask, torch.ones(piece.numel, dtype=torch.bool))
        hole = uncovered(shape, pieces)
        assert (hole is None) == mask.all().item(), (shape, pieces, hole)
        if hole is not None:
            holes += 1
            assert not mask[inside(hole, tuple((0, size) for size in shape))].any() and Piece(shape, hole).numel
    assert 100 < holes < 1000
