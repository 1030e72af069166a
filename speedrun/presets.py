"""The recipes of the main job, one for each kind of machine, and the choice among them.

Steps are fixed, not timed, so that an interrupted run and an uninterrupted one end in the same place; `cpu` is sized
for less than five minutes of training on two cores, the time of compiling included. `gpu` and `gpus` have not run on a
GPU yet.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from minigpt import bpe_native
from speedrun.config import RaceConfig

CPU = RaceConfig(
    folder=Path("runs/speedrun"), tokenizer="bpe:4096", layers=4, width=192, heads=2, kv_heads=2, mlp="swiglu",
    mlp_width=512, value_embeddings=True, rope_base=100.0, softcap=15.0, context=128, eval_stride=64, batch=16,
    steps=900, warmup=20, optimizer="muon", muon_lr=0.014, embedding_lr=0.1, head_lr=0.01, gain_lr=0.01, beta2=0.99,
    eval_every=100, eval_windows=256, checkpoint_every=100, compile=True,
)  # fmt: skip
GPU = replace(
    CPU, tokenizer="bpe:8192", layers=8, width=512, heads=4, kv_heads=4, mlp_width=1408, rope_base=10_000.0,
    context=1024, eval_stride=512, batch=32, steps=1500, beta2=0.95, checkpoint_every=250,
)  # fmt: skip
PRESETS = {
    "cpu": CPU,
    "cpu-eager": replace(CPU, compile=False, steps=600),
    "gpu": GPU,
    "gpus": replace(GPU, batch=64, steps=1000, clip=0.0),
    "smoke": replace(
        CPU, folder=Path("runs/smoke"), tokenizer="bpe:512", layers=2, width=32, mlp_width=64, context=64, batch=4,
        eval_stride=64, steps=40, warmup=5, eval_every=10, eval_windows=16, checkpoint_every=10, compile=False,
        clip=0.0,
    ),
}  # fmt: skip


def has_compiler() -> bool:
    """Whether torch.compile can make CPU code: its compiler is there, and so are Python's headers, or our own native
    module would not have been built."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return bpe_native.built() and shutil.which(name) is not None


def choose_preset(cuda: bool, several: bool, compiler: bool) -> str:
    """The preset for a machine with or without CUDA and a C++ compiler, in a world of one rank or of several."""
    if not cuda:
        return "cpu" if compiler else "cpu-eager"
    return "gpus" if several else "gpu"
