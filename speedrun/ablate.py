"""What each trick is worth: `python -m speedrun.ablate --quick`, or `--base small --seeds 3 --switches muon,smear`.

Each switch is run on and off against one base, seed by seed on the same data, and its steps are timed on against off in
alternation. Runs lie in runs/ablate/<base>/<arm>/<seed>; a finished one is not run again, a broken-off one goes on, so
the same command continues after Ctrl-C. Refused: unknown switches, fewer than two seeds, and runs of another config or
source (--stale rerun does them again, --stale keep takes those of another source as they are).
"""

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from common import cli
from common.cli import UserError
from common.dist import World, finish, init_from_env
from common.log import atomic_write, format_duration, jsonable
from common.results import save_result
from minigpt.checkpoint import FOLDER, checkpoint_folders
from minigpt.train_config import plain
from minigpt.trainer import choose_dtype
from speedrun import winners
from speedrun.config import RaceConfig
from speedrun.effects import Effect, as_lines, chart, judge, median_effect, paired_effect, slope_of
from speedrun.model import refuse
from speedrun.presets import PRESETS, has_compiler
from speedrun.record_log import digest_of
from speedrun.stale import STATE, about, finished, look_for_stale, same_config, sources, state_of
from speedrun.step_times import step_ratios
from speedrun.switches import Switch, choose, pieces, switches, unfit
from speedrun.train import check, race

# Not derived from the recipes in presets.py: those are tuned, and all runs would be stale each time.
SMALL = RaceConfig(
    tokenizer="bpe:2048", layers=4, width=128, heads=2, kv_heads=2, mlp="swiglu", mlp_width=344, value_embeddings=True,
    rope_base=100.0, softcap=15.0, context=128, eval_stride=128, batch=16, steps=150, warmup=20, optimizer="muon",
    muon_lr=0.014, embedding_lr=0.1, head_lr=0.01, gain_lr=0.01, beta2=0.99, eval_every=50,
)  # fmt: skip
QUICK = replace(
    SMALL, tokenizer="bpe:1024", width=64, heads=2, kv_heads=2, mlp_width=176, context=64, eval_stride=64, batch=8,
    steps=120, warmup=10, eval_every=60,
)  # fmt: skip
BASES = {**PRESETS, "small": SMALL, "quick": QUICK}
PACE = ("base", "base-half")  # arms that tell what steps are worth
QUICK_SWITCHES = "zero-init,qk-norm,value-embeddings,x0-skip,muon"


@dataclass(frozen=True, slots=True)
class AblateConfig:
    base: str = field(default="small", metadata={"help": f"the recipe to change: {', '.join(BASES)}"})
    switches: str = field(
        default="",
        metadata={"help": "names with commas between them, chosen before a look: p is corrected for these; empty: all"},
    )
    seeds: int = field(default=3, metadata={"help": "of each side; at least 2"})
    steps: int = field(default=0, metadata={"help": "of each run; 0 for the base's own"})
    quick: bool = field(default=False, metadata={"help": "a small base, two seeds, a handful of switches"})
    rounds: int = field(default=9, metadata={"help": "timed steps of each side in each part of a run; 0: no timing"})
    retime: bool = field(default=False, metadata={"help": "time the steps again where that was done before"})
    stale: Literal["refuse", "rerun", "keep"] = field(
        default="refuse", metadata={"help": "what to do with runs of another config or source; keep: source only"}
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where to run"})
    folder: Path = field(default=Path("runs/ablate"), metadata={"help": "where the runs lie"})
    out: Path = field(default=Path("results"), metadata={"help": "where results are kept"})

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ValueError(f"base {self.base!r}: expected one of {', '.join(BASES)}")
        if self.seeds < 2:
            raise ValueError(f"seeds {self.seeds}: expected at least 2, one says nothing about chance")
        if self.steps < 0 or self.steps == 1:
            raise ValueError(f"steps {self.steps}: expected at least 2, or 0 for the base's own")
        if self.rounds and self.rounds < 6:
            raise ValueError(f"rounds {self.rounds}: expected at least 6 for an interval of the median, or 0")


def recipe(config: AblateConfig) -> RaceConfig:
    """The base as all runs share it: on no track, whose rules are for whole races, a fixed number of steps, no
    checkpoint but the last."""
    base = BASES[config.base]
    steps = config.steps or base.steps
    return replace(
        base, track="", steps=steps, minutes=0.0, eval_every=min(base.eval_every, steps), checkpoint_every=steps,
        keep=1, device=config.device, resume=False,
    )  # fmt: skip


# ---- the runs --------------------------------------------------------------------------------------------------------


def run_one(folder: Path, recipe: RaceConfig, now: dict[str, Any], world: World) -> dict[str, Any]:
    """The state of the finished run: `bits_per_byte` and `seconds`, or `failed`. What it prints goes to run.log."""
    state = state_of(folder)
    if finished(state):
        return state
    going_on = state is not None and bool(checkpoint_folders(folder))
    if not going_on:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        atomic_write(folder / STATE, json.dumps({"about": now}, indent=1))
    try:
        with open(folder / "run.log", "a") as log, contextlib.redirect_stdout(log):
            done = race(replace(recipe, folder=folder, resume=going_on), world)
        found = {"bits_per_byte": done.bits_per_byte, "seconds": done.seconds, "data_digest": done.data.digest}
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():  # it has not begun: a download that failed, say
            raise
        found = {"failed": str(error)}  # a loss that is not finite is a result too
    if recipe.compile:
        torch._dynamo.reset()  # or the next model counts as one recompilation too many
    shutil.rmtree(folder / FOLDER, ignore_errors=True)  # weights that nobody will ask for
    state = {"about": now, **found}
    atomic_write(folder / STATE, json.dumps(jsonable(state), indent=1))
    return state


@contextlib.contextmanager
def interrupted_after() -> Iterator[None]:
    """KeyboardInterrupt at the end if Ctrl-C was pressed inside: a race at its last step ends as if nothing were, and
    here that is not the end. Python writes the number of each signal it handles into the wakeup pipe, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pipe = os.pipe()
    for end in pipe:
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(pipe[1])
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(pipe[1])
        with open(pipe[0], "rb") as reader:
            pressed = signal.SIGINT in (reader.read() or b"")
    if pressed:
        raise KeyboardInterrupt


def run_all(config: AblateConfig, root: Path, arms: Mapping[str, RaceConfig], world: World) -> dict[str, list[dict]]:
    """{arm: state of each seed}. Seed by seed, so that what is there after half of the time is about every switch."""
    todo = {}
    for seed in range(config.seeds):
        for name, side in arms.items():
            todo[name, seed] = replace(side, seed=seed)
    folders = {(name, seed): root / name / str(seed) for name, seed in todo}
    facts = {folders[key]: about(side, world) for key, side in todo.items()}
    for note in look_for_stale(facts, config.stale):
        print(note)
    states, began, ran = {name: [] for name in arms}, time.monotonic(), 0
    print(f"{len(todo)} runs: {len(arms)} recipes x {config.seeds} seeds, below {root}", flush=True)
    for number, ((name, seed), side) in enumerate(todo.items(), start=1):
        folder = folders[name, seed]
        fresh = not finished(state_of(folder))
        with interrupted_after():
            state = run_one(folder, side, facts[folder], world)
        states[name].append(state)
        ran += fresh
        left = (time.monotonic() - began) / ran * (len(todo) - number) if ran else math.nan
        found = f"{state['bits_per_byte']:.4f}" if "bits_per_byte" in state else state["failed"]
        if fresh:
            print(f"{number:4}/{len(todo)}  {name:20} seed {seed}  {found}  left {format_duration(left)}", flush=True)
    if len(digests := digests_of(states)) > 1:
        raise ValueError(f"runs below {root} on {len(digests)} texts, digests {', '.join(digests)}: expected one; "
                         f"choose another --folder")  # fmt: skip
    return states


def digests_of(states: Mapping[str, list[dict]]) -> list[str]:
    """Of the texts that the runs were trained on: one, if they can be compared."""
    found = {state.get("data_digest") for of_seeds in states.values() for state in of_seeds}
    return sorted(digest for digest in found if digest)


# ---- the effects -----------------------------------------------------------------------------------------------------


def times_of(config: AblateConfig, root: Path, base: RaceConfig, switch: Switch, world: World) -> Effect | None:
    """On over off; measured once and then kept in <root>/times, where `--retime` does it again."""
    path = root / "times" / f"{switch.name}.json"
    on, off = switch.sides(base)
    now = {"on": about(on, world), "off": about(off, world)}
    kept = json.loads(path.read_text()) if path.exists() else None
    same = kept is not None and (
        kept["about"] == now
        or (config.stale == "keep" and all(same_config(kept["about"][side], now[side]) for side in now))
    )
    if not config.rounds and not same:
        return None
    if not same or (config.retime and config.rounds):
        kept = {"about": now, "ratios": step_ratios(on, off, config.rounds, world)}
        atomic_write(path, json.dumps(kept))
    return median_effect(kept["ratios"])


def row_of(switch: Switch, sides: tuple[str, str] | None, states: Mapping[str, list[dict]]) -> dict[str, Any]:
    """The effect on bits per byte; with a `reason` where there is none. `sides`: names of the arms on and off."""
    row = {name: getattr(switch, name) for name in ("about", "on", "off", "needs")}
    row = {"switch": switch.name, **row, "bits": None, "holm": None, "time": None, "to_same_loss": None, "reason": ""}
    if sides is None:
        return row
    for arm in sides:
        for seed, state in enumerate(states[arm]):
            if "failed" in state:
                return row | {"reason": f"{arm}, seed {seed}: {state['failed']}"}
    on, off = ([state["bits_per_byte"] for state in states[arm]] for arm in sides)
    return row | {"on_bits_per_byte": on, "off_bits_per_byte": off, "bits": paired_effect(on, off)}


def ablate(config: AblateConfig, world: World) -> tuple[list[dict[str, Any]], list[Path]]:
    """The rows, best first, and the files written. KeyboardInterrupt after Ctrl-C: the same command goes on."""
    base = recipe(config)
    chosen = choose(config.switches, switches(base))
    reasons = {switch.name: reason_of(switch, base, world) for switch in chosen}
    fit = [switch for switch in chosen if not reasons[switch.name]]
    if not fit:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    root = config.folder / f"{config.base}-{base.steps}"
    plan = pieces(base, fit)
    states = run_all(config, root, plan.arms, world) if plan.sides else {}
    rows = {switch.name: row_of(switch, plan.sides.get(switch.name), states) for switch in chosen}
    for number, switch in enumerate(fit, start=1):
        print(f"{number:4}/{len(fit)}  time of a step: {switch.name}", flush=True)
        rows[switch.name]["time"] = times_of(config, root, base, switch, world)
    for name, reason in reasons.items():
        rows[name]["reason"] = rows[name]["reason"] or reason
    lengths = {arm: [state.get("bits_per_byte", math.nan) for state in states.get(arm, [])] for arm in PACE}
    judge(list(rows.values()), *slope_of(*lengths.values(), base.steps))
    ordered = sorted(rows.values(), key=lambda row: row["bits"].value if row["bits"] else math.inf)
    found = {"bits_per_byte": lengths, "data_digest": next(iter(digests_of(states)), None)}
    return ordered, save(config, base, ordered, found, world)


def reason_of(switch: Switch, base: RaceConfig, world: World) -> str:
    """Why the switch cannot be measured, found before anything runs; empty where it can."""
    if reason := unfit(switch, base, cuda=world.device.type == "cuda", compiler=has_compiler()):
        return reason
    try:
        for side in switch.sides(base):
            check(side, world)
            dtype = choose_dtype(side.dtype, world.device)
            refuse(side, winners.choose(side, world.device, dtype)[0], world.device, dtype)
    except (ValueError, UserError) as error:
        return str(error)
    return ""


def save(config: AblateConfig, base: RaceConfig, rows: list[dict], found: Mapping, world: World) -> list[Path]:
    """results/speedrun/ablation_<machine>_<date>.json and the chart beside it; `ablation-quick_...` with --quick."""
    name = "ablation-quick" if config.quick else "ablation"
    stored = {"ablation": asdict(config), "recipe": plain(base), "source": digest_of(sources()), **found}
    result = save_result("speedrun", name, rows, config=stored, device=world.device.type, root=config.out)
    title = f"each switch on against off: base {config.base}, {base.steps} steps, {config.seeds} seeds, 95% intervals"
    return [result, chart(result.with_suffix(".png"), rows, title)]


# ---- the program -----------------------------------------------------------------------------------------------------


def configured(argv: list[str] | None = None) -> AblateConfig:
    """With --quick the flags beside it still count."""
    text = "what each trick is worth: on against off, with seeds"
    config, given = cli.parse_explicit(AblateConfig, argv, prog=cli.program(), description=text)
    quick = {"base": "quick", "seeds": 2, "switches": QUICK_SWITCHES}
    return replace(config, **{name: value for name, value in quick.items() if config.quick and name not in given})


def main() -> None:
    config = configured()
    world = init_from_env(None if config.device == "auto" else config.device)
    try:
        if world.world_size > 1:
            raise ValueError(f"{world.world_size} ranks: expected one, an ablation is many small runs")
        rows, files = ablate(config, world)
    except KeyboardInterrupt:
        print(f"stopped: what is finished stays in {config.folder}; the same command goes on from there")
        raise
    finally:
        finish()
    print(as_lines(rows))
    print(*files, sep="\n")


if __name__ == "__main__":
    cli.run(main)
