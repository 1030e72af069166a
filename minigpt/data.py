"""The tokens that a corpus is named by: text is tokenised here and now, shards are found, fetched or made.

Refused: a corpus that is not there or no text, a tokenizer that is not the shards' own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt.batches import TokenStream
from minigpt.corpus import TextCorpus, load_corpus
from minigpt.download import HUGGING_FACE, fineweb10b
from minigpt.prepare import choose_tokenizer, prepare_dataset, shard_tokenizer
from minigpt.shards import ShardFolder, count_tokens, fingerprint, is_shard_folder, open_shard, read_folder, shard_dtype
from minigpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenData:
    """What a run trains and is judged on. Each document of `train` and `held_out` begins with tokenizer.separator."""

    name: str
    tokenizer: Tokenizer
    train: TokenStream
    held_out: np.ndarray  # uint16 or uint32 of shape (tokens,)
    held_out_bytes: int  # of held-out text, separators not counted
    held_out_text: bytes | None  # None where only tokens are at hand
    held_out_names: tuple[str, ...] | None  # of its documents; None likewise
    byte_lengths: np.ndarray  # of each token id, int64 of shape (vocab_size,); 0 for the separator
    documents: int | None  # None where nobody counted
    digest: str  # of the text, `+`, of the tokenizer; hexadecimal
    about: str  # the corpus in words

    def describe(self) -> str:
        """The corpus, what was left out of it, and its tokens, on a line each."""
        shards = f"{len(self.train.shards)} shard{'s' * (len(self.train.shards) != 1)}"
        return (
            f"{self.about}\ntokens: vocabulary {self.tokenizer.vocab_size:,} (digest {self.tokenizer.digest[:12]}), "
            f"{self.train.size / 1e6:.2f} M training in {shards}, {self.held_out.size / 1e6:.2f} M held out, "
            f"{self.held_out_bytes / self.held_out.size:.2f} bytes a token"
        )


def load_data(
    corpus: str, tokenizer: str = "auto", *, root: Path = Path("data"), endpoint: str = HUGGING_FACE
) -> TokenData:
    """The data that `corpus` names, in the tokens of `tokenizer`; all ranks of a machine may call it together.

    corpus: `stdlib`, `python`, the path of a text file or folder of texts (tokenised here, in memory), the path of a
    folder of token shards, `fineweb10B:N` (N training shards, fetched to root),
    `hf:owner/name[:config[:split[:column]]]` (fetched and tokenised into shards below root on first use). tokenizer:
    `bytes`, `bpe:N` (trained on the training side), a path, or `auto`: bpe:2048 for text, for shards their own. Raises
    ValueError for what is not there, is no text, or does not fit together; UserError when a download fails.
    """
    if corpus.startswith("fineweb10B"):
        return _fineweb(corpus, tokenizer, root, endpoint)
    if corpus.startswith("hf:"):
        return _shard_data(corpus, read_folder(prepare_dataset(corpus, tokenizer, root, endpoint)), tokenizer)
    if is_shard_folder(Path(corpus)):
        return _shard_data(corpus, read_folder(Path(corpus)), tokenizer)
    return _text_data(load_corpus(corpus), tokenizer)


def _fineweb(corpus: str, tokenizer: str, root: Path, endpoint: str) -> TokenData:
    kind, _, number = corpus.partition(":")
    if kind != "fineweb10B" or not number.isdecimal():
        raise ValueError(f"corpus {corpus!r}: expected fineweb10B:N with N training shards")
    folder = root / "fineweb10B"
    train, held_out = fineweb10b(int(number), folder, endpoint=endpoint)
    return _shard_data(corpus, ShardFolder(folder, tuple(train), (held_out,), {}), tokenizer)


def _text_data(corpus: TextCorpus, spec: str) -> TokenData:
    tokenizer = choose_tokenizer(spec, (text for _, text in corpus.train))
    train, held_out = (
        join_documents(tokenizer.encode_batch([text for _, text in side]), tokenizer)
        for side in (corpus.train, corpus.held_out)
    )
    text = corpus.held_out_text
    return TokenData(
        corpus.name, tokenizer, TokenStream([train]), held_out, len(text), text,
        tuple(name for name, _ in corpus.held_out), tokenizer.byte_lengths(), corpus.documents,
        f"{corpus.digest}+{tokenizer.digest}", corpus.describe(),
    )  # fmt: skip


def join_documents(documents: Iterable[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """uint16 or uint32 tokens: a separator in front of each document."""
    separator = np.array([tokenizer.separator], dtype=shard_dtype(tokenizer.vocab_size))
    return np.concatenate([part for document in documents for part in (separator, document)], dtype=separator.dtype)


def _shard_data(name: str, shards: ShardFolder, spec: str) -> TokenData:
    tokenizer, meta = shard_tokenizer(shards, spec), shards.meta
    train, held_out = ([open_shard(p, tokenizer.vocab_size) for p in side] for side in (shards.train, shards.held_out))
    held_out = held_out[0] if len(held_out) == 1 else np.concatenate(held_out)
    byte_lengths = tokenizer.byte_lengths()
    digest = meta.get("digest") or fingerprint([*shards.train, *shards.held_out])
    documents = sum(meta["documents"].values()) if meta else None
    counted = f"{documents} documents of {meta['source']}, held out: {meta['split']}" if meta else "token shards"
    return TokenData(
        name, tokenizer, TokenStream(train), held_out,
        int(count_tokens(held_out, tokenizer.vocab_size) @ byte_lengths), None, None, byte_lengths,
        documents, f"{digest}+{tokenizer.digest}", f"corpus {name}: {counted}, digest {digest[:12]}",
    )  # fmt: skip
