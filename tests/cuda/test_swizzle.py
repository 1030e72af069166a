"""cuda/layouts.py against brute force and what the PTX ISA says of its layouts, and the command that shows them.

What the formulas say of real instructions is tested in test_layouts.py.
"""

import dataclasses
import io
import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from cuda import layout_pictures, layouts, swizzle
from cuda.layouts import SWIZZLES, Descriptor

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(8, 16), (64, 64), (128, 48), (256, 128)]


# ---- swizzles


def moved_bit_by_bit(address: int, span: int) -> int:
    """The PTX ISA's picture of a swizzle as text: bits 4, 5, 6 take up bits 7, 8, 9, as many as the span has chunks."""
    digits = list(f"{address:020b}"[::-1])
    for i in range({0: 0, 32: 1, 64: 2, 128: 3}[span]):
        digits[4 + i] = "01"[digits[4 + i] != digits[7 + i]]
    return int("".join(digits[::-1]), 2)


@pytest.mark.parametrize("span", SWIZZLES)
def test_a_swizzle_permutes_chunks_within_its_lines(span):
    addresses = np.arange(4096)
    moved = layouts.swizzle_address(addresses, span)
    assert sorted(moved) == list(addresses)
    np.testing.assert_array_equal(layouts.swizzle_address(moved, span), addresses)
    np.testing.assert_array_equal(moved // 128, addresses // 128)
    np.testing.assert_array_equal(moved % 16, addresses % 16)
    assert [moved_bit_by_bit(a, span) for a in range(4096)] == list(moved)
    if span:
        np.testing.assert_array_equal(moved[: 8 * span] + 8 * span, moved[8 * span : 16 * span])  # the pattern repeats


def test_the_128_byte_swizzle_adds_row_and_chunk_without_carry():
    for row, chunk in itertools.product(range(8), repeat=2):
        assert layouts.swizzle_address(row * 128 + chunk * 16, 128) == row * 128 + (row ^ chunk) * 16


@pytest.mark.parametrize(("span", "plain"), [(32, 2), (64, 4), (128, 8)])
def test_columns_are_free_of_conflicts_only_when_swizzled(span, plain):
    for chunk in range(span // 16):
        column = np.arange(8) * span + chunk * 16
        assert layouts.passes(column) == plain
        assert layouts.passes(layouts.swizzle_address(column, span)) == 1
    line = np.arange(8) * 16  # a line of memory stays as good as it was
    assert layouts.passes(line) == layouts.passes(layouts.swizzle_address(line + 384, span)) == 1


def test_passes_count_what_banks_serve():
    assert layouts.passes([0, 0, 4, 12]) == 1  # one chunk, read once for all
    assert layouts.passes([0, 128, 256, 16]) == 3


# ---- TMA boxes


@pytest.mark.parametrize("span", SWIZZLES)
@pytest.mark.parametrize(
    ("box", "step"), [((5,), None), ((7, 3), (1, 2)), ((4, 5, 3), (1, 3, 2)), ((3, 2, 2, 2, 1), None)]
)
def test_boxes_element_by_element(span, box, step):
    element = 4
    box = ((span or 48) // element, *box[1:])
    tensor, at = (6, 5, 9, 4, 20)[-len(box) :], (-2, -2, 5, -1, 5)[: len(box)]
    addresses = layouts.box_addresses(box, element, span, 2048, step)
    indices, inside = layouts.box_indices(tensor, at, box, step)
    steps = step or (1,) * len(box)
    place = 2048
    moved = [range(0, extent, s) for extent, s in zip(box, steps, strict=True)]
    for offsets in itertools.product(*moved[::-1]):  # the innermost fastest
        position = tuple(o // s for o, s in zip(offsets, steps[::-1], strict=True))
        wanted = [o + c for o, c in zip(offsets, at[::-1], strict=True)]
        assert addresses[position] == moved_bit_by_bit(place, span)
        assert inside[position] == all(0 <= w < size for w, size in zip(wanted, tensor, strict=True))
        if inside[position]:
            assert [index[position] for index in indices] == wanted
        place += element
    assert addresses.size == np.prod([len(r) for r in moved])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layouts.box_addresses((7, 2), 2), "14 bytes.*multiple of 16"),
        (lambda: layouts.box_addresses((8, 2), 2, 128), "16 bytes.*expected the 128"),
        (lambda: layouts.box_addresses((128, 2), 2, 128), "256 bytes.*expected the 128"),
        (lambda: layouts.box_addresses((8, 2), 2, step=(2, 1)), r"step \(2, 1\): expected 1 in the innermost"),
        (lambda: layouts.swizzle_address(0, 16), "swizzle 16: expected one of 0, 32, 64, 128"),
        (lambda: Descriptor(8, 0, 0, 0), "start 8: expected a multiple of 16"),
        (lambda: Descriptor(0, 1 << 18, 0, 0), "leading 262144"),
        (lambda: Descriptor(0, 0, -16, 0), "stride -16"),
        (lambda: Descriptor(0, 0, 0, 96), "swizzle 96"),
        (lambda: Descriptor(0, 0, 0, 0, 8), "base_offset 8: expected 0 to 7"),
        (lambda: Descriptor.decode(1 << 64), "0x10000000000000000: expected 64 bits"),
        (lambda: Descriptor.decode(-1), "-0x1: expected 64 bits"),
        (lambda: Descriptor.decode(1 << 14 | 1 << 61), r"0x2000000000004000: bits \[14, 61\] have no meaning"),
        (lambda: layouts.operand_addresses(Descriptor(0, 0, 0, 128, 3), 8, False), "base_offset 3: expected 0"),
        (lambda: layouts.dense_descriptor(60, 64, 128, False), "60 x 64, 128-byte swizzle: expected whole 8 x 64"),
        (lambda: layouts.dense_descriptor(64, 24, 32, False), "64 x 24"),
        (lambda: layouts.dense_descriptor(72, 64, 128, True), "72 x 64"),
        (lambda: layouts.accumulator_fragment(12), "n 12: expected a multiple of 8"),
        (lambda: layouts.accumulator_fragment(264), "n 264"),
        (lambda: layouts.accumulator_fragment(0), "n 0"),
        (lambda: swizzle.parse_descriptor("0xfoo"), "'0xfoo': expected a whole number"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- descriptors


def test_descriptors_round_trip():
    generator = np.random.default_rng(1)
    for span in SWIZZLES:
        for _ in range(50):
            start, leading, stride = (int(x) * 16 for x in generator.integers(0, 1 << 14, 3))
            descriptor = Descriptor(start, leading, stride, span, int(generator.integers(8)))
            assert 0 <= descriptor.encode() < 1 << 64 and Descriptor.decode(descriptor.encode()) == descriptor


def test_a_descriptor_written_by_hand():
    assert Descriptor.decode(0x4000004000010080) == Descriptor(2048, 16, 1024, 128)
    assert Descriptor(0x3FFF0, 0, 0, 0).encode() == 0x3FFF
    assert [Descriptor(0, 0, 0, span).encode() >> 62 for span in (0, 128, 64, 32)] == [
        0,
        1,
        2,
        3,
    ]  # the PTX ISA's table


@pytest.mark.parametrize("span", SWIZZLES)
@pytest.mark.parametrize(("rows", "depth"), SHAPES)
@pytest.mark.parametrize("mn_major", [False, True])
def test_descriptors_describe_what_tma_writes(span, rows, depth, mn_major):
    """A dense tile, written box after box, is found element by element by the descriptors of its k16 steps."""
    wide = (span or 16) // 2
    across, along = (rows, depth) if mn_major else (depth, rows)
    if across % wide and across > wide:
        with pytest.raises(ValueError, match=f"{rows} x {depth}"):
            layouts.dense_descriptor(rows, depth, span, mn_major)
        return
    boxes = -(-across // wide)
    box = [layouts.box_addresses((wide, along), 2, span, 1024 * 64 + i * wide * 2 * along) for i in range(boxes)]
    tile = np.concatenate(box, axis=1)[:, :across]  # (along, across): row-major as in global memory
    tile = tile.T if mn_major else tile
    descriptor, steps = layouts.dense_descriptor(rows, depth, span, mn_major, 1024 * 64)
    assert len(steps) == depth // 16 and steps[0] == 0
    for i, step in enumerate(steps):
        there = dataclasses.replace(descriptor, start=descriptor.start + step)
        np.testing.assert_array_equal(layouts.operand_addresses(there, rows, mn_major), tile[:, 16 * i : 16 * i + 16])


def test_the_steps_that_kernels_take():
    assert layouts.dense_descriptor(128, 64, 128, False) == (Descriptor(0, 16, 1024, 128), [0, 32, 64, 96])
    assert layouts.dense_descriptor(256, 64, 128, True) == (Descriptor(0, 8192, 1024, 128), [0, 2048, 4096, 6144])


# ---- fragments


@pytest.mark.parametrize(
    ("shape", "fragment"),
    [
        *[((64, n), layouts.accumulator_fragment(n)) for n in range(8, 257, 8)],
        ((64, 16), layouts.a_register_fragment()),
        ((16, 16), layouts.mma_a_fragment()),
        ((16, 8), layouts.mma_b_fragment()),
        ((16, 8), layouts.mma_c_fragment()),
        ((8, 8), layouts.matrix_fragment()),
        ((8, 8), layouts.matrix_fragment(True)),
    ],
    ids=lambda value: str(value) if isinstance(value[0], int) else "",
)
def test_every_element_has_one_owner(shape, fragment):
    row, column = np.broadcast_arrays(*fragment)
    owners = np.zeros(shape, int)
    np.add.at(owners, (row, column), 1)
    assert (owners == 1).all() and row.size == owners.size


def test_corners_of_the_fragments():
    row, column = layouts.accumulator_fragment(256)
    for thread, register, place in [
        (0, 0, (0, 0)),
        (0, 1, (0, 1)),
        (0, 2, (8, 0)),
        (1, 4, (0, 10)),
        (127, 127, (63, 255)),
    ]:
        assert (row[thread, register], column[thread, register]) == place
    row, column = layouts.mma_b_fragment()
    assert (row[5, 1, 1], column[5, 1, 1]) == (2 * 1 + 8 + 1, 1)


def test_an_accumulator_is_the_next_products_a():
    """What attention relies on: softmax(Q K') needs no exchange between threads before it multiplies V."""
    rows, columns = layouts.accumulator_fragment(64)
    a_rows, a_columns = layouts.a_register_fragment()
    for k in range(4):
        part = slice(8 * k, 8 * k + 8)
        np.testing.assert_array_equal(rows[:, part].reshape(128, 4, 2), a_rows)
        np.testing.assert_array_equal(columns[:, part].reshape(128, 4, 2) - 16 * k, a_columns)


def test_ldmatrix_feeds_mma():
    """Four matrices in the order (top, bottom) x (left, right) are A; two, transposed or not, are B."""
    row, column = layouts.matrix_fragment()
    a_rows, a_columns = layouts.mma_a_fragment()
    for register, (down, right) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        np.testing.assert_array_equal(a_rows[:, register], row + down)
        np.testing.assert_array_equal(a_columns[:, register], column + right)
    b_rows, b_columns = layouts.mma_b_fragment()
    for register in range(2):  # B (k x n) read from rows of k, with .trans
        k, n = layouts.matrix_fragment(transpose=True)
        np.testing.assert_array_equal(b_rows[:, register], k + 8 * register)
        np.testing.assert_array_equal(b_columns[:, register], n)


# ---- the command


def test_a_descriptor_in_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swizzle", "--descriptor", "0x4000004002000082"])
    swizzle.main()
    said = capsys.readouterr().out
    for line in (
        "descriptor 0x4000004002000082",
        "bits 13-0    0x0082  start address         2080 bytes (0x820)",
        "bits 29-16   0x0200  leading offset (LBO)  8192 bytes",
        "bits 45-32   0x0040  stride offset (SBO)   1024 bytes",
        "bits 63-62   0x0001  swizzle               128 bytes",
        "this start address        columns 16 to 31 of its atom",
        "the next 64 columns       + 8192 bytes (LBO)",
        "the next 16 k             + 2048 bytes",
    ):
        assert line in said
    assert said == swizzle.words(Descriptor(2080, 8192, 1024, 128)) + "\n"


def test_words_without_a_swizzle_say_that_the_offsets_change_their_roles():
    said = swizzle.words(Descriptor(0, 256, 512, 0))
    assert (
        "the next 8 columns of K   + 256 bytes (LBO)" in said and "the next 8 k              + 256 bytes (LBO)" in said
    )
    assert (
        "the next 8 rows           + 512 bytes (SBO)" in said and "the next 8 columns        + 512 bytes (SBO)" in said
    )


@pytest.mark.parametrize("text", ["0x1ffffffffffffffff", "0x8000", "swizzled"])
def test_a_bad_descriptor_is_one_line_and_code_2(text):
    command = [sys.executable, "-m", "cuda.swizzle", "--descriptor", text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and text in done.stderr.replace("0x0000000000008000", "0x8000")
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_pictures_are_drawn_small_and_alike_each_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swizzle", "--out", str(tmp_path / "new")])
    swizzle.main()
    said = capsys.readouterr().out.split()
    assert said == [str(tmp_path / "new" / f"{name}.png") for name in layout_pictures.PICTURES]
    again = layout_pictures.PICTURES["tma_box"](tmp_path / "again.png")
    assert again.read_bytes() == (tmp_path / "new" / "tma_box.png").read_bytes()
    for name in layout_pictures.PICTURES:
        data = (tmp_path / "new" / f"{name}.png").read_bytes()
        assert len(data) < 150_000
        assert matplotlib.image.imread(io.BytesIO(data), format="png").shape[1] == 960
        assert (ROOT / "results" / "cuda" / f"{name}.png").exists()


def test_the_swizzle_picture_shows_the_bank_groups(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(layout_pictures, "save", lambda figure, path: figures.append(figure))
    layout_pictures.PICTURES["swizzle"](tmp_path / "x.png")
    for axes, (what, span) in zip(
        figures[0].axes, itertools.product(("plain", "swizzled"), (32, 64, 128)), strict=True
    ):
        assert axes.get_title(loc="left") in (f"{span} B, {what}", f"{span}-byte rows, {what}")
        numbers = np.array([int(text.get_text()) for text in axes.texts]).reshape(8, span // 16)
        addresses = np.arange(8)[:, None] * span + np.arange(span // 16) * 16
        if what == "swizzled":
            addresses = np.vectorize(lambda address, span=span: moved_bit_by_bit(int(address), span))(addresses)
        np.testing.assert_array_equal(numbers, addresses // 16 % 8)
        passes = max(np.bincount(column).max() for column in numbers.T)
        assert axes.get_xlabel().startswith(f"a column: {passes} pass")
