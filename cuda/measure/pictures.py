"""The pictures of the matmul benchmark: the ladder at one size, the ratio to cuBLAS by size, the roofline.

Drawn from the rows of a result. Refused, by leaving the picture out: too few rows to draw it from.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import plots
from cuda import dispatch
from cuda.measure import products
from cuda.measure.products import Shape

Rows = Sequence[Mapping[str, Any]]
RATIOS = 3  # steps, the last ones, whose ratio is drawn


def draw(rows: Rows, folder: Path, *, size: str, bytes_per_s: float | None, device: str) -> list[Path]:
    """The pictures that these rows are enough for."""
    made = [ladder(rows, folder / "matmul_ladder.png", size, device), ratio(rows, folder / "matmul_ratio.png", device)]
    made.append(roofline(rows, folder / "matmul_roofline.png", bytes_per_s, device))
    return [path for path in made if path is not None]


def ladder(rows: Rows, path: Path, size: str, device: str) -> Path | None:
    """TFLOP/s of each step at one size, lines where cuBLAS and ours in Triton are."""
    burst = [row for row in rows if row["size"] == size and row["regime"] == "burst"]
    ours = sorted((row for row in burst if row["step"] in dispatch.STEPS), key=lambda row: row["step"][-2:])
    if not ours:
        return None
    peers: dict[str, float] = {}
    for row in burst:
        if row["step"] not in dispatch.STEPS:
            who = "Triton" if row["step"] == products.TRITON else "cuBLAS"
            label = f"{who} {'bf16' if row['dtype'] == 'bfloat16' else 'fp32'}"
            peers[label] = max(peers.get(label, 0.0), row["tflops"])
    labels = [f"{row['step'][-2:]} {row['step'][:-3].replace('_', ' ')}" for row in ours]
    title = f"Matrix product of size {size} on {device}: 01-07 in fp32, 08-16 in bf16"
    speeds = {"ours": [row["tflops"] for row in ours]}
    return plots.bars(path, labels, speeds, xlabel="TFLOP/s", title=title, log_x=True, reference=peers)


def ratio(rows: Rows, path: Path, device: str) -> Path | None:
    """Speed over that of the fastest cuBLAS by size, of the last steps of the ladder and of ours in Triton."""
    square = [row for row in rows if row["m"] == row["n"] == row["k"] and row["dtype"] == "bfloat16"]
    series = {}
    for regime in ("burst", "sustained"):
        for step in (*dispatch.STEPS[-RATIOS:], products.TRITON):
            points = sorted(
                (row["m"], row["of_cublas"])
                for row in square
                if row["step"] == step and row["regime"] == regime and "of_cublas" in row
            )
            if points:
                series[f"{step}, {regime}"] = tuple(zip(*points, strict=True))
    if not series:
        return None
    text = {"xlabel": "size", "ylabel": "speed / cuBLAS", "title": f"bf16 products on {device}"}
    return plots.curve(path, series, **text, log_x=True, reference={"cuBLAS": 1.0})


def roofline(rows: Rows, path: Path, bytes_per_s: float | None, device: str) -> Path | None:
    """TFLOP/s over FLOPs for a byte of memory that must be moved, under what memory and tensor cores allow."""
    bf16 = [row for row in rows if row["dtype"] == "bfloat16" and row["regime"] == "burst"]
    last = [row for row in bf16 if row["step"] == dispatch.STEPS[-1]]
    if bytes_per_s is None or not last:
        return None
    dtype = products.dtype_of(dispatch.STEPS[-1])
    peak = products.PEAK[dtype]

    def intensity(row: Mapping[str, Any]) -> float:
        shape = Shape(row["m"], row["n"], row["k"])
        return shape.flops / shape.bytes(dtype)

    places = [min(map(intensity, last)) / 4, peak / bytes_per_s, max(max(map(intensity, last)), peak / bytes_per_s) * 2]
    roof = [min(peak, place * bytes_per_s) / 1e12 for place in places]
    plain = [row for row in bf16 if row["step"] == "cuBLAS"]
    triton = [row for row in bf16 if row["step"] == products.TRITON]
    points = {
        name: ([intensity(row) for row in some], [row["tflops"] for row in some])
        for name, some in (("step 16", last), ("Triton", triton), ("cuBLAS", plain))
        if some
    }
    text = {"xlabel": "FLOP a byte of memory", "ylabel": "TFLOP/s", "title": f"bf16 products on {device}"}
    return plots.curve(path, {"copy speed, peak": (places, roof)}, **text, log_x=True, log_y=True, points=points)
