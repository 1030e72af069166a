"""Block-diagonal adapters in vLLM's packing and back: `python -m lora.vllm_files --source A --target B --to vllm`.

Both keep the N blocks of a block-diagonal factor and no zeros. PEFT stacks them on the rows, A as (r, I/N) and B as
(O, r/N). vLLM stacks them on the side that is not the rank, so B is the same and A is (r/N, I): a rank's shard is then
a run of columns, as of its frozen weight. The packings have the same adapter_config.json, and shapes tell them apart.
Refused: adapters without blocks, factors of any other shape, NaN and infinity, a target that exists.

Shapes: r rank, I inputs, O outputs, N blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common import cli
from lora.config import LoraConfig
from lora.peft_blocks import Blocks
from lora.peft_files import CONFIG, PREFIX, WEIGHTS, config_from_peft, read_config, read_weights, write_adapter

A_END, B_END, BASE_END = ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    source: Path = field(metadata={"help": f"folder with {CONFIG} and {WEIGHTS}"})
    target: Path = field(metadata={"help": "folder to make"})
    to: Literal["vllm", "peft"] = field(metadata={"help": "the packing of the target; the source has the other one"})


def to_vllm(A: Tensor, blocks: int) -> Tensor:
    """(r, I/N) -> (r/N, I). Raises ValueError for a shape that cannot be cut into blocks."""
    return torch.cat(_cut(A, blocks, dim=0), dim=1)


def to_peft(A: Tensor, blocks: int) -> Tensor:
    """(r/N, I) -> (r, I/N), the way back."""
    return torch.cat(_cut(A, blocks, dim=1), dim=0)


def _cut(A: Tensor, blocks: int, dim: int) -> list[Tensor]:
    if A.ndim != 2 or A.shape[dim] % blocks:
        side = ("rows", "columns")[dim]
        raise ValueError(f"A of shape {list(A.shape)} in {blocks} blocks: expected a matrix whose {side} they divide")
    return list(A.chunk(blocks, dim))


def convert_tensors(fields: dict[str, Any], tensors: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    """The tensors of an adapter_model.safetensors in the packing `to`; `fields` are those of adapter_config.json.

    Only block-diagonal A change, the other tensors are the same objects. Raises ValueError with each tensor that is
    missing, not finite or has not the shape of the other packing, and for configs that `load_adapter` would not take.
    """
    if to not in ("vllm", "peft"):
        raise ValueError(f"packing {to!r}: expected 'vllm' or 'peft'")
    config, blocks = config_from_peft(fields), Blocks.read(fields.get("use_bdlora"))
    if blocks.count == 1:
        raise ValueError(f"{CONFIG} has no use_bdlora of several blocks: plain adapters have one packing only")
    from_vllm = to == "peft"
    if faults := [fault for key in tensors for fault in _faults(key, tensors, config, blocks, from_vllm)]:
        raise ValueError(f"{WEIGHTS} in {'vllm' if from_vllm else 'peft'} packing: {'; '.join(sorted(faults))}")
    convert = to_peft if from_vllm else to_vllm
    return {
        key: convert(tensor, blocks.count) if key.endswith(A_END) and blocks.factor(_module(key)) == "A" else tensor
        for key, tensor in tensors.items()
    }


def _module(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(A_END).removesuffix(B_END)


def _faults(key: str, tensors: dict[str, Tensor], config: LoraConfig, blocks: Blocks, from_vllm: bool) -> Iterator[str]:
    """What is wrong with a tensor, as far as one can say without the model: its rank and its blocks are known."""
    if key.endswith(BASE_END):
        return  # PEFT adds the frozen weight of an adapted head
    if not key.startswith(PREFIX) or not key.endswith((A_END, B_END)):
        yield f"{key} is unexpected"
        return
    module, of_A = _module(key), key.endswith(A_END)
    if (other := f"{PREFIX}{module}{B_END if of_A else A_END}") not in tensors:
        yield f"{other} is missing"
    if (factor := blocks.factor(module)) == "AB":
        yield f"{module} has both factors block-diagonal by use_bdlora, expected one"
    if not tensors[key].isfinite().all():
        yield f"{key} holds NaN or infinity"
    short = factor == "A" and from_vllm if of_A else factor == "B"  # packed on the side that is not the rank
    rank, multiple = config.rank_of(module), 1
    if short:
        rank, multiple = rank // blocks.count, blocks.count
    shape, order = list(tensors[key].shape), 1 if of_A else -1  # the rank comes first in A, last in B
    if len(shape) != 2 or shape[::order][0] != rank or shape[::order][1] % multiple:
        expected = [str(rank), f"a multiple of {multiple}" if short else "any"][::order]
        yield f"{key} has shape {shape}, expected [{', '.join(expected)}]"


def convert_folder(config: ConvertConfig) -> None:
    """Writes both files of the adapter, adapter_config.json as it is; nothing is written when anything is wrong."""
    if config.target.exists():
        raise ValueError(f"target {config.target} exists: expected a folder to make")
    fields, tensors = read_config(config.source), read_weights(config.source)
    try:
        converted = convert_tensors(fields, tensors, config.to)
    except ValueError as error:
        raise ValueError(f"{config.source}: {error}") from None
    write_adapter(config.target, (config.source / CONFIG).read_bytes(), converted)


def main() -> None:
    config = cli.parse(ConvertConfig, prog=cli.program(), description="repack a block-diagonal adapter")
    convert_folder(config)
    print(f"{config.target}: in the packing of {config.to}")


if __name__ == "__main__":
    cli.run(main)
