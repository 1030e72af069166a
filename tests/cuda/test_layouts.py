"""The instructions of kernels/layouts.cu against cuda/layouts.py, byte for byte: first on the CPU model, then on a GPU.

Each test runs on the model, with asynchronous operations as late as is legal and at once, and (marked gpu) on a Hopper.
Numbers are small integers, so that every product is exact and the three must agree to the last bit. What no instruction
may touch is filled with other bytes, NaNs where they could be multiplied.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from cuda import layouts

IMAGE = 64 * 1024
SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}  # simt::Swizzle
TYPES = {"u8": (0, 1), "u16": (1, 2), "u32": (2, 4), "u64": (4, 8), "f16": (6, 2), "f32": (7, 4), "bf16": (9, 2)}
NAN = 0x7FFF  # of bf16 and of f16


class Machine:
    """Calls a module with numpy arrays, which it sees as 16-bit elements; on a GPU they go there and come back."""

    def __init__(self, module, cuda: bool, **options):
        self.module, self.cuda, self.options = module, cuda, options

    def __call__(self, name, *arguments):
        if not self.cuda:
            views = [x.reshape(-1).view(np.uint16) if isinstance(x, np.ndarray) else x for x in arguments]
            with self.module.options(**self.options):
                return getattr(self.module, name)(*views)
        there = [
            torch.from_numpy(x.reshape(-1).view(np.int16)).cuda().view(torch.bfloat16)
            if isinstance(x, np.ndarray)
            else x
            for x in arguments
        ]
        getattr(self.module, name)(*there)
        torch.cuda.synchronize()
        for x, tensor in zip(arguments, there, strict=True):
            if isinstance(x, np.ndarray):
                x.reshape(-1).view(np.int16)[:] = tensor.view(torch.int16).cpu().numpy()


def model(**options):
    return Machine(pytest.importorskip("tests.cuda._layouts", reason="make native builds it"), False, **options)


def hopper():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(f"{torch.cuda.get_device_name()} is not a Hopper")
    return Machine(pytest.importorskip("tests.cuda._layouts_sm90", reason="make native builds it where nvcc is"), True)


@pytest.fixture(params=["lazy", "eager", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request):
    return hopper() if request.param == "gpu" else model(async_=request.param)


def zeros(shape, dtype, align=1024):
    """An array at an aligned address: TMA wants 16 bytes, and tests the same on every run."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + align, np.uint8)
    skip = -memory.ctypes.data % align
    return memory[skip : skip + size].view(dtype).reshape(shape)


def filled(shape, dtype, generator):
    array = zeros(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = generator.integers(0, 256, array.nbytes)
    return array


# ---- TMA: name: (element type, sizes, box, coordinates, steps), innermost first
BOXES = {
    "1d inside": ("u8", (1000,), "span", (16,), None),
    "1d over the end": ("bf16", (77,), "span", (60,), None),
    "1d before the beginning": ("f32", (77,), "span", (-5,), None),
    "2d inside": ("bf16", (200, 31), ("span", 17), (72, 9), None),
    "2d negative": ("bf16", (75, 31), ("span", 9), (-3, -4), None),
    "2d over both ends": ("u32", (37, 13), ("span", 24), (20, 7), None),
    "2d wholly outside": ("bf16", (75, 31), ("span", 8), (-200, 3), None),
    "2d every second row": ("u16", (75, 31), ("span", 9), (8, -2), (1, 2)),
    "3d": ("u64", (19, 5, 4), ("span", 3, 3), (-1, -1, 2), None),
    "4d": ("f16", (75, 5, 4, 3), ("span", 3, 2, 2), (5, 3, -1, 2), None),
    "4d with steps": ("bf16", (75, 9, 8, 3), ("span", 5, 4, 2), (5, 1, -1, 2), (1, 2, 3, 1)),
    "5d": ("u8", (150, 3, 4, 3, 2), ("span", 2, 3, 2, 2), (-7, -1, 2, 1, 1), None),
}


def tma_case(name, swizzle, offset, generator, dtype=None):
    """(the whole allocation, the tensor in it, the dict for the module, addresses, indices, inside)."""
    type_name, sizes, box, coordinates, steps = BOXES[name]
    number, element = TYPES[type_name]
    dtype = dtype or f"u{element}"
    box = (box,) if isinstance(box, str) else box
    box = ((swizzle or 48) // element, *box[1:])
    steps = steps or (1,) * len(sizes)
    inner = -(-sizes[0] * element // 16) * 16 // element  # rows start at multiples of 16 bytes
    memory = filled((*sizes[:0:-1], inner), dtype, generator)
    tensor = memory[..., : sizes[0]]
    addresses = layouts.box_addresses(box, element, swizzle, offset, steps)
    indices, inside = layouts.box_indices(tensor.shape, coordinates, box, steps)
    description = {
        "type": number,
        "size": list(sizes),
        "stride": list(memory.strides[-2::-1]),
        "box": list(box),
        "step": list(steps),
        "swizzle": SWIZZLE[swizzle],
        "coordinates": list(coordinates),
        "offset": offset,
        "bytes": addresses.size * element,
    }
    return memory, tensor, description, addresses, tuple(indices), inside


@pytest.mark.parametrize("swizzle", layouts.SWIZZLES)
@pytest.mark.parametrize("name", BOXES)
def test_where_a_tma_load_puts_its_bytes(machine, name, swizzle):
    generator = np.random.default_rng(1)
    memory, tensor, box, addresses, indices, inside = tma_case(name, swizzle, 1024, generator)
    image = filled((8192,), np.uint8, generator)
    expected, before = image.copy(), memory.copy()
    values = np.where(inside, tensor[indices], 0).astype(tensor.dtype)
    for byte in range(tensor.itemsize):
        expected[addresses + byte] = np.ascontiguousarray(values)[..., None].view(np.uint8)[..., byte]
    machine("tma_load", memory, image, box)
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("offset", [128, 640, 1920])
@pytest.mark.parametrize("swizzle", layouts.SWIZZLES)
def test_swizzles_follow_the_address_not_the_tile(machine, swizzle, offset):
    generator = np.random.default_rng(2)
    memory, tensor, box, addresses, indices, inside = tma_case("2d inside", swizzle, offset, generator)
    image = filled((8192,), np.uint8, generator)
    expected = image.copy()
    expected.view(np.uint16)[addresses // 2] = np.where(inside, tensor[indices], 0)
    machine("tma_load", memory, image, box)
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("swizzle", layouts.SWIZZLES)
@pytest.mark.parametrize("name", [name for name in BOXES if "second" not in name and "steps" not in name])
def test_what_a_tma_store_writes(machine, name, swizzle):
    generator = np.random.default_rng(3)
    memory, tensor, box, addresses, indices, inside = tma_case(name, swizzle, 1024, generator)
    image = filled((8192,), np.uint8, generator)
    expected = memory.copy()
    expected[tuple(index[inside] for index in indices)] = image.view(tensor.dtype)[addresses // tensor.itemsize][inside]
    machine("tma_store", memory, image, box, False)
    np.testing.assert_array_equal(memory, expected)


@pytest.mark.parametrize("name", ["2d over both ends", "2d negative", "1d before the beginning", "4d"])
def test_what_a_tma_reduction_adds(machine, name):
    generator = np.random.default_rng(4)
    memory, tensor, box, addresses, indices, inside = tma_case(name, 64, 1024, generator)
    image = zeros((8192,), np.uint8)
    there, added = (generator.integers(-50, 50, shape) for shape in (memory.shape, (8192 // tensor.itemsize,)))
    type_name = BOXES[name][0]
    memory[:], image.view(tensor.dtype)[:] = bits(there, type_name), bits(added, type_name)
    there[tuple(index[inside] for index in indices)] += added[addresses // tensor.itemsize][inside]
    machine("tma_store", memory, image, box, True)
    np.testing.assert_array_equal(memory, bits(there, type_name))


def bits(values, type_name):
    """Whole numbers in the type's own bits."""
    if type_name.startswith("u"):
        return values.astype(f"i{TYPES[type_name][1]}").view(f"u{TYPES[type_name][1]}")
    if type_name == "bf16":  # exact: few bits
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(type_name.replace("f16", "float16").replace("f32", "float32")).view(f"u{TYPES[type_name][1]}")


@pytest.mark.parametrize(
    ("blocks", "source", "mask"), [(2, 0, 0b11), (2, 1, 0b01), (2, 0, 0b10), (4, 2, 0b1010), (8, 7, 0xFF)]
)
def test_multicast_reaches_the_blocks_of_its_mask(machine, blocks, source, mask):
    generator = np.random.default_rng(5)
    memory, tensor, box, addresses, indices, inside = tma_case("2d negative", 128, 2048, generator)
    images = filled((blocks, 8192), np.uint8, generator)
    expected = images.copy()
    for block in range(blocks):
        if mask >> block & 1:
            expected[block].view(np.uint16)[addresses // 2] = np.where(inside, tensor[indices], 0)
    machine("tma_multicast", memory, images, box, blocks, source, mask)
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize("blocks", [2, 3, 8])
def test_a_ring_of_blocks_writes_and_arrives_next_door(machine, blocks):
    received, tested = zeros((blocks, 32), np.uint32), zeros((blocks, 2), np.uint32)
    machine("cluster_ring", received, tested, blocks)
    rank, lane = np.indices((blocks, 32))
    np.testing.assert_array_equal(received, (rank - 1) % blocks * 100 + lane)
    np.testing.assert_array_equal(tested, [[0, 1]] * blocks)  # a fresh barrier: the phase before it has completed


# ---- one warp


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(machine, count, transpose):
    generator = np.random.default_rng(6)
    image, registers = filled((4096,), np.uint8, generator), zeros((32, count), np.uint32)
    offsets = zeros((32,), np.uint32)
    offsets[: 8 * count] = generator.permutation(256)[: 8 * count] * 16  # of the other lanes, no address is read
    rows = image.view(np.uint16)[(offsets[:, None] // 2 + np.arange(8))[: 8 * count]].reshape(count, 8, 8)
    row, column = layouts.matrix_fragment(transpose)
    machine("ldmatrix", image, offsets, registers, count, transpose)
    np.testing.assert_array_equal(registers.view(np.uint16).reshape(32, count, 2), rows[:, row, column].swapaxes(0, 1))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_stmatrix(machine, count, transpose):
    generator = np.random.default_rng(7)
    image, registers = filled((4096,), np.uint8, generator), filled((32, count), np.uint32, generator)
    offsets = zeros((32,), np.uint32)
    offsets[: 8 * count] = generator.permutation(256)[: 8 * count] * 16
    expected = image.copy()
    row, column = layouts.matrix_fragment(transpose)
    for matrix in range(count):
        place = offsets[8 * matrix : 8 * matrix + 8][row] // 2 + column
        expected.view(np.uint16)[place] = registers.view(np.uint16).reshape(32, count, 2)[:, matrix]
    machine("stmatrix", image, offsets, registers, count, transpose)
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("type_name", ["bf16", "f16"])
def test_mma_m16n8k16(machine, type_name):
    generator = np.random.default_rng(8)
    a, b, c = (generator.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    d = zeros((32, 4), np.float32)
    a_registers = bits(a[layouts.mma_a_fragment()], type_name)
    b_registers = bits(b[layouts.mma_b_fragment()], type_name)
    machine("mma", a_registers, b_registers, c[layouts.mma_c_fragment()].astype(np.float32), d, type_name == "f16")
    np.testing.assert_array_equal(d, (a @ b + c)[layouts.mma_c_fragment()])


# ---- one warpgroup

BOTH_ORDERS = list(itertools.product([False, True], repeat=2))


def place(image, matrix, offset, swizzle, mn_major, type_name, spread=False):
    """Writes a matrix (rows, K) into the image as wgmma wants it; the operand for the module, and its descriptor."""
    rows, depth = matrix.shape
    wide = (swizzle or 16) // 2
    whole = -(-rows // wide) * wide if mn_major else rows
    descriptor, steps = layouts.dense_descriptor(whole, depth, swizzle, mn_major, offset)
    if spread:  # gaps of one atom and more
        assert depth == 16
        wider = {"leading": descriptor.leading * 2 + 1024, "stride": descriptor.stride * 2}
        descriptor = dataclasses.replace(descriptor, **wider)
    for i, step in enumerate(steps):
        there = dataclasses.replace(descriptor, start=offset + step)
        addresses = layouts.operand_addresses(there, rows, mn_major)
        assert (image.view(np.uint16)[addresses // 2] == NAN).all(), "the reference's tiles overlap"
        image.view(np.uint16)[addresses // 2] = bits(matrix[:, 16 * i : 16 * i + 16], type_name)
    fields = {name: getattr(descriptor, name) for name in ("leading", "stride")}
    return {"offset": offset, **fields, "mn_major": mn_major, "steps": steps}, descriptor


def multiply(
    machine, n, depth, swizzle, a_mn, b_mn, *, type_name="bf16", from_registers=False, accumulate=False, spread=False
):
    generator = np.random.default_rng(n + depth)
    a, b, c = (generator.integers(-4, 5, shape) for shape in ((64, depth), (n, depth), (64, n)))
    image = zeros((IMAGE,), np.uint8)
    image.view(np.uint16)[:] = NAN
    fragment = layouts.accumulator_fragment(n)
    d, descriptors = zeros((128, n // 2), np.float32), zeros((3,), np.uint64)
    d[:] = c[fragment] if accumulate else np.nan
    operand_a, descriptor_a = place(image, a, 0, swizzle, a_mn, type_name, spread)
    operand_b, descriptor_b = place(image, b, 16384, swizzle, b_mn, type_name, spread)
    if from_registers:
        row, column = layouts.a_register_fragment()
        operand_a = bits(np.stack([a[row, column + k] for k in range(0, depth, 16)]), type_name)
    arguments = (image, operand_a, operand_b, d, descriptors, n, type_name == "f16", SWIZZLE[swizzle], accumulate)
    machine("wgmma", *arguments)
    np.testing.assert_array_equal(d, (a @ b.T + (c if accumulate else 0))[fragment])
    if not from_registers:
        base = int(descriptors[0])
        assert base % 1024 == 0
        wanted = [dataclasses.replace(x, start=base + x.start).encode() for x in (descriptor_a, descriptor_b)]
        assert [int(bits) for bits in descriptors[1:]] == wanted


@pytest.mark.parametrize("n", [8, 24, 64, 128, 256])
@pytest.mark.parametrize("swizzle", layouts.SWIZZLES)
@pytest.mark.parametrize(("a_mn", "b_mn"), BOTH_ORDERS)
def test_wgmma_finds_both_operands(machine, n, swizzle, a_mn, b_mn):
    multiply(machine, n, 64, swizzle, a_mn, b_mn)


@pytest.mark.parametrize("swizzle", layouts.SWIZZLES)
@pytest.mark.parametrize(("a_mn", "b_mn"), BOTH_ORDERS)
def test_wgmma_with_gaps_between_atoms(machine, swizzle, a_mn, b_mn):
    multiply(machine, 64, 16, swizzle, a_mn, b_mn, spread=True, accumulate=True)


@pytest.mark.parametrize(("a_mn", "b_mn"), BOTH_ORDERS)
def test_wgmma_in_f16(machine, a_mn, b_mn):
    multiply(machine, 64, 128, 128, a_mn, b_mn, type_name="f16")


@pytest.mark.parametrize("n", [8, 24, 64, 128, 256])
@pytest.mark.parametrize("b_mn", [False, True])
def test_wgmma_with_a_from_registers(machine, n, b_mn):
    multiply(machine, n, 48, 32, False, b_mn, from_registers=True, accumulate=n == 24)


@pytest.mark.parametrize("b_mn", [False, True])
def test_wgmma_with_a_from_registers_in_f16(machine, b_mn):
    multiply(machine, 64, 64, 128, False, b_mn, type_name="f16", from_registers=True)


@pytest.mark.gpu
def test_model_and_hardware_round_alike_enough():
    """Where sums are rounded the two may differ: the hardware cuts bits off inside a product, the model does not."""
    real, generator = hopper(), np.random.default_rng(9)
    a, b, c = ((generator.standard_normal(shape)).astype(np.float32) for shape in ((32, 8), (32, 4), (32, 4)))
    a, b = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
    results = [zeros((32, 4), np.float32) for _ in range(2)]
    for machine, d in zip((model(), real), results, strict=True):
        machine("mma", a, b, c, d, False)
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)
