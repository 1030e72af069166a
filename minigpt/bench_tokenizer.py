"""Training and encoding speed of the tokenizer beside Hugging Face's tokenizers and tiktoken.

`python -m minigpt.bench_tokenizer` trains on 8 MB of the standard library's source and encodes it, each library on the
same text with the same vocabulary, alternating in one process. Saves results/minigpt/tokenizer_*.json. Refuses to time
vocabularies or ids that differ, and to run without the C++ module.
"""

import json
import os
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import timing
from common.cli import UserError, parse, run
from common.results import save_result
from minigpt import bpe_native
from minigpt.corpus import python_files
from minigpt.splitting import GPT4
from minigpt.tokenizer import Tokenizer
from minigpt.tokenizer_files import token_of


@dataclass(frozen=True, slots=True)
class Config:
    """How to measure."""

    rounds: int = field(default=7, metadata={"help": "samples of each competitor, taken in turn"})
    megabytes: int = field(default=8, metadata={"help": "text for training and batches; a quarter for single calls"})
    vocab: int = field(default=10_000, metadata={"help": "vocabulary size"})
    threads: int = field(default=2, metadata={"help": "threads where more than one is used"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result file"})

    def __post_init__(self):
        if min(self.rounds, self.megabytes, self.threads) < 1 or self.vocab < 300:
            raise ValueError(f"{self}: expected at least 1 round, megabyte and thread, and a vocabulary of 300")


def documents(size: int) -> list[bytes]:
    """Whole files of the standard library's source, about `size` bytes together."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, total = [], 0
    for name in python_files(root):
        data = (root / name).read_bytes()
        if total + len(data) <= size and data:
            texts.append(data.decode("utf-8", "ignore").encode())
            total += len(texts[-1])
    return texts


def train_hugging_face(texts: list[str], vocab: int):
    import tokenizers
    from tokenizers import pre_tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(GPT4), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def hugging_face_merges(tokenizer) -> list[tuple[bytes, bytes]]:
    return [tuple(map(token_of, pair)) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def training_row(config: Config) -> dict:
    texts = documents(config.megabytes * 1_000_000)
    strings = [text.decode() for text in texts]
    steps = {
        "ours_1_thread": lambda: Tokenizer.train(texts, config.vocab, threads=1),
        "ours": lambda: Tokenizer.train(texts, config.vocab, threads=config.threads),
        "hugging_face": lambda: train_hugging_face(strings, config.vocab - 1),  # ours has one special token
    }

    def same(results):
        merges = [results[name].listed_merges() for name in ("ours", "ours_1_thread")]
        return merges[0] == merges[1] == hugging_face_merges(results["hugging_face"])

    samples = timing.compare(steps, rounds=min(config.rounds, 3), warmup=0, check=same, inner=1)
    return row("train", sum(map(len, texts)), samples, vocab=config.vocab, threads=config.threads)


def python_training_row(config: Config) -> dict:
    """The readable trainer beside its twin, on a text that it can finish."""
    texts, vocab = documents(1_000_000), 2000
    steps = {
        "python": lambda: Tokenizer.train(texts, vocab, native=False),
        "ours_1_thread": lambda: Tokenizer.train(texts, vocab, threads=1),
    }
    samples = timing.compare(
        steps,
        rounds=min(config.rounds, 3),
        warmup=0,
        check=lambda results: results["python"].ranks == results["ours_1_thread"].ranks,
        inner=1,
    )
    return row("train, Python and C++", sum(map(len, texts)), samples, vocab=vocab, threads=1)


def peers(tokenizer: Tokenizer):
    """The same vocabulary in tiktoken and in tokenizers."""
    import tiktoken
    import tokenizers

    ranks, special = dict(tokenizer.ranks), dict(tokenizer.special)
    openai = tiktoken.Encoding("bench", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=special)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        return openai, tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def same_ids(results: dict) -> bool:
    first, *others = [np.concatenate(list(map(np.atleast_1d, result))) for result in results.values()]
    return all(np.array_equal(first, other) for other in others)


def encoding_rows(config: Config) -> list[dict]:
    texts = documents(config.megabytes * 1_000_000)
    tokenizer = Tokenizer.train(texts, config.vocab)
    openai, hugging_face = peers(tokenizer)
    strings = [text.decode() for text in texts]
    single = "".join(strings)[: config.megabytes * 250_000]
    rows = [single_row(config, tokenizer, openai, hugging_face, single)]
    batch = {
        "ours": lambda: tokenizer.encode_batch(strings, threads=config.threads),
        "tiktoken": lambda: openai.encode_ordinary_batch(strings, num_threads=config.threads),
        "hugging_face": lambda: [encoded.ids for encoded in hugging_face.encode_batch_fast(strings)],
    }
    samples = timing.compare(batch, rounds=min(config.rounds, 3), warmup=0, check=same_ids, inner=1)
    rows.append(row("encode a batch", sum(map(len, texts)), samples, documents=len(texts), threads=config.threads))
    ids = tokenizer.encode(single)
    listed = ids.tolist()
    decode = {
        "ours": lambda: tokenizer.decode(ids),
        "ours_from_list": lambda: tokenizer.decode(listed),
        "tiktoken": lambda: openai.decode(listed),
        "hugging_face": lambda: hugging_face.decode(listed, skip_special_tokens=False),
    }
    alike = lambda results: len(set(results.values())) == 1  # noqa: E731
    samples = timing.compare(decode, rounds=config.rounds, warmup=1, check=alike)
    return [*rows, row("decode", len(single.encode()), samples, tokens=len(ids), threads=1)]


def single_row(config: Config, tokenizer: Tokenizer, openai, hugging_face, text: str) -> dict:
    """One call on one thread; `ours_cold` has never seen the text, so its cache of pre-tokens is empty."""
    # compare calls each twice before the rounds and twice a round
    cold = [Tokenizer(tokenizer.ranks, tokenizer.pattern, tokenizer.special) for _ in range(2 * config.rounds + 3)]
    for one in cold:
        one.encode(b"")  # builds the tables, which is not what is timed
    steps = {
        "ours": lambda: tokenizer.encode(text),
        "ours_cold": lambda: cold.pop().encode(text),
        "tiktoken": lambda: openai.encode_ordinary(text),
        "hugging_face": lambda: hugging_face.encode(text).ids,
    }
    samples = timing.compare(steps, rounds=config.rounds, warmup=0, check=same_ids, inner=1)
    return row("encode one text", len(text.encode()), samples, threads=1)


def row(case: str, size: int, samples: dict[str, timing.Samples], **about) -> dict:
    out = {"case": case, "megabytes": size / 1e6, **about}
    for name, sample in samples.items():
        out |= {f"{name}_s": sample.median, f"{name}_mb_per_s": size / 1e6 / sample.median, f"{name}_samples": sample}
    speeds = ", ".join(f"{name} {out[f'{name}_mb_per_s']:.1f}" for name in samples)
    print(f"{case}, {size / 1e6:.1f} MB, MB/s: {speeds}", flush=True)
    return out


def main() -> None:
    description = "Time the tokenizer beside tokenizers and tiktoken."
    config = parse(Config, prog="minigpt.bench_tokenizer", description=description)
    if not bpe_native.built():
        raise UserError("minigpt._bpe is not built: make native")
    threads = {"RAYON_NUM_THREADS": str(config.threads), "TOKENIZERS_PARALLELISM": "true"}
    if any(os.environ.get(name) != value for name, value in threads.items()):  # tokenizers reads it once, at first use
        command = [sys.executable, "-m", "minigpt.bench_tokenizer", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **threads})
    rows = [training_row(config), python_training_row(config), *encoding_rows(config)]
    print(save_result("minigpt", "tokenizer", rows, config=config, device="cpu", root=config.out))


if __name__ == "__main__":
    run(main)
