"""Which documents a run finds hard: `python -m minigpt.by_document runs/first [runs/second]`.

Of one run, the held-out documents that cost it most; of two, those that make the difference between them. Runs of one
text may have different tokenizers, models and windows. Refused: a corpus whose documents have no names (token shards),
another text than the run's own or the other run's.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import cli
from minigpt.batches import held_out_windows
from minigpt.checkpoint import TOKENIZER, load_checkpoint, load_run
from minigpt.data import load_data
from minigpt.evaluate import predictions

ROWS = 32  # windows at a time


@dataclass(frozen=True)
class DocumentBits:
    """Of D held-out documents: names, bytes (D,) int64, and the bits (D,) float64 that a run needs for each, with those
    for the separator in front of it. The text's first separator is free."""

    names: tuple[str, ...]
    sizes: np.ndarray
    bits: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return float(self.bits.sum() / self.sizes.sum())


def by_document(folder: Path) -> DocumentBits:
    """Of a run's newest checkpoint, by the windows and in the dtype of its own evaluation, on the CPU. Raises
    ValueError naming what does not fit."""
    state = load_checkpoint(folder)[0].state
    config = state["train_config"]
    data = load_data(config["corpus"], str(folder / TOKENIZER))
    if data.held_out_names is None:
        raise ValueError(f"{folder}: the documents of corpus {data.name} have no names here: expected text")
    if data.digest != state["data_digest"]:
        raise ValueError(f"{folder} was trained on other text than {data.name} is here: expected the same")
    model, _ = load_run(folder)
    separator = data.tokenizer.separator if config["document_mask"] or config.get("documents") else None
    options = {"window": int(config["windows"].split(",")[-1])} if config.get("windows") else {}
    windows = held_out_windows(data.held_out.size, config["context"], config["eval_stride"])
    dtype = torch.bfloat16 if state["machine"]["dtype"] == "bfloat16" else torch.float32
    nats = np.zeros(data.held_out.size)
    given = {"rows": ROWS, "device": torch.device("cpu"), "dtype": dtype}

    def of_run(tokens_BT: torch.Tensor) -> torch.Tensor:
        return model(tokens_BT, separator=separator, **options)

    for group, _, nats_BT, counted_BT in predictions(of_run, data.held_out, windows, **given):
        for (start, length, _), nats_T, counted_T in zip(group, nats_BT.numpy(), counted_BT.numpy(), strict=True):
            nats[start + 1 : start + 1 + length][counted_T] = nats_T[counted_T]
    document = (data.held_out == data.tokenizer.separator).cumsum() - 1
    sizes = np.bincount(document, weights=data.byte_lengths[data.held_out]).astype(np.int64)
    bits = np.bincount(document, weights=nats) / math.log(2)
    return DocumentBits(data.held_out_names, sizes, bits)


def table(runs: dict[str, DocumentBits], rows: int) -> str:
    """Of one or two runs of one text: the documents with the largest share of what is asked for, the largest first."""
    first, last = (list(runs.values())[i] for i in (0, -1))
    size = first.sizes.sum()
    share = (last.bits - first.bits if len(runs) > 1 else first.bits) / size
    order = np.argsort(-np.abs(share), kind="stable")[:rows]
    wide = max(len("all documents"), *(len(first.names[i]) for i in order))
    heads = "".join(f"  {name:>12.12}" for name in runs)
    lines = [f"{'document':{wide}}  {'bytes':>8}{heads}  {'difference' if len(runs) > 1 else 'of the sum':>10}"]
    for i in order:
        cells = "".join(f"  {run.bits[i] / max(run.sizes[i], 1):12.4f}" for run in runs.values())
        lines.append(f"{first.names[i]:{wide}}  {first.sizes[i]:8,}{cells}  {share[i]:+10.4f}")
    cells = "".join(f"  {run.bits_per_byte:12.4f}" for run in runs.values())
    return "\n".join([*lines, f"{'all documents':{wide}}  {size:8,}{cells}  {share.sum():+10.4f}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=cli.program(), description="bits per byte of each held-out document", allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="the folder of a run, or of two")
    parser.add_argument("--rows", type=int, default=15, help="documents to show")
    arguments = parser.parse_args()
    if len(arguments.runs) > 2 or len(set(arguments.runs)) < len(arguments.runs):
        raise ValueError(f"{' '.join(map(str, arguments.runs))}: expected one run, or two different ones")
    if arguments.rows < 1:
        raise ValueError(f"rows {arguments.rows}: expected at least 1")
    digests = [load_checkpoint(run)[0].state["data_digest"] for run in arguments.runs]
    if len({digest.partition("+")[0] for digest in digests}) > 1:  # the tokenizers, behind the +, may differ
        raise ValueError(f"{' and '.join(map(str, arguments.runs))}: expected runs of the same text")
    unique = len({run.name for run in arguments.runs}) == len(arguments.runs)
    found = {(run.name if unique else str(run)): by_document(run) for run in arguments.runs}
    print(table(found, arguments.rows))


if __name__ == "__main__":
    cli.run(main)
