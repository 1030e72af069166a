"""Tokenizer files: tokenizer.json (Hugging Face), .tiktoken, and the folder of vocab.json and merges.txt (GPT-2).

Reading gives `Parts`, the arguments of Tokenizer; writing takes a Tokenizer. In tokenizer.json and vocab.json a token
is written with one visible character for each byte. Refused, with the file and the field: anything that is not
byte-level BPE (SentencePiece-like models, Metaspace, byte fallback), normalisers other than NFC, a prefix space,
several splitting patterns, added tokens that swallow whitespace. What a post-processor adds (a first token, say) is
left to the caller.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.log import atomic_write
from minigpt.bpe import BYTE_ORDER, VISIBLE, Pair, all_merges
from minigpt.splitting import CL100K, GPT2, STYLES

CL100K_TOKENS = 100_256
CL100K_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What a file says; the fields are the arguments of Tokenizer."""

    ranks: dict[bytes, int]
    pattern: str
    special: dict[str, int]
    merges: list[Pair] | None = None
    ignore_merges: bool = False
    normalizer: str | None = None


@lru_cache(maxsize=1)
def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte: itself where Latin-1 shows it, else U+0100, U+0101, ... in order."""
    characters = {byte: chr(byte) for byte in VISIBLE}
    hidden = BYTE_ORDER[len(VISIBLE) :]
    return tuple(characters.get(byte) or chr(0x100 + hidden.index(byte)) for byte in range(256))


def characters_of(token: bytes) -> str:
    return "".join(map(byte_characters().__getitem__, token))


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def token_of(characters: str) -> bytes:
    """ValueError for a character that stands for no byte."""
    try:
        return bytes(map(_byte_of().__getitem__, characters))
    except KeyError as error:
        raise ValueError(f"token {characters!r} holds {error}, which stands for no byte: not byte-level BPE") from None


# -- reading --
def read(path: Path, pattern: str | None, special: Mapping[str, int] | None) -> Parts:
    """The parts in a file or folder. Raises ValueError naming the file and its line or field."""
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            path = path / "tokenizer.json"
        elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
            return _read_folder(path, pattern or GPT2, special)
        else:
            raise ValueError(f"{path}: expected tokenizer.json, or vocab.json and merges.txt, in this folder")
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist: expected tokenizer.json, *.tiktoken, or a folder")
    if path.suffix == ".tiktoken":
        return _read_tiktoken(path, pattern or CL100K, special)
    if pattern is not None or special is not None:
        raise ValueError(f"{path}: its pattern and special tokens stand in it, expected none beside it")
    return _JsonReader(path).parts()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: expected JSON, {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_tiktoken(path: Path, pattern: str, special: Mapping[str, int] | None) -> Parts:
    """One line a token: base64 of its bytes, a space, its id."""
    ranks: dict[bytes, int] = {}
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        lines = data.count(b"\n") + 1
        raise ValueError(f"{path}: line {lines} is cut off: expected a line end")
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}: line {number} is {line[:80]!r}: expected base64, a space, an id") from None
        if token in ranks:
            raise ValueError(f"{path}: line {number}: token {token!r} has id {ranks[token]} already, got {value}")
        ranks[token] = value
    if special is None and len(ranks) != CL100K_TOKENS:
        raise ValueError(
            f"{path}: {len(ranks)} tokens: expected cl100k_base's {CL100K_TOKENS}, or the special tokens as an argument"
        )
    return Parts(ranks, pattern, dict(CL100K_SPECIAL if special is None else special))


def _read_folder(folder: Path, pattern: str, special: Mapping[str, int] | None) -> Parts:
    """In vocab.json the special tokens stand among the others: they are those written <...> that nothing merges to."""
    path = folder / "merges.txt"
    merges = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, {error}") from None
    for number, line in enumerate(lines, start=1):
        if (number == 1 and line.startswith("#version")) or (number == len(lines) and not line):
            continue
        merges.append(_pair(line.rstrip("\r"), f"{path}: line {number}"))
    vocab = _vocab(_read_json(folder / "vocab.json"), f"{folder / 'vocab.json'}")
    if special is None:
        made = {*byte_characters(), *(characters_of(left + right) for left, right in merges)}
        special = {name: id for name, id in vocab.items() if name not in made and name[0] + name[-1] == "<>"}
    ranks = {token_of(name): id for name, id in vocab.items() if name not in special}
    return Parts(ranks, pattern, dict(special), merges)


def _pair(entry: Any, where: str) -> Pair:
    """A merge, written "a b" or ["a", "b"]."""
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts)):
        raise ValueError(f"{where} is {entry!r}: expected a merge of two tokens")
    try:
        return token_of(parts[0]), token_of(parts[1])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _vocab(vocab: Any, where: str) -> dict[str, int]:
    if not isinstance(vocab, dict):
        raise ValueError(f"{where}: expected an object of tokens and ids, got {vocab!r:.80}")
    for name, id in vocab.items():
        if not (isinstance(id, int) and not isinstance(id, bool) and name):
            raise ValueError(f"{where}: token {name!r} has id {id!r}: expected characters and a whole number")
    return vocab


class _JsonReader:
    """tokenizer.json, field by field; each error names the field."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, _read_json(path)

    def parts(self) -> Parts:
        model = self.content.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise self.error("model", model, "an object with vocab and merges")
        if model.get("type", "BPE") != "BPE":
            raise self.error("model.type", model["type"], "'BPE'")
        if model.get("byte_fallback"):
            raise self.error("model.byte_fallback", True, "byte-level BPE; this is a SentencePiece-like model")
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(field):
                raise self.error(f"model.{field}", model[field], "none")
        pattern, normalizer = self.pattern(self.content.get("pre_tokenizer")), self.normalizer()
        merges = model.get("merges")
        if not isinstance(merges, list):
            raise self.error("model.merges", merges, "a list")
        pairs = [_pair(entry, f"{self.path}: model.merges[{i}]") for i, entry in enumerate(merges)]
        vocab = _vocab(model["vocab"], f"{self.path}: model.vocab")
        special = self.special(vocab)
        try:
            ranks = {token_of(name): id for name, id in vocab.items() if name not in special}
        except ValueError as error:
            raise ValueError(f"{self.path}: model.vocab: {error}") from None
        return Parts(ranks, pattern, special, pairs, bool(model.get("ignore_merges")), normalizer)

    def error(self, field: str, got: Any, expected: str) -> ValueError:
        return ValueError(f"{self.path}: {field} is {got!r:.200}: expected {expected}")

    def pattern(self, pre: Any) -> str:
        kind = pre.get("type") if isinstance(pre, dict) else None
        if kind == "Sequence":
            steps = pre.get("pretokenizers")
            if isinstance(steps, list) and len(steps) == 2 and all(isinstance(step, dict) for step in steps):
                self.byte_level(steps[1], use_regex=False)
                return self.split(steps[0])
        if kind == "ByteLevel":
            self.byte_level(pre, use_regex=True)
            return GPT2
        named = {"Metaspace": "byte-level BPE; this is a SentencePiece-like model"}
        raise self.error("pre_tokenizer", pre, named.get(kind, "ByteLevel, or Split and then ByteLevel"))

    def byte_level(self, step: dict[str, Any], use_regex: bool) -> None:
        if step.get("type") != "ByteLevel" or step.get("use_regex", True) != use_regex:
            raise self.error("pre_tokenizer", step, f"ByteLevel with use_regex {str(use_regex).lower()}")
        if step.get("add_prefix_space", True):
            raise self.error("pre_tokenizer.add_prefix_space", True, "false")

    def split(self, step: dict[str, Any]) -> str:
        pattern = step.get("pattern")
        pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
        if step.get("type") != "Split" or not isinstance(pattern, str):
            raise self.error("pre_tokenizer", step, "Split with a pattern of Regex")
        how = (step.get("behavior"), bool(step.get("invert")))
        # Removing what does not match is keeping what does, where the pattern leaves nothing out.
        if how != ("Isolated", False) and not (how == ("Removed", True) and pattern in STYLES):
            raise self.error("pre_tokenizer.behavior", step, "Isolated, not inverted")
        return pattern

    def normalizer(self) -> str | None:
        normalizer = self.content.get("normalizer")
        if normalizer in (None, {"type": "Sequence", "normalizers": []}):
            return None
        if normalizer != {"type": "NFC"}:
            raise self.error("normalizer", normalizer, "null or NFC")
        return "NFC"

    def special(self, vocab: dict[str, int]) -> dict[str, int]:
        special: dict[str, int] = {}
        for i, token in enumerate(self.content.get("added_tokens") or []):
            field = f"added_tokens[{i}]"
            if not (isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]):
                raise self.error(field, token, "an object with content and id")
            name, id = token["content"], token.get("id")
            if not isinstance(id, int) or isinstance(id, bool):
                raise self.error(f"{field}.id", id, "a whole number")
            if vocab.get(name, id) != id or special.get(name, id) != id:
                raise self.error(f"{field}.id", id, f"{vocab.get(name, special.get(name))}, as before for {name!r}")
            for flag in ("lstrip", "rstrip", "single_word"):
                if token.get(flag):
                    raise self.error(f"{field}.{flag}", True, "false")
            special[name] = id
        return special


# -- writing --
def write_json(tokenizer: Any, path: Path) -> None:
    """tokenizer.json as `tokenizers` writes it. Special tokens stand in the vocabulary too, which fixes their ids."""
    merges, ignore_merges = tokenizer.listed_merges(), tokenizer.ignore_merges
    if merges is None:  # not a vocabulary that BPE trains: list every pair, and take whole tokens first
        merges, ignore_merges = all_merges(tokenizer.ranks), True
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    pre = byte_level | {"use_regex": True}
    if tokenizer.pattern != GPT2:
        split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
        pre = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges}
    model |= {"vocab": _vocabulary(tokenizer), "merges": [list(map(characters_of, pair)) for pair in merges]}
    by_id = sorted(tokenizer.special.items(), key=lambda item: item[1])
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **plain} for name, id in by_id],
        "normalizer": {"type": tokenizer.normalizer} if tokenizer.normalizer else None,
        "pre_tokenizer": pre,
        "post_processor": byte_level | {"use_regex": False},
        "decoder": byte_level | {"use_regex": False},
        "model": model,
    }
    atomic_write(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Every token, written in visible characters, and the specials as they are, by id."""
    ordinary = {characters_of(token): id for token, id in tokenizer.ranks.items()}
    if clash := ordinary.keys() & tokenizer.special.keys():
        raise ValueError(
            f"special token {min(clash)!r} cannot be written: an ordinary token is spelled so in this format"
        )
    return dict(sorted((ordinary | dict(tokenizer.special)).items(), key=lambda item: item[1]))


def write_tiktoken(tokenizer: Any, path: Path) -> None:
    """A .tiktoken file; pattern and special tokens are not in it. ValueError where the ranks do not say it all."""
    if tokenizer.merges is not None or tokenizer.normalizer:
        raise ValueError(f"{path}: this format holds no {'merges' if tokenizer.merges else 'normalizer'}: use save")
    by_id = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    atomic_write(path, b"".join(base64.b64encode(token) + b" %d\n" % id for token, id in by_id))


def write_vocab_merges(tokenizer: Any, folder: Path) -> None:
    """vocab.json and merges.txt in `folder`. ValueError for what they cannot say: another pattern than GPT-2's, NFC,
    ranks without merges, special tokens that are not written <...>."""
    merges = tokenizer.listed_merges()
    unable = {"a pattern but GPT-2's": tokenizer.pattern != GPT2, "a normalizer": tokenizer.normalizer is not None}
    unable |= {"ranks that no merges give": merges is None, "ignore_merges": tokenizer.ignore_merges}
    unable |= {f"special token {name!r}": name[0] + name[-1] != "<>" for name in tokenizer.special}
    if found := [what for what, true in unable.items() if true]:
        raise ValueError(f"{folder}: vocab.json and merges.txt cannot hold {found[0]}: use save")
    lines = ["#version: 0.2", *(" ".join(map(characters_of, pair)) for pair in merges)]
    atomic_write(folder / "vocab.json", json.dumps(_vocabulary(tokenizer), ensure_ascii=False) + "\n")
    atomic_write(folder / "merges.txt", "\n".join(lines) + "\n")
