"""Where Hopper's instructions find and put things: swizzles, TMA boxes, matrix descriptors, register fragments.

Pure numpy, written from the PTX ISA (9.0) and not from the C++ model, so that tests can hold one against the other and
both against the hardware. Elements of matrices are 16 bits wide (bf16, f16). A swizzle is named by its span in bytes: 0
(none), 32, 64 or 128. Addresses are bytes in shared memory. Refused: boxes narrower than their swizzle, other swizzles.
"""

from dataclasses import dataclass

import numpy as np

SWIZZLES = (0, 32, 64, 128)
CHUNK = 16  # bytes: what a swizzle moves as one, the width of 4 banks and of 8 elements
ELEMENT = 2  # bytes
MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # bits 63-62 of a descriptor


# ---- swizzles and banks


def swizzle_address(address, swizzle: int):
    """Where a byte of the plain layout lies under a swizzle; its own inverse. An int or an integer array of any shape.

    Bits 7-9 of the address (which 128-byte line of eight) are added, without carry, to bits 4-6 (which chunk): all
    three for 128 bytes, two for 64, one for 32. It is the address that counts, not the offset in a tile: a tile has the
    pattern from its beginning only where it starts at a multiple of 8 * swizzle. Source: PTX ISA, "Swizzling modes".
    """
    _check_swizzle(swizzle)
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return address ^ ((address >> 7 & mask) << 4)


def bank_group(address):
    """Which of the eight groups of 4 banks holds the 16-byte chunk at this address: 0..7."""
    return address // CHUNK % 8


def passes(addresses) -> int:
    """How often shared memory must be read for the 16-byte chunks at `addresses`, shape (P,): one chunk of each bank
    group a pass. Eight chunks that are wanted together (an 8 x 8 matrix of ldmatrix) take 1 at best and 8 at worst.
    """
    chunks = np.unique(np.asarray(addresses) // CHUNK)
    return int(np.bincount(chunks % 8, minlength=8).max())


# ---- TMA boxes


def box_shape(box, step=None) -> tuple[int, ...]:
    """The numpy shape of what one TMA instruction moves, outermost first; `box` and `step` are innermost first.

    Along a dimension with an element stride of `step`, ceil(box / step) elements are moved. Raises ValueError for a
    step in the innermost dimension, which the hardware ignores. Source: CUDA driver API, cuTensorMapEncodeTiled.
    """
    step = step or (1,) * len(box)
    if step[0] != 1:
        raise ValueError(f"step {tuple(step)}: expected 1 in the innermost dimension")
    return tuple(-(-extent // s) for extent, s in zip(box, step, strict=True))[::-1]


def box_addresses(box, element_bytes: int, swizzle: int = 0, base: int = 0, step=None) -> np.ndarray:
    """Shared-memory address of each element of a box at `base`, of shape `box_shape(box, step)`.

    The box lies densely, innermost dimension first, then its addresses are swizzled. Raises ValueError where the
    innermost extent is no multiple of 16 bytes, or is not the span of the swizzle.
    """
    inner = box[0] * element_bytes
    if inner % CHUNK:
        raise ValueError(f"innermost extent {inner} bytes: expected a multiple of {CHUNK}")
    _check_swizzle(swizzle)
    if swizzle and inner != swizzle:
        raise ValueError(f"innermost extent {inner} bytes: expected the {swizzle} of the swizzle")
    shape = box_shape(box, step)
    dense = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape) * element_bytes
    return swizzle_address(base + dense, swizzle)


def box_indices(tensor_shape, coordinates, box, step=None) -> tuple[list[np.ndarray], np.ndarray]:
    """(index arrays into the tensor, which of them are inside), each of shape `box_shape(box, step)`.

    `tensor_shape` is numpy's, outermost first; `coordinates` are the instruction's, innermost first, maybe negative.
    Indices outside are clipped: use them with the mask. What is outside reads as zero, is not written by a store, and
    counts all the same among the bytes that a load announces to its mbarrier.
    """
    shape = box_shape(box, step)
    step = step or (1,) * len(box)
    grid = np.indices(shape)
    at = [grid[d] * step[::-1][d] + coordinates[::-1][d] for d in range(len(shape))]
    inside = np.all([(index >= 0) & (index < size) for index, size in zip(at, tensor_shape, strict=True)], axis=0)
    return [np.clip(index, 0, size - 1) for index, size in zip(at, tensor_shape, strict=True)], inside


# ---- matrix descriptors


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A wgmma matrix descriptor, in bytes. Source: PTX ISA, "Matrix Descriptor Format" of wgmma.

    Raises ValueError for an address or offset that its 14 bits (a multiple of 16 below 2^18) cannot hold.
    """

    start: int
    leading: int
    stride: int
    swizzle: int
    base_offset: int = 0

    def __post_init__(self):
        for name in ("start", "leading", "stride"):
            value = getattr(self, name)
            if not (0 <= value < 1 << 18 and value % 16 == 0):
                raise ValueError(f"{name} {value}: expected a multiple of 16 from 0 to {(1 << 18) - 16}")
        _check_swizzle(self.swizzle)
        if not 0 <= self.base_offset < 8:
            raise ValueError(f"base_offset {self.base_offset}: expected 0 to 7")

    def encode(self) -> int:
        """The 64 bits."""
        return (
            self.start >> 4
            | self.leading >> 4 << 16
            | self.stride >> 4 << 32
            | self.base_offset << 49
            | MODES[self.swizzle] << 62
        )

    @classmethod
    def decode(cls, bits: int) -> "Descriptor":
        """Raises ValueError for a number of more than 64 bits and for bits that have no meaning."""
        if not 0 <= bits < 1 << 64:
            raise ValueError(f"descriptor {bits:#x}: expected 64 bits")
        reserved = ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62) & bits
        if reserved:
            places = [bit for bit in range(64) if reserved >> bit & 1]
            raise ValueError(f"descriptor {bits:#018x}: bits {places} have no meaning, expected 0 there")
        swizzle = {mode: span for span, mode in MODES.items()}[bits >> 62]
        fields = [(bits >> low & 0x3FFF) << 4 for low in (0, 16, 32)]
        return cls(*fields, swizzle, bits >> 49 & 7)


def operand_addresses(descriptor: Descriptor, rows: int, mn_major: bool) -> np.ndarray:
    """Address of each element of a wgmma operand, shape (rows, 16): rows are M of A or N of B, columns are K.

    With S the swizzle's span in elements (8 without swizzle), L leading, T stride, in bytes from the start address:
      K-major, swizzled     row r at (r % 8) * swizzle + (r // 8) * T, column k at 2k; L is ignored
      K-major, none         row r at (r % 8) * 16 + (r // 8) * T, column k at 2 (k % 8) + (k // 8) * L
      MN-major, swizzled    row r at 2 (r % S) + (r // S) * L, column k at (k % 8) * swizzle + (k // 8) * T
      MN-major, none        row r at 2 (r % 8) + (r // 8) * T, column k at (k % 8) * 16 + (k // 8) * L
    and the swizzle comes last, on the absolute address. Source: PTX ISA, "Strides" and "Canonical layouts" of wgmma.
    """
    if descriptor.base_offset:
        raise ValueError(f"base_offset {descriptor.base_offset}: expected 0, a tile aligned to its swizzle pattern")
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    span = descriptor.swizzle or CHUNK
    leading, stride = descriptor.leading, descriptor.stride
    if not mn_major:
        along_k = ELEMENT * k if descriptor.swizzle else ELEMENT * (k % 8) + k // 8 * leading
        plain = r % 8 * span + r // 8 * stride + along_k
    elif descriptor.swizzle:
        wide = span // ELEMENT
        plain = ELEMENT * (r % wide) + r // wide * leading + k % 8 * span + k // 8 * stride
    else:
        plain = ELEMENT * (r % 8) + r // 8 * stride + k % 8 * CHUNK + k // 8 * leading
    return swizzle_address(descriptor.start + plain, descriptor.swizzle)


def dense_descriptor(
    rows: int, depth: int, swizzle: int, mn_major: bool, start: int = 0
) -> tuple[Descriptor, list[int]]:
    """(descriptor of the first 16 columns, what to add to its start for each 16 columns) of a dense tile rows x depth.

    The tile is what TMA writes with this swizzle: K-major, boxes of span x rows, MN-major, boxes of span x depth, one
    after the other. Raises ValueError for a shape that is not whole (`rows` or `depth` beyond the first box included).
    """
    _check_swizzle(swizzle)
    span = swizzle or CHUNK
    wide, across, along = span // ELEMENT, (rows if mn_major else depth), (depth if mn_major else rows)
    if along % 8 or depth % 16 or (across % wide and across > wide) or rows % 8:
        raise ValueError(f"tile of {rows} x {depth}, {swizzle}-byte swizzle: expected whole 8 x {wide} atoms")
    next_atom, next_box = 8 * span, along * span
    # Without swizzle the two words change their places for MN-major: "leading" is then the step along K.
    leading, stride = (next_atom, next_box) if mn_major and not swizzle else (next_box, next_atom)
    if not mn_major and swizzle:
        leading = CHUNK  # ignored; 1 in its field by custom
    if mn_major:
        steps = [k // 8 * next_atom for k in range(0, depth, 16)]
    else:
        steps = [k // wide * next_box + k % wide * ELEMENT for k in range(0, depth, 16)]
    return Descriptor(start, leading, stride, swizzle), steps


# ---- fragments: which element a thread's register holds, as (row, column) arrays


def accumulator_fragment(n: int) -> tuple[np.ndarray, np.ndarray]:
    """wgmma m64nNk16, D in f32: (row, column) of register i of thread t, each of shape (128, n / 2).

    Source: PTX ISA, "Register Fragments" of wgmma.mma_async. Raises ValueError unless n is 8, 16, .., 256.
    """
    if not (8 <= n <= 256 and n % 8 == 0):
        raise ValueError(f"n {n}: expected a multiple of 8 from 8 to 256")
    t, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    row, column = mma_c_fragment(t % 32, i % 4)
    return 16 * (t // 32) + row, 8 * (i // 4) + column


def a_register_fragment() -> tuple[np.ndarray, np.ndarray]:
    """wgmma with A (64 x 16, 16-bit) in registers: shape (128, 4, 2) for thread, register, low or high half.

    The same places as `mma_a_fragment` in each warp's 16 rows; and as those of an accumulator, so that d[8j..8j+7] of
    one product, packed in pairs, are columns 16j..16j+15 of the next one's A.
    """
    t = np.arange(128)[:, None, None]
    row, column = mma_a_fragment()
    return 16 * (t // 32) + row[np.arange(128) % 32], column[np.arange(128) % 32]


def mma_a_fragment() -> tuple[np.ndarray, np.ndarray]:
    """mma.m16n8k16, A (16 x 16): (row, column) of lane, register, half; shape (32, 4, 2).

    Source: PTX ISA, "Matrix Fragments for mma.m16n8k16", of this and the next two functions.
    """
    lane, register, half = np.ogrid[:32, :4, :2]
    row = lane // 4 + 8 * (register % 2) + 0 * half
    return row, 2 * (lane % 4) + 8 * (register // 2) + half


def mma_b_fragment() -> tuple[np.ndarray, np.ndarray]:
    """mma.m16n8k16, B (16 x 8): (row, column) = (k, n), shape (32, 2, 2)."""
    lane, register, half = np.ogrid[:32, :2, :2]
    return 2 * (lane % 4) + 8 * register + half, lane // 4 + 0 * (register + half)


def mma_c_fragment(lane=None, register=None) -> tuple[np.ndarray, np.ndarray]:
    """mma.m16n8k16, C and D (16 x 8, f32): (row, column), shape (32, 4), or for the lanes and registers given."""
    lane = np.arange(32)[:, None] if lane is None else lane
    register = np.arange(4)[None, :] if register is None else register
    return lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2


def matrix_fragment(transpose: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """ldmatrix and stmatrix, one 8 x 8 matrix of 16-bit elements: (row, column) of lane, half; shape (32, 2).

    Register q belongs to matrix q, and lane 8q + i gives the address of its row i, 16 bytes. With .trans row and column
    change places. Source: PTX ISA, "ldmatrix".
    """
    lane, half = np.ogrid[:32, :2]
    row, column = lane // 4 + 0 * half, 2 * (lane % 4) + half
    return (column, row) if transpose else (row, column)


def _check_swizzle(swizzle: int) -> None:
    if swizzle not in SWIZZLES:
        raise ValueError(f"swizzle {swizzle!r}: expected one of {', '.join(map(str, SWIZZLES))} bytes")
