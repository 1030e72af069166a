"""Tokenizer files: what is written is read back the same, the formats of published models are read, and a broken file
is refused with its name and the line or field."""

import base64
import copy
import json

import pytest

from minigpt import tokenizer_files
from minigpt.splitting import CL100K, GPT2, GPT4, QWEN2
from minigpt.tokenizer import Tokenizer
from minigpt.tokenizer_files import byte_characters, characters_of, token_of
from tests.minigpt.tokenizer_texts import ENGINES, PATTERNS, random_text, trained

BYTES = {bytes([byte]): byte for byte in range(256)}
TEXT = random_text(1) + "<|end|>of hello<|endoftext|>\n\n" + random_text(2)


def same(ours: Tokenizer, theirs: Tokenizer) -> bool:
    ids = [tokenizer.encode(TEXT, allowed_special="all").tolist() for tokenizer in (ours, theirs)]
    return ids[0] == ids[1] and ours.digest == theirs.digest


def test_the_byte_alphabet_is_gpt2s():
    characters = byte_characters()
    assert len(set(characters)) == 256 and characters_of(b" \n\x00\xad") == "ĠĊĀŃ"
    assert characters_of(b"A~\xa1\xff") == "A~¡ÿ"
    assert token_of(characters_of(bytes(range(256)))) == bytes(range(256))


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("pattern", [*PATTERNS.values(), r"\w+|\W"], ids=[*PATTERNS, "other"])
def test_json_round_trip(pattern, native, tmp_path):
    ours = Tokenizer(trained().ranks, pattern, trained().special, native=native)
    ours.save(tmp_path / "new" / "tokenizer.json")
    for path in (tmp_path / "new" / "tokenizer.json", tmp_path / "new"):
        again = Tokenizer.load(path, native=native)
        assert same(ours, again) and again.pattern == pattern and again.merges is None


def test_tiktoken_round_trip(tmp_path):
    ours = trained(CL100K)
    ours.save_tiktoken(tmp_path / "a.tiktoken")
    assert same(ours, Tokenizer.load(tmp_path / "a.tiktoken", special=ours.special))
    with pytest.raises(ValueError, match=r"a\.tiktoken: 1496 tokens: expected cl100k_base's 100256, or the special"):
        Tokenizer.load(tmp_path / "a.tiktoken")
    again = Tokenizer.load(tmp_path / "a.tiktoken", special={}, pattern=GPT2)
    assert again.pattern == GPT2 and not again.special


def test_tiktoken_defaults_are_cl100ks(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "CL100K_TOKENS", 256)
    Tokenizer(BYTES, CL100K, {}).save_tiktoken(tmp_path / "a.tiktoken")
    again = Tokenizer.load(tmp_path / "a.tiktoken")
    assert again.pattern == CL100K and again.separator == 100257 and again.vocab_size == 100277


def test_vocab_and_merges_round_trip(tmp_path):
    ours = Tokenizer.train([TEXT * 3], 400, pattern=GPT2)
    ours.save_vocab_merges(tmp_path)
    assert same(ours, Tokenizer.load(tmp_path))
    with pytest.raises(ValueError, match="vocab.json and merges.txt cannot hold a pattern but GPT-2's"):
        trained(GPT4).save_vocab_merges(tmp_path)


def test_permuted_ids_as_in_gpt2(tmp_path):
    """GPT-2 numbers the bytes by its alphabet and puts its special token last, in vocab.json itself."""
    order = {characters_of(bytes([byte])): i for i, byte in enumerate(tokenizer_files.BYTE_ORDER)}
    vocab = order | {"he": 256, "ll": 257, "Ġhe": 258, "<|endoftext|>": 259}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nĠ he\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pattern == GPT2 and dict(tokenizer.special) == {"<|endoftext|>": 259}
    assert tokenizer.encode("he hell!").tolist() == [256, 258, 257, 0] and tokenizer.merges is None


def test_ranks_that_no_training_gives_are_written_as_llama_3_does(tmp_path):
    """`abcd` has no pair: it is a token only as a whole."""
    ours = Tokenizer(BYTES | {b"ab": 256, b"bc": 257, b"abcd": 258}, GPT4, {"<|end_of_text|>": 259})
    assert ours.listed_merges() is None and ours.separator == 259
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    assert again.ignore_merges and same(ours, again)
    for tokenizer in (ours, again):
        assert tokenizer.encode("abcd xabcd").tolist() == [258, 32, 120, 256, 99, 100]
    with pytest.raises(ValueError, match="cannot hold ranks that no merges give"):
        Tokenizer(ours.ranks, GPT2, {}).save_vocab_merges(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    trained().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="special token 'Ġa' cannot be written: an ordinary token is spelled so"):
        Tokenizer(BYTES | {b" a": 256}, GPT4, {"Ġa": 257}).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


# -- the variants of tokenizer.json --
def content() -> dict:
    """A tokenizer.json like Qwen's: bytes, two merges, specials outside the vocabulary, one not marked special."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())} | {"he": 256, "Ġhe": 257}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 258, "content": "<|endoftext|>", "special": True, **flags},
            {"id": 259, "content": "<tool_call>", "special": False, **flags},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "byte_fallback": False, "vocab": vocab, "merges": ["h e", "Ġ he"]},
    }


def load(tmp_path, edit=lambda c: None) -> Tokenizer:
    changed = copy.deepcopy(content())
    edit(changed)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed))
    return Tokenizer.load(path)


def test_qwens_variant(tmp_path):
    tokenizer = load(tmp_path)
    assert tokenizer.pattern == QWEN2 and tokenizer.normalizer == "NFC" and tokenizer.vocab_size == 260
    ids = tokenizer.encode("he he<tool_call>12", allowed_special="all").tolist()
    assert ids == [256, 257, 259, 49, 50]


def test_merges_as_strings_or_as_pairs(tmp_path):
    as_pairs = load(tmp_path, lambda c: c["model"].update(merges=[["h", "e"], ["Ġ", "he"]]))
    assert as_pairs.digest == load(tmp_path).digest


def test_gpt2s_and_llama_3s_variants(tmp_path):
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}  # use_regex is true where it lacks
    tokenizer = load(tmp_path, lambda c: c.update(pre_tokenizer=gpt2, normalizer=None))
    assert tokenizer.pattern == GPT2 and tokenizer.normalizer is None

    def llama(c):
        c["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = GPT4
        c["model"].update(ignore_merges=True, merges=["Ġ he", "h e"])  # an order that the ids do not have

    tokenizer = load(tmp_path, llama)
    assert tokenizer.pattern == GPT4 and tokenizer.ignore_merges
    assert tokenizer.merges == ((b" ", b"he"), (b"h", b"e"))


def test_removing_the_rest_is_keeping_what_matches(tmp_path):
    def edit(c):
        c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed", invert=True)

    assert load(tmp_path, edit).digest == load(tmp_path).digest


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c["model"].update(byte_fallback=True), "model.byte_fallback is True: .* a SentencePiece-like model"),
        (lambda c: c.update(pre_tokenizer=METASPACE), "pre_tokenizer is .*Metaspace.* a SentencePiece-like model"),
        (
            lambda c: c.update(pre_tokenizer=None),
            "pre_tokenizer is None: expected ByteLevel, or Split and then ByteLevel",
        ),
        (lambda c: c["model"].update(type="Unigram"), "model.type is 'Unigram': expected 'BPE'"),
        (lambda c: c["model"].update(dropout=0.1), "model.dropout is 0.1: expected none"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix is '</w>': expected none"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "normalizer is {'type': 'NFKC'}: expected null or NFC"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "add_prefix_space is True"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "ByteLevel with use_regex false"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"), "expected Isolated"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "}), "a pattern of Regex"),
        (
            lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("),
            "expected a regular expression",
        ),
        (lambda c: c["pre_tokenizer"]["pretokenizers"].append({"type": "Digits"}), "Split and then ByteLevel"),
        (lambda c: c["added_tokens"][0].update(lstrip=True), r"added_tokens\[0\].lstrip is True: expected false"),
        (lambda c: c["added_tokens"][1].update(id=258), "'<|endoftext|>' and '<tool_call>' both have id 258"),
        (lambda c: c["added_tokens"][1].update(id="x"), r"added_tokens\[1\].id is 'x': expected a whole number"),
        (lambda c: c["added_tokens"][0].update(content="he"), r"added_tokens\[0\].id is 258: expected 256, as before"),
        (lambda c: c["added_tokens"].append(3), r"added_tokens\[2\] is 3: expected an object"),
        (lambda c: c["model"].update(merges=["h e", "h e"]), "merge 1 of b'h' and b'e' is merge 0 already"),
        (
            lambda c: c["model"].update(merges=["h e", "l l"]),
            "merge 1 of b'l' and b'l': b'll' is not in the vocabulary",
        ),
        (lambda c: c["model"].update(merges=["h e", "Ġh e"]), "merge 1 .*: b' h' is not in the vocabulary"),
        (
            lambda c: c["model"].update(merges=["h e", "he"]),
            r"model.merges\[1\] is 'he': expected a merge of two tokens",
        ),
        (lambda c: c["model"].update(merges=["h e", ["a"]]), r"model.merges\[1\] is \['a'\]: expected a merge"),
        (
            lambda c: c["model"].update(merges=["h e", "▁ a"]),
            r"model.merges\[1\]: token '▁' holds '▁', which stands for no",
        ),
        (lambda c: c["model"].update(merges=None), "model.merges is None: expected a list"),
        (
            lambda c: c["model"]["vocab"].update({"▁a": 300}),
            "model.vocab: token '▁a' holds '▁', which stands for no byte",
        ),
        (lambda c: c["model"]["vocab"].update({"x": "1"}), "model.vocab: token 'x' has id '1': expected"),
        (lambda c: c["model"]["vocab"].pop("A"), "ranks lack 1 of the 256 bytes, the first is b'A'"),
        (lambda c: c["model"]["vocab"].update(he=5), "have id 5: expected one token an id"),
        (lambda c: c["model"].pop("vocab"), "model is .*: expected an object with vocab and merges"),
        (lambda c: c.pop("model"), "model is None: expected an object with vocab and merges"),
    ],
)
def test_bad_json_is_refused(edit, message, tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}"):
        load(tmp_path, edit)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("tokenizer.json", b'{"model": {', "tokenizer.json: expected JSON"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: expected JSON"),
        ("tokenizer.json", b"[]", "tokenizer.json: expected a JSON object, got list"),
        ("a.tiktoken", b"QQ== 0\nQg== 1", "a.tiktoken: line 2 is cut off: expected a line end"),
        ("a.tiktoken", b"QQ== 0\nQg==\n", "a.tiktoken: line 2 is b'Qg==': expected base64, a space, an id"),
        ("a.tiktoken", b"QQ== 0\nQg== x\n", "a.tiktoken: line 2 is b'Qg== x': expected"),
        ("a.tiktoken", b"Q 0\n", "a.tiktoken: line 1 is b'Q 0': expected"),
        ("a.tiktoken", b"QQ== 0\nQQ== 1\n", "a.tiktoken: line 2: token b'A' has id 0 already, got 1"),
        ("a.tiktoken", b"", "a.tiktoken: 0 tokens: expected"),
    ],
)
def test_broken_files_are_refused(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path / name)


def test_a_tiktoken_file_without_all_bytes_is_refused(tmp_path):
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256) if byte != 65]
    (tmp_path / "a.tiktoken").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="a.tiktoken: ranks lack 1 of the 256 bytes, the first is b'A'"):
        Tokenizer.load(tmp_path / "a.tiktoken", special={})


@pytest.mark.parametrize(
    "merges, vocab, message",
    [
        ("h e\nhe\n", {}, "merges.txt: line 2 is 'he': expected a merge of two tokens"),
        ("h e\n\n\n", {}, "merges.txt: line 2 is '': expected a merge of two tokens"),
        ("h e\nl l\n", {}, "b'll' is not in the vocabulary"),
        ("h e\n", {"x y": 300}, "token 'x y' holds ' ', which stands for no byte"),
        ("h e\n", {"zz": "a"}, "vocab.json: token 'zz' has id 'a'"),
    ],
)
def test_a_broken_folder_is_refused(merges, vocab, message, tmp_path):
    alphabet = {character: byte for byte, character in enumerate(byte_characters())}
    (tmp_path / "merges.txt").write_text(merges)
    (tmp_path / "vocab.json").write_text(json.dumps(alphabet | {"he": 256} | vocab))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="expected tokenizer.json, or vocab.json and merges.txt, in this folder"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist: expected tokenizer.json"):
        Tokenizer.load(tmp_path / "none.json")
    trained().save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="its pattern and special tokens stand in it, expected none beside it"):
        Tokenizer.load(tmp_path / "tokenizer.json", special={})


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    merges = [(b"b", b"c"), (b"a", b"b")]
    listed = Tokenizer(BYTES | {b"ab": 256, b"bc": 257}, GPT2, {}, merges=merges)
    with pytest.raises(ValueError, match="this format holds no merges: use save"):
        listed.save_tiktoken(tmp_path / "a.tiktoken")
    listed.save_vocab_merges(tmp_path)
    assert Tokenizer.load(tmp_path).merges == tuple(merges)
    with pytest.raises(ValueError, match="cannot hold special token 'end': use save"):
        Tokenizer(BYTES, GPT2, {"end": 256}).save_vocab_merges(tmp_path)
    with pytest.raises(ValueError, match="holds no normalizer"):
        Tokenizer(BYTES, GPT2, {}, normalizer="NFC").save_tiktoken(tmp_path / "a.tiktoken")
