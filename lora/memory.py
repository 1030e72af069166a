"""The memory of full fine-tuning, LoRA and QLoRA: measured beside what lora/budget.py predicts, and predicted for
models of 8B and 70B.

    python -m lora.memory --width 512 --layers 8 --rank 16 --format nf4-double --optimizer paged

Measured are the storages below the tensors, on a CPU and on a GPU alike, while two steps are trained on random tokens;
on a GPU also what torch's allocator handed out. Columns are fields of lora.budget.Bytes; "held" is all that the device
holds between two steps, the gradients among it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, product
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from common import cli
from common.results import save_result
from lora.adamw8bit import AdamW8bit, eight_bit
from lora.budget import Method, Optimizer, predict, skeleton
from lora.config import LoraConfig
from lora.lora import adapter_parameters, add_adapter
from lora.paged import PAGE, block_bytes
from lora.qlora import quantise_base
from lora.quantised import Format
from minigpt.config import GPTConfig
from minigpt.model import GPT
from parallel.memory import LiveBytes


def measure(
    config: GPTConfig, method: Method, optimizer: Optimizer, *, rank: int, rows: int, T: int, page: int = PAGE,
    device: str = "cpu",
) -> dict[str, int]:  # fmt: skip
    """The fields of Bytes, as two steps of training show them, with "peak" in place of "above": kept and what came on
    top. On a GPU besides "allocated" and "most_allocated", what torch's allocator had at the end and at the most."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    model = GPT(config, seed=0)
    if method in get_args(Format):
        quantise_base(model, method)
    if method != "full":
        add_adapter(model, LoraConfig(rank=rank))
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = [] if method == "full" else adapter_parameters(model)
    stepper = _optimizer(trained, optimizer, page)
    kept, peak = _passes(model, stepper, torch.randint(config.vocab_size, (rows, T + 1)).to(device))
    device_states, host_states = _states(stepper)
    found = {
        "weights": _storages([*model.parameters(), *model.buffers()]) - _storages(adapters),
        "adapters": _storages(adapters),
        "gradients": _storages([p.grad for p in trained]),
        "optimizer": _storages(device_states),
        "host": _storages(host_states),
        "kept": kept,
        "peak": peak,
    }
    if cuda:
        found["allocated"] = torch.cuda.memory_allocated(device) - before
        found["most_allocated"] = torch.cuda.max_memory_allocated(device) - before
    return found


def _optimizer(trained: list[nn.Parameter], optimizer: Optimizer, page: int) -> torch.optim.Optimizer:
    if optimizer == "adamw":
        return torch.optim.AdamW(trained, fused=True)
    return AdamW8bit(trained, paged=optimizer == "paged", page=page)


def _passes(model: GPT, optimizer: torch.optim.Optimizer, rows_BT: Tensor) -> tuple[int, int]:
    """Bytes kept between the passes of the second step, and the most there during them, without what was there."""
    inputs_BT, targets_BT = rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous()
    with LiveBytes() as live:
        for _ in range(2):
            loss = optimizer.zero_grad()  # and the last step's loss goes
            before = live.now()
            live.peak = before
            loss = model(inputs_BT, targets_BT)
            kept = live.now() - before
            loss.backward()
            peak = live.peak - before
            optimizer.step()
    return kept, peak


def _states(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors on the device, and those in host memory."""
    state = [(p, name, x) for p, values in optimizer.state.items() for name, x in values.items()]
    if not isinstance(optimizer, AdamW8bit):
        return [x for _, _, x in state], []
    paged = optimizer.paging["paged"]
    host = [x for p, name, x in state if name == "step" or (paged and eight_bit(p))]
    device = [x for p, name, x in state if name != "step" and not (paged and eight_bit(p))]
    for laid_out in chain(*optimizer.laid_out.values()):
        device += [*(laid_out.codes or ()), *(x for slot in laid_out.slots for x in slot.values())]
    return device, host


def _storages(tensors: list[Tensor]) -> int:
    """Bytes of memory below the tensors, each piece once."""
    pieces = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}
    return sum(pieces.values())


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = field(default=0, metadata={"help": "0: as many as heads"})
    mlp: Literal["swiglu", "relu2", "gelu"] = "swiglu"
    mlp_width: int = field(default=0, metadata={"help": "0: four times the width"})
    vocab_size: int = 1024
    tied: bool = False
    context: int = field(default=128, metadata={"help": "tokens of a row"})
    rows: int = field(default=4, metadata={"help": "sequences of one pass"})
    rank: int = 8
    format: Literal["all", "full", "lora", "nf4", "nf4-double", "int8", "int4"] = field(
        default="all", metadata={"help": "of the frozen weights: lora has them whole, full does not freeze them"}
    )
    optimizer: Literal["all", "adamw", "adamw8bit", "paged"] = "all"
    page: int = field(default=PAGE, metadata={"help": "bytes of a page of optimizer states; paged, two are there"})
    device: Literal["cpu", "cuda"] = "cpu"
    large: bool = field(default=True, metadata={"help": "print what models of 8B and 70B would take, too"})
    save: bool = field(default=False, metadata={"help": "write results/lora/memory_<device>_<date>.json"})

    def __post_init__(self) -> None:
        for name in ("rows", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.page < block_bytes(True):
            raise ValueError(f"page {self.page}: expected at least {block_bytes(True)} bytes")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: expected a machine with a GPU")
        self.model()  # checks the rest

    def model(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=self.vocab_size, context=self.context, layers=self.layers, width=self.width, heads=self.heads,
            kv_heads=self.kv_heads or self.heads, mlp=self.mlp, mlp_width=self.mlp_width or 4 * self.width,
            tied=self.tied,
        )  # fmt: skip


def rows(config: MemoryConfig) -> Iterator[dict]:
    """Predicted and measured, one row for each method and optimizer."""
    model, shape = skeleton(config.model()), {"rank": config.rank, "rows": config.rows, "T": config.context}
    methods = get_args(Method) if config.format == "all" else (config.format,)
    optimizers = get_args(Optimizer) if config.optimizer == "all" else (config.optimizer,)
    for method, optimizer in product(methods, optimizers):
        cuda = config.device == "cuda"
        predicted = predict(model, method, optimizer, **shape, page=config.page, fused=cuda)
        measured = measure(config.model(), method, optimizer, **shape, page=config.page, device=config.device)
        yield {"method": method, "optimizer": optimizer, "predicted": asdict(predicted), "measured": measured}


SHAPES = {  # of Llama 3, Dubey et al. 2024, table 3
    "8B": GPTConfig(
        vocab_size=128_256, context=8192, layers=32, width=4096, heads=32, kv_heads=8, mlp="swiglu", mlp_width=14_336,
        qk_norm=False, softcap=0.0,
    ),
    "70B": GPTConfig(
        vocab_size=128_256, context=8192, layers=80, width=8192, heads=64, kv_heads=8, mlp="swiglu", mlp_width=28_672,
        qk_norm=False, softcap=0.0,
    ),
}  # fmt: skip


def large_rows(rank: int, page: int = PAGE) -> Iterator[dict]:
    """Predicted alone, without activations; frozen weights that are not quantised have 2 bytes."""
    for name, config in SHAPES.items():
        model = skeleton(config)
        for method, optimizer in product(get_args(Method), get_args(Optimizer)):
            predicted = predict(model, method, optimizer, rank=rank, rows=1, T=1, page=page, number=2)
            values = {key: value for key, value in asdict(predicted).items() if key not in ("kept", "above")}
            yield {"shape": name, "method": method, "optimizer": optimizer, "predicted": values}


HELD = ("weights", "adapters", "gradients", "optimizer")
EQUAL = (*HELD, "host", "kept")


def verdict(row: dict) -> str:
    """ "equal" where every predicted number was measured, else those that were not; then where the peak lay."""
    predicted, measured = row["predicted"], row["measured"]
    wrong = [f"{name} {measured[name]:,} bytes" for name in EQUAL if measured[name] != predicted[name]]
    above = measured["peak"] - predicted["kept"]
    inside = "within" if 0 <= above <= predicted["above"] else "OUTSIDE"
    peak = f"peak {above / 2**20:.2f} above, {inside} {predicted['above'] / 2**20:.2f}"
    handed_out = f"; torch handed out {measured['most_allocated'] / 2**20:.2f}" if "most_allocated" in measured else ""
    return f"{', '.join(wrong) or 'equal'}; {peak}{handed_out}"


def flat(row: dict) -> dict:
    """For a file of results: predictions as ..._bytes, what was measured as measured_..._bytes, and what a run holds
    between steps in MiB and GiB too."""
    predicted, measured = row["predicted"], row.get("measured", {})
    held = sum(predicted[name] for name in HELD)
    return {
        **{"shape": row.get("shape", "measured"), "method": row["method"], "optimizer": row["optimizer"]},
        **{f"{name}_bytes": value for name, value in predicted.items()},
        **{f"measured_{name}_bytes": value for name, value in measured.items()},
        **{"held_mib": held / 2**20, "held_gib": held / 2**30, "kept_mib": predicted.get("kept", 0) / 2**20},
        **({"measured_held_mib": sum(measured[name] for name in HELD) / 2**20} if measured else {}),
    }


def _line(row: dict, names: tuple[str, ...], unit: int) -> str:
    predicted = row["predicted"] | {"held": sum(row["predicted"][name] for name in HELD)}
    cells = "".join(f"{predicted[name] / unit:>12,.3f}" for name in names)
    return f"{row.get('shape', ''):<5}{row['method']:<11}{row['optimizer']:<10}{cells}"


def _head(names: tuple[str, ...], unit: str) -> str:
    return f"{'':<5}{'method':<11}{'optimizer':<10}" + "".join(f"{name:>12}" for name in names) + f"   {unit}"


def main() -> None:
    config = cli.parse(MemoryConfig, prog="python -m lora.memory", description="Memory of fine-tuning.")
    names, found = (*HELD, "held", "host"), []
    print(_head((*names, "kept"), "MiB; measured: the same or what differs; peak above kept, and its bound"))
    for row in rows(config):
        found.append(row)
        print(f"{_line(row, (*names, 'kept'), 2**20)}   {verdict(row)}", flush=True)
    if config.large:
        print("\npredicted, no such tensor was made; frozen weights that are not quantised have 2 bytes")
        print(_head(names, "GiB"))
        for row in large_rows(config.rank, config.page):
            found.append(row)
            print(_line(row, names, 2**30), flush=True)
    if config.save:
        print(save_result("lora", "memory", [flat(row) for row in found], config=config))


if __name__ == "__main__":
    cli.run(main)
