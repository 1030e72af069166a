"""What speaks against race logs whose numbers fit together: flags that say something else, steps faster than any such
machine, seconds that the day did not have, held-out text that is easier than training text, seeds that are one run.

Each is arithmetic on the logs alone, with limits that honest races are far from. Refused: nothing, all is told.
"""

import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import combinations, pairwise
from typing import Any

import torch

from minigpt.model import GPT
from minigpt.train_config import FREE
from speedrun.config import RaceConfig
from speedrun.record_log import RaceLog, number
from speedrun.schedule import plan

ROUNDING = 2e-7  # relative, of means in float32
# FLOP/s that nothing on sale exceeds: a core with AMX in bfloat16; Hopper in 8 bits, dense; any other GPU likewise.
CORE, HOPPER, GPU = 5e12, 2e15, 5e15
SKIP = 10  # times faster than the median step of its kind: no step, but a clock that was turned back
FEW = 50  # steps with which nothing can be said about a curve
EASIER = 0.9  # times the bits per byte of training text just before: held-out text has cost 0.94 to 1.17 times these
OTHER_TOKENS = 0.25  # by which bytes per token of held-out and training text may differ
TOGETHER = 0.75  # of the steps in which two losses rise and fall together; of other batches it is a half


# ---- one log ---------------------------------------------------------------------------------------------------------


def of_commands(about: dict[str, Any]) -> Iterator[str]:
    """Flags of the command of each sitting, against the config. What a preset says is not looked up: it may change."""
    config = about["config"]
    for sitting in about["sittings"]:
        words = shlex.split(sitting.get("command") or "")
        if words[:3] != ["python", "-m", "speedrun.train"]:
            continue
        for name, text in flags(words[3:]).items():
            fitted = name == "steps" and config.get("minutes")
            if name in config and name not in FREE and not fitted and not same(text, config[name]):
                yield f"line 1, command: {name} {text} at step {sitting['step']}, while the config says {config[name]}"


def flags(words: Sequence[str]) -> dict[str, str]:
    """{field: value} of a command line as common.cli reads it; the last of equal flags counts."""
    found = {}
    for word, after in pairwise([*words, "--"]):
        if not word.startswith("--"):
            continue
        name, given, value = word[2:].replace("-", "_").partition("=")
        if given:
            found[name.replace("-", "_")] = value
        elif not after.startswith("--"):
            found[name] = after
        else:
            found[name.removeprefix("no_")] = str(not name.startswith("no_"))
    return found


def same(text: str, value: Any) -> bool:
    """Whether a flag's text is that value of a config."""
    try:
        return float(text) == value if type(value) in (int, float) else text == str(value)
    except ValueError:
        return False


def of_speed(log: RaceLog, config: RaceConfig) -> Iterator[str]:
    """Parameters, FLOP/s of each step, steps that took next to nothing beside others of their kind."""
    with torch.device("meta"):  # shapes alone
        model = GPT(config.model_config(log.about["vocabulary"]), seed=None)
    own_head = config.tied and plan(config.steps - 1, config).untied
    wanted = model.num_parameters() + own_head * model.config.vocab_size * model.config.width
    if log.result.get("parameters") != wanted:
        told = log.result.get("parameters")
        yield f"line {len(log.steps) + 2}, parameters: {told}, while a model of this config has {wanted}"
    kinds: dict[tuple, list[tuple[int, float]]] = {}
    most = peak(log.about)
    for line, row in enumerate(log.steps, start=2):
        now = plan(line - 2, config)
        kinds.setdefault(now.kind, []).append((line, row["seconds"]))
        flops = model.num_flops_per_token(now.context, now.window) * now.rows * now.context / row["seconds"]
        if flops > most:
            speed = f"{flops:.3g} FLOP/s, expected below {most:.3g} on {log.about['machine']}"
            yield f"line {line}, seconds: {row['seconds']}, so {speed}"
    for rows in kinds.values():
        usual = statistics.median(seconds for _, seconds in rows)
        for line, seconds in rows:
            if seconds < usual / SKIP:
                yield f"line {line}, seconds: {seconds}, while half of the steps of its kind take {usual:.3g} s or more"


def peak(about: dict[str, Any]) -> float:
    """FLOP/s that a machine cannot exceed."""
    if about["device"] == "cpu":
        return CORE * about["threads"] * about["ranks"]
    return (HOPPER if {"h100", "h200"} & set(about["machine"].split("-")) else GPU) * about["ranks"]


def times(log: RaceLog) -> list[datetime]:
    """When each sitting began, and the end."""
    return [datetime.fromisoformat(text) for text in [*(s["began"] for s in log.about["sittings"]), log.about["ended"]]]


def wall_seconds(log: RaceLog) -> float:
    first, *_, last = times(log)
    return (last - first).total_seconds()


def of_clock(log: RaceLog) -> Iterator[str]:
    """A sitting's steps were done between its begin and the next one's, whatever else was done then."""
    moments = times(log)
    starts = [*(sitting["step"] for sitting in log.about["sittings"]), len(log.steps)]
    for (start, stop), (began, ended) in zip(pairwise(starts), pairwise(moments), strict=True):
        seconds = math.fsum(row["seconds"] for row in log.steps[start:stop])
        if len(moments) == 2:
            seconds += log.result["compile_seconds"]
        wall = (ended - began).total_seconds() + 1  # times are in whole seconds
        if seconds > wall:
            yield f"line 1, began: steps {start + 1} to {stop} took {seconds:.1f} s, of {wall:.0f} s until {ended}"
    if log.about["date"] != log.about["sittings"][-1]["began"][:10]:
        yield f"line 1, date: {log.about['date']}, while the last sitting began {log.about['sittings'][-1]['began']}"


def bytes_of(row: dict[str, Any], tokens: int) -> float:
    """Of a step's targets: its loss and its bits per byte together tell. nan where they do not."""
    return tokens * number(row, "loss") / math.log(2) / (number(row, "train_bits_per_byte") or math.nan)


def exact(size: float) -> bool:
    """Whether float32 told so many bytes to less than half of one."""
    return ROUNDING * size < 0.1


def of_text(log: RaceLog) -> Iterator[str]:
    """What held-out text cost, beside training text in the tenth of the steps before; bytes per token, likewise."""
    train, about, sizes = [], log.about, 0.0
    config = RaceConfig(**about["config"])
    tokens = 0
    for line, row in enumerate(log.steps, start=2):
        now = plan(line - 2, config)
        train.append(row["train_bits_per_byte"])
        tokens += now.rows * now.context
        sizes += bytes_of(row, now.rows * now.context)
        if len(train) < FEW:
            continue
        before = statistics.fmean(train[-(len(train) // 10) :])
        for name in ("held_out_look", "held_out_bits_per_byte"):
            if row.get(name, math.inf) < EASIER * before:
                yield f"line {line}, {name}: {row[name]}, while training text needed {before:.4f} just before"
    ours, theirs = about["held_out_bytes"] / about["held_out_tokens"], sizes / tokens
    if not abs(ours / theirs - 1) <= OTHER_TOKENS:
        yield f"line 1, held_out_bytes: {ours:.2f} a token, while training text has {theirs:.2f}"


# ---- several seeds ---------------------------------------------------------------------------------------------------


def of_twins(logs: Sequence[RaceLog]) -> Iterator[str]:
    """Seeds that have more in common than two runs can: another seed has other batches, and no clock repeats itself."""
    for one, other in combinations(logs, 2):
        names = f"seeds {one.about['seed']} and {other.about['seed']}"
        for what, values in (("seconds", seconds_of), ("batches", sizes_of), ("losses", losses_of)):
            pairs = list(zip(values(one), values(other), strict=False))
            if sum(a == b for a, b in pairs) > len(pairs) / 2:
                yield f"{names} have the same {what} in most steps: they are one run"
        a, b = list(map(signs, (losses_of(each)[len(each.steps) // 2 :] for each in (one, other))))
        if len(a) >= FEW and (share := sum(x == y for x, y in zip(a, b, strict=False)) / len(a)) > TOGETHER:
            yield f"{names}: their losses rise and fall together in {share:.0%} of the steps: they are one run"
        if one.result["bits_per_byte"] == other.result["bits_per_byte"]:
            yield f"{names} ended at the same {one.result['bits_per_byte']} bits per byte"


def seconds_of(log: RaceLog) -> list[float]:
    return [row["seconds"] for row in log.steps]


def losses_of(log: RaceLog) -> list[float]:
    """But that of the first step, which is log V in each run with a head of zeros."""
    return [row["loss"] for row in log.steps[1:]]


def sizes_of(log: RaceLog) -> list[int]:
    """Bytes of the batches, where losses tell them exactly."""
    config = RaceConfig(**log.about["config"])
    plans = (plan(step, config) for step in range(len(log.steps)))
    sizes = [bytes_of(row, now.rows * now.context) for row, now in zip(log.steps, plans, strict=True)]
    return [round(size) for size in sizes if exact(size)]


def signs(values: Sequence[float]) -> list[bool]:
    return [after > before for before, after in pairwise(values)]
