"""Files a finished speedrun under results/: `python -m speedrun.record --folder runs/speedrun`.

Writes results/speedrun/cpu_<machine>_<date>.json with the summary and the curve, and copies loss.png beside it as
loss_cpu.png (on a GPU: cuda_..., loss_cuda.png): what the READMEs show comes from there. Refused: a folder without a
finished run.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from common import cli
from common.log import atomic_write, read_jsonl
from common.results import save_result

FILES = ("summary.json", "config.json", "metrics.jsonl", "loss.png")


@dataclass(frozen=True, slots=True)
class RecordConfig:
    folder: Path = field(default=Path("runs/speedrun"), metadata={"help": "folder of a finished run"})
    out: Path = field(default=Path("results"), metadata={"help": "where results are kept"})


def record(config: RecordConfig) -> list[Path]:
    """The files written. Raises ValueError when the folder lacks one of those that a finished run leaves."""
    if missing := [name for name in FILES if not (config.folder / name).exists()]:
        raise ValueError(f"{config.folder} holds no finished speedrun: expected {', '.join(missing)}")
    summary = json.loads((config.folder / "summary.json").read_text())
    about = json.loads((config.folder / "config.json").read_text())
    compressors = {name.split()[0]: bits for name, bits in summary.pop("compressors").items()}
    metrics = read_jsonl(config.folder / "metrics.jsonl")
    looks = [[row["step"], row["held_out_look"]] for row in metrics if "held_out_look" in row]
    row = {**summary, **compressors, "held_out_looks": looks}
    run = {"sittings": about["sittings"], **about["config"]}
    device = summary["device"]
    result = save_result("speedrun", device, [row], config=run, device=device, root=config.out)
    picture = config.out / "speedrun" / f"loss_{device}.png"
    atomic_write(picture, (config.folder / "loss.png").read_bytes())
    return [result, picture]


def main() -> None:
    config = cli.parse(RecordConfig, prog=cli.program(), description="file a finished speedrun under results/")
    for path in record(config):
        print(path)


if __name__ == "__main__":
    cli.run(main)
