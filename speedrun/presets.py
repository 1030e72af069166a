"""The recipes of the main job, by track, and the choice among them.

Steps are fixed, not timed, so that an interrupted run and an uninterrupted one end in the same place. `accumulate` of a
recipe is for one rank; more ranks share the same batch and so take that much fewer parts. Of every track there are two
baselines in its own size, text and tokens: `nanogpt` and `record21`. Recipes for GPUs have not run on one yet.
"""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minigpt import bpe_native
from minigpt.train import configured
from speedrun.config import RaceConfig
from speedrun.tracks import TRACKS, is_on

LAPTOP = RaceConfig(
    track="laptop", device="cpu", folder=Path("runs/speedrun"), tokenizer="bpe:4096", layers=4, width=192, heads=2,
    kv_heads=2, mlp="swiglu", mlp_width=512, value_embeddings=True, bigrams=32_768, rope_base=100.0, softcap=15.0,
    context=128, eval_stride=64, batch=16, steps=1350, warmup=20, cooldown=0.4, optimizer="muon", muon_lr=0.03,
    embedding_lr=0.1, head_lr=0.01, gain_lr=0.01, beta2=0.99, eval_every=100, eval_windows=256, checkpoint_every=200,
    compile=True,
)  # fmt: skip

# Of the recipe before it, for shorter runs.
GENTLE = {"muon_lr": 0.014, "cooldown": 0.6}

# The record's optimizer: NorMuon with cautious decay, momentum that warms up, Adam that forgets faster.
FORGETFUL = {
    "muon_lr": 0.023, "normuon": 0.9, "muon_decay": 0.028, "cautious": True, "momentum_start": 0.85,
    "momentum_warmup": 300, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "head_lr": 0.008, "cooldown": 0.6, "clip": 0.0,
}  # fmt: skip
ONE_GPU = replace(
    LAPTOP, **FORGETFUL, track="one-gpu", device="auto", folder=Path("runs/one-gpu"), corpus="python",
    tokenizer="bpe:16384", layers=8, width=768, heads=6, kv_heads=6, mlp="relu2", mlp_width=3072, value_gate=True,
    attention_gate=True, x0_skip=True, backout=True, smear=True, bigrams=0, rope_base=1024.0, context=1024,
    eval_stride=512, batch=64, accumulate=1, steps=1500, floor=0.1, eval_every=250, checkpoint_every=500,
    attention="auto", kernels="auto",
)  # fmt: skip
# What changes on the way changes at two steps, so that three programs are compiled and no more.
FINEWEB = replace(
    ONE_GPU, track="fineweb", folder=Path("runs/fineweb"), corpus="fineweb10B:5", tokenizer="auto", layers=12,
    bigrams=251_520, tied=True, untie_at=2 / 3, context=2048, contexts="1024,2048,2048", eval_stride=1024, batch=64,
    batches="64,128,192", accumulate=16, windows="128,384,768", window_pattern="SSSL", yarn=True, mtp="1,0.5,0.25",
    mtp_until=2 / 3, steps=1500, floor=0.15, documents=True,
)  # fmt: skip

# What nanoGPT trains: GPT-2 without biases, AdamW at one rate for everything, a cosine. Small models at its rates for
# small models, from its own character-level example.
NANOGPT = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False, "tied": True, "softcap": 0.0,
    "value_embeddings": False, "value_gate": False, "attention_gate": False, "x0_skip": False, "backout": False,
    "smear": False, "bigrams": 0, "zero_init": False, "documents": False, "untie_at": 0.0, "optimizer": "adamw",
    "embedding_lr": 0.0,
    "head_lr": 0.0, "gain_lr": 0.0, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.1, "embedding_decay": 0.1,
    "cautious": False, "schedule": "cosine", "floor": 0.1, "clip": 1.0, "batches": "", "contexts": "", "windows": "",
    "yarn": False, "mtp": "", "momentum_start": 0.0, "normuon": 0.0, "muon_decay": 0.0, "attention": "torch",
    "kernels": "torch",
}  # fmt: skip
SMALL = {"learning_rate": 1e-3, "beta2": 0.99, "warmup": 100}
LARGE = {"learning_rate": 6e-4, "beta2": 0.95}

# modded-nanogpt's record 21, as far as there are switches: its windows grow in four steps, and its long layers see the
# whole row. Of fewer layers than twelve some have value tables, and none of four is without attention.
RECORD21 = {
    "mlp": "relu2", "value_embeddings": True, "value_gate": False, "attention_gate": False, "x0_skip": True,
    "unet_skips": True, "backout": False, "smear": False, "bigrams": 0, "tied": False, "untie_at": 0.0,
    "rope_base": 1024.0, "softcap": 15.0, "muon_lr": 0.05, "momentum": 0.95, "momentum_start": 0.85, "normuon": 0.0,
    "muon_decay": 0.0, "embedding_lr": 0.6, "head_lr": 0.008, "gain_lr": 0.04, "beta1": 0.8, "beta2": 0.95,
    "eps": 1e-10, "warmup": 0, "cooldown": 0.4, "floor": 0.1, "clip": 0.0, "batches": "", "contexts": "",
    "windows": "", "yarn": False, "mtp": "",
}  # fmt: skip

ON_TRACK = {
    "laptop": {
        "laptop": LAPTOP,
        # One pass over the text, 1,475 steps, and no more: what is read again is remembered, not learned; see LOG.md.
        "laptop-15": replace(
            LAPTOP, folder=Path("runs/laptop-15"), width=256, mlp_width=704, steps=1450
        ),
        "laptop-short": replace(
            LAPTOP, **GENTLE, folder=Path("runs/laptop-short"), tokenizer="bpe:2048", layers=3, width=128,
            mlp_width=384, bigrams=8_192, steps=400, compile=False, clip=0.0,
        ),
        "laptop-eager": replace(LAPTOP, **GENTLE, steps=900, compile=False),
        "nanogpt": replace(LAPTOP, **NANOGPT, **SMALL, folder=Path("runs/nanogpt"), heads=3, kv_heads=3, mlp_width=768),
        "record21": replace(
            LAPTOP, **RECORD21, folder=Path("runs/record21"), value_tables=1, momentum_warmup=150, mlp_width=768
        ),
    },
    "one-gpu": {
        "one-gpu": ONE_GPU,
        "nanogpt": replace(
            ONE_GPU, **NANOGPT, **LARGE, folder=Path("runs/nanogpt-one-gpu"), warmup=100, heads=12, kv_heads=12
        ),
        "record21": replace(
            ONE_GPU, **RECORD21, folder=Path("runs/record21-one-gpu"), value_tables=2, without_attention="4",
            momentum_warmup=250,
        ),
    },
    "fineweb": {
        "fineweb": FINEWEB,
        # As many tokens as llm.c needs with it, the ladder's first record.
        "nanogpt": replace(
            FINEWEB, **NANOGPT, **LARGE, folder=Path("runs/nanogpt-fineweb"), corpus="fineweb10B:103", warmup=700,
            heads=12, kv_heads=12, context=1024, batch=512, accumulate=16, steps=19_560,
        ),
        "record21": replace(
            FINEWEB, **(RECORD21 | {"windows": "128,384,640,896"}), folder=Path("runs/record21-fineweb"),
            value_tables=3, without_attention="7", corpus="fineweb10B:8", batch=192, window_pattern="LSSSLSSLSSSL",
            steps=1770,
        ),
    },
}  # fmt: skip
SMOKE = replace(
    LAPTOP, **GENTLE, track="", device="auto", folder=Path("runs/smoke"), tokenizer="bpe:512", layers=2, width=32,
    mlp_width=64, bigrams=0, context=64, batch=4, eval_stride=64, steps=40, warmup=5, eval_every=10, eval_windows=16,
    checkpoint_every=10, compile=False, clip=0.0,
)  # fmt: skip
BASELINES = ("nanogpt", "record21")  # of every track; where none is named, those of the laptop
PRESETS = ON_TRACK["fineweb"] | ON_TRACK["one-gpu"] | ON_TRACK["laptop"] | {"smoke": SMOKE}
ABOUT = (
    "Train a GPT, and race for what it reaches: python -m speedrun.tracks prints the tracks. Each has a preset of its "
    "name, and the baselines nanogpt and record21; any flag overrides the preset."
)


def from_command_line(argv: Sequence[str] | None = None) -> RaceConfig:
    """The config that the flags describe, by default this process's. Without --preset it is the one for --track and
    for the machine; on torchrun's ranks its parts are shared among them."""
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--track", "--corpus", "--device"):
        early.add_argument(flag, default="", nargs="?", const="")  # what lacks its value, the whole parser refuses
    asked = early.parse_known_args(argv)[0]
    ranks = os.environ.get("WORLD_SIZE", "1")  # common.dist checks it
    cuda = asked.device != "cpu" and torch.cuda.is_available()
    default = choose_preset(asked.track, cuda, has_compiler())
    ranks = int(ranks) if ranks.isdecimal() and int(ranks) else 1
    chosen = presets(asked.track, ranks, asked.corpus, home=PRESETS[default].track)
    return configured(argv, presets=chosen, default_preset=default, description=ABOUT)


def presets(track: str = "", ranks: int = 1, corpus: str = "", home: str = "laptop") -> dict[str, RaceConfig]:
    """Those of a track, "" for all with the baselines of `home`, on so many ranks. With another corpus than its track's
    a preset is on none, unless a track was asked for."""
    chosen = ON_TRACK.get(track, PRESETS | {name: ON_TRACK[home][name] for name in BASELINES})
    if corpus and not track:
        chosen = {
            name: preset if not preset.track or is_on(TRACKS[preset.track], corpus) else replace(preset, track="")
            for name, preset in chosen.items()
        }
    return {name: over(preset, ranks) for name, preset in chosen.items()}


def over(preset: RaceConfig, ranks: int) -> RaceConfig:
    """The same batch on so many ranks: together they take as many parts as one would, where that is possible."""
    return replace(preset, accumulate=preset.accumulate // math.gcd(preset.accumulate, ranks))


def has_compiler() -> bool:
    """Whether torch.compile can make CPU code: its compiler is there, and so are Python's headers, or our own native
    module would not have been built."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return bpe_native.built() and shutil.which(name) is not None


def choose_preset(track: str, cuda: bool, compiler: bool) -> str:
    """The preset for a track, where "" is the one for a machine with or without CUDA; without CUDA a C++ compiler
    matters."""
    if track in ("one-gpu", "fineweb"):
        return track
    if cuda and not track:
        return "one-gpu"
    return "laptop" if compiler else "laptop-eager"
