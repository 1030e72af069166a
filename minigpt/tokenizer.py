"""The byte-level BPE tokenizer: text <-> token ids, trained here or read from the files of published models.

    tokenizer = Tokenizer.train(texts, 10_000)
    ids = tokenizer.encode("hello")          # numpy, uint16 up to a vocabulary of 65,536, else uint32
    tokenizer.decode(ids) == "hello"

minigpt/splitting.py cuts text into pre-tokens, minigpt/bpe.py merges inside them, minigpt/native does both in C++ when
`make native` has built it, with the same ids. Any bytes round-trip. A special token's string in the text is ordinary
text unless it is allowed by name. Nothing is ever added to the text: no first token, no prefix space.
"""

import codecs
import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from common.log import cpu_threads
from minigpt import bpe, bpe_native, tokenizer_files
from minigpt.bpe import Pair
from minigpt.splitting import (
    GPT2,
    GPT4,
    SPELLINGS,
    STYLES,
    compiled,
    cut_stream,
    split_ends,
    to_bytes,
    to_text,
)

__all__ = ["GPT2", "GPT4", "StreamDecoder", "Tokenizer"]

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # the first one that a tokenizer has
LARGEST_ID = (1 << 31) - 1


class Tokenizer:
    """Immutable. `ranks` maps the bytes of each token to its id, `special` the string of each special token to its id.

    Without `merges`, two neighbouring tokens merge when their concatenation is a token, the lowest id first (what
    tiktoken does). `merges` lists pairs in order of rank instead, for vocabularies where that says something else;
    where it says the same, it is dropped and `.merges` is None. `ignore_merges`: a pre-token that is a token is taken
    whole, whatever the merges say (Llama 3). `normalizer` "NFC" normalises text before it is split (Qwen), so those
    decode to their NFC. `native`: True C++, False Python, None C++ if it is built.
    Raises ValueError for contradictions.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str,
        special: Mapping[str, int],
        *,
        merges: Sequence[Pair] | None = None,
        ignore_merges: bool = False,
        normalizer: Literal["NFC"] | None = None,
        native: bool | None = None,
    ) -> None:
        _check_ids(ranks, special)
        if normalizer not in (None, "NFC"):
            raise ValueError(f"normalizer {normalizer!r}: expected 'NFC' or None")
        compiled(pattern)
        self.ranks: Mapping[bytes, int] = MappingProxyType(dict(ranks))
        self.pattern = SPELLINGS.get(pattern, pattern)
        self.special: Mapping[str, int] = MappingProxyType(dict(special))
        self.normalizer = normalizer
        self.native = bpe_native.choose(native)
        self.merges: tuple[Pair, ...] | None = None
        self.ignore_merges = False
        if merges is not None:
            merges = _checked_merges(merges, ranks)
            if merges != self._canonical:
                self.merges, self.ignore_merges = tuple(merges), ignore_merges

    # -- making one --
    @classmethod
    def bytes_only(cls) -> "Tokenizer":
        """No merges: the id of a byte is the byte, and `<|endoftext|>` is 256."""
        return cls({bytes([byte]): byte for byte in range(256)}, GPT4, {"<|endoftext|>": 256})

    @classmethod
    def train(
        cls,
        texts: Iterable[bytes | str],
        vocab_size: int,
        *,
        pattern: str = GPT4,
        special: Sequence[str] = ("<|endoftext|>",),
        native: bool | None = None,
        threads: int | None = None,
    ) -> "Tokenizer":
        """Learns vocab_size - 256 - len(special) merges. Ids: the bytes, the merges in order, the specials.

        The most frequent pair merges first; among equals the one of the smallest symbols, bytes in GPT-2's order
        before merges, as in Hugging Face's BpeTrainer. No pre-token spans two texts; special strings in a text are
        ordinary text. Raises ValueError for a size below 256 + specials, and when the text has too few pairs.
        """
        wanted = vocab_size - 256 - len(special)
        if wanted < 0:
            raise ValueError(
                f"vocab_size {vocab_size}: expected at least {256 + len(special)}, 256 bytes and the specials"
            )
        if len(set(special)) < len(special):
            raise ValueError(f"special {list(special)}: expected no name twice")
        _check_threads(threads)
        data, pattern = map(_as_bytes, texts), SPELLINGS.get(pattern, pattern)
        compiled(pattern)
        if bpe_native.choose(native):
            pairs = bpe_native.train(data, pattern, wanted, threads or cpu_threads())
        else:
            pairs = bpe.Trainer(bpe.count_words(data, pattern)).merges(wanted)
        if len(pairs) < wanted:
            most = vocab_size - wanted + len(pairs)
            raise ValueError(
                f"vocab_size {vocab_size} needs {wanted} merges, the text has pairs for {len(pairs)}: "
                f"expected more text or a vocabulary of at most {most}"
            )
        tokens = [bytes([byte]) for byte in range(256)] + bpe.merged_tokens(pairs)
        ranks = {token: id for id, token in enumerate(tokens)}
        return cls(ranks, pattern, {name: len(ranks) + i for i, name in enumerate(special)}, native=native)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        pattern: str | None = None,
        special: Mapping[str, int] | None = None,
        native: bool | None = None,
    ) -> "Tokenizer":
        """Reads tokenizer.json, *.tiktoken (pattern and specials default to cl100k_base's), or a folder that holds
        tokenizer.json or vocab.json and merges.txt (the pattern defaults to GPT-2's). A ValueError
        names the file and the line or field."""
        parts = tokenizer_files.read(Path(path), pattern, special)
        options = {"ignore_merges": parts.ignore_merges, "normalizer": parts.normalizer, "native": native}
        try:
            return cls(parts.ranks, parts.pattern, parts.special, merges=parts.merges, **options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: Path | str) -> None:
        """Writes a Hugging Face tokenizer.json, whole or not at all."""
        tokenizer_files.write_json(self, Path(path))

    def save_tiktoken(self, path: Path | str) -> None:
        """Writes a .tiktoken file, which holds the ranks only."""
        tokenizer_files.write_tiktoken(self, Path(path))

    def save_vocab_merges(self, folder: Path | str) -> None:
        """Writes vocab.json and merges.txt, GPT-2's format."""
        tokenizer_files.write_vocab_merges(self, Path(folder))

    # -- what it is --
    @cached_property
    def vocab_size(self) -> int:
        return max(max(self.ranks.values()), max(self.special.values(), default=0)) + 1

    @property
    def separator(self) -> int:
        """The id that stands between documents."""
        for name in SEPARATORS:
            if name in self.special:
                return self.special[name]
        raise ValueError(f"no separator among the special tokens {sorted(self.special)}: expected one of {SEPARATORS}")

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of everything that decides about ids."""
        parts = [self.pattern, sorted(self.special.items()), self.normalizer]
        parts.append(sorted((token.hex(), id) for token, id in self.ranks.items()))
        # The list that `save` writes for ranks without a merge a token says nothing that the ranks do not.
        if self.merges is not None and not (self.ignore_merges and list(self.merges) == bpe.all_merges(self.ranks)):
            parts += [[(left.hex(), right.hex()) for left, right in self.merges], self.ignore_merges]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def byte_lengths(self) -> np.ndarray:
        """int64 (vocab_size,): the bytes of each token; 0 for special tokens and for ids that none has."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        lengths[list(self.ranks.values())] = list(map(len, self.ranks))
        return lengths

    def listed_merges(self) -> list[Pair] | None:
        """The merges in order of rank; None where the ranks have no one merge a token (bpe.canonical_merges)."""
        return self._canonical if self.merges is None else list(self.merges)

    # -- text to ids --
    def encode(self, text: str | bytes, *, allowed_special: Collection[str] | Literal["all"] = ()) -> np.ndarray:
        """uint16 or uint32 ids. The special tokens named in `allowed_special` (or all) are recognised in the text,
        leftmost and then longest first; the strings of the others are encoded as ordinary text. Raises ValueError for
        a name that is no special token and for a str with a lone surrogate."""
        data = _as_bytes(text)
        if not len(allowed_special):
            return self._encode(self._normalise(data))
        finder = _finder(self._allowed(allowed_special))
        ids, end = [], 0
        for match in finder.finditer(data):
            ids.append(self._encode(self._normalise(data[end : match.start()])))
            ids.append(np.array([self.special[match[0].decode()]], dtype=self._dtype))
            end = match.end()
        return np.concatenate([*ids, self._encode(self._normalise(data[end:]))])

    def encode_batch(self, texts: Iterable[str | bytes], *, threads: int | None = None) -> list[np.ndarray]:
        """`encode` of each text, on `threads` threads (default: as many as the machine has) in C++."""
        _check_threads(threads)
        data = [self._normalise(_as_bytes(text)) for text in texts]
        if self.pattern not in STYLES:
            return list(map(self._encode, data))
        return self._encoder.encode_batch(data, threads or cpu_threads(), self._dtype == np.uint32)

    def encode_stream(self, chunks: Iterable[str | bytes]) -> Iterator[np.ndarray]:
        """Arrays whose concatenation is `encode` of the joined chunks, in memory that does not grow with the text.

        Characters, words and whitespace may be cut between chunks. Special strings are ordinary text. Raises ValueError
        for a pre-token of more than 16 Mi characters, and for a pattern that is none of splitting.STYLES: where
        another one surely splits is not known.
        """
        if self.pattern not in STYLES:
            raise ValueError(f"pattern {self.pattern!r} cannot be streamed: expected that of GPT-2, GPT-4 or Qwen 2")
        return map(self._encode, cut_stream(map(_as_bytes, chunks), nfc=self.normalizer == "NFC"))

    # -- ids to text --
    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The exact bytes. ValueError for an id that no token has, naming it and its place."""
        if self.native and isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype in (np.uint16, np.uint32):
            joined = self._joiner(ids)
            if joined is not None:
                return joined
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return b"".join(map(self._token_of.__getitem__, ids))
        except (KeyError, TypeError):
            known = self._token_of
            place, id = next((i, id) for i, id in enumerate(ids) if isinstance(id, list) or id not in known)
            message = f"id {id!r} at place {place}: expected the id of a token, below {self.vocab_size}"
            raise ValueError(message) from None

    def decode(self, ids: Iterable[int] | np.ndarray, errors: str = "replace") -> str:
        """The text; `errors` as in bytes.decode, for ids that end within a character."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def stream_decoder(self, errors: str = "replace") -> "StreamDecoder":
        """For text that comes token by token."""
        return StreamDecoder(self, errors)

    # -- inside --
    @property
    def _dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def _token_of(self) -> dict[int, bytes]:
        tokens = {id: token for token, id in self.ranks.items()}
        return tokens | {id: name.encode() for name, id in self.special.items()}

    @cached_property
    def _joiner(self) -> bpe_native.Joiner:
        return bpe_native.Joiner(self._token_of)

    @cached_property
    def _canonical(self) -> list[Pair] | None:
        if not self.native:
            return bpe.canonical_merges(self.ranks)
        rows = bpe_native.make_encoder(self.ranks, None, False, self.pattern).reduced().tolist()
        if len(rows) < sum(len(token) > 1 for token in self.ranks):
            return None
        return [(self._token_of[left], self._token_of[right]) for left, right, _ in rows]

    @cached_property
    def _encoder(self):
        make = bpe_native.make_encoder if self.native else bpe.Encoder
        return make(self.ranks, self.merges, self.ignore_merges, self.pattern)

    def _encode(self, data: bytes) -> np.ndarray:
        known = not self.native or self.pattern in STYLES  # else the `regex` package splits for the C++ encoder
        ends = None if known else split_ends(data, self.pattern)
        return self._encoder.encode(data, ends, self._dtype == np.uint32)

    def _normalise(self, data: bytes) -> bytes:
        if self.normalizer is None or data.isascii():
            return data
        return to_bytes(unicodedata.normalize("NFC", to_text(data)))

    def _allowed(self, allowed: Collection[str] | Literal["all"]) -> tuple[str, ...]:
        if isinstance(allowed, str) and allowed != "all":
            raise ValueError(f"allowed_special {allowed!r}: expected 'all' or a collection of names")
        names = self.special if allowed == "all" else allowed
        if unknown := sorted(name for name in names if name not in self.special):
            raise ValueError(f"special token {unknown[0]!r} is unknown: expected some of {sorted(self.special)}")
        return tuple(sorted(names))

    def __reduce__(self):  # the C++ encoder stays behind: it is made again where it is needed
        options = {"ignore_merges": self.ignore_merges, "normalizer": self.normalizer, "native": self.native and None}
        return _rebuild, (dict(self.ranks), self.pattern, dict(self.special), self.merges, options)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} ids, {len(self.special)} special, digest {self.digest[:12]})"


class StreamDecoder:
    """Text from tokens that come one by one: the bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer, errors: str) -> None:
        self._tokenizer, self._decoder = tokenizer, codecs.getincrementaldecoder("utf-8")(errors)

    def feed(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left of an unfinished character."""
        return self._decoder.decode(b"", final=True)


def _rebuild(ranks, pattern, special, merges, options) -> Tokenizer:
    return Tokenizer(ranks, pattern, special, merges=merges, **options)


@lru_cache(maxsize=32)
def _finder(names: tuple[str, ...]) -> re.Pattern[bytes]:
    """Longest first: of two names that begin alike, the longer one is meant. No names match nowhere."""
    ordered = sorted((name.encode() for name in names), key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, ordered)) if ordered else rb"(?!)")


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at place {error.start}"
            raise ValueError(f"the text holds {found}, a lone surrogate: expected characters, or bytes") from None
    if not isinstance(text, bytes | bytearray | memoryview):
        raise ValueError(f"expected str or bytes, got {type(text).__name__}: {text!r:.60}")
    return bytes(text)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads {threads}: expected at least 1, or None for as many as the machine has")


def _check_ids(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> None:
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"ranks lack {len(missing)} of the 256 bytes, the first is {bytes(missing[:1])!r}")
    owner: dict[int, bytes | str] = {}
    for kind, names in ((bytes, ranks), (str, special)):
        for token, id in names.items():
            if not (isinstance(token, kind) and token):
                raise ValueError(f"token {token!r}: expected {kind.__name__} that is not empty")
            if not (isinstance(id, int | np.integer) and not isinstance(id, bool) and 0 <= id < LARGEST_ID):
                raise ValueError(f"token {token!r} has id {id!r}: expected a whole number from 0 to {LARGEST_ID - 1}")
            if id in owner:
                raise ValueError(f"tokens {owner[id]!r} and {token!r} both have id {id}: expected one token an id")
            owner[id] = token
    for name in special:
        if _as_bytes(name) in ranks:
            raise ValueError(f"special token {name!r} is an ordinary token too, with id {ranks[name.encode()]}")


def _checked_merges(merges: Sequence[Pair], ranks: Mapping[bytes, int]) -> list[Pair]:
    seen: dict[Pair, int] = {}
    for number, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in ranks:
                raise ValueError(f"merge {number} of {left!r} and {right!r}: {token!r} is not in the vocabulary")
        if (left, right) in seen:
            raise ValueError(f"merge {number} of {left!r} and {right!r} is merge {seen[left, right]} already")
        seen[left, right] = number
    return list(seen)
