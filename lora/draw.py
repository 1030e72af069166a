"""Which rank has which number of A and B, in the three ways to shard an adapter, as an SVG picture.

Nothing is drawn by hand: a GPT of width 8 is really cut among W ranks, gets adapters, and each square is one number of
a factor, in the colour of the rank that has it; grey ones are on every rank, white ones are the zeros of a
block-diagonal factor. Refused: other than 2 or 4 ranks, since 8 channels are few.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.log import atomic_write
from lora.config import LoraConfig
from lora.layers import unpacked
from lora.sharded import ShardedLinear, shard_adapter
from lora.sharding import SHARDINGS, Sharding
from minigpt.config import GPTConfig
from parallel.comm import TorchComm
from parallel.mesh import Group, Layout, Mesh
from parallel.model import StageGPT, materialise
from parallel.pieces import Piece
from parallel.tensor_parallel import parallelise

SIZE = 8  # channels of inputs and outputs
KINDS = {"query": "column-parallel: query, key, value, gate, up", "output": "row-parallel: output, down"}
BETWEEN = {
    ("query", "s-lora"): ("all-gather", "of S × r"), ("output", "s-lora"): ("all-reduce", "of S × r"),
}  # fmt: skip
COLOURS = ("#4292c6", "#fd8d3c", "#41ab5d", "#9e6ebd")
ZERO, SHARED, INK, RED = "#ffffff", "#bdbdbd", "#333333", "#cb181d"
EVERYONE = -1  # of an owner; 0 is nobody, a zero that is not kept, others are rank + 1
NOTES = (
    "A layer gives W x + B A x. Arrows: what ranks send each other of A x, S tokens by r numbers, in a forward pass.",
    "A row-parallel layer ends with a sum over the ranks anyway: each adds its part of B A x to its term before it.",
)
CELL, PANEL, ROW, LEFT, TOP, NOTE = 13, 292, 160, 168, 80, 16  # pixels


def owners(ranks: int, sharding: Sharding) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{"query", "output": owners of the numbers of W (O, I), A (r, I) and B (O, r)}, r being W."""
    gpt = GPTConfig(layers=1, width=SIZE, heads=ranks, kv_heads=ranks, mlp_width=SIZE, vocab_size=SIZE, context=1)
    blocks = ranks if sharding == "block-diagonal" else 1
    config = LoraConfig(rank=ranks, targets=tuple(KINDS), blocks=blocks)
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for rank in range(ranks):
        mesh, comm = Mesh(Layout(tp=ranks), rank, ranks), TorchComm(Group(("tp",), tuple(range(ranks)), rank))
        stage = StageGPT(gpt)
        partial = parallelise(stage, mesh, comm)
        materialise(stage)
        shard_adapter(stage, config, sharding, comm, partial)
        for kind in KINDS:
            layer: ShardedLinear = stage.get_submodule(f"blocks.0.attention.{kind}")
            pieces = [p.piece for p in (layer.base.weight, layer.shard.A, layer.shard.B)]
            maps = found.setdefault(kind, tuple(torch.zeros(piece.shape, dtype=torch.int64) for piece in pieces))
            for owner, piece in zip(maps, pieces, strict=True):
                _claim(owner, piece, rank, ranks)
    return {
        "query": (found["query"][0], found["query"][1], unpacked(found["query"][2], blocks)),
        "output": (found["output"][0], unpacked(found["output"][1], blocks), found["output"][2]),
    }


def _claim(owner: Tensor, piece: Piece, rank: int, ranks: int) -> None:
    mine = piece.of(owner)
    assert piece.copies in (1, ranks) and (piece.copies == ranks or not mine.any()), piece
    mine.fill_(rank + 1 if piece.copies == 1 else EVERYONE)


def svg(ranks: int = 4) -> str:
    if ranks not in (2, 4):
        raise ValueError(f"ranks {ranks}: expected 2 or 4")
    width, height = LEFT + len(SHARDINGS) * PANEL, TOP + len(KINDS) * ROW + len(NOTES) * NOTE
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="{INK}">',
        "<title>Which rank has which number of an adapter</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_legend(ranks),
        *(_text(12, TOP + len(KINDS) * ROW + number * NOTE, note) for number, note in enumerate(NOTES)),
    ]
    for column, sharding in enumerate(SHARDINGS):
        x = LEFT + column * PANEL
        lines.append(_text(x, 56, sharding, size=15))
        for row, (kind, maps) in enumerate(owners(ranks, sharding).items()):
            y = TOP + row * ROW
            if column == 0:
                lines += [_text(12, y, KINDS[kind]), *_matrix(maps[0], 12, y + 24, "frozen W")]
            lines += _panel(maps[1], maps[2], x, y + 24, *BETWEEN.get((kind, sharding), ("nothing", "is sent")))
    return "\n".join([*lines, "</svg>", ""])


def _panel(A: Tensor, B: Tensor, x: int, y: int, first: str, second: str) -> list[str]:
    """A, what the ranks tell each other between it and B, and B."""
    width, middle = A.shape[1] * CELL, y + SIZE * CELL // 2
    top = middle - len(A) * CELL // 2
    colour, left = INK if first == "nothing" else RED, x + width
    return [
        *_matrix(A, x, top, "A"),
        f'<line x1="{left + 6}" y1="{middle}" x2="{left + 74}" y2="{middle}" stroke="{colour}"/>',
        f'<path d="M{left + 74} {middle} l-7 -4 v8 z" fill="{colour}"/>',
        _text(left + 38, middle - 7, first, colour, anchor="middle"),
        _text(left + 38, middle + 16, second, colour, anchor="middle"),
        *_matrix(B, left + 82, y, "B"),
    ]


def _matrix(owner: Tensor, x: int, y: int, name: str) -> list[str]:
    lines = [_text(x, y - 5, f"{name} {owner.shape[0]} × {owner.shape[1]}"), '<g stroke="#d9d9d9" stroke-width="0.6">']
    for i, row in enumerate(owner.tolist()):
        for j, who in enumerate(row):
            fill = ZERO if who == 0 else SHARED if who == EVERYONE else COLOURS[who - 1]
            place = f'x="{x + j * CELL}" y="{y + i * CELL}" width="{CELL}" height="{CELL}"'
            lines.append(f'<rect {place} fill="{fill}"/>')
    return [*lines, "</g>"]


def _legend(ranks: int) -> list[str]:
    entries = [(COLOURS[rank], f"rank {rank}") for rank in range(ranks)]
    entries += [(SHARED, "every rank"), (ZERO, "zero, not kept")]
    lines = [_text(12, 20, f"Adapters beside a layer that is cut among {ranks} ranks", size=15)]
    for number, (colour, name) in enumerate(entries):
        x = LEFT + 300 + number * 82
        lines.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}" stroke="#d9d9d9"/>')
        lines.append(_text(x + 17, 20, name))
    return lines


def _text(x: int, y: int, text: str, colour: str = INK, size: int = 11, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{text}</text>'


@dataclass(frozen=True, slots=True)
class DrawConfig:
    ranks: int = field(default=4, metadata={"help": "2 or 4"})
    out: Path = field(default=Path("results/lora/block_diagonal.svg"), metadata={"help": "the SVG file"})


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(DrawConfig, argv, prog=cli.program(), description="draw which rank has what of an adapter")
    atomic_write(config.out, svg(config.ranks))
    print(config.out)


if __name__ == "__main__":
    cli.run(main)
