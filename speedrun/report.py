"""One page about one run or several, to be read offline: `python -m speedrun.report RUN [RUN ...] --out report.html`.

Everything comes from the files of the runs: numbers, curves, schedules, where the time went, samples of the last
checkpoint, configs with what differs, versions and command lines. What a run does not have yet is said so. The page
fetches nothing. Refused, by name: a folder that is no run, a run named twice.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import cli
from common.html import element, escaped, number, page, table
from common.log import atomic_write
from minigpt.checkpoint import load_run
from minigpt.generate import generate, stream_text
from minigpt.sample import Source, document_tokens
from minigpt.sampling import Sampling
from speedrun.report_charts import CHOICES, breakdown, curves, held_out, schedule, speed, training
from speedrun.run_files import ABSENT, RunFiles, differing, read_runs
from speedrun.tracks import NATS

FILE = "report.html"
CODE, PROSE = ("def ", "class ", "import ", "    for "), ("The ", "In the year ", "She said", "How to ")
LENGTH, TEMPERATURE = 120, 0.8  # of a sample: tokens at most; the first prompt has seed 0, the next 1, ...
COLUMNS = (  # of summary.json: name, heading, format, what it is multiplied with
    ("tokens", "tokens", "{:,.0f}", 1), ("train_seconds", "seconds on the clock", "{:,.1f}", 1),
    ("compile_seconds", "compiling, off the clock, s", "{:,.1f}", 1),
    ("wall_seconds", "last sitting in all, s", "{:,.1f}", 1), ("tokens_per_s", "tokens/s", "{:,.0f}", 1),
    ("flops", "GFLOP/s", "{:,.1f}", 1e-9), ("of_peak", "MFU, of the GEMM peak measured", "{:.1%}", 1),
    ("parameters", "parameters", "{:,.0f}", 1), ("vocabulary", "vocabulary", "{:,.0f}", 1),
)  # fmt: skip
MACHINE = ("device", "ranks", "threads", "dtype", "corpus", "held_out_bytes")
NONE = '<span class="soft">not on file</span>'


def write(folders: Sequence[Path], out: Path) -> Path:
    """Raises ValueError naming what is no run."""
    runs = read_runs(folders)
    title = f"Speedrun: {runs[0].label}" if len(runs) == 1 else f"Speedrun: {len(runs)} runs"
    atomic_write(out, page(title, "".join(sections(runs)), CHOICES))
    return out


def sections(runs: Sequence[RunFiles]) -> list[str]:
    return [
        element("h2", "Reached"), reached(runs),
        element("h2", "Held-out text"), looks(runs),
        element("h2", "Training batches"),
        curves("train", runs, training, title="Bits per byte of training batches", ylabel="bits per byte",
               note="Each batch before its update, smoothed over about twenty steps."),
        element("h2", "Schedule"), schedule(runs),
        element("h2", "Where the time of a step goes"), breakdown(runs),
        element("h2", "Speed"),
        curves("speed", runs, speed, title="Tokens a second", ylabel="tokens/s", logarithmic=False,
               note="Of each step, or of the steps that were waited for together."),
        element("h2", "Samples"), *map(samples, runs),
        element("h2", "Config"), configs(runs),
        element("h2", "Where this comes from"), *map(provenance, runs),
    ]  # fmt: skip


# ---- numbers ---------------------------------------------------------------------------------------------------------


def reached(runs: Sequence[RunFiles]) -> str:
    """One run: a line a number. Several: a line a run, the best first."""
    others = list(dict.fromkeys(name for run in runs for name in run.summary.get("compressors", {})))
    nats = ["nats per token"] if any(run.track and run.track.unit == NATS for run in runs) else []
    head = ["run", "state", "bits per byte", *nats, *others, "target", "seconds to it", "steps"]
    head += [*(heading for _, heading, *_ in COLUMNS), "memory, GB"]
    head += [name.replace("_", " ") for name in MACHINE]
    rows = [cells(run, others, bool(nats)) for run in runs]
    texts = {run.judged for run in runs if run.summary}
    if len(runs) == 1:
        return table(["", ""], list(zip(map(escaped, head), rows[0], strict=True))[1:])
    best = len(texts) == 1
    if best:
        rows[0][0] = element("strong", f"{rows[0][0]} (best)")
        rows[0][2] = element("strong", rows[0][2])
    note = "" if len(texts) < 2 else element("p", "These runs were judged on different texts: no best one among them.")
    caption = "Sorted by bits per byte on all held-out text."
    changed = [
        [escaped(name), *(escaped(plain(value)) for value in values)] for name, values in differing(runs).items()
    ]
    labels = ["field", *(escaped(run.label) for run in runs)]
    return (
        note
        + table(list(map(escaped, head)), rows, caption, [0] if best else [])
        + element("h3", "Configs differ in")
        + (table(labels, changed) if changed else element("p", "nothing."))
    )


def cells(run: RunFiles, others: Sequence[str], with_nats: bool) -> list[str]:
    """A run's line of numbers."""
    s, memory, target, nats = run.summary, run.memory(), run.target(), run.nats()
    seconds = None if target is None else run.seconds_to(target)
    compressors = s.get("compressors", {})
    values = [escaped(run.label), escaped(run.state())]
    values.append(NONE if run.bits_per_byte is None else number(run.bits_per_byte, f"{run.bits_per_byte:.4f}"))
    values += [NONE if nats is None else number(nats, f"{nats:.4f}")] if with_nats else []
    values += [
        number(compressors[name], f"{compressors[name]:.4f}") if name in compressors else NONE for name in others
    ]
    values.append(aim(run))
    values.append(NONE if seconds is None else number(seconds, f"{seconds:,.1f}"))
    values.append(number(run.config["steps"], f"{run.config['steps']:,}"))
    for name, _, text, unit in COLUMNS:
        values.append(number(s[name], text.format(float(s[name]) * unit)) if s.get(name) is not None else NONE)
    values.append(NONE if memory is None else number(memory, f"{memory / 1e9:.2f}"))
    return values + [escaped(plain(s[name])) if name in s else NONE for name in MACHINE]


def aim(run: RunFiles) -> str:
    """The target in its own unit, and in bits per byte where that is another."""
    track, bits = run.track, run.target()
    if track is None:
        return NONE
    told = number(track.target, f"{track.target:.2f}")
    if track.unit != NATS:
        return told
    return told + f" {NATS}" + (f", {number(bits, f'{bits:.4f}')} bits per byte" if bits is not None else "")


def looks(runs: Sequence[RunFiles]) -> str:
    """What held-out text showed on the way; beside compressors where all runs have the same."""
    found = [run.summary.get("compressors", {}) for run in runs]
    levels = dict(found[0]) if all(each == found[0] for each in found) else {}
    targets = {run.target() for run in runs}
    if len(targets) == 1 and None not in targets:
        levels["target"] = targets.pop()
    return curves(
        "held-out", runs, held_out, title="Bits per byte of held-out text", ylabel="bits per byte", dots=True,
        levels={name: float(value) for name, value in levels.items()},
        note="A look is at some windows, the last point is all of the text: it may lie above or below the looks.",
    )  # fmt: skip


# ---- samples ---------------------------------------------------------------------------------------------------------


def samples(run: RunFiles) -> str:
    """What the last checkpoint writes after some prompts; that there is none where the weights are gone."""
    heading = element("h3", escaped(run.label))
    prompts = PROSE if str(run.config.get("corpus", "")).startswith(("fineweb", "hf:")) else CODE
    try:
        written = continued(run.folder, prompts)
    except (ValueError, TypeError, RuntimeError) as error:  # no weights, or those of another program
        return heading + element("p", escaped(f"None: {str(error).splitlines()[0]}"), class_="soft")
    shown = [
        element("h4", f"seed {seed}") + element("pre", element("strong", escaped(prompt)), escaped(text))
        for seed, (prompt, text) in enumerate(zip(prompts, written, strict=True))
    ]
    about = f"At most {LENGTH} tokens each, temperature {TEMPERATURE}; the prompt is in bold."
    return heading + element("p", about, class_="soft") + "".join(shown)


def continued(folder: Path, prompts: Sequence[str]) -> list[str]:
    """What follows each prompt. Raises ValueError where the folder has no whole checkpoint."""
    model, tokenizer = load_run(folder)
    source = Source(model, tokenizer, (tokenizer.separator,))
    steps = generate(
        model, [source.document(prompt) for prompt in prompts], max_new_tokens=LENGTH,
        sampling=Sampling(temperature=TEMPERATURE), stop_tokens=source.ends, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    rows = zip(*steps, strict=True)
    return ["".join(stream_text(document_tokens(row, source.ends), tokenizer)) for row in rows]


# ---- where it comes from ---------------------------------------------------------------------------------------------


def plain(value: Any) -> str:
    """As JSON, but texts without their quotes as long as something is left."""
    return value if isinstance(value, str) and value else json.dumps(value)


def configs(runs: Sequence[RunFiles]) -> str:
    """All fields; those in which runs differ are marked and come first."""
    names, marked = list(dict.fromkeys(name for run in runs for name in run.config)), differing(runs)
    rows = [
        [
            escaped(name) + (" ≠" if name in marked else ""),
            *(escaped(plain(run.config.get(name, ABSENT))) for run in runs),
        ]
        for name in sorted(names, key=lambda name: (name not in marked, names.index(name)))
    ]
    labels = ["field", *(escaped(run.label) for run in runs)]
    about = f"≠ marks the {len(marked)} fields that differ" if len(runs) > 1 else ""
    shown = table(labels, rows, about, range(len(marked)))
    return element("details", element("summary", f"All {len(names)} fields"), shown, open=len(runs) > 1)


def provenance(run: RunFiles) -> str:
    """Versions, machine, digests, and the command line of each sitting."""
    rows = [(name, version) for name, version in run.about.get("versions", {}).items()]
    rows += [("platform", run.about.get("platform", "none"))]
    rows += [("data digest", run.summary["data_digest"])] if run.summary else []
    if run.race is not None:
        kept = ("track", "source", "device", "machine", "ranks", "seed")
        rows += [(f"race log: {name}", plain(run.race.about[name])) for name in kept if name in run.race.about]
    rows += [("race log", f"refused: {run.fault}")] if run.fault else []
    for count, sitting in enumerate(run.about.get("sittings", []), start=1):
        git = sitting.get("git", {})
        state = {True: "with changes", False: "without changes", None: "unknown"}[git.get("dirty")]
        rows.append((f"sitting {count}, from step {sitting.get('start_step')}", sitting.get("command", "none")))
        rows.append((f"sitting {count}, commit", f"{git.get('commit')}, {state}"))
    body = [[escaped(name), element("code", escaped(value))] for name, value in rows]
    return element("h3", escaped(run.label)) + table(["", ""], body)


def main() -> None:
    parser = argparse.ArgumentParser(prog=cli.program(), description="one page about runs", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("runs") / FILE, help="the page")
    arguments = parser.parse_args()
    print(write(arguments.runs, arguments.out))


if __name__ == "__main__":
    cli.run(main)
