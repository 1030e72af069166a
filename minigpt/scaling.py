"""Scaling laws, small but real: `python -m minigpt.scaling`.

Trains a handful of tiny models on several amounts of text, fits L(N, D) = E + A / N^a + B / D^b to what they reach on
held-out text, predicts one size larger, and only then trains that one. N counts all parameters, D the training tokens,
L is bits per byte. Runs that are finished are not repeated. Refused: fewer than two sizes or amounts.

The form and the fit (Huber loss of the logarithms, many starts) are those of Hoffmann et al. 2022, section 3.3.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import cli, plots
from common.log import atomic_write
from common.results import save_result
from minigpt.checkpoint import checkpoint_folders, differing
from minigpt.train import train
from minigpt.train_config import TrainConfig, deciding, plain

HUBER = 1e-3
FEWEST = 6  # points that five parameters are fitted to
HEAD_WIDTH = 16


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    corpus: str = field(default="stdlib", metadata={"help": "text, as of minigpt.train"})
    tokenizer: str = field(default="bpe:1024", metadata={"help": "tokenizer, as of minigpt.train"})
    widths: str = field(default="32,48,64,96", metadata={"help": "sizes that the law is fitted to, multiples of 16"})
    larger: int = field(default=128, metadata={"help": "the size that is predicted, then trained"})
    steps: str = field(default="100,200,400,800", metadata={"help": "amounts of text, in steps of 1,024 tokens"})
    layers: int = field(default=4, metadata={"help": "transformer blocks of every size"})
    folder: Path = field(default=Path("runs/scaling"), metadata={"help": "where the runs are kept"})
    out: Path = field(default=Path("results"), metadata={"help": "where results are kept"})

    def __post_init__(self) -> None:
        widths, steps = (numbers(name, getattr(self, name)) for name in ("widths", "steps"))
        for width in (*widths, self.larger):
            if width < HEAD_WIDTH or width % HEAD_WIDTH:
                raise ValueError(f"width {width}: expected a multiple of {HEAD_WIDTH}")
        if self.larger <= max(widths):
            raise ValueError(f"larger {self.larger}: expected more than the widths, {self.widths}")
        if len(widths) * len(steps) < FEWEST:
            raise ValueError(f"{len(widths)} widths and {len(steps)} steps: expected at least {FEWEST} pairs of them")

    def training(self, width: int, steps: int) -> TrainConfig:
        return TrainConfig(
            folder=self.folder / f"width{width}_steps{steps}", corpus=self.corpus, tokenizer=self.tokenizer,
            layers=self.layers, width=width, heads=width // HEAD_WIDTH, kv_heads=width // HEAD_WIDTH, mlp="relu2",
            mlp_width=4 * width, value_embeddings=False, context=64, eval_stride=64, batch=16, steps=steps, warmup=10,
            muon_lr=0.02, embedding_lr=0.03, head_lr=0.005, gain_lr=0.001, eval_every=steps, checkpoint_every=steps,
            keep=1,
        )  # fmt: skip


def numbers(name: str, text: str) -> list[int]:
    """Raises ValueError unless `text` is two or more different positive whole numbers, with commas between."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts) or not 2 <= len(set(map(int, parts))) == len(parts):
        raise ValueError(f"{name} {text!r}: expected at least two different numbers, such as '32,64'")
    return sorted(map(int, parts))


class Law(NamedTuple):
    """L(N, D) = E + A / N^a + B / D^b."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def __call__(self, N, D):
        return self.E + self.A / np.asarray(N, float) ** self.a + self.B / np.asarray(D, float) ** self.b


def fit(N: Sequence[float], D: Sequence[float], L: Sequence[float]) -> Law:
    """The law nearest to the points in log L. Raises ValueError for fewer than six points: it has five parameters."""
    from scipy.optimize import least_squares

    if not (len(N) == len(D) == len(L) >= FEWEST):
        raise ValueError(f"{len(N)}, {len(D)}, {len(L)} values of N, D, L: expected as many of each, at least {FEWEST}")
    log_N, log_D, log_L = (np.log(np.asarray(values, float)) for values in (N, D, L))

    def residuals(p):
        terms = np.stack([np.full_like(log_N, p[0]), p[1] - p[2] * log_N, p[3] - p[4] * log_D])
        return np.logaddexp.reduce(terms, axis=0) - log_L

    limits = ([-10, -10, 0, -10, 0], [log_L.min(), 30, 2, 30, 2])  # logarithms of E, A, B; exponents from 0 to 2
    starts = product((-3.0, log_L.min() - 0.3), (0.0, 4.0), (0.2, 0.6), (0.0, 4.0), (0.2, 0.6))
    tries = [least_squares(residuals, p, bounds=limits, loss="huber", f_scale=HUBER) for p in starts]
    log_E, log_A, a, log_B, b = min(tries, key=lambda found: found.cost).x
    return Law(math.exp(log_E), math.exp(log_A), a, math.exp(log_B), b)


def reached(config: TrainConfig) -> dict:
    """What a run reached; trains it, or goes on with it, when it is not finished.

    Raises ValueError when the folder holds a run of another config; the text of a finished run is not looked at again.
    """
    summary = config.folder / "summary.json"
    if summary.exists():
        stored = json.loads(summary.read_text())
        if differences := differing(deciding(stored["config"]), deciding(plain(config))):
            raise ValueError(f"{config.folder} holds another run, choose another --folder: {differences}")
        return stored["row"]
    result = train(replace(config, resume=bool(checkpoint_folders(config.folder))))
    tokens = config.steps * config.batch * config.context
    row = {"width": config.width, "parameters": result.model.num_parameters(), "tokens": tokens}
    row |= {"bits_per_byte": result.bits_per_byte, "seconds": result.train_seconds, "digest": result.data.digest}
    atomic_write(summary, json.dumps({"config": plain(config), "row": row}, indent=1) + "\n")
    return row


def draw(path: Path, rows: list[dict], beyond: list[dict], law: Law) -> None:
    """Measured points on the fitted curves; of the larger size, what was predicted and what came."""
    lines, points = {}, {}
    tokens = np.geomspace(min(row["tokens"] for row in rows), max(row["tokens"] for row in rows), 50)
    for group, note in ((rows, "fitted"), (beyond, "predicted")):
        for size in sorted({row["parameters"] for row in group}):
            label = f"{size / 1e3:,.0f} thousand parameters, {note}"
            mine = [row for row in group if row["parameters"] == size]
            lines[label] = (tokens, law(size, tokens))
            points[label] = ([row["tokens"] for row in mine], [row["bits_per_byte"] for row in mine])
    title = f"L = {law.E:.2f} + {law.A:.3g}/N^{law.a:.2f} + {law.B:.3g}/D^{law.b:.2f}"
    plots.curve(
        path, lines, points=points, log_x=True, log_y=True, title=title,
        xlabel="training tokens D", ylabel="held-out bits per byte L",
    )  # fmt: skip


def main() -> None:
    config = cli.parse(ScalingConfig, prog=cli.program(), description="fit a scaling law and test its prediction")
    grid = list(product(numbers("widths", config.widths), numbers("steps", config.steps)))
    rows = [reached(config.training(width, steps)) for width, steps in grid]
    law = fit(*([row[name] for row in rows] for name in ("parameters", "tokens", "bits_per_byte")))
    for row in rows:
        row |= {"role": "fitted", "law": float(law(row["parameters"], row["tokens"]))}
    beyond = [reached(config.training(config.larger, steps)) for steps in numbers("steps", config.steps)]
    for row in beyond:
        row |= {"role": "predicted", "law": float(law(row["parameters"], row["tokens"]))}
    for row in rows + beyond:
        row["error"] = row["law"] / row["bits_per_byte"] - 1
    print(f"L(N, D) = {law.E:.3f} + {law.A:.4g} / N^{law.a:.3f} + {law.B:.4g} / D^{law.b:.3f} bits per byte")
    for row in rows + beyond:
        print(
            f"{row['role']:9} width {row['width']:4} N {row['parameters']:9,} D {row['tokens']:9,} "
            f"reached {row['bits_per_byte']:.4f} law {row['law']:.4f} ({row['error']:+.1%})"
        )
    settings = {**asdict(config), "law": law._asdict()}
    print(save_result("minigpt", "scaling", rows + beyond, config=settings, root=config.out))
    picture = config.out / "minigpt" / "scaling.png"
    draw(picture, rows, beyond, law)
    print(picture)


if __name__ == "__main__":
    cli.run(main)
