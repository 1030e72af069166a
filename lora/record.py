"""Files a finished fine-tuning run under results/: `python -m lora.record --folder runs/finetune`.

Writes results/lora/finetune_<machine>_<date>.json with a row for each method, differences_... with a row for each pair
of methods on the same examples, and copies curves.png: what the chapter shows comes from there. Refused: a folder
without a finished run.
"""

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from common import cli
from common.log import atomic_write
from common.results import save_result
from lora.finetune_config import METHODS
from lora.judge import Judged, loss_of
from lora.report import CONFIG, PICTURE, SUMMARY, compared, read, with_base
from minigpt.hf import read_json


@dataclass(frozen=True, slots=True)
class RecordConfig:
    folder: Path = field(default=Path("runs/finetune"), metadata={"help": "folder of a finished run"})
    out: Path = field(default=Path("results"), metadata={"help": "where results are kept"})


def record(config: RecordConfig) -> list[Path]:
    """The files written. Raises ValueError when the folder lacks what a finished run leaves."""
    done = [method for method in METHODS if (config.folder / method / SUMMARY).exists()]
    if not done or not (config.folder / PICTURE).exists():
        raise ValueError(f"{config.folder} holds no finished run: expected {PICTURE} and a method with {SUMMARY}")
    about = read_json(config.folder / CONFIG, "the folder of a run that lora.finetune began")
    summaries, before, after = read(config.folder, done)
    rows = [row(summaries[method], before[method], after[method]) for method in done]
    judged = with_base(summaries, before, after)
    pairs = [difference(b, judged[b], a, judged[a]) for b, a in combinations(judged, 2)]
    device = summaries[done[0]]["machine"]["device"]
    options = {"config": about["config"] | {"data": about["data"]}, "device": device, "root": config.out}
    written = [save_result("lora", "finetune", rows, **options), save_result("lora", "differences", pairs, **options)]
    picture = config.out / "lora" / PICTURE
    atomic_write(picture, (config.folder / PICTURE).read_bytes())
    return [*written, picture]


def row(summary: dict[str, Any], before: list[Judged], after: list[Judged]) -> dict[str, Any]:
    values = {}
    for when, judged in (("before", before), ("after", after)):
        values |= {
            f"loss_{when}": loss_of(judged),
            f"right_{when}": sum(each.exact for each in judged),
            f"similarity_{when}": sum(each.similarity for each in judged) / len(judged),
            f"parses_{when}": None if judged[0].parses is None else sum(bool(each.parses) for each in judged),
        }
    return {**summary, "examples": len(after), **values}


def difference(name_b: str, b: list[Judged], name_a: str, a: list[Judged]) -> dict[str, Any]:
    """a - b, as in report.md."""
    right, loss, similarity = compared(name_a, a, name_b, b)
    return {
        "a": name_a,
        "b": name_b,
        "only_a": right.test.only_a,
        "only_b": right.test.only_b,
        "p": right.test.p_value,
        **{f"loss_{end}": getattr(loss, end) for end in ("difference", "low", "high")},
        **{f"similarity_{end}": getattr(similarity, end) for end in ("difference", "low", "high")},
    }


def main() -> None:
    config = cli.parse(RecordConfig, prog=cli.program(), description="file a finished fine-tuning run under results/")
    for path in record(config):
        print(path)


if __name__ == "__main__":
    cli.run(main)
