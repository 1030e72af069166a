"""cuBLAS at its best: the algorithms that cublasLt's heuristics propose for a product, each of which can then be timed.

torch.mm takes the first proposal. Here all of them are to be had, through ctypes and the library that torch has loaded.
For cuBLAS all is column-major: a row-major matrix is its transpose there, and d = a @ b is d' = b' @ a'. a (m, k) and
d (m, n) are row-major, b (k, n) is that or the transpose of such a matrix. Refused: layouts with gaps, several types.
Raises OSError where there is no library, RuntimeError naming the call that failed.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper
MOST = 16  # proposals asked for
COMPUTE_32F, REAL_32F = 68, 0  # cublasComputeType_t, cudaDataType_t
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
DESC_TRANSA, DESC_TRANSB, PREFERENCE_WORKSPACE = 3, 4, 1
Product = Callable[[Tensor, Tensor, Tensor], None]


class Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def library() -> ctypes.CDLL:
    """The one that torch uses; raises OSError naming what was tried."""
    major = (torch.version.cuda or "none").partition(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}")


class CublasLt:
    """`workspace` is an address of WORKSPACE_BYTES on the device; `stream` returns the current stream's."""

    def __init__(self, lib: ctypes.CDLL, workspace: int, stream: Callable[[], int]):
        self.lib, self.workspace, self.stream = lib, workspace, stream
        self.handle = self._make("cublasLtCreate")

    def products(self, a: Tensor, b: Tensor, d: Tensor) -> list[Product]:
        """A function (a, b, d) for each proposal, the heuristics' favourite first; the tensors given stand for all of
        their shape and type."""
        transposed = not b.is_contiguous()
        for name, x in (("a", a), ("b", b.mT if transposed else b), ("d", d)):
            if not x.is_contiguous() or x.dtype != a.dtype:
                raise ValueError(f"{name} is {x.dtype} with strides {x.stride()}: expected {a.dtype} without gaps")
        (m, k), n, kind = a.shape, b.shape[1], TYPES[a.dtype]
        description = self._make("cublasLtMatmulDescCreate", COMPUTE_32F, REAL_32F)
        for attribute, value in ((DESC_TRANSA, int(transposed)), (DESC_TRANSB, 0)):
            self._set("cublasLtMatmulDescSetAttribute", description, attribute, ctypes.c_int32(value))
        sizes = ((k, n) if transposed else (n, k), (k, m), (n, m))  # rows and columns; columns without gaps
        layouts = [
            self._make("cublasLtMatrixLayoutCreate", kind, ctypes.c_uint64(x), ctypes.c_uint64(y), ctypes.c_int64(x))
            for x, y in sizes
        ]
        preference = self._make("cublasLtMatmulPreferenceCreate")
        workspace = ctypes.c_uint64(WORKSPACE_BYTES)
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, PREFERENCE_WORKSPACE, workspace)
        proposals, count = (Proposal * MOST)(), ctypes.c_int()
        left, right, out = layouts
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            *(self.handle, description, left, right, out, out, preference, MOST, proposals, ctypes.byref(count)),
        )
        usable = [proposal for proposal in proposals[: count.value] if proposal.status == 0]
        return [self._product(description, layouts, proposal) for proposal in usable]

    def _product(self, description: ctypes.c_void_p, layouts: list[ctypes.c_void_p], proposal: Proposal) -> Product:
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        left, right, out = layouts

        def product(a: Tensor, b: Tensor, d: Tensor) -> None:
            target = ctypes.c_void_p(d.data_ptr())
            self._call(
                "cublasLtMatmul",
                *(self.handle, description, ctypes.byref(one), ctypes.c_void_p(b.data_ptr()), left),
                *(ctypes.c_void_p(a.data_ptr()), right, ctypes.byref(zero), target, out, target, out),
                *(ctypes.byref(proposal.algorithm), ctypes.c_void_p(self.workspace)),
                *(ctypes.c_size_t(WORKSPACE_BYTES), ctypes.c_void_p(self.stream())),
            )

        return product

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self.lib, name)(*arguments):
            raise RuntimeError(f"{name} returned status {status}")

    def _make(self, name: str, *arguments: object) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *arguments)
        return made

    def _set(self, name: str, on: ctypes.c_void_p, attribute: int, value: object) -> None:
        self._call(name, on, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


def of_current_device() -> CublasLt:
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    found = CublasLt(library(), workspace.data_ptr(), lambda: torch.cuda.current_stream().cuda_stream)
    found.memory = workspace  # it must live as long as its address is used
    return found
