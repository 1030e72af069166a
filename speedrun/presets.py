"""The recipes of the main job, one for each kind of machine, and the choice among them.

Steps are fixed, not timed, so that an interrupted run and an uninterrupted one end in the same place; `cpu` is sized
for about four and a half minutes of training on two cores. `gpu` and `gpus` have not run on a GPU yet.
"""

from dataclasses import replace
from pathlib import Path

from minigpt.train_config import TrainConfig

CPU = TrainConfig(
    folder=Path("runs/speedrun"), layers=4, width=192, heads=2, kv_heads=2, mlp="swiglu", mlp_width=512, qk_norm=True,
    softcap=15.0, rope_base=100.0, context=128, eval_stride=64, batch=4, steps=4800, warmup=100, learning_rate=1e-3,
    beta2=0.99, eval_every=200, checkpoint_every=200,
)  # fmt: skip
GPU = replace(
    CPU, layers=8, width=512, heads=4, kv_heads=4, mlp_width=1408, rope_base=10_000.0, context=1024, eval_stride=512,
    batch=32, steps=1500, beta2=0.95, eval_every=100, checkpoint_every=250,
)  # fmt: skip
PRESETS = {
    "cpu": CPU,
    "gpu": GPU,
    "gpus": replace(GPU, batch=64, steps=1000),
    "smoke": replace(
        CPU, folder=Path("runs/smoke"), layers=2, width=32, mlp_width=64, context=64,
        eval_stride=64, steps=40, warmup=5, learning_rate=1e-2, eval_every=10, eval_windows=16, checkpoint_every=10,
    ),
}  # fmt: skip


def choose_preset(cuda: bool, several: bool) -> str:
    """The preset for a machine with or without CUDA, in a world of one rank or of several."""
    if not cuda:
        return "cpu"
    return "gpus" if several else "gpu"
