"""What the methods of a run reached: a table, paired comparisons with their uncertainty, a picture, some answers.

Everything is read from the files of the run, so the report of a run that was resumed is that of one that never stopped.
No share stands without its count, and no difference without its interval. Refused: a run without a finished method.
"""

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from common import plots
from common.log import atomic_write, read_jsonl
from lora.judge import Judged, loss_of, read_judged
from lora.statistics import Comparison, Interval, bootstrap_difference, compare

PICTURE, TEXT, CONFIG, ANSWERS, SUMMARY = "curves.png", "report.md", "config.json", "held_out.jsonl", "summary.json"
BASE = "base"
SHOWN = 6  # held-out prompts whose answers the report holds
WIDEST = 110  # characters of an answer there
ByMethod = dict[str, list[Judged]]


def write(folder: Path, methods: Sequence[str], signatures: bool) -> str:
    """Writes report.md and curves.png of `methods`, which are done; returns the text."""
    summaries, before, after = read(folder, methods)
    draw(folder / PICTURE, {method: held_out_curve(folder / method) for method in methods})
    judged = with_base(summaries, before, after)
    lines = ["# Fine-tuning", "", *rules(after[methods[0]], signatures), "", *table(summaries, before, after), ""]
    lines += ["## Differences", "", *differences(judged), "", "## Answers", "", *samples(judged), f"![]({PICTURE})"]
    text = "\n".join(lines) + "\n"
    atomic_write(folder / TEXT, text)
    return text


def read(folder: Path, methods: Sequence[str]) -> tuple[dict[str, dict[str, Any]], ByMethod, ByMethod]:
    """By method: its summary, and what is judged before and after training."""
    summaries = {method: json.loads((folder / method / SUMMARY).read_text()) for method in methods}
    if not summaries:
        raise ValueError(f"{folder}: no method: expected at least one that is done")
    before = {method: read_judged(folder / s["start"]) for method, s in summaries.items()}
    return summaries, before, {method: read_judged(folder / method / ANSWERS) for method in methods}


def with_base(summaries: dict[str, dict[str, Any]], before: ByMethod, after: ByMethod) -> ByMethod:
    """What is compared, pair by pair. All but qlora start from the same weights, so that is the base where there is
    one."""
    first = next((method for method, s in summaries.items() if s["start"] == f"{BASE}.jsonl"), next(iter(summaries)))
    return {BASE: before[first], **after}


def rules(judged: Sequence[Judged], signatures: bool) -> list[str]:
    parses = " `parses`: is one whole signature in Python." if signatures else ""
    return [
        f"Judged on {len(judged)} held-out examples, greedy answers. `loss`: nats a token of the wanted answer and its "
        f"end. `right`: equal to the wanted answer but for whitespace at the ends. `similarity`: 1 - edit distance / "
        f"length of the longer one, mean.{parses}"
    ]


def table(summaries: dict[str, dict[str, Any]], before: ByMethod, after: ByMethod) -> list[str]:
    """One row a method, values before and after."""
    head = ("method", "trained", "rank", "loss", "right", "similarity", "parses", "frozen", "optimizer", "training")
    rows = [head, ("---",) + ("---:",) * (len(head) - 1)]
    for method, s in summaries.items():
        pair = before[method], after[method]
        parses = [sum(bool(each.parses) for each in judged) for judged in pair]
        rows.append(
            (
                method,
                f"{s['trained']:,} of {s['parameters']:,}",
                "" if s["rank"] is None else f"{s['rank']}" + (f", {s['blocks']} blocks" if s["blocks"] > 1 else ""),
                arrow([f"{loss_of(judged):.3f}" for judged in pair]),
                arrow([sum(each.exact for each in judged) for judged in pair]),
                arrow([f"{sum(each.similarity for each in judged) / len(judged):.3f}" for judged in pair]),
                "" if pair[1][0].parses is None else arrow(parses),
                f"{s['frozen_bytes'] / 1e6:.2f} MB",
                f"{s['optimizer_bytes'] / 1e6:.2f} MB",
                f"{s['seconds']:.0f} s",
            )
        )
    return ["| " + " | ".join(row) + " |" for row in rows]


def arrow(values: Sequence[object]) -> str:
    return " → ".join(map(str, values))


def differences(judged: ByMethod) -> list[str]:
    """Every pair of methods, and each beside the base, on the same examples."""
    pairs = list(combinations(judged, 2))
    lines = [
        f"On the same examples, which count as independent; intervals of 95% by the bootstrap over examples, exact "
        f"McNemar test of `right`. These are {len(pairs)} comparisons, and no p-value is corrected for that; one run a "
        f"method, so what another seed would change is in none of them.",
        "",
    ]
    for b, a in pairs:
        right, loss, similarity = compared(a, judged[a], b, judged[b])
        lines += [f"- {right}", f"  loss {a} - {b} = {shown_interval(loss)}; similarity {shown_interval(similarity)}"]
    return lines


def compared(
    name_a: str, a: Sequence[Judged], name_b: str, b: Sequence[Judged]
) -> tuple[Comparison, Interval, Interval]:
    """a - b on the same examples: right answers, loss in nats a token, similarity. Raises ValueError for others."""
    asked_a, asked_b = ([(each.prompt, each.wanted, each.tokens) for each in judged] for judged in (a, b))
    if asked_a != asked_b:
        raise ValueError(f"{name_a} and {name_b} were judged on other examples: expected the same, in the same order")
    return (
        compare(name_a, [each.exact for each in a], name_b, [each.exact for each in b]),
        bootstrap_difference(
            [each.nats for each in a], [each.nats for each in b], counts=[each.tokens for each in a], seed=0
        ),
        bootstrap_difference([each.similarity for each in a], [each.similarity for each in b], seed=0),
    )


def shown_interval(found: Interval) -> str:
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def samples(judged: ByMethod) -> list[str]:
    """Evenly spaced held-out prompts, not chosen ones."""
    examples, lines = len(next(iter(judged.values()))), []
    for number in sorted({i * examples // SHOWN for i in range(SHOWN)}):
        first = next(iter(judged.values()))[number]
        width = max(map(len, ("wanted", *judged)))
        lines += ["```", shown(first.prompt), f"{'wanted':{width}}  {shown(first.wanted)}"]
        lines += [f"{name:{width}}  {shown(each[number].written)}" for name, each in judged.items()]
        lines += ["```", ""]
    return lines


def shown(text: str) -> str:
    """One line, as a terminal and Markdown can show it: what a model writes may hold control characters."""
    line = " ⏎ ".join(text.strip().splitlines()).replace("```", "'''")
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= WIDEST else line[: WIDEST - 1] + "…"


def held_out_curve(folder: Path) -> tuple[list[int], list[float]]:
    """(steps, held-out loss), from before the first step."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "held_out_loss" in row]
    return [row["step"] for row in rows], [float(row["held_out_loss"]) for row in rows]


def draw(path: Path, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """Without the values before training, which would press all differences into a line: they are in the title."""
    starts = sorted({round(losses[0], 3) for _, losses in curves.values()})
    plots.curve(
        path,
        {method: (steps[1:], losses[1:]) for method, (steps, losses) in curves.items()},
        xlabel="step",
        ylabel="held-out loss, nats a token",
        title=f"Held-out loss; before training {' to '.join(f'{loss:.2f}' for loss in starts if math.isfinite(loss))}",
    )
