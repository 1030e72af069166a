"""The fastest measured tilings of step 16. `python -m cuda.bench_matmul --tune` writes this on a GPU: nothing yet."""

# (kind, element type, m, n, k): the fields of dispatch.Tiling. A is m x k row-major, B transposed n x k.
MEASURED: dict[tuple[str, str, int, int, int], tuple[int, ...]] = {}
