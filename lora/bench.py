"""How fast adapters train and serve, beside other libraries in the same process: `python -m lora.bench`.

train: a step beside PEFT's (bench_train.py). nf4: products with NF4 weights beside bitsandbytes' (bench_nf4.py).
multi: many adapters in one batch (bench_multi.py). Results go to results/lora/. Refused: timing what does not compute
the same as its peer. Memory of quantised bases has a program of its own: `python -m lora.memory`.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from common import cli
from common.cli import UserError
from common.results import save_result
from lora import bench_multi, bench_nf4, bench_train
from lora.bench_config import BenchConfig, peer_versions

PARTS: dict[str, Callable] = {"train": bench_train.rows, "nf4": bench_nf4.rows, "multi": bench_multi.rows}


def print_row(row: dict[str, Any]) -> None:
    shown = ((key, value) for key, value in row.items() if isinstance(value, str | int | float))
    print("  ".join(f"{key} {value:,.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown),
          flush=True)  # fmt: skip


def main() -> None:
    config = cli.parse(BenchConfig, prog=cli.program(), description="adapters beside PEFT and bitsandbytes")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no CUDA device")
    if config.device == "auto":
        config = replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
    for name, part in PARTS.items():
        if config.what in ("all", name):
            rows = []
            for row in part(config):
                rows.append(row)
                print_row(row)
            settings = asdict(config) | {"peers": peer_versions()}
            print(save_result("lora", name, rows, config=settings, device=config.device, root=config.out))


if __name__ == "__main__":
    cli.run(main)
