"""How long Triton compiles each operation for a Hopper GPU, and what comes out: `python -m cuda.bench_triton`.

Runs on any machine: nothing is launched, and no speed of a kernel is measured. Results go to results/cuda/. Refused:
nothing; an operation that does not compile is named, the others are measured, and the exit code is 1.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import cli
from common.results import save_result
from cuda.measure import triton_compiled


@dataclass(frozen=True, slots=True)
class BenchConfig:
    operations: str = field(default="all", metadata={"help": "all, or names: matmul,rms_norm"})
    build: Path = field(default=Path("build"), metadata={"help": "where Ninja logged how long nvcc took"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def chosen(self) -> list[triton_compiled.Configuration]:
        found = list(triton_compiled.configurations())
        names = list(dict.fromkeys(one.operation for one in found))
        wanted = names if self.operations == "all" else [name.strip() for name in self.operations.split(",")]
        for name in wanted:
            if name not in names:
                raise ValueError(f"operation {name!r}: expected all, or some of {', '.join(names)}")
        return [one for one in found if one.operation in wanted]


def measure(config: BenchConfig) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and what did not compile."""
    chosen, nvcc = config.chosen(), triton_compiled.nvcc_seconds(config.build)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    warm = False
    for one in chosen:
        try:
            if not warm:  # what is loaded and set up at the first compilation is not counted to it
                triton_compiled.compile_all(one)
                warm = True
            found = triton_compiled.compile_all(one)
        except Exception as error:  # whatever a compiler may raise
            failures.append(f"{one.operation}, {one.what}: {type(error).__name__}: {error}")
            print(f"FAILED: {failures[-1]}", flush=True)
            continue
        if one.source in nvcc:
            found[0] |= {"source": one.source, "nvcc_s": nvcc[one.source]}
        for row in found:
            made = f"{row['registers']:3} registers {row['shared']:6} B shared {row['spills']:3} spills"
            code = f"{row['instructions']:5} instructions {row['hgmma']:3} HGMMA {row['tma_loads']:3} UTMALDG"
            what = f"{row['operation']}, {row['configuration']}"
            print(f"{what:38} {row['kernel']:28} {row['compile_s']:6.2f} s {made} {code}", flush=True)
        print(
            f"{'':38} lines: {found[0]['triton_lines']} Triton, {found[0].get('cuda_lines', 'no')} CUDA C++", flush=True
        )
        rows += found
    return rows, failures


def main() -> int:
    config = cli.parse(BenchConfig, prog=cli.program(), description="what Triton compiles, and how long it takes")
    rows, failures = measure(config)
    settings = {"operations": config.operations, "capability": 90, "failed": failures}
    if rows:
        print(save_result("cuda", "triton_compile", rows, config=settings, device="cpu", root=config.out))
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    cli.run(main)
