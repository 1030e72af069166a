"""The pictures of `python -m cuda.swizzle`: swizzles, descriptors, a TMA box, and the fragments that threads hold.

Every number in them comes from cuda/layouts.py. Each function draws one PNG; the same bytes every time.
"""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from common import plots
from common.log import atomic_write
from cuda import layouts

# Eight backgrounds for black text: the house's palette lightened, with its yellow and a grey.
TINTS = ("#F6D28B", "#8FC4E8", "#8ED1B5", "#F0A97E", "#C9C9C9", "#E8C3D8", "#F4EE9A", "#BBA7D9")
OUTSIDE = "#FFFFFF"
SMALL = 7.5  # points; the pictures are 960 pixels wide


def cell(axes: Axes, row, column, text, tint: str, *, width=1.0, height=1.0, bold=False, hatch=None) -> None:
    """One rectangle with its top left corner at (row, column); `bold` draws its outline and nothing inside."""
    look = {"facecolor": tint, "edgecolor": "#FFFFFF", "linewidth": 0.8, "hatch": hatch}
    if bold:
        look = {"facecolor": "none", "edgecolor": "#000000", "linewidth": 2.0, "zorder": 3}
    drawn = [axes.add_patch(Rectangle((column, row), width, height, **look))]
    if text is not None:
        place = (column + width / 2, row + height / 2)
        drawn.append(axes.text(*place, text, ha="center", va="center_baseline", fontsize=SMALL, zorder=4))
    for artist in drawn:
        artist.set_in_layout(False)  # it lies inside of the axes: nobody needs to measure it


def frame(axes: Axes, rows: int, columns: int, title: str, *, xticks=None, yticks=None, xlabel="", ylabel="") -> None:
    """Axes of cells, the first row on top; ticks are the labels of rows and columns, at the middle of each."""
    axes.set(xlim=(-0.02, columns + 0.02), ylim=(rows + 0.02, -0.02))
    axes.grid(False)
    axes.tick_params(length=0, labelsize=SMALL, top=True, labeltop=True, bottom=False, labelbottom=False, pad=1)
    axes.set_xticks(*_middles(columns, xticks))
    axes.set_yticks(*_middles(rows, yticks))
    axes.spines[:].set_visible(False)
    axes.set_xlabel(xlabel, fontsize=8.5)
    axes.set_ylabel(ylabel, fontsize=8.5)
    axes.set_title(title, fontsize=9.5, loc="left")


def _middles(count: int, labels) -> tuple[list, list]:
    return (
        ([], [])
        if labels is None
        else ([i * count / len(labels) + count / len(labels) / 2 for i in range(len(labels))], labels)
    )


def picture(height: float, title: str) -> Figure:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def save(figure: Figure, path: Path) -> Path:
    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # 64 colours suffice for eight backgrounds and grey edges of letters, in a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(data, format="png", optimize=True)
    atomic_write(path, data.getvalue())
    return path


def legend(figure: Figure, entries: dict[str, str], note: str | None = None) -> None:
    patches = [Patch(facecolor=tint, label=label) for label, tint in entries.items()]
    look = {"fontsize": 8.5, "title_fontsize": 8.5, "handlelength": 1.2, "columnspacing": 1.2, "alignment": "left"}
    figure.legend(handles=patches, loc="outside lower left", ncols=len(entries), title=note, **look)


# ---- swizzles


def swizzle(path: Path) -> Path:
    """8 rows of a tile, in 16-byte chunks, by the bank group that holds each: plain above, swizzled below."""
    figure = picture(5.1, "Which bank group holds each 16-byte chunk of 8 rows: look down a column")
    grid = figure.subplots(2, 3, width_ratios=(2.6, 4, 8))
    for column, span in enumerate((32, 64, 128)):
        plain = np.arange(8)[:, None] * span + np.arange(span // 16)[None, :] * 16
        for axes, addresses, what in zip(
            grid[:, column], (plain, layouts.swizzle_address(plain, span)), ("plain", "swizzled"), strict=True
        ):
            count = max(layouts.passes(addresses[:, c]) for c in range(span // 16))
            title = f"{span}-byte rows, {what}" if span > 32 else f"{span} B, {what}"
            note = f"a column: {count} pass{'es' if count > 1 else ''}"
            frame(axes, 8, span // 16, title, yticks=range(8) if span == 32 else None, xlabel=note)
            for (r, c), address in np.ndenumerate(addresses):
                group = int(layouts.bank_group(address))
                cell(axes, r, c, group, TINTS[group])
            cell(axes, 0, 0, None, OUTSIDE, height=8, bold=True)
    grid[0, 0].set_ylabel("row", fontsize=8.5)
    grid[1, 0].set_ylabel("row", fontsize=8.5)
    legend(
        figure,
        {f"{group}": tint for group, tint in enumerate(TINTS)},
        "bank group (4 banks, 16 bytes); eight chunks are read in one pass if their groups differ",
    )
    return save(figure, path)


# ---- a TMA box


def tma_box(path: Path) -> Path:
    """A box over the corner of a tensor, and the lines of shared memory it becomes under the 128-byte swizzle."""
    tensor, at, box = (12, 200), (-16, 7), (64, 8)
    figure = picture(3.2, "A TMA load: bf16 box {64, 8} at coordinates {-16, 7} of a tensor with 12 rows")
    left, right = figure.subplots(1, 2)
    columns, rows = np.arange(at[0], at[0] + 64, 8), np.arange(at[1], at[1] + 8)
    frame(left, 8, 8, "in the tensor", xticks=columns, yticks=rows, ylabel="row", xlabel="first column of the chunk")
    lines = [f"{line * 128}" for line in range(8)]
    frame(right, 8, 8, "in shared memory, 128-byte swizzle", xticks=range(8), yticks=lines)
    right.set(xlabel="bank group", ylabel="byte offset")
    addresses = layouts.box_addresses(box, 2, 128)[:, ::8]
    inside = layouts.box_indices(tensor, at, box)[1][:, ::8]
    for (r, c), address in np.ndenumerate(addresses):
        look = {"tint": TINTS[c]} if inside[r, c] else {"tint": "#F2F2F2", "hatch": "////"}
        label = f"{rows[r]},{columns[c]}" if inside[r, c] else "0"
        cell(left, r, c, label, **look)
        cell(right, address // 128, address % 128 // 16, label, **look)
    figure.supxlabel(
        "A cell is 16 bytes: row, first column. What lies outside arrives as zeros, and counts: 1024 bytes in all.",
        fontsize=8.5,
    )
    return save(figure, path)


# ---- descriptors


def descriptor_k_major(path: Path) -> Path:
    """64 rows x 128 columns of K as two TMA boxes; one atom, with the four k16 steps that walk through it."""
    figure = picture(4.3, "K-major, 128-byte swizzle, 64 rows: SBO = 1024, LBO is ignored")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    _, steps = layouts.dense_descriptor(64, 128, 128, False)
    rows = [f"{r}-{r + 7}" for r in range(0, 64, 8)]
    frame(
        left,
        8,
        2,
        "atoms by their byte offset",
        xticks=("k 0-63", "k 64-127"),
        yticks=rows,
        ylabel="row (M of A, N of B)",
    )
    for row in range(8):
        for column in range(2):
            for part in range(4):
                left.add_patch(Rectangle((column + part / 4, row), 0.25, 1, facecolor=TINTS[part]))
            cell(left, row, column, None, "none")
            left.text(
                column + 0.5,
                row + 0.5,
                f"+ {column * 8192 + row * 1024}",
                ha="center",
                va="center_baseline",
                fontsize=8.5,
            )
    cell(left, 0, 0, None, OUTSIDE, bold=True)
    left.set_xlabel("down: + 1024 (SBO)\nright: + 8192, a new start address", fontsize=8.5)
    frame(right, 8, 8, "the first atom, as it lies", xticks=range(8), yticks=[f"{i * 128}" for i in range(8)])
    right.set(xlabel="bank group; in a cell: row, first k", ylabel="byte offset")
    _zoom(right, lambda row, chunk: (f"{row},{8 * chunk}", TINTS[chunk // 2]))
    names = {f"k {16 * i}-{16 * i + 15}: start + {steps[i]}": TINTS[i] for i in range(4)}
    legend(figure, names)
    return save(figure, path)


def descriptor_mn_major(path: Path) -> Path:
    """64 of K x 128 of M or N as two TMA boxes; one atom."""
    descriptor, steps = layouts.dense_descriptor(128, 64, 128, True)
    title = f"MN-major, 128-byte swizzle, 64 of k: LBO = {descriptor.leading}, SBO = {descriptor.stride}"
    figure = picture(4.3, title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    blocks = [f"{k}-{k + 7}" for k in range(0, 64, 8)]
    frame(left, 8, 2, "atoms by their byte offset", xticks=("0-63", "64-127"), yticks=blocks, ylabel="k")
    for row in range(8):
        for column in range(2):
            offset = column * descriptor.leading + row * descriptor.stride
            cell(left, row, column, f"+ {offset}", TINTS[row // 2])
    cell(left, 0, 0, None, OUTSIDE, bold=True)
    left.set_xlabel("M of A, N of B\ndown: + 1024 (SBO), right: + 8192 (LBO)", fontsize=8.5)
    frame(right, 8, 8, "the first atom, as it lies", xticks=range(8), yticks=[f"{i * 128}" for i in range(8)])
    right.set(xlabel="bank group; in a cell: k, first of M or N", ylabel="byte offset")
    _zoom(right, lambda k, chunk: (f"{k},{8 * chunk}", TINTS[0]))
    legend(figure, {f"k {16 * i}-{16 * i + 15}: start + {steps[i]}": TINTS[i] for i in range(4)})
    return save(figure, path)


def _zoom(axes: Axes, look: Callable[[int, int], tuple[str, str]]) -> None:
    """The 8 lines of one 1024-byte atom; `look(line of the plain layout, chunk)` is its text and tint."""
    for line in range(8):
        for chunk in range(8):
            address = layouts.swizzle_address(line * 128 + chunk * 16, 128)
            text, tint = look(line, chunk)
            cell(axes, address // 128, address % 128 // 16, text, tint)


# ---- fragments


def fragment(axes: Axes, title: str, shape, row: np.ndarray, column: np.ndarray, tints: np.ndarray, **labels) -> None:
    """Pairs of elements with their thread's number; row, column: (threads, pairs, 2), tints: (pairs,) into TINTS."""
    frame(axes, *shape, title, xticks=range(shape[1]), yticks=range(shape[0]), **labels)
    for (thread, pair), tint in np.ndenumerate(np.broadcast_to(tints, row.shape[:2])):
        r, c = row[thread, pair], column[thread, pair]
        if max(r) < shape[0] and max(c) < shape[1]:
            size = {"height": r[1] - r[0] + 1, "width": c[1] - c[0] + 1}
            cell(axes, r[0], c[0], thread, TINTS[tint], **size)
            if thread == 0:
                cell(axes, r[0], c[0], None, OUTSIDE, bold=True, **size)


def wgmma_fragments(path: Path) -> Path:
    """Rows 0-15, those of the warpgroup's first warp: an accumulator's first 16 columns, and A from registers."""
    figure = picture(4.6, "wgmma: which thread holds which pair of elements, in the rows of warp 0")
    left, right = figure.subplots(1, 2)
    row, column = (x[:32].reshape(32, -1, 2) for x in layouts.accumulator_fragment(16))
    fragment(left, "D of m64nN: f32, one register each", (16, 16), row, column, np.arange(4), ylabel="row", xlabel="n")
    row, column = (x[:32] for x in layouts.a_register_fragment())
    fragment(right, "A of m64k16: 16 bits, two in a register", (16, 16), row, column, np.arange(4), xlabel="k")
    note = "outlined: thread 0. Warp w: rows + 16w, threads + 32w. Columns n + 8j of D: registers + 4j"
    legend(figure, {f"d{2 * i}, d{2 * i + 1}  and  a{i}": TINTS[i] for i in range(4)}, note)
    return save(figure, path)


def mma_fragments(path: Path) -> Path:
    """A, B and C of mma.m16n8k16."""
    figure = picture(4.5, "mma.m16n8k16: which lane holds which pair of elements")
    a, b, c = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    fragment(a, "A: m x k", (16, 16), *layouts.mma_a_fragment(), np.arange(4), ylabel="row", xlabel="k")
    fragment(b, "B: k x n", (16, 8), *layouts.mma_b_fragment(), np.arange(2), xlabel="n")
    row, column = (x.reshape(32, 2, 2) for x in layouts.mma_c_fragment())
    fragment(c, "C and D: m x n, f32", (16, 8), row, column, np.arange(2), xlabel="n")
    legend(
        figure,
        {f"a{i}" + (f", b{i}, c{2 * i} c{2 * i + 1}" if i < 2 else ""): TINTS[i] for i in range(4)},
        "outlined: lane 0",
    )
    return save(figure, path)


def ldmatrix(path: Path) -> Path:
    """Four 8 x 8 matrices: which lane gives each row's address, and who receives what, plain and transposed."""
    figure = picture(4.6, "ldmatrix.x4 and stmatrix.x4 of a 16 x 16 tile")
    first, second, third = figure.subplots(1, 3, width_ratios=(0.5, 0.9, 1.6))
    corner = [(0, 0), (8, 0), (0, 8), (8, 8)]  # the order that makes register q the a[q] of mma
    frame(first, 16, 16, "who gives a\nrow's address", yticks=range(16), ylabel="row")
    for lane in range(32):
        r, c = corner[lane // 8]
        cell(first, r + lane % 8, c, lane, TINTS[lane // 8], width=8)
    for axes, transpose in ((second, False), (third, True)):
        row, column = layouts.matrix_fragment(transpose)
        rows, columns = (np.stack([x + at[i] for at in corner], axis=1) for i, x in enumerate((row, column)))
        title = ".trans: who holds each pair,\none above the other" if transpose else "plain: who holds\neach pair"
        fragment(axes, title, (16, 16), rows, columns, np.arange(4))
        if not transpose:
            axes.set_xticks(range(1, 16, 2), [f"{c}" for c in range(0, 16, 2)])
    legend(figure, {f"matrix {i}, register {i}": TINTS[i] for i in range(4)}, "lanes of the warp; outlined: lane 0")
    return save(figure, path)


def _in_house_style(draw: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def styled(path: Path) -> Path:
        with matplotlib.rc_context(plots.STYLE):
            return draw(path)

    return styled


_DRAWN = (swizzle, tma_box, descriptor_k_major, descriptor_mn_major, wgmma_fragments, mma_fragments, ldmatrix)
PICTURES = {draw.__name__: _in_house_style(draw) for draw in _DRAWN}
