"""What a race is: stage 2's fields, and every trick of the race as a switch with a name.

A switch is a field; off, the run is stage 2's. What changes during a run is a list for equal parts of it ("64,128": the
first half, the second half), read by speedrun/schedule.py. Refused, before any work: numbers out of range, switches
that contradict each other.
"""

import math
from dataclasses import dataclass
from typing import Literal

from minigpt.train_config import TrainConfig, option
from speedrun.tracks import check_track


@dataclass(frozen=True, slots=True)
class RaceConfig(TrainConfig):
    track: str = option("", "what is raced for: laptop, one-gpu or fineweb, see speedrun/tracks.py; empty for none")
    # the model
    zero_init: bool = option(True, "projections back into the stream and the head begin at zero")
    value_gate: bool = option(False, "value embeddings are scaled by the token, head by head")
    value_tables: int = option(0, "tables that the first and last layers share, 012..012; 0: every second has its own")
    without_attention: str = option("", "layers that are an MLP alone, '7'")
    attention_gate: bool = option(False, "what a head returns is scaled by the token")
    x0_skip: bool = option(False, "each block sees the embedding again, by a learned weight")
    unet_skips: bool = option(False, "the second half of the blocks sees what left the first, by learned weights")
    backout: bool = option(False, "the head sees less of the middle of the model, by a learned weight")
    smear: bool = option(False, "each token carries some of the one before")
    bigrams: int = option(0, "rows of a table of embeddings for pairs of tokens; 0 for none")
    untie_at: float = option(0.0, "share of the run after which a tied head gets its own weights; 0 for never")
    # the run
    minutes: float = option(0.0, "minutes on the clock that --steps is fitted to, by a rehearsal; 0: not at all")
    batches: str = option("", "windows in a step, for equal parts of the run: '8,16'; empty for --batch throughout")
    batch_lr: float = option(0.5, "rates grow with this power of the batch")
    contexts: str = option("", "tokens in a window, for equal parts of the run; a step keeps its number of tokens")
    windows: str = option("", "tokens that a sliding layer sees, for equal parts of the run; empty for --window")
    yarn: bool = option(False, "rotary speeds are stretched when the window grows")
    documents: bool = option(False, "rows are packed from documents, which begin anew in them and see no other")
    mtp: str = option("", "weights of the next tokens' losses at first, '1,0.5,0.25'; empty: the next one alone")
    mtp_until: float = option(0.5, "share of the run in which the weights after the first fall to 0")
    # the optimizer
    momentum_start: float = option(0.0, "of Muon in the first step, from where it rises to --momentum; 0: no warmup")
    momentum_warmup: int = option(300, "steps of that rise")
    normuon: float = option(0.0, "memory of Muon's mean squares by row; 0 for none")
    muon_decay: float = option(0.0, "decay of the matrices under Muon, times the rate")
    cautious: bool = option(True, "only weights that the update shrinks decay too")
    overlap: bool = option(True, "gradients are averaged over ranks while other gradients are still worked on")
    # the machine
    attention: Literal["auto", "torch", "cuda", "triton"] = option(
        "auto", "whose attention; auto: the fastest measured"
    )
    kernels: Literal["auto", "torch", "cuda", "triton"] = option("auto", "whose products, norms, embeddings, AdamW ...")
    measured: str = option("results", "folder of the benchmarks' results, by which auto chooses")
    fused_loss: bool = option(False, "head and loss in one operation that never has all logits; by our kernels")
    fp8_head: bool = option(False, "the head multiplies in 8 bits; by our kernels")
    fp8_mlp: bool = option(False, "the MLPs multiply in 8 bits; by our kernels")
    bf16_weights: bool = option(False, "matrices are bfloat16 with their lower halves beside them")
    prefetch: bool = option(True, "batches are made by a thread, ahead of their step")
    cuda_graphs: bool = option(False, "torch.compile replays a recorded graph of launches")

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        check_track(self.track, self.corpus, self.tokenizer, self.device)
        for name in ("untie_at", "mtp_until"):
            if not (0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 1")
        for name in ("normuon", "momentum_start"):
            if not (0 <= getattr(self, name) < 1):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to less than 1")
        for name in ("muon_decay", "batch_lr", "minutes"):
            if not (0 <= getattr(self, name) < math.inf):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or a positive number")
        if self.momentum_warmup < 1:
            raise ValueError(f"momentum_warmup {self.momentum_warmup}: expected at least 1")
        for name in ("batches", "contexts", "windows"):
            if wrong := [n for n in numbers(getattr(self, name)) if n < 1 or n != int(n)]:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected whole numbers of at least 1, got {wrong}")
        self._check_parts()

    def _check_parts(self) -> None:
        """Lists that have to fit to other fields, switches that need another one."""
        weights = numbers(self.mtp)
        if weights and (weights[0] != 1 or not all(0 <= weight <= 1 for weight in weights)):
            raise ValueError(f"mtp {self.mtp!r}: expected 1 and then weights from 0 to 1, like '1,0.5'")
        for context in numbers(self.contexts):
            if context > self.context or self.context % context:
                raise ValueError(f"contexts {self.contexts!r}: expected divisors of the context, {self.context}")
        if self.documents and self.document_mask:
            raise ValueError("documents and document_mask: expected one of them, documents sees to the mask too")
        if self.untie_at and not self.tied:
            raise ValueError(f"untie_at {self.untie_at} with an untied head: expected --tied, or 0")
        windows = numbers(self.windows)
        if self.yarn and not (windows and windows == sorted(windows)):
            raise ValueError(f"yarn with windows {self.windows!r}: expected --windows that grow, like '64,128'")
        if self.yarn and self.positions != "rotary":
            raise ValueError(f"yarn with positions {self.positions}: expected rotary, it stretches what turns")
        if windows and "S" not in self.window_pattern:
            raise ValueError(f"windows with window_pattern {self.window_pattern!r}: expected an S, a layer that slides")
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs without compile: expected both")
        if self.fp8_head and self.tied:
            raise ValueError("fp8_head with a tied head: expected --no-tied, an embedding is not in 8 bits")
        if self.fp8_mlp and self.bias:
            raise ValueError("fp8_mlp with bias: expected --no-bias, these layers have none")
        if self.bf16_weights and self.optimizer != "muon":
            raise ValueError(
                f"bf16_weights with optimizer {self.optimizer}: expected muon, which keeps the lower halves"
            )
        if self.bf16_weights and self.dtype == "float32":
            raise ValueError("bf16_weights with dtype float32: expected bfloat16, products are of one type")
        if self.fp8_head and self.fused_loss:
            raise ValueError("fp8_head and fused_loss: expected one of them, the fused operation has no 8 bits")
        if self.fused_loss and weights[1:]:
            raise ValueError("mtp and fused_loss: expected one of them, the fused loss has one target a token")


def numbers(text: str) -> list[float]:
    """Of "8,16". Raises ValueError for what is no list of finite numbers."""
    try:
        values = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{text!r}: expected numbers with commas between them, like '8,16'")
    return values
