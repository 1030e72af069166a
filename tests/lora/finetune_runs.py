"""A tiny base, a tiny data set and the pieces of a fine-tuning run, for the tests of lora/finetune.py and its parts."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from common.dist import World
from lora.finetune_config import FinetuneConfig
from lora.finetuner import Finetuner
from lora.methods import prepare
from lora.task import Task, load_task
from minigpt.checkpoint import TOKENIZER, save_checkpoint
from minigpt.model import GPT
from minigpt.sample import Source
from minigpt.tokenizer import Tokenizer
from parallel.comm import Comm, make_comm
from parallel.mesh import Layout, Mesh
from tests.minigpt.models import random_gpt

BYTES = Tokenizer.bytes_only()
TINY = dict(vocab_size=264, context=40, layers=2, width=16, heads=2, kv_heads=1, mlp_width=24, value_embeddings=True)
WORDS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown", "gold", "teal", "rust", "sand")


def lines(count: int = 40) -> list[dict]:
    """Prompts and answers of several lengths; every prompt is another one."""
    rows = [(f"{WORDS[i % 12]} {i}", f"{WORDS[i % 12][: 1 + i % 4]}!") for i in range(count)]
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_base(folder: Path) -> Path:
    """A run folder like that of minigpt.train, with a GPT of random weights."""
    model = random_gpt(spread=0.15, **TINY).float()
    save_checkpoint(folder, 1, {"model_config": asdict(model.config)}, {"model": model.state_dict()}, 1)
    BYTES.save(folder / TOKENIZER)
    return folder


def tiny_config(folder: Path, **changes) -> FinetuneConfig:
    """Of a run in `folder`, whose base and data are made where they lack."""
    base, data = folder / "base_run", folder / "data.jsonl"
    if not base.exists():
        write_base(base)
        write_lines(data, lines())
    config = FinetuneConfig(
        folder=folder / "run", folder_of_base=base, data=data, held_out_share=0.3, rank=4, alpha=8.0, batch=3, steps=6,
        warmup=2, eval_every=3, checkpoint_every=2, dtype="float32", device="cpu", full_lr=1e-2, adapter_lr=1e-2,
    )  # fmt: skip
    return replace(config, **changes)


def alone() -> World:
    return World(0, 1, 0, torch.device("cpu"), None)


def comm_of(rank: int = 0, ranks: int = 1) -> Comm:
    return make_comm(Mesh(Layout(dp=ranks), rank, ranks).group("dp"))


def tiny_source(**changes) -> Source:
    """In float64."""
    return Source(random_gpt(spread=0.15, **TINY | changes), BYTES, (BYTES.separator,))


def tiny_tuner(config: FinetuneConfig, rank: int = 0, ranks: int = 1, source: Source | None = None) -> Finetuner:
    """Of config.method, on a base in float64."""
    source = source or tiny_source()
    task: Task = load_task(config, source)
    dtype = next(source.model.parameters()).dtype
    prepare(source.model.float() if config.method == "qlora" else source.model, config.method, config)
    source.model.to(dtype)  # weights of float64 cannot be quantised, but what is left of the model goes back
    return Finetuner(config, config.method, source.model, task, comm_of(rank, ranks), config.folder / config.method)


def trained_values(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
