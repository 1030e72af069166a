"""The tracks of the race: which text, which target, which rules. `python -m speedrun.tracks` prints them.

A run on a track can be compared with every other one on it, so a track fixes the text and what is predicted of it. The
config refuses flags that contradict its track, `judged` refuses held-out text that is too short for it.
"""

import argparse
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common import cli
from common.cli import UserError
from minigpt.data import TokenData, load_data
from minigpt.shards import count_tokens


@dataclass(frozen=True, slots=True)
class Track:
    name: str
    corpus: str  # what config.corpus is; "...:N" with any number
    tokenizer: str  # what config.tokenizer is; "" for any
    device: str  # "cpu" or "cuda"; "" for any
    gpus: int  # at most, one to a rank; 0 for none
    target: float  # of the whole held-out text, or of its part that counts
    unit: str
    limit_seconds: float  # of training, where a race is for what can be reached in that time; 0: for time to the target
    held_out: int  # predicted tokens that count, from the start of the held-out text; 0 for all
    rules: tuple[str, ...]
    longer: tuple[tuple[float, float], ...] = ()  # the same race in more seconds, to a lower target: (seconds, target)

    @property
    def races(self) -> tuple[tuple[float, float], ...]:
        """(seconds, target) of each race for what can be reached in a time, the shortest first."""
        return ((self.limit_seconds, self.target), *self.longer) if self.limit_seconds else ()


BITS, NATS = "bits per byte", "nats per token"
TOKENIZER = "Any tokenizer, trained on the training side alone; neither that nor tokenising is on the clock."
CLOCK = "The clock runs in the steps alone: compiling, looking at held-out text and saving are not on it, and are told."
SEEDS = "A record is several seeds whose mean is below the target with p < 0.01, one-sided."
HELD_OUT = "No look at held-out text decides anything in the run; every held-out token is predicted once."

TRACKS = {
    "laptop": Track(
        "laptop", corpus="stdlib", tokenizer="", device="cpu", gpus=0, target=1.35, unit=BITS, limit_seconds=300.0,
        held_out=0,
        rules=(
            "Two CPU cores, one or two processes; OMP_NUM_THREADS=2 where there are more cores.",
            "The text is the standard library of the Python that runs; its digest and the version of Python are told.",
            "Three races: the fewest bits per byte after 300 seconds, below 1.35; the fewest after 900 seconds, below "
            "1.23; the fewest seconds to 1.35.",
            TOKENIZER, CLOCK, HELD_OUT, SEEDS,
        ),
        longer=((900.0, 1.23),),
    ),
    "one-gpu": Track(
        "one-gpu", corpus="python", tokenizer="", device="cuda", gpus=1, target=0.90, unit=BITS, limit_seconds=0.0,
        held_out=0,
        rules=(
            "One GPU, one process, no network.",
            "The text is the standard library and the Python files of the installed packages: another machine has "
            "others, so runs are compared where their digests are the same.",
            "The race is for the fewest seconds to the target.",
            TOKENIZER, CLOCK, HELD_OUT, SEEDS,
        ),
    ),
    "fineweb": Track(
        "fineweb", corpus="fineweb10B:N", tokenizer="auto", device="", gpus=8, target=3.28, unit=NATS,
        limit_seconds=0.0, held_out=10_485_760,
        rules=(
            "One to eight GPUs, told apart.",
            "The text is FineWeb in GPT-2 tokens, in the speedrun community's shards, in any order.",
            "What counts is the first 10,485,760 predicted tokens of the validation shard, each seen after at most "
            "one window.",
            "The race is for the fewest seconds to the target.",
            CLOCK, HELD_OUT, SEEDS,
        ),
    ),
}  # fmt: skip


def is_on(track: Track, corpus: str) -> bool:
    """Whether that corpus is the track's."""
    stem, _, number = corpus.partition(":")
    return number.isdecimal() if track.corpus == f"{stem}:N" else corpus == track.corpus


def check_track(name: str, corpus: str, tokenizer: str, device: str) -> None:
    """Raises ValueError where there is no such track or a flag contradicts it. The name "" is of no track."""
    if not name:
        return
    if name not in TRACKS:
        near = difflib.get_close_matches(name, TRACKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"track {name!r}: expected one of {', '.join(TRACKS)}; the nearest is {near}")
    track = TRACKS[name]
    for what, given, wanted, fits in (
        ("corpus", corpus, track.corpus, is_on(track, corpus)),
        ("tokenizer", tokenizer, track.tokenizer, track.tokenizer in ("", tokenizer)),
        ("device", device, track.device, track.device in ("", device) or device == "auto"),
    ):
        if not fits:
            raise ValueError(f"{what} {given!r} on track {name}: expected {wanted}; --track '' is for a run on none")


def load(corpus: str, tokenizer: str, track: str, endpoint: str) -> TokenData:
    """The data of a run, of whose held-out text only the part that counts on its track is there. Raises UserError that
    says what else can be done where FineWeb is neither here nor fetched, ValueError as `load_data` and `judged`."""
    try:
        data = load_data(corpus, tokenizer, endpoint=endpoint)
    except UserError as error:
        if not corpus.startswith("fineweb10B:"):
            raise
        fetch = f"python -m minigpt.download --shards {corpus.partition(':')[2]}"
        raise UserError(
            f"{error}; where there is network, {fetch} makes a data/fineweb10B that can be copied here; races without "
            f"network: --track one-gpu, --track laptop"
        ) from None
    return judged(data, track)


def judged(data: TokenData, name: str) -> TokenData:
    """The data with the part of the held-out text that counts on a track ("": on none).

    Raises ValueError where the held-out text is shorter than that.
    """
    count = TRACKS[name].held_out if name else 0
    if not count:
        return data
    if data.held_out.size < count + 1:
        raise ValueError(
            f"{data.held_out.size:,} held-out tokens on track {name}: expected at least {count + 1:,}, of which the "
            f"last {count:,} are predicted"
        )
    held_out = data.held_out[: count + 1]
    size = int(count_tokens(held_out, data.byte_lengths.size) @ data.byte_lengths)
    return replace(data, held_out=held_out, held_out_bytes=size)


def predicted(data: TokenData) -> dict[str, int]:
    """How many tokens and bytes of the held-out text are predicted: all but the first token, which none precedes."""
    size = data.held_out_bytes - int(data.byte_lengths[data.held_out[0]])
    return {"held_out_tokens": data.held_out.size - 1, "held_out_bytes": size}


def nats_per_bit(counts: Mapping[str, Any]) -> float:
    """Nats per token of one bit per byte, by the counts of `predicted`."""
    return math.log(2) * counts["held_out_bytes"] / counts["held_out_tokens"]


def table() -> str:
    """All tracks and their rules, as markdown."""
    lines = ["| track | corpus | target | time |", "|---|---|---|---|"]
    for track in TRACKS.values():
        for seconds, target in track.races or ((0.0, track.target),):
            limit = f"{seconds:.0f} s" if seconds else "to the target"
            lines.append(f"| {track.name} | `{track.corpus}` | {target:.2f} {track.unit} | {limit} |")
    for track in TRACKS.values():
        lines += ["", f"**{track.name}**", "", *(f"* {rule}" for rule in track.rules)]
    return "\n".join(lines)


def main() -> None:
    about = "print the tracks of the race: text, target, rules"
    argparse.ArgumentParser(prog=cli.program(), description=about, allow_abbrev=False).parse_args()
    print(table())


if __name__ == "__main__":
    cli.run(main)
