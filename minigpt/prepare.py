"""Text -> token shards in a folder: `python -m minigpt.prepare --corpus stdlib --tokenizer bpe:2048 --out data/stdlib`.

The folder gets val_000000.bin, train_000001.bin, ..., tokenizer.json and, last, meta.json. After an interruption the
same command goes on: finished shards stay, and tokenising resumes inside the document that the last one ended in.
Of a data set, memory holds a few megabytes; of a text folder, its text. Refused: a folder that holds, finished or not,
something else; shards as a source.
"""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import cli
from common.log import atomic_write
from minigpt.corpus import TextCorpus, is_held_out, load_corpus, parquet_rows
from minigpt.download import endpoint_from_env, locked, parquet_files, parquet_splits
from minigpt.shards import MAX_TOKENS, META, META_FORMAT, STATE, ShardFolder, ShardWriter, is_shard_folder
from minigpt.tokenizer import Tokenizer

AUTO_TOKENIZER = "bpe:2048"
SHARD_TOKENS = 100_000_000  # 200 MB
TRAINING_TEXT = 64 << 20  # bytes of the training side, from its start, that a tokenizer is trained on at most
BATCH_TEXT = 4 << 20  # bytes of text that are tokenised together, by all cores
SIDES = {"held_out": ("val", 0), "train": ("train", 1)}  # the name of a side's shards, and the number of the first


@dataclass(frozen=True, slots=True)
class Source:
    """Documents of two sides, each to be read any number of times; b"" stands for a row that has no text."""

    name: str
    split: str  # how the held-out side was chosen, in words
    digest: str  # knows every document and its side
    held_out: Callable[[], Iterable[bytes]]
    train: Callable[[], Iterable[bytes]]


def open_source(spec: str, root: Path, endpoint: str) -> Source:
    """`hf:owner/name[:config[:split[:column]]]`, fetched below root, or what minigpt.corpus.load_corpus knows."""
    if spec.startswith("hf:"):
        return dataset_source(spec, root, endpoint)
    if spec.startswith("fineweb10B:") or is_shard_folder(Path(spec)):
        raise ValueError(f"corpus {spec!r} is token shards already: expected text; train with --corpus {spec}")
    return text_source(load_corpus(spec))


def text_source(corpus: TextCorpus) -> Source:
    held_out, train = ([text for _, text in side] for side in (corpus.held_out, corpus.train))
    return Source(corpus.name, corpus.split, corpus.digest, lambda: held_out, lambda: train)


def dataset_source(spec: str, root: Path, endpoint: str) -> Source:
    """A text column of a Hugging Face data set, a document a row; the `validation` split is held out where there is
    one, else 5% of the rows by the hash of their number."""
    name, config, split, column = parse_dataset(spec)
    config, splits = parquet_splits(name, config, endpoint=endpoint)
    if split not in splits:
        raise ValueError(f"{name}, config {config}, has no split {split!r}: expected one of {', '.join(splits)}")
    folder = root / "hf" / name.replace("/", "--") / config
    files = parquet_files(splits[split], folder / split)
    others = parquet_files(splits["validation"], folder / "validation") if "validation" in splits else []
    by_split = bool(others) and split != "validation"
    rule = "split validation" if by_split else "rows by the hash of their number"
    if any("/partial-" in url for url in splits[split]):  # of large data sets the hub converts the first 5 GB
        rule += "; only the part that the hub converted to parquet"
    digest = hashlib.sha256(f"{name} {config} {split} {column} {rule}\n".encode())
    for path in files + (others if by_split else []):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())

    def rows(held_out: bool) -> Iterator[bytes]:
        texts = enumerate(parquet_rows(files, column))
        return (text for number, text in texts if is_held_out(str(number)) == held_out)

    if by_split:
        return Source(
            spec, rule, digest.hexdigest(), *(partial(parquet_rows, part, column) for part in (others, files))
        )
    return Source(spec, rule, digest.hexdigest(), partial(rows, True), partial(rows, False))


def parse_dataset(spec: str) -> tuple[str, str | None, str, str]:
    """(owner/name, config or None, split, column) of `hf:owner/name[:config[:split[:column]]]`; "" is the default."""
    parts = spec.removeprefix("hf:").split(":")
    owner, _, name = parts[0].partition("/")
    if not (owner and name) or "/" in name or len(parts) > 4:
        raise ValueError(f"corpus {spec!r}: expected hf:owner/name[:config[:split[:column]]]")
    config, split, column = (part or None for part in [*parts[1:], "", "", ""][:3])
    return parts[0], config, split or "train", column or "text"


def choose_tokenizer(spec: str, texts: Iterable[bytes]) -> Tokenizer:
    """`bytes`, `bpe:N` (trained on the first TRAINING_TEXT bytes of texts), `auto` for bpe:2048, or a path."""
    spec = AUTO_TOKENIZER if spec == "auto" else spec
    if spec == "bytes":
        return Tokenizer.bytes_only()
    kind, _, number = spec.partition(":")
    if kind == "bpe":
        if not (number.isdecimal() and int(number) > 256):
            raise ValueError(f"tokenizer {spec!r}: expected bpe:N with N, the vocabulary size, above 256")
        return Tokenizer.train(_first(texts, TRAINING_TEXT), int(number))
    if not Path(spec).exists():
        raise ValueError(f"tokenizer {spec!r} does not exist: expected auto, bytes, bpe:N or the path of a tokenizer")
    return Tokenizer.load(Path(spec))


def shard_tokenizer(shards: ShardFolder, spec: str) -> Tokenizer:
    """The tokenizer beside the shards, or the one asked for where they came without; ValueError if the two differ."""
    folder, meta = shards.folder, shards.meta
    file = folder / "tokenizer.json"
    if file.exists():
        own = Tokenizer.load(file)
    else:
        own = Tokenizer.load(folder) if (folder / "vocab.json").exists() else None
    if meta and (own is None or own.digest != meta["tokenizer_digest"]):
        raise ValueError(f"{file} is not the tokenizer of its {META}: expected digest {meta['tokenizer_digest']}")
    if own is not None and spec in ("auto", meta.get("tokenizer")):
        return own
    if spec == "auto" or spec.startswith("bpe:"):
        came, expected = ("with another one", "auto") if own else ("without one", "bytes")
        raise ValueError(f"tokenizer {spec!r}: the shards in {folder} came {came}; expected {expected} or a path")
    given = choose_tokenizer(spec, ())
    if own is not None and given.digest != own.digest:
        known = f"the shards in {folder} were made with {own.digest[:12]}"
        raise ValueError(f"tokenizer {spec!r} has digest {given.digest[:12]}, but {known}: expected auto or that one")
    return given


def _first(texts: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Whole texts until they are `size` bytes together."""
    for text in texts:
        if size <= 0:
            return
        size -= len(text)
        if text:
            yield text


def prepare(source: Source, tokenizer: Tokenizer, out: Path, *, spec: str, shard_tokens: int) -> dict[str, Any]:
    """Writes or completes the folder `out`; returns its meta.json. `spec` is how the tokenizer was asked for.

    Raises ValueError when out holds shards of another source, tokenizer or size, or a side of the source is empty.
    """
    what = {"source": source.name, "split": source.split, "digest": source.digest, "tokenizer": spec}
    what |= {"tokenizer_digest": tokenizer.digest, "shard_tokens": shard_tokens}
    with locked(out):
        state = _state(out, what)
        if state.get("format") == META_FORMAT:
            return state
        tokenizer.save(out / "tokenizer.json")
        for side in SIDES:
            if not state["sides"][side]["done"]:
                _write_side(getattr(source, side)(), side, tokenizer, out, state)
        sides = state["sides"]
        meta = {"format": META_FORMAT, **what, "vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator}
        for name in ("documents", "left_out", "bytes", "tokens"):
            meta[name] = {side: sides[side][name] for side in SIDES}
        meta["shards"] = {name: count for side in SIDES for name, count in sides[side]["shards"].items()}
        atomic_write(out / META, json.dumps(meta, indent=2) + "\n")
        (out / STATE).unlink()
    return meta


def _state(out: Path, what: dict[str, Any]) -> dict[str, Any]:
    """The meta.json of a finished folder, the state.json of an unfinished one, or the state that begins one."""
    for name in (META, STATE):
        if (out / name).exists():
            state = json.loads((out / name).read_text())
            for key, value in what.items():
                if state.get(key) != value:
                    known = f"{out} holds shards with {key} {state.get(key)!r}"
                    raise ValueError(f"{known}, not {value!r}: expected another --out, or delete that folder")
            if name == STATE:
                print(f"{out}: goes on after {sum(len(side['shards']) for side in state['sides'].values())} shards")
            return state
    if any(out.glob("*.bin")):
        raise ValueError(f"{out} holds .bin files that are not of minigpt.prepare: expected an --out without any")
    fresh = {"rows": 0, "used": 0, "documents": 0, "left_out": 0, "bytes": 0, "tokens": 0, "done": False}
    state = {**what, "sides": {side: {**fresh, "shards": {}} for side in SIDES}}
    atomic_write(out / STATE, json.dumps(state))
    return state


def _write_side(texts: Iterable[bytes], side: str, tokenizer: Tokenizer, out: Path, state: dict[str, Any]) -> None:
    """Tokenises from where `state` says on. state.json is written anew as each shard stands under its name."""
    place = state["sides"][side]

    def finished(path: Path, count: int, used: int) -> None:
        place["shards"][path.name], place["used"] = count, used
        atomic_write(out / STATE, json.dumps(state))

    prefix, first = SIDES[side]
    limit = state["shard_tokens"] if side == "train" else MAX_TOKENS
    sizes = {"vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator, "max_tokens": limit}
    show, skip = _progress(side), place["used"]
    with ShardWriter(out, prefix, **sizes, first=first + len(place["shards"]), on_finish=finished) as writer:
        for batch in _batches(itertools.islice(texts, place["rows"], None)):
            for text, tokens in zip(batch, tokenizer.encode_batch(batch), strict=True):
                if text:
                    writer.add(tokens, skip)  # may call `finished`, for which this document still lies ahead
                    place["tokens"] += tokens.size + 1
                    skip = 0
                place["rows"] += 1
                place["documents" if text else "left_out"] += 1
                place["bytes"] += len(text)
            show(place)
    if not place["documents"]:
        raise ValueError(f"{state['source']} has no {side} documents ({state['split']}): expected at least one")
    place["done"] = True
    atomic_write(out / STATE, json.dumps(state))


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lists of texts, each at least BATCH_TEXT bytes together but the last."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1
        if size >= BATCH_TEXT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress(side: str, every_s: float = 2.0) -> Callable[[dict[str, Any]], None]:
    shown = began = time.monotonic()
    start: int | None = None

    def show(place: dict[str, Any]) -> None:
        nonlocal shown, start
        start = place["bytes"] if start is None else start
        if (now := time.monotonic()) - shown >= every_s:
            shown, speed = now, (place["bytes"] - start) / 1e6 / (now - began)
            done = f"{place['bytes'] / 1e6:,.0f} MB, {place['tokens'] / 1e6:,.1f} M tokens"
            print(f"{side}: {place['documents']:,} documents, {done}, {speed:,.1f} MB/s", flush=True)

    return show


def prepare_dataset(spec: str, tokenizer: str, root: Path, endpoint: str) -> Path:
    """The folder below root with the shards of a Hugging Face data set, made on first use, later without network."""
    parse_dataset(spec)
    tokenizer = AUTO_TOKENIZER if tokenizer == "auto" else tokenizer
    readable = "-".join(re.findall(r"[\w.]+", f"{spec.removeprefix('hf:')} {tokenizer}"))
    out = root / "shards" / f"{readable}-{hashlib.sha256(f'{spec} {tokenizer}'.encode()).hexdigest()[:8]}"
    if not (out / META).exists():
        source = open_source(spec, root, endpoint)
        chosen = choose_tokenizer(tokenizer, source.train())
        prepare(source, chosen, out, spec=tokenizer, shard_tokens=SHARD_TOKENS)
    return out


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    corpus: str = field(
        metadata={"help": "'stdlib', 'python', a text file or folder, or hf:owner/name[:config[:split[:column]]]"}
    )
    out: Path = field(metadata={"help": "folder of the shards"})
    tokenizer: str = field(default=AUTO_TOKENIZER, metadata={"help": "'bytes', bpe:N, or the path of a tokenizer"})
    shard_tokens: int = field(default=SHARD_TOKENS, metadata={"help": "tokens of a training shard"})
    root: Path = field(default=Path("data"), metadata={"help": "where downloads are kept"})
    endpoint: str = field(default_factory=endpoint_from_env, metadata={"help": "address of the Hugging Face hub"})

    def __post_init__(self) -> None:
        if not 1 <= self.shard_tokens <= MAX_TOKENS:
            raise ValueError(f"shard_tokens {self.shard_tokens}: expected 1 to {MAX_TOKENS}")


def main() -> None:
    config = cli.parse(PrepareConfig, prog=cli.program(), description="tokenise a text into shards to train on")
    source = open_source(config.corpus, config.root, config.endpoint)
    spec = AUTO_TOKENIZER if config.tokenizer == "auto" else config.tokenizer
    meta = prepare(
        source,
        choose_tokenizer(spec, source.train()),
        config.out,
        spec=spec,
        shard_tokens=config.shard_tokens,
    )
    tokens, left_out = meta["tokens"], sum(meta["left_out"].values())
    print(
        f"{config.out}: {tokens['train']:,} tokens to train on, {tokens['held_out']:,} held out ({meta['split']}), "
        f"{len(meta['shards'])} shards" + (f", {left_out} empty rows left out" if left_out else "")
    )


if __name__ == "__main__":
    cli.run(main)
